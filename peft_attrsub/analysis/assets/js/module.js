// One module: the spectra of its attributes, the eigenvalues of its pairs, and its numbers.

let moduleView = null;

// From anywhere on the page: show this module, say so, and bring it into view if it is not.
function chooseModule(module) {
  state.module = module;
  markChosenModule();
  redraw(moduleView);
  announce(`Showing ${module.name}`);
  const panel = byId("module");
  if (panel.getBoundingClientRect().top > innerHeight - 220) {
    panel.scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
  }
}

const indices = (values) => values.map((_, i) => i + 1);

// The directions kept are shaded, the adapters' rank is a dashed line; attributes that differ get one each.
function spectrumShapes(rows) {
  const across = { yref: "paper", y0: 0, y1: 1, layer: "below" };
  const dims = [...new Set(rows.map((s) => s.dim))].filter(Boolean);
  const ranks = [...new Set(known(rows.map((s) => s.rank)))];
  return [
    ...dims.map((dim) => ({
      type: "rect",
      ...across,
      x0: 0,
      x1: dim + 0.5,
      fillcolor: css("null-fill"),
      opacity: 0.8 / dims.length,
      line: { width: 0 },
    })),
    ...ranks.map((rank) => ({
      type: "line",
      ...across,
      x0: rank + 0.5,
      x1: rank + 0.5,
      line: { color: css("soft"), width: 1.5, dash: "dash" },
    })),
  ];
}

function spectrumKeys(rows) {
  const list = (values) => [...new Set(values)].sort((a, b) => a - b).join(", ");
  const ranks = known(rows.map((s) => s.rank));
  return [
    ...(ranks.length ? [lineKey(`adapters' rank (${list(ranks)})`, { color: css("soft"), dash: "4 3" })] : []),
    squareKey(`directions in use (${list(rows.map((s) => s.dim))})`, css("null-fill")),
    ...(rows.some((s) => s.first_singular_values.length)
      ? [lineKey("plain mean (the paper's figure)", { color: css("soft"), dash: "1 3" })]
      : []),
    ...(rows.some((s) => s.drops.length)
      ? [lineKey("drop", { color: css("ink"), symbol: "triangle-down", line: false })]
      : []),
  ];
}

// The plain mean of all adapters, as the paper shows it: what the mining mutes has its full say there.
function firstTrace(spectrum, attribute) {
  const values = aboveRounding(spectrum.first_singular_values);
  return {
    type: "scatter",
    mode: values.length > 1 ? "lines" : "markers",
    x: indices(values),
    y: values,
    opacity: 0.4,
    line: { color: attributeColor(attribute), width: 1.2, dash: "dot" },
    marker: { color: attributeColor(attribute), symbol: "circle-open", size: 6 },
    hovertemplate: `${label(attribute)}, plain mean<br>singular value %{x}: %{y:.3g}<extra></extra>`,
  };
}

// Values under this share of the largest are rounding: on a logarithmic axis they would be most of the picture.
const ROUNDING = 1e-6;
const aboveRounding = (values) => values.map((v) => (v > ROUNDING * values[0] ? v : null));
const longestOf = (rows) => Math.max(1, ...rows.map((s) => known(aboveRounding(s.singular_values)).length));

function spectrumTraces(spectrum, attribute) {
  const color = attributeColor(attribute);
  const values = aboveRounding(spectrum.singular_values);
  const line = {
    type: "scatter",
    mode: values.length > 1 ? "lines+markers" : "markers",
    x: indices(values),
    y: values,
    line: { color, width: 2 },
    marker: { color, symbol: attributeSymbol(attribute), size: 6, maxdisplayed: 14 },
    hovertemplate: `${label(attribute)}<br>singular value %{x}: %{y:.3g}<extra></extra>`,
  };
  const drops = spectrum.drops.filter((drop) => values[drop.index - 1] && values[drop.index]);
  // A drop stands in the middle of its fall: between the value it counts last and the next.
  const marks = {
    type: "scatter",
    mode: "markers",
    x: drops.map((d) => d.index + 0.5),
    y: drops.map((d) => Math.sqrt(values[d.index - 1] * values[d.index])),
    marker: { color, symbol: "triangle-down", size: 11, line: { color: css("card"), width: 1.5 } },
    text: drops.map((d) => `drop after ${d.index}: factor ${number(d.factor)}`),
    hovertemplate: `${label(attribute)}<br>%{text}<extra></extra>`,
  };
  const first = spectrum.first_singular_values.length ? [firstTrace(spectrum, attribute)] : [];
  return [...first, line, ...(drops.length ? [marks] : [])];
}

