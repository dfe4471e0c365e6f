// Adapters held against the basis: the share of their norm inside it, beside what a random update would have.

const JOINT = "all together";
const chosenShare = (part, attribute) =>
  attribute === JOINT ? { share: part.joint, expected: part.expected } : part.attributes[attribute];

// Shares over the modules shown, each module counting as much as its part of the squared norm.
function sharesOf(adapter) {
  const names = [...shownAttributes().filter((name) => name in adapter.attributes), JOINT];
  const rows = adapter.modules.filter((row) => moduleNamed.has(row.module) && isShown(moduleNamed.get(row.module)));
  const total = rows.reduce((sum, row) => sum + row.norm, 0);
  const mean = (name, part) => rows.reduce((sum, row) => sum + row.norm * chosenShare(row, name)[part], 0) / total;
  return names.map((name) => {
    if (!isFiltered()) return { name, ...chosenShare(adapter, name) };
    return total
      ? { name, share: mean(name, "share"), expected: mean(name, "expected") }
      : { name, share: null, expected: null };
  });
}

function drawShares(shares) {
  const chart = byId("explained-bars");
  const color = (name) => (name === JOINT ? css("ink") : attributeColor(name));
  const margin = Math.min(0.38 * chart.clientWidth, 18 + Math.max(...shares.map(({ name }) => textWidth(name, 12))));
  const most = Math.max(0.01, ...shares.flatMap((s) => [s.share, s.expected]));
  plot(
    chart,
    [
      {
        type: "bar",
        orientation: "h",
        y: shares.map((_, i) => i),
        x: shares.map((s) => s.share),
        width: 0.6,
        marker: { color: shares.map((s) => color(s.name)) },
        text: shares.map((s) => label(`${s.name}: ${percent(s.share)}`)),
        textposition: "none",
        hovertemplate: "%{text}<extra></extra>",
      },
      {
        type: "scatter",
        mode: "markers",
        y: shares.map((_, i) => i),
        x: shares.map((s) => s.expected),
        marker: { symbol: "diamond", size: 11, color: css("warn"), line: { color: css("card"), width: 1.5 } },
        text: shares.map((s) => `random update: ${percent(s.expected)}`),
        hovertemplate: "%{text}<extra></extra>",
        cliponaxis: false,
      },
    ],
    {
      height: 34 * shares.length + 48,
      margin: { l: margin, r: 12, t: 6, b: 40 },
      bargap: 0.3,
      xaxis: { title: "share of the squared norm", tickformat: ".0~%", range: [0, 1.06 * most], nticks: 6 },
      yaxis: {
        range: [shares.length - 0.5, -0.5],
        showgrid: false,
        ticks: "outside",
        ticklen: 8,
        tickcolor: "rgba(0,0,0,0)",
        tickvals: shares.map((_, i) => i),
        ticktext: shares.map((s) => label(shortened(s.name, margin - 16, 12))),
      },
    },
  );
  byId("explained-legend").replaceChildren(
    squareKey("share inside the basis", css("null")),
    lineKey("expected of a random update", { color: css("warn"), symbol: "diamond", line: false }),
  );
  const heads = ["Subspace", "Share", "Random update", "Ratio"];
  byId("explained-table").replaceChildren(
    make(
      "thead",
      {},
      make("tr", {}, ...heads.map((text, i) => make("th", { text, scope: "col", className: i ? "" : "text" }))),
    ),
    make(
      "tbody",
      {},
      ...shares.map((s) =>
        make(
          "tr",
          {},
          make("th", { text: s.name, scope: "row" }),
          make("td", { text: percent(s.share) }),
          make("td", { text: percent(s.expected) }),
          make("td", { text: s.expected ? `${number(s.share / s.expected, 2)} ×` : "–" }),
        ),
      ),
    ),
  );
}

// A source of the basis is held by it in any case.
const sourceNote = (adapter) => (adapter.source_of.length ? ` (a source of ${adapter.source_of.join(", ")})` : "");

function startExplained() {
  if (!data.explained.length) return;
  const adapterSelect = byId("explained-adapter");
  const attributeSelect = byId("explained-attribute");
  byId("explained").hidden = false;
  fillSelect(
    adapterSelect,
    data.explained.map((adapter, index) => [String(index), adapter.adapter + sourceNote(adapter)]),
    "0",
  );
  const grid = make("div");
  const heading = make("h3");
  const box = make("div", { className: "map" }, heading, grid);
  let rows = new Map();
  const map = new HeatMap(
    grid,
    "explained share",
    (module) => {
      const row = rows.get(module.name);
      if (!row) return { value: null, lines: [module.name, "not in this adapter"] };
      const { share, expected } = chosenShare(row, attributeSelect.value);
      return {
        value: share,
        lines: [module.name, `${attributeSelect.value}: ${percent(share)}`, `random update: ${percent(expected)}`],
      };
    },
    chooseModule,
  );

  const view = addView(byId("explained"), () => {
    const adapter = data.explained[Number(adapterSelect.value)];
    const names = shownAttributes().filter((name) => name in adapter.attributes);
    fillSelect(
      attributeSelect,
      [JOINT, ...names].map((name) => [name, name]),
      attributeSelect.value,
    );
    rows = new Map(adapter.modules.map((row) => [row.module, row]));
    const missing = byId("explained-missing");
    missing.hidden = !adapter.modules_missing.length;
    missing.textContent = `${counted(adapter.modules_missing.length, "module")} of this adapter ${adapter.modules_missing.length === 1 ? "is" : "are"} not in the basis: ${adapter.modules_missing.slice(0, 5).join(", ")}${adapter.modules_missing.length > 5 ? ", …" : ""}.`;
    drawShares(sharesOf(adapter));
    const modules = shownModules();
    const most = Math.max(1e-6, ...adapter.modules.map((row) => chosenShare(row, attributeSelect.value).share));
    heading.textContent = `Share by module: ${attributeSelect.value}`;
    byId("explained-map-legend").replaceChildren(rampKey(VIRIDIS, ["0 %", percent(most / 2), percent(most)]));
    byId("explained-map").replaceChildren(
      modules.length ? box : make("p", { className: "empty", text: "Nothing matches the filters." }),
    );
    if (modules.length) map.draw(gridOf(modules), { colors: VIRIDIS, low: 0, high: most });
  });
  for (const select of [adapterSelect, attributeSelect]) select.addEventListener("change", () => redraw(view));
}
