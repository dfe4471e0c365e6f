// A heat map of modules: a column per depth, a row per kind; a cell can be pointed at, walked to and chosen.

const LOOSE_COLUMNS = 24;
const WIDEST_CELL = 72;

// Where every module goes. Those without a depth fill rows of their own, under the rest, in their order.
function gridOf(modules) {
  const columns = [...new Set(known(modules.map((m) => m.depth)))].sort((a, b) => a - b);
  const kinds = [...new Set(modules.filter((m) => m.depth !== null).map((m) => m.kind))];
  const rows = kinds.map((kind) => ({ name: kind, cells: columns.map(() => null) }));
  const column = new Map(columns.map((depth, index) => [depth, index]));
  const row = new Map(kinds.map((kind, index) => [kind, index]));
  const loose = modules.filter((m) => m.depth === null);
  for (const m of modules) if (m.depth !== null) rows[row.get(m.kind)].cells[column.get(m.depth)] = m;
  const width = columns.length || Math.min(LOOSE_COLUMNS, loose.length);
  if (rows.length && loose.length) rows.push({ name: "", cells: columns.map(() => null) });
  for (let at = 0; at < loose.length; at += width) {
    const cells = Array.from({ length: width }, (_, i) => loose[at + i] ?? null);
    rows.push({ name: at ? "" : NO_DEPTH, cells });
  }
  return { columns, rows, width };
}

function gridMargins(grid, width) {
  const longest = Math.max(...grid.rows.map((row) => textWidth(row.name, 12)));
  return { l: Math.min(longest + 10, 0.38 * width), r: 4, t: 4, b: grid.columns.length ? 40 : 8 };
}

// Every how-many-th depth gets a label, so that they never touch.
function tickStep(columns, cellWidth) {
  const room = Math.max(...columns.map((depth) => textWidth(String(depth), 12))) + 8;
  return [1, 2, 4, 5, 6, 8, 10, 12, 16, 20, 25, 50, 100].find((step) => step * cellWidth >= room) ?? 200;
}

function outline(row, column, color, width) {
  return {
    type: "rect",
    x0: column - 0.5,
    x1: column + 0.5,
    y0: row - 0.5,
    y1: row + 0.5,
    line: { color, width },
    fillcolor: "rgba(0,0,0,0)",
  };
}

// Every map on the page: the module chosen is outlined in all of them.
const maps = [];
const markChosenModule = () => maps.filter(({ box, grid }) => grid && box.isConnected).forEach((map) => map.mark());

class HeatMap {
  // describe(module) gives { value, lines, glyph, ink } of a cell: the number its colour stands for (null: none),
  // what hovering says, and a sign, in a colour of its own, for readers who do not tell the colours apart.
  constructor(box, name, describe, choose) {
    Object.assign(this, { box, name, describe, choose, cursor: null });
    maps.push(this);
    box.className = "grid";
    box.tabIndex = 0;
    box.setAttribute("role", "application");
    box.setAttribute("aria-roledescription", "heat map");
    box.setAttribute("aria-label", `${name}: arrow keys move between modules, Enter shows one`);
    box.addEventListener("keydown", (event) => this.key(event));
    box.addEventListener("focus", () => {
      if (!box.matches(":focus-visible")) return;
      this.cursor ??= this.placeOf(state.module) ?? this.firstCell();
      this.mark();
      this.speak();
    });
    box.addEventListener("blur", () => {
      this.cursor = null;
      this.mark();
    });
  }

