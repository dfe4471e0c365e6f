// The adapters each attribute was mined from: how much weight they kept, and which the robust mean muted.

const COLUMNS = [
  { name: "Attribute", key: (a) => attributeIndex.get(a.attribute), text: true },
  { name: "Adapter", key: (a) => a.adapter, text: true },
  { name: "Weight", key: (a) => a.weight_median, note: "median" },
  { name: "Muted in", key: (a) => a.muted_share, note: "of the modules" },
  { name: "Least", key: (a) => a.weight_min, note: "weight" },
  { name: "Most", key: (a) => a.weight_max, note: "weight" },
  { name: "Residual", key: (a) => a.residual_median, note: "median" },
  { name: "Energy", key: (a) => a.energy_median, note: "in the subspace" },
];
const sorting = { column: 0, descending: false };

// An adapter's numbers over the modules shown; over all of them they are as the analysis gives them.
function overShown(adapter, place, modules) {
  const rows = modules.map((m) => spectrumOf(m, adapter.attribute)).filter((s) => s && s.weights.length > place);
  if (!rows.length) return adapter;
  const weights = rows.map((s) => s.weights[place]);
  const muted =
    rows.filter((s) => s.weights[place] < data.limits.muted_weight * median(s.weights)).length / rows.length;
  return {
    ...adapter,
    weight_median: median(weights),
    weight_min: Math.min(...weights),
    weight_max: Math.max(...weights),
    residual_median: median(rows.map((s) => s.residuals[place])),
    energy_median: median(rows.map((s) => s.energies[place])),
    muted_share: muted,
    muted: muted > data.limits.muted_modules,
  };
}

function adapterRows() {
  const modules = shownModules();
  const filtered = isFiltered();
  const places = new Map();
  const rows = data.adapters
    .map((adapter) => {
      const place = places.get(adapter.attribute) ?? 0;
      places.set(adapter.attribute, place + 1);
      return filtered ? overShown(adapter, place, modules) : adapter;
    })
    .filter((adapter) => state.attributes.has(adapter.attribute));
  const { key } = COLUMNS[sorting.column];
  const compare = (a, b) =>
    typeof key(a) === "string" ? key(a).localeCompare(key(b), undefined, { numeric: true }) : key(a) - key(b);
  return rows.sort((a, b) => (sorting.descending ? -1 : 1) * compare(a, b));
}

// Two decimals, so that a column lines up; what they would round to nothing keeps its digits.
const decimals = (value) => (value > 0 && value < 0.01 ? number(value) : fixed(value));

// A path that may break behind its slashes.
const breakable = (path) => path.split(/(?<=\/)/).flatMap((part) => [part, make("wbr")]);

function adapterRow(adapter) {
  const dot = make("i", { className: "dot" });
  dot.style.background = attributeColor(adapter.attribute);
  const muted = make(
    "td",
    {},
    ...(adapter.muted ? [make("span", { className: "badge", text: "muted" }), " "] : []),
    percent(adapter.muted_share),
  );
  const revision = adapter.revision ? [" ", make("small", { text: `@${adapter.revision.slice(0, 10)}` })] : [];
  return make(
    "tr",
    {},
    make("td", { className: "text attribute", title: adapter.attribute }, dot, make("span", { text: adapter.attribute })),
    make("th", { scope: "row" }, ...breakable(adapter.adapter), ...revision),
    make("td", { text: decimals(adapter.weight_median) }),
    muted,
    ...[adapter.weight_min, adapter.weight_max, adapter.residual_median].map((value) =>
      make("td", { text: decimals(value) }),
    ),
    make("td", { text: percent(adapter.energy_median) }),
  );
}

function adapterHead(column, index, view) {
  const button = make("button", { type: "button", text: column.name });
  button.addEventListener("click", () => {
    Object.assign(sorting, { descending: sorting.column === index && !sorting.descending, column: index });
    redraw(view);
    byId("adapters-table").querySelectorAll("th button")[index].focus();
    announce(`Sorted by ${column.name}, ${sorting.descending ? "descending" : "ascending"}`);
  });
  const order = sorting.column !== index ? "none" : sorting.descending ? "descending" : "ascending";
  const note = column.note ? [make("br"), make("small", { text: column.note })] : [];
  return make("th", { scope: "col", className: column.text ? "text" : "", "aria-sort": order }, button, ...note);
}

function startAdapters() {
  const mined = data.adapters.length > 0;
  byId("adapters-text").textContent = mined
    ? `${data.rules.muted} Residual: distance from the shared subspace, relative to the adapter's own norm.`
    : "This basis names no source adapters.";
  byId("adapters-table").parentElement.hidden = !mined;
  if (!mined) return;
  const view = addView(byId("adapters"), () =>
    byId("adapters-table").replaceChildren(
      make("thead", {}, make("tr", {}, ...COLUMNS.map((column, index) => adapterHead(column, index, view)))),
      make("tbody", {}, ...adapterRows().map(adapterRow)),
    ),
  );
}
