// Overlap of the attributes: a table of pairs for each side, and every module of every pair as a point.

const SIDES = { output: "Output side (U)", input: "Input side (V)" };

// Medians of a band's mean and ends over modules.
const middleBand = (bands) =>
  Object.fromEntries(["mean", "low", "high"].map((name) => [name, median(bands.map((one) => one[name]))]));

// The numbers of one pair and side over the modules shown.
function pairNumbers(a, b, side, modules) {
  const rows = known(modules.map((module) => overlapOf(module, a, b, side)));
  if (!rows.length) return null;
  const random = rows.map(nullOf);
  const permuted = rows.map(permutedOf).filter(Boolean);
  return {
    rows,
    median: median(rows.map((o) => o.smallest)),
    under: rows.filter((o, i) => o.smallest < random[i].low).length / rows.length,
    random: middleBand(random),
    permuted: permuted.length ? middleBand(permuted) : null,
  };
}

// Smaller than the null means more overlap: said in words, since the direction is easily mistaken.
function comparison(value, { low, high }, what) {
  if (value < low) return `more overlap than ${what}`;
  return value > high ? `less overlap than ${what}` : `overlap like ${what}`;
}

function meter(value, random) {
  const fill = make("i", { className: "fill" });
  fill.style.width = `${100 * value}%`;
  const range = make("i", { className: "band" });
  range.style.left = `${100 * random.low}%`;
  range.style.width = `${Math.max(1, 100 * (random.high - random.low))}%`;
  return make("span", { className: "meter", "aria-hidden": "true" }, fill, range);
}

function pairCell(numbers) {
  if (!numbers) return make("td", { text: "–" });
  const { random, permuted } = numbers;
  return make(
    "td",
    {},
    make("strong", { text: fixed(numbers.median) }),
    meter(numbers.median, random),
    make("small", { className: "verdict", text: comparison(numbers.median, random, "random") }),
    make("small", { text: `random ${fixed(random.mean)} (${band(random.low, random.high)})` }),
    make("small", {
      text: permuted
        ? `mismatched ${fixed(permuted.mean)} (${band(permuted.low, permuted.high)})`
        : "mismatched layers: none",
    }),
    make("small", { text: `under the band in ${percent(numbers.under)}` }),
  );
}

// The lower half of attributes x attributes: the upper one would say the same again.
function overlapTable(side, modules) {
  const names = shownAttributes();
  const heads = ["", ...names.slice(0, -1)].map((text) => (text ? make("th", { text, scope: "col" }) : make("td")));
  const rows = names
    .slice(1)
    .map((b, i) =>
      make(
        "tr",
        {},
        make("th", { text: b, scope: "row" }),
        ...names.slice(0, -1).map((a, j) => (j <= i ? pairCell(pairNumbers(a, b, side, modules)) : make("td"))),
      ),
    );
  const table = make(
    "table",
    { className: "matrix" },
    make("caption", { text: SIDES[side] }),
    make("thead", {}, make("tr", {}, ...heads)),
    make("tbody", {}, ...rows),
  );
  return make(
    "div",
    { className: "scroll", tabIndex: 0, role: "region", "aria-label": `Overlap, ${SIDES[side]}` },
    table,
  );
}

const strips = Object.fromEntries(
  Object.keys(SIDES).map((side) => {
    const chart = make("div", {
      className: "plot",
      role: "img",
      "aria-label": `Smallest eigenvalue of every module, ${SIDES[side]}`,
    });
    return [side, { chart, box: make("figure", {}, make("figcaption", { text: SIDES[side] }), chart) }];
  }),
);

// Every point is marked by its own random band, since modules of different sizes have different ones.
const STANDINGS = [
  { text: "a module under its random band: more overlap", symbol: "circle", of: (o, r) => o.smallest < r.low },
  { text: "inside it", symbol: "circle-open", of: (o, r) => o.smallest >= r.low && o.smallest <= r.high },
  { text: "above it", symbol: "x", of: (o, r) => o.smallest > r.high },
];
const standingColor = (standing) => css(standing === STANDINGS[0] ? "accent" : "soft");

