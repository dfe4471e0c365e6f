// The analysis, indexed by module and attribute, and the small helpers every part of the page uses.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const allAttributes = data.basis.attributes;
const attributeIndex = new Map(allAttributes.map((name, index) => [name, index]));
const moduleNamed = new Map(data.modules.map((module) => [module.name, module]));
const allKinds = [...new Set(data.modules.filter((m) => m.depth !== null).map((m) => m.kind))];
const hasLoose = data.modules.some((m) => m.depth === null);

const SEPARATOR = "\u0000";
const keyOf = (...parts) => parts.join(SEPARATOR);
const spectra = new Map(data.spectra.map((s) => [keyOf(s.module, s.attribute), s]));
const overlaps = new Map(data.overlaps.map((o) => [keyOf(o.module, o.attribute, o.other, o.side), o]));

const spectrumOf = (module, attribute) => spectra.get(keyOf(module.name, attribute));

// Attributes of a pair in the order of the basis, as the overlaps are stored.
const inOrder = (a, b) => (attributeIndex.get(a) < attributeIndex.get(b) ? [a, b] : [b, a]);
const overlapOf = (module, a, b, side) => overlaps.get(keyOf(module.name, ...inOrder(a, b), side));
const pairsOf = (names) => names.flatMap((a, i) => names.slice(i + 1).map((b) => inOrder(a, b)));

// What the smallest eigenvalue is compared with: random subspaces, and mismatched layers (null where there are none).
function nullOf(overlap) {
  const all = data.nulls[overlap.null];
  return { mean: all.mean[0], low: all.low[0], high: all.high[0] };
}
const permutedOf = (overlap) => overlap.permuted;

const known = (values) => values.filter((value) => value !== null && value !== undefined);

function median(values) {
  const sorted = known(values).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

// Three digits, as a person writes them; a missing number is a dash.
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replace("e", "·10^").replace("^+", "^");
  return String(Number(value.toPrecision(digits)));
}

function percent(share) {
  if (share === null || share === undefined) return "–";
  let text = String(Math.round(100 * share));
  if (share > 0 && share < 0.01) text = String(Number((100 * share).toPrecision(2)));
  else if (share >= 0.995 && share < 1) text = share > 0.999 ? ">99.9" : (100 * share).toFixed(1);
  return `${text}\u00a0%`;
}

const fixed = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
const band = (low, high) => `${fixed(low)}–${fixed(high)}`;
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const quantifiable = (value) => typeof value === "number" && Number.isFinite(value);

// An element with text and children; text is only ever text.
function make(tag, { text, className, ...properties } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, text })));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

const announce = (text) => {
  byId("live").textContent = text;
};
