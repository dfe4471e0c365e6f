// Starts every part of the page in its order, and draws again when the window or the colour scheme changes.

const RULE_NAMES = {
  drop: "Drop",
  pattern: "Pattern",
  suggested_dim: "Suggested dimension",
  muted: "Muted",
  null: "Random subspaces",
  permutation: "Mismatched layers",
  captured: "Captured energy",
};
byId("rules-list").replaceChildren(
  ...Object.entries(data.rules).flatMap(([name, text]) => [
    make("dt", { text: RULE_NAMES[name] ?? name }),
    make("dd", { text }),
  ]),
);

startMaps();
startModule();
startDepth();
startOverlap();
startAdapters();
startExplained();
startFilters();

dark.addEventListener("change", () => {
  drawFilters();
  refresh();
});

let width = innerWidth;
let waiting = 0;
addEventListener("resize", () => {
  // A phone's address bar changes the height alone: nothing to draw again.
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(() => refresh(), 120);
});