function standingTrace(standing, points) {
  const own = points.filter(({ o }) => standing.of(o, nullOf(o)));
  return {
    type: "scatter",
    mode: "markers",
    x: own.map(({ o }) => o.smallest),
    y: own.map(({ y }) => y),
    customdata: own.map(({ o }) => o.module),
    marker: { color: standingColor(standing), symbol: standing.symbol, size: 5, opacity: 0.6 },
    text: own.map(({ o }) => [o.module, ...overlapLines(o)].map(label).join("<br>")),
    hovertemplate: "%{text}<extra></extra>",
  };
}

// Modules of one size share a random band; of their mismatched layers the median band is drawn.
function bandsBySize(rows) {
  return [...new Set(rows.map((o) => o.null))].map((index) => {
    const permuted = rows.filter((o) => o.null === index && permutedOf(o)).map(permutedOf);
    return { random: nullOf({ null: index }), permuted: permuted.length ? middleBand(permuted) : null };
  });
}

function drawStrip(side, modules) {
  const { chart } = strips[side];
  const found = shownPairs()
    .map(([a, b]) => ({ a, b, ...pairNumbers(a, b, side, modules) }))
    .filter((pair) => pair.rows);
  // Points are spread by the golden ratio: even, and the same each time.
  const spread = (i) => 0.34 * (((i * 0.618034) % 1) - 0.5);
  const points = found.flatMap((pair, y) => pair.rows.map((o, i) => ({ o, y: y + spread(i) })));
  const shape = (y, range, settings) => ({
    type: "rect",
    x0: range.low,
    x1: range.high,
    y0: y - 0.24,
    y1: y + 0.24,
    layer: "below",
    line: { width: 0 },
    ...settings,
  });
  plot(
    chart,
    STANDINGS.map((standing) => standingTrace(standing, points)),
    {
      height: 54 * found.length + 44,
      margin: { l: 8, r: 8, t: 4, b: 40 },
      xaxis: {
        title: "smallest eigenvalue: 0 shared, 1 orthogonal",
        range: [-0.02, 1.02],
        tickvals: [0, 0.25, 0.5, 0.75, 1],
      },
      yaxis: { range: [found.length - 0.6, -0.75], showgrid: false, showticklabels: false },
      shapes: found.flatMap((pair, y) => [
        ...bandsBySize(pair.rows).flatMap(({ random, permuted }) => [
          shape(y, random, { fillcolor: css("null"), opacity: 0.4 }),
          ...(permuted ? [shape(y, permuted, { line: { color: css("soft"), width: 1.5, dash: "dot" } })] : []),
        ]),
        {
          type: "line",
          x0: pair.median,
          x1: pair.median,
          y0: y - 0.28,
          y1: y + 0.28,
          line: { color: css("warn"), width: 3 },
        },
      ]),
      annotations: found.map(({ a, b }, y) => ({
        x: 0,
        xref: "paper",
        xanchor: "left",
        y: y - 0.46,
        yanchor: "middle",
        showarrow: false,
        font: { color: css("ink"), size: 12 },
        text: label(shortened(`${a} – ${b}`, chart.clientWidth - 30, 12)),
      })),
    },
  );
  if (chart.listening) return;
  chart.listening = true;
  chart.on("plotly_click", ({ points: [point] }) => chooseModule(moduleNamed.get(point.customdata)));
}

function drawOverlap() {
  const modules = shownModules();
  const some = shownPairs().some(([a, b]) => modules.some((m) => overlapOf(m, a, b, "output")));
  const tables = byId("overlap-tables");
  for (const element of byId("overlap").children)
    if (!["overlap-tables", "overlap-title"].includes(element.id)) element.hidden = !some;
  if (!some)
    return tables.replaceChildren(make("p", { className: "empty", text: "No pair of attributes to compare." }));
  tables.className = shownAttributes().length > 4 ? "stack" : "tables";
  tables.replaceChildren(...Object.keys(SIDES).map((side) => overlapTable(side, modules)));
  byId("strip-legend").replaceChildren(
    ...STANDINGS.map((standing) =>
      lineKey(standing.text, { color: standingColor(standing), symbol: standing.symbol, line: false }),
    ),
    squareKey("median", css("warn")),
    squareKey("random subspaces, 95 % (one band per size)", css("null")),
    lineKey("mismatched layers, 95 %", { color: css("soft"), dash: "2 2" }),
  );
  byId("overlap-strips").replaceChildren(...Object.values(strips).map(({ box }) => box));
  for (const side of Object.keys(SIDES)) drawStrip(side, modules);
}

const startOverlap = () => addView(byId("overlap"), drawOverlap);
