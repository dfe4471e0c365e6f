// Largest singular value against depth: a panel per kind, a line per attribute, one logarithmic scale for all.

const panels = new Map();

function panelOf(kind) {
  if (!panels.has(kind)) {
    const chart = make("div", {
      className: "plot",
      role: "img",
      "aria-label": `Largest singular value by depth, ${kind}`,
    });
    panels.set(kind, { box: make("div", {}, make("h3", { text: kind }), chart), chart });
  }
  return panels.get(kind);
}

function depthTraces(modules) {
  return shownAttributes().map((name) => {
    const points = modules.map((m) => ({ m, value: spectrumOf(m, name)?.largest })).filter(({ value }) => value > 0);
    const color = attributeColor(name);
    return {
      type: "scatter",
      mode: points.length > 1 ? "lines+markers" : "markers",
      x: points.map(({ m }) => m.depth),
      y: points.map(({ value }) => value),
      customdata: points.map(({ m }) => m.name),
      line: { color, width: 1.8 },
      marker: { color, symbol: attributeSymbol(name), size: 6 },
      hovertemplate: `${label(name)}, depth %{x}: %{y:.3g}<extra></extra>`,
    };
  });
}

function drawDepth() {
  const modules = shownModules().filter((m) => m.depth !== null);
  const kinds = allKinds.filter((kind) => modules.some((m) => m.kind === kind));
  const left = shownModules().length - modules.length;
  byId("depth-left-out").textContent = left
    ? `${counted(left, "module")} without a depth ${left === 1 ? "is" : "are"} left out.`
    : "";
  byId("depth-legend").replaceChildren(...(kinds.length ? shownAttributes().map(attributeKey) : []));
  const box = byId("depth-facets");
  box.replaceChildren(...kinds.map((kind) => panelOf(kind).box));
  const values = modules
    .flatMap((m) => shownAttributes().map((name) => spectrumOf(m, name)?.largest))
    .filter((v) => v > 0);
  if (!values.length) return box.replaceChildren(make("p", { className: "empty", text: "No layers to show." }));
  const range = [
    Math.log10(values.reduce((a, b) => Math.min(a, b))) - 0.1,
    Math.log10(values.reduce((a, b) => Math.max(a, b))) + 0.1,
  ];
  const span = [Math.min(...modules.map((m) => m.depth)) - 0.7, Math.max(...modules.map((m) => m.depth)) + 0.7];
  for (const kind of kinds) {
    const { chart } = panelOf(kind);
    plot(chart, depthTraces(modules.filter((m) => m.kind === kind)), {
      height: 200,
      margin: { l: 46, r: 6, t: 8, b: 38 },
      xaxis: { title: "depth", range: span, ...wholeTicks(...span) },
      yaxis: { type: "log", range, ...logTicks(...range) },
    });
    if (chart.listening) continue;
    chart.listening = true;
    chart.on("plotly_click", ({ points }) => chooseModule(moduleNamed.get(points[0].customdata)));
  }
}

const startDepth = () => addView(byId("depth"), drawDepth);