const spectrumLayout = (longest) => ({
  height: 340,
  margin: { l: 58, r: 10, t: 10, b: 44 },
  xaxis: { title: "index", range: [0.2, longest + 0.8], ...wholeTicks(0, longest) },
  yaxis: { title: "singular value", type: "log", ...logTicks(-60, 20) },
});

function drawSpectrum(module) {
  const shown = shownAttributes().filter((name) => spectrumOf(module, name)?.singular_values.length);
  const rows = shown.map((name) => spectrumOf(module, name));
  byId("spectrum-title").textContent = "Singular values of C";
  byId("spectrum-legend").replaceChildren(...shown.map(attributeKey), ...(rows.length ? spectrumKeys(rows) : []));
  const traces = rows.flatMap((spectrum, i) => spectrumTraces(spectrum, shown[i]));
  plotOrSay(
    byId("spectrum"),
    traces,
    { ...spectrumLayout(longestOf(rows)), shapes: spectrumShapes(rows) },
    "No singular values: the module has no direction here.",
  );
}

// The same kind at every depth, dark to light from first to last: the paper's figure per matrix kind.
function drawAllLayers(module, attribute) {
  const layers = shownModules().filter(
    (m) => m.kind === module.kind && m.depth !== null && spectrumOf(m, attribute)?.singular_values.length,
  );
  const span = [layers[0]?.depth ?? 0, layers.at(-1)?.depth ?? 0];
  byId("spectrum-title").textContent = `Singular values of C: ${attribute}, ${module.kind}, all layers`;
  const rows = layers.map((m) => spectrumOf(m, attribute));
  const ramp = rampKey(lineRamp(), [`depth ${span[0]}`, String(span[1])]);
  byId("spectrum-legend").replaceChildren(
    ...(rows.length ? [ramp, ...spectrumKeys(rows.map((s) => ({ ...s, drops: [], first_singular_values: [] })))] : []),
  );
  const traces = layers.map((m, i) => {
    const color = colorAt(lineRamp(), (m.depth - span[0]) / Math.max(1, span[1] - span[0]));
    const values = aboveRounding(rows[i].singular_values);
    return {
      type: "scatter",
      mode: values.length > 1 ? "lines" : "markers",
      x: indices(values),
      y: values,
      customdata: values.map(() => m.name),
      line: { color, width: m === module ? 3.5 : 1.3 },
      marker: { color },
      hovertemplate: `depth ${m.depth}<br>singular value %{x}: %{y:.3g}<extra></extra>`,
    };
  });
  plotOrSay(
    byId("spectrum"),
    traces,
    { ...spectrumLayout(longestOf(rows)), shapes: spectrumShapes(rows) },
    "No layers of this kind to show.",
  );
}

// A chart, or a sentence where there is nothing to draw.
function plotOrSay(element, traces, layout, sentence) {
  if (traces.length) {
    if (!element.querySelector(".plot-container")) element.replaceChildren();
    return plot(element, traces, layout, { zoomable: true });
  }
  Plotly.purge(element);
  element.replaceChildren(make("p", { className: "empty", text: sentence }));
}

// The 95 % band of random subspaces of the pair's sizes and its mean.
function nullTraces(random) {
  const x = indices(random.mean);
  const edge = { type: "scatter", mode: "lines", x, line: { width: 0 }, hoverinfo: "skip" };
  return [
    { ...edge, y: random.low },
    { ...edge, y: random.high, fill: "tonexty", fillcolor: css("null-fill") },
    {
      type: "scatter",
      mode: "lines",
      x,
      y: random.mean,
      line: { color: css("null"), width: 1.5, dash: "dash" },
      hovertemplate: "random subspaces, mean<br>angle %{x}: %{y:.3f}<extra></extra>",
    },
  ];
}

// The pairs drawn: all of them, or, where they are too many for one chart, those of one attribute.
const MOST_PAIRS = 10;
function chosenPairs() {
  const names = shownAttributes();
  const select = byId("angles-of");
  const many = shownPairs().length > MOST_PAIRS;
  const options = [...(many ? [] : [["", "all pairs"]]), ...names.map((name) => [name, name])];
  byId("angles-of-label").hidden = names.length < 3;
  fillSelect(select, options, select.value);
  return shownPairs().filter((pair) => names.length < 3 || !select.value || pair.includes(select.value));
}

