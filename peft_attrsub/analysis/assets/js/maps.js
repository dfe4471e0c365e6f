// The layers at a glance: one heat map per attribute, all in one quantity and one colour scale.

const PATTERNS = [
  { name: "at-rank", glyph: "=", ink: "#ffffff", text: "one drop at the rank" },
  { name: "beyond-rank", glyph: ">", ink: "#2b2100", text: "one drop beyond the rank" },
  { name: "two-step", glyph: "2", ink: "#ffffff", text: "two drops or more" },
  { name: "below-rank", glyph: "<", ink: "#06283f", text: "one drop below the rank" },
  { name: "none", glyph: "", ink: "#000000", text: "no drop" },
];
const patternNumber = new Map(PATTERNS.map((pattern, index) => [pattern.name, index]));
const log10 = (value) => (value > 0 ? Math.log10(value) : null);
const ANY = "";

// Every quantity: its name in the chooser, a sentence, the number of a module and attribute, and how it is written.
const QUANTITIES = {
  pattern: {
    name: "pattern of the spectrum",
    text: "Where the singular values of C fall sharply: the rule is at the foot of the page.",
    of: (s) => patternNumber.get(s.pattern) ?? null,
    write: (s) => s.pattern ?? "not known",
  },
  gap: {
    name: "largest drop",
    log: true,
    text: "Factor by which the singular values fall at the largest drop, or the largest fall where none counts as a drop.",
    of: (s) => s.gap,
    write: (s) => `largest drop: factor ${number(s.gap)}`,
    tick: (v) => `×${number(v)}`,
  },
  energy: {
    name: "energy at the dimension in use",
    text: "Share of the sum of squared singular values of C in the directions the basis keeps.",
    of: (s) => s.energy_at_dim,
    write: (s) => `energy: ${percent(s.energy_at_dim)} in ${counted(s.dim, "direction")}`,
    tick: percent,
  },
  captured: {
    name: "captured energy of the adapters",
    text: "Share of the adapters' own squared norm at the dimension in use, mean over those not muted.",
    of: (s) => s.captured_energy,
    write: (s) => `captured energy: ${percent(s.captured_energy)}`,
    tick: percent,
  },
  suggested: {
    name: "suggested dimension",
    text: "Index of the deepest drop; without a drop, where 90 % of the energy is reached.",
    of: (s) => s.suggested_dim,
    write: (s) => `suggested: ${number(s.suggested_dim)}, in use: ${s.dim}`,
    tick: number,
  },
  largest: {
    name: "largest singular value",
    log: true,
    text: "Of C, the weighted mean of the attribute's updates.",
    of: (s) => s.largest,
    write: (s) => `largest singular value: ${number(s.largest)}`,
    tick: number,
  },
  eigenvalue: {
    name: "smallest eigenvalue",
    text: "1 − cos θ of the first principal angle with another attribute: 0 is a shared direction, 1 is orthogonal. Hover shows what random subspaces and mismatched layers have.",
  },
};
const choice = { quantity: "pattern", other: ANY, side: "output" };

// The overlap a cell shows: with the attribute chosen, or the smallest of all that are visible.
function closestOverlap(module, attribute) {
  const others = choice.other === ANY ? shownAttributes().filter((name) => name !== attribute) : [choice.other];
  const found = known(others.map((other) => overlapOf(module, attribute, other, choice.side)));
  return found.reduce((least, o) => (!least || o.smallest < least.smallest ? o : least), null);
}

function overlapLines(overlap) {
  const random = nullOf(overlap);
  const permuted = permutedOf(overlap);
  return [
    `${overlap.attribute} – ${overlap.other}, ${overlap.side} side: ${fixed(overlap.smallest)}`,
    `random subspaces: ${fixed(random.mean)} (${band(random.low, random.high)})`,
    ...(permuted ? [`mismatched layers: ${fixed(permuted.mean)} (${band(permuted.low, permuted.high)})`] : []),
  ];
}

function describeModule(module, attribute) {
  if (choice.quantity === "eigenvalue") {
    const overlap = closestOverlap(module, attribute);
    return {
      value: overlap?.smallest ?? null,
      lines: [module.name, ...(overlap ? overlapLines(overlap) : ["no other attribute here"])],
    };
  }
  const quantity = QUANTITIES[choice.quantity];
  const spectrum = spectrumOf(module, attribute);
  if (!spectrum) return { value: null, lines: [module.name, `${attribute}: not in the basis`] };
  const value = quantity.of(spectrum);
  const known = quantifiable(value);
  const sign = choice.quantity === "pattern" && known ? PATTERNS[value] : {};
  return {
    value: known ? (quantity.log ? log10(value) : value) : null,
    glyph: sign.glyph,
    ink: sign.ink,
    lines: [module.name, `${attribute}: ${known ? quantity.write(spectrum) : "not known"}`],
  };
}

