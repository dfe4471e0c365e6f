// What is shown: the attributes, kinds and depths chosen, and the module and settings the parts share.

const NO_DEPTH = "no depth";
const depths = known(data.modules.map((m) => m.depth));
const depthSpan = depths.length ? [Math.min(...depths), Math.max(...depths)] : null;
const kindChoices = hasLoose ? [...allKinds, NO_DEPTH] : allKinds;

const state = {
  attributes: new Set(allAttributes),
  kinds: new Set(kindChoices),
  depths: depthSpan && [...depthSpan],
  module: null,
};

const shownAttributes = () => allAttributes.filter((name) => state.attributes.has(name));
const shownPairs = () => pairsOf(shownAttributes());

function isShown(module) {
  if (module.depth === null) return state.kinds.has(NO_DEPTH);
  return state.kinds.has(module.kind) && module.depth >= state.depths[0] && module.depth <= state.depths[1];
}
const shownModules = () => data.modules.filter(isShown);
const isFiltered = () => shownModules().length < data.modules.length;

function chips(box, choices, chosen, color) {
  const boxes = choices.map((choice) => {
    const input = make("input", { type: "checkbox", checked: chosen.has(choice), value: choice });
    const text = make("span", { text: choice });
    if (color) text.style.setProperty("--chip", color(choice));
    input.addEventListener("change", () => {
      if (input.checked) chosen.add(choice);
      else chosen.delete(choice);
      byId("filter-kinds").querySelector("button").textContent = state.kinds.size ? "none" : "all";
      filtersChanged();
    });
    return make("label", { className: "chip" }, input, text);
  });
  box.replaceChildren(...boxes);
}

function drawFilters() {
  chips(byId("filter-attributes"), allAttributes, state.attributes, attributeColor);
  chips(byId("filter-kinds"), kindChoices, state.kinds);
  drawAllOrNone();
  byId("filter-depth").hidden = !depthSpan || depthSpan[0] === depthSpan[1];
  if (!depthSpan) return;
  ["depth-from", "depth-to"].forEach((id, end) => {
    const input = byId(id);
    [input.min, input.max] = depthSpan;
    input.value = state.depths[end];
  });
}

// One button for the kinds: with some chosen it clears them, with none it takes them all.
function drawAllOrNone() {
  const button = make("button", { type: "button", text: state.kinds.size ? "none" : "all" });
  button.addEventListener("click", () => {
    if (state.kinds.size) state.kinds.clear();
    else kindChoices.forEach((kind) => state.kinds.add(kind));
    drawFilters();
    filtersChanged();
    byId("filter-kinds").querySelector("button").focus();
  });
  byId("filter-kinds").append(button);
}

// An end that passes the other takes it along; one left empty is where the layers end.
function depthChanged(end) {
  const typed = Math.round(byId(end ? "depth-to" : "depth-from").valueAsNumber);
  const value = Number.isFinite(typed) ? Math.min(depthSpan[1], Math.max(depthSpan[0], typed)) : depthSpan[end];
  state.depths[end] = value;
  state.depths[1 - end] = end ? Math.min(value, state.depths[0]) : Math.max(value, state.depths[1]);
  byId("depth-from").value = state.depths[0];
  byId("depth-to").value = state.depths[1];
  filtersChanged();
}

function resetFilters() {
  allAttributes.forEach((name) => state.attributes.add(name));
  kindChoices.forEach((kind) => state.kinds.add(kind));
  state.depths = depthSpan && [...depthSpan];
  drawFilters();
  filtersChanged();
}

// A filtered-out module cannot stay the chosen one: the middle layer of the first kind takes its place.
function keepModuleShown() {
  const shown = shownModules();
  if (state.module && shown.includes(state.module)) return;
  const alike = shown.filter((m) => m.kind === shown[0].kind);
  state.module = alike[alike.length >> 1] ?? null;
}

function filtersChanged() {
  const shown = shownModules();
  byId("filter-count").textContent = `${shown.length} of ${counted(data.modules.length, "module")}`;
  keepModuleShown();
  refresh();
}

function startFilters() {
  drawFilters();
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filter-reset").addEventListener("click", resetFilters);
  byId("depth-from").addEventListener("change", () => depthChanged(0));
  byId("depth-to").addEventListener("change", () => depthChanged(1));
  filtersChanged();
}