function drawAngles(module) {
  const side = byId("angles-side").value;
  const found = known(chosenPairs().map(([a, b]) => overlapOf(module, a, b, side))).filter(
    (o) => o.eigenvalues.length,
  );
  byId("angles-title").textContent = "Eigenvalues 1 − cos θ";
  const style = (o) => ({
    color: attributeColor(o.attribute),
    symbol: attributeSymbol(o.other),
    markColor: attributeColor(o.other),
  });
  byId("angles-legend").replaceChildren(
    ...found.map((o) => lineKey(`${o.attribute} – ${o.other}`, style(o))),
    ...(found.length
      ? [
          squareKey("random subspaces, 95 %", css("null-fill")),
          lineKey("their mean", { color: css("null"), dash: "4 3" }),
        ]
      : []),
  );
  const most = Math.max(1, ...found.map((o) => o.eigenvalues.length));
  const nulls = [...new Set(found.map((o) => o.null))].flatMap((index) => nullTraces(data.nulls[index]));
  const lines = found.map((o) => ({
    type: "scatter",
    mode: "lines+markers",
    x: indices(o.eigenvalues),
    y: o.eigenvalues,
    line: { color: style(o).color, width: 2 },
    marker: { color: style(o).markColor, symbol: style(o).symbol, size: 7, maxdisplayed: 16 },
    hovertemplate: `${label(`${o.attribute} – ${o.other}`)}<br>angle %{x}: %{y:.3f}<extra></extra>`,
  }));
  plotOrSay(
    byId("angles"),
    [...nulls, ...lines],
    {
      height: 340,
      margin: { l: 46, r: 10, t: 10, b: 44 },
      xaxis: {
        title: "principal angle",
        range: [0.5, most + 0.5],
        ...wholeTicks(0, most),
      },
      yaxis: { title: "0 shared, 1 orthogonal", range: [-0.02, 1.04] },
    },
    "No pair of attributes to compare in this module.",
  );
}

function drawModuleTable(module) {
  const heads = [
    "Attribute",
    "Rank",
    "Dimension",
    "Suggested",
    "Pattern",
    "Largest drop",
    "Energy kept",
    "Captured energy",
    "Largest value",
  ];
  const rows = shownAttributes()
    .map((name) => [name, spectrumOf(module, name)])
    .filter(([, s]) => s)
    .map(([name, s]) => {
      const dot = make("i", { className: "dot" });
      dot.style.background = attributeColor(name);
      const cells = [
        number(s.rank),
        number(s.dim),
        number(s.suggested_dim),
        s.pattern ?? "–",
        s.gap ? `×${number(s.gap)}` : "–",
        percent(s.energy_at_dim),
        percent(s.captured_energy),
        number(s.largest),
      ];
      return make("tr", {}, make("th", { scope: "row" }, dot, name), ...cells.map((text) => make("td", { text })));
    });
  byId("module-table").replaceChildren(
    make(
      "thead",
      {},
      make("tr", {}, ...heads.map((text, i) => make("th", { text, scope: "col", className: i ? "" : "text" }))),
    ),
    make("tbody", {}, ...rows),
  );
}

function drawModule() {
  const { module } = state;
  const shown = shownModules();
  fillSelect(
    byId("module-select"),
    shown.map((m) => [m.name, m.name]),
    module?.name,
  );
  for (const child of byId("module").children)
    if (child.tagName !== "H2" && child.id !== "module-name") child.hidden = !module;
  if (!module) {
    byId("module-name").textContent = "No module matches the filters.";
    return;
  }
  const all = byId("all-layers");
  all.disabled = module.depth === null;
  const together = all.checked && !all.disabled;
  const names = shownAttributes();
  byId("all-layers-of").hidden = !together;
  fillSelect(
    byId("all-layers-attribute"),
    names.map((name) => [name, name]),
    byId("all-layers-attribute").value,
  );
  byId("module-name").textContent = module.name;
  const place = module.depth === null ? "no depth" : `${module.kind}, depth ${module.depth}`;
  byId("module-size").textContent = `${place}; weight ${module.n} × ${module.m} (out × in)`;
  const single = allAttributes.length < 2;
  byId("angles-figure").hidden = single;
  byId("angles-figure").parentElement.classList.toggle("single", single);
  if (together && names.length) drawAllLayers(module, byId("all-layers-attribute").value);
  else drawSpectrum(module);
  if (!single) drawAngles(module);
  drawModuleTable(module);
}

function startModule() {
  moduleView = addView(byId("module"), drawModule);
  byId("module-select").addEventListener("change", (event) => chooseModule(moduleNamed.get(event.target.value)));
  for (const id of ["all-layers", "all-layers-attribute", "angles-of", "angles-side"])
    byId(id).addEventListener("change", () => redraw(moduleView));
}