// Colours and their range: over the whole analysis, so that a filter never changes what a colour means.
function scaleFor(name) {
  if (name === "pattern") return { colors: PATTERNS.map((p) => css(p.name)), low: 0, high: PATTERNS.length - 1 };
  if (name === "eigenvalue") return { colors: VIRIDIS, low: 0, high: 1, ticks: ["0 shared", "0.5", "1 orthogonal"] };
  const { of, log, tick } = QUANTITIES[name];
  const values = data.spectra.map(of).filter((v) => quantifiable(v) && (!log || v > 0));
  if (!values.length) return { colors: VIRIDIS, low: 0, high: 1, ticks: [] };
  const ends = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const middle = log ? Math.sqrt(ends[0] * ends[1]) : (ends[0] + ends[1]) / 2;
  const [low, high] = log ? ends.map(log10) : ends;
  return {
    colors: VIRIDIS,
    low,
    high: high > low ? high : low + 1e-9,
    ticks: high > low ? [ends[0], middle, ends[1]].map((v) => tick(v)) : [tick(low)],
  };
}

// Categories need steps, not a ramp: each colour holds from half a number below to half above.
function stepped(scale) {
  if (choice.quantity !== "pattern") return scale;
  return {
    ...scale,
    colors: scale.colors.flatMap((color) => Array(12).fill(color)),
    low: -0.5,
    high: PATTERNS.length - 0.5,
  };
}

function drawLayersLegend(scale) {
  const box = byId("layers-legend");
  if (choice.quantity !== "pattern")
    return box.replaceChildren(...(scale.ticks.length ? [rampKey(scale.colors, scale.ticks)] : []));
  box.replaceChildren(...PATTERNS.map((p, i) => squareKey(`${p.name}: ${p.text}`, scale.colors[i], p.glyph, p.ink)));
}

// What a facet's heading says beside the attribute: the middle of what its cells show.
function facetSummary(modules, attribute) {
  const rows = modules.map((module) => describeModule(module, attribute));
  const values = known(rows.map((row) => row.value));
  if (!values.length) return choice.quantity === "eigenvalue" ? "nothing to compare with" : "not known";
  if (choice.quantity === "eigenvalue") return `median ${fixed(median(values))}`;
  if (choice.quantity === "pattern") {
    const counts = PATTERNS.map((p, i) => [values.filter((v) => v === i).length, p.name]).sort((a, b) => b[0] - a[0]);
    const share = percent(counts[0][0] / values.length);
    const names = counts.filter(([count]) => count === counts[0][0]).map(([, name]) => (name === "none" ? "no drop" : name));
    return names.length > 1 ? `a tie: ${names.join(" and ")}, ${share} each` : `${names[0]} in ${share}`;
  }
  const { log, tick } = QUANTITIES[choice.quantity];
  return `median ${tick(log ? 10 ** median(values) : median(values))}`;
}

const facets = new Map();

function facetOf(attribute) {
  if (!facets.has(attribute)) {
    const dot = make("i", { className: "dot" });
    const summary = make("small");
    const grid = make("div");
    const box = make("div", { className: "map" }, make("h3", {}, make("span", {}, dot, attribute), summary), grid);
    const map = new HeatMap(grid, attribute, (module) => describeModule(module, attribute), chooseModule);
    facets.set(attribute, { box, dot, summary, map });
  }
  return facets.get(attribute);
}

function drawMaps() {
  const quantity = QUANTITIES[choice.quantity];
  const modules = shownModules();
  const shown = modules.length ? shownAttributes() : [];
  const scale = scaleFor(choice.quantity);
  const box = byId("maps");
  byId("quantity-text").textContent = quantity.text;
  for (const element of document.querySelectorAll("#layers .for-eigenvalues"))
    element.hidden = choice.quantity !== "eigenvalue";
  fillSelect(byId("other"), [[ANY, "any (smallest)"], ...shownAttributes().map((name) => [name, name])], choice.other);
  drawLayersLegend(scale);
  const wanted = shown.map((attribute) => facetOf(attribute).box);
  // Facets that stay are not moved, so that one with the focus keeps it.
  if (wanted.length !== box.children.length || wanted.some((facet, i) => facet !== box.children[i]))
    box.replaceChildren(...wanted);
  if (!shown.length)
    return box.replaceChildren(make("p", { className: "empty", text: "Nothing matches the filters." }));
  const grid = gridOf(modules);
  for (const attribute of shown) {
    const facet = facetOf(attribute);
    facet.dot.style.background = attributeColor(attribute);
    facet.summary.textContent = facetSummary(modules, attribute);
    facet.map.draw(grid, stepped(scale));
  }
}

function startMaps() {
  const hasPairs = data.overlaps.length > 0;
  const names = Object.keys(QUANTITIES).filter((name) => name !== "eigenvalue" || hasPairs);
  fillSelect(
    byId("quantity"),
    names.map((name) => [name, QUANTITIES[name].name]),
    choice.quantity,
  );
  const view = addView(byId("maps"), drawMaps);
  for (const [id, name] of [
    ["quantity", "quantity"],
    ["other", "other"],
    ["layers-side", "side"],
  ]) {
    byId(id).addEventListener("change", (event) => {
      choice[name] = event.target.value;
      redraw(view);
    });
  }
}