  draw(grid, { colors, low, high }) {
    this.grid = grid;
    const { box } = this;
    const margin = gridMargins(grid, box.clientWidth);
    const room = box.clientWidth - margin.l - margin.r;
    const cellWidth = Math.min(WIDEST_CELL, room / grid.width);
    margin.r += room - cellWidth * grid.width;
    const cellHeight = grid.rows.length > 14 ? 18 : 22;
    const cells = grid.rows.map((row) => row.cells.map((m) => m && this.describe(m)));
    const hover = cells.map((row) => row.map((cell) => (cell ? cell.lines.map(label).join("<br>") : "")));
    const glyphs = cellWidth >= 14 && cells.flat().some((cell) => cell?.glyph);
    const step = grid.columns.length ? tickStep(grid.columns, cellWidth) : 1;
    const ticks = grid.columns.map((_, index) => index).filter((index) => grid.columns[index] % step === 0);
    const colorscale =
      colors.length === 1
        ? [
            [0, colors[0]],
            [1, colors[0]],
          ]
        : scaleOf(colors);
    const gap = cellWidth < 8 ? 0.5 : 1.5;
    // Modules without this number keep a quiet cell that can still be chosen.
    const common = {
      type: "heatmap",
      hoverongaps: false,
      xgap: gap,
      ygap: gap,
      showscale: false,
      text: hover,
      hovertemplate: "%{text}<extra></extra>",
    };
    const missing = cells.map((row) => row.map((cell) => (cell && cell.value === null ? 0 : null)));
    const traces = [
      { ...common, z: cells.map((row) => row.map((cell) => cell?.value ?? null)), zmin: low, zmax: high, colorscale },
    ];
    if (missing.flat().includes(0))
      traces.push({
        ...common,
        z: missing,
        zmin: 0,
        zmax: 1,
        colorscale: [
          [0, css("empty")],
          [1, css("empty")],
        ],
      });
    if (glyphs) traces.push(this.glyphs(cells));
    plot(box, traces, {
      height: grid.rows.length * cellHeight + margin.t + margin.b,
      margin,
      shapes: this.shapes(),
      xaxis: {
        range: [-0.5, grid.width - 0.5],
        showgrid: false,
        tickvals: ticks,
        ticktext: ticks.map((i) => grid.columns[i]),
        title: grid.columns.length ? "depth" : "",
      },
      yaxis: {
        range: [grid.rows.length - 0.5, -0.5],
        showgrid: false,
        tickvals: grid.rows.map((_, i) => i),
        ticktext: grid.rows.map((row) => label(shortened(row.name, margin.l - 8, 12))),
      },
    });
    if (box.listening) return;
    box.listening = true;
    box.on("plotly_click", ({ points }) => this.pick(Math.round(points[0].y), Math.round(points[0].x)));
  }

  // Signs are a trace of text that the pointer passes through.
  glyphs(cells) {
    const signs = cells.flatMap((row, y) =>
      row.flatMap((cell, x) => (cell?.glyph ? [{ x, y, text: label(cell.glyph), color: cell.ink }] : [])),
    );
    return {
      type: "scatter",
      mode: "text",
      hoverinfo: "skip",
      x: signs.map((s) => s.x),
      y: signs.map((s) => s.y),
      text: signs.map((s) => s.text),
      textfont: { size: 11, color: signs.map((s) => s.color) },
    };
  }

  placeOf(module) {
    for (const [row, { cells }] of this.grid.rows.entries()) {
      const column = cells.indexOf(module);
      if (module && column >= 0) return { row, column };
    }
    return null;
  }

  firstCell() {
    const row = this.grid.rows.findIndex(({ cells }) => cells.some(Boolean));
    return { row, column: this.grid.rows[row].cells.findIndex(Boolean) };
  }

  shapes() {
    const chosen = this.placeOf(state.module);
    const shapes = chosen
      ? [outline(chosen.row, chosen.column, css("card"), 4), outline(chosen.row, chosen.column, css("ink"), 2)]
      : [];
    if (this.cursor) shapes.push(outline(this.cursor.row, this.cursor.column, css("accent"), 3.5));
    return shapes;
  }

  mark() {
    if (this.box.listening) Plotly.relayout(this.box, { shapes: this.shapes() });
  }

  speak() {
    const module = this.grid.rows[this.cursor.row].cells[this.cursor.column];
    announce(this.describe(module).lines.join(", "));
  }

  pick(row, column) {
    const module = this.grid.rows[row]?.cells[column];
    if (module) this.choose(module);
  }

  // From the cursor in one direction to the next cell that holds a module; at the edge it stays.
  step(down, right) {
    let { row, column } = this.cursor;
    do {
      row += down;
      column += right;
      if (this.grid.rows[row]?.cells[column]) return { row, column };
    } while (row >= 0 && row < this.grid.rows.length && column >= 0 && column < this.grid.width);
    return this.cursor;
  }

  key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const chosen = event.key === "Enter" || event.key === " ";
    if (!this.grid || (!steps[event.key] && !chosen)) return;
    event.preventDefault();
    this.cursor ??= this.placeOf(state.module) ?? this.firstCell();
    if (chosen) return this.pick(this.cursor.row, this.cursor.column);
    this.cursor = this.step(...steps[event.key]);
    this.mark();
    this.speak();
  }
}
