// Colours, marks and plotly's common settings; drawing what is near the window, and again when something changed.

// Okabe and Ito's colours, in an order that keeps the first ones apart; lighter ones for a dark page.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b8559a", "#b07d00", "#3b8fc4", "#5b5b5b", "#7a4b1e"];
const DARK = ["#5aaae6", "#f2854a", "#2fc394", "#e09cc6", "#edb93d", "#9fd4f5", "#c3c7cc", "#c99767"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star"];
const PATHS = {
  circle: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
  "circle-open": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0ZM-2.6,0a2.6,2.6 0 1,1 5.2,0a2.6,2.6 0 1,1 -5.2,0Z",
  square: "M-3.5,-3.5H3.5V3.5H-3.5Z",
  diamond: "M0,-4.8L4.8,0L0,4.8L-4.8,0Z",
  "triangle-up": "M0,-4.6L4.4,3.2H-4.4Z",
  cross: "M-1.5,-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
  x: "M-4,-2.2L-2.2,-4L0,-1.8L2.2,-4L4,-2.2L1.8,0L4,2.2L2.2,4L0,1.8L-2.2,4L-4,2.2L-1.8,0Z",
  "triangle-down": "M0,4.6L4.4,-3.2H-4.4Z",
  star: "M0,-5L1.4,-1.7L5,-1.5L2.2,0.8L3.1,4.2L0,2.3L-3.1,4.2L-2.2,0.8L-5,-1.5L-1.4,-1.7Z",
};
const VIRIDIS = [
  "#440154",
  "#482878",
  "#3e4a89",
  "#31688e",
  "#26828e",
  "#1f9e89",
  "#35b779",
  "#6ece58",
  "#b5de2b",
  "#fde725",
];

const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const attributeColor = (name) => (dark.matches ? DARK : LIGHT)[attributeIndex.get(name) % LIGHT.length];
const attributeSymbol = (name) => SYMBOLS[attributeIndex.get(name) % SYMBOLS.length];
// Viridis for lines: without its end that would vanish into the page.
const lineRamp = () => (dark.matches ? VIRIDIS.slice(2) : VIRIDIS.slice(0, 9));
const scaleOf = (colors) => colors.map((color, index) => [index / (colors.length - 1), color]);

// The colour at `share` in [0, 1] of a list of colours.
function colorAt(colors, share) {
  const at = Math.min(1, Math.max(0, share)) * (colors.length - 1);
  const left = Math.min(colors.length - 2, Math.floor(at));
  const channel = (color, i) => parseInt(color.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mix = [0, 1, 2].map((i) =>
    Math.round(channel(colors[left], i) + (at - left) * (channel(colors[left + 1], i) - channel(colors[left], i))),
  );
  return `rgb(${mix.join(",")})`;
}

// Plotly reads <b>, <a href> and entities in every label: names are escaped before it sees them.
const label = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const ruler = document.createElement("canvas").getContext("2d");
function textWidth(text, size) {
  ruler.font = `${size}px system-ui, sans-serif`;
  return ruler.measureText(text).width;
}

// `text` with its middle left out so that it is at most `width` pixels wide.
function shortened(text, width, size) {
  if (textWidth(text, size) <= width) return text;
  let keep = text.length - 1;
  const cut = () => `${text.slice(0, Math.ceil(keep / 2))}…${text.slice(text.length - Math.floor(keep / 2))}`;
  while (keep > 2 && textWidth(cut(), size) > width) keep -= 1;
  return cut();
}

const FONT = "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif";

// Ticks at whole numbers only, about eight over the range.
const wholeTicks = (low, high) => ({
  tick0: 0,
  dtick: [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => (high - low) / step <= 8) ?? 1000,
});

// Ticks of a logarithmic axis from 10^low to 10^high: the closer its ends, the more between the decades.
function logTicks(low, high) {
  const within = high - low < 0.6 ? [1, 1.5, 2, 3, 4, 5, 7] : high - low < 3 ? [1, 2, 5] : [1];
  const powers = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, i) => Math.floor(low) + i);
  const values = powers.flatMap((power) => within.map((digit) => digit * 10 ** power));
  return { tickvals: values, ticktext: values.map((value) => logText(value)) };
}

// 0.02 as it is; what is far from 1 as a power of ten.
function logText(value) {
  const power = Math.floor(Math.log10(value) + 1e-9);
  if (Math.abs(power) < 4) return String(Number(value.toPrecision(2)));
  const digit = Number((value / 10 ** power).toPrecision(2));
  return `${digit === 1 ? "" : `${digit}·`}10<sup>${String(power).replace("-", "−")}</sup>`;
}

function axis(settings = {}) {
  return {
    gridcolor: css("grid"),
    linecolor: css("line"),
    zeroline: false,
    ticks: "",
    automargin: false,
    exponentformat: "power",
    ...settings,
    title: settings.title ? { text: settings.title, standoff: 8, font: { size: 12 } } : undefined,
  };
}

// Draw or redraw a chart in the width its element has; returns plotly's promise.
function plot(element, traces, layout, { zoomable = false } = {}) {
  // A finger on a chart scrolls the page.
  const zoom = zoomable && !touch.matches;
  const { xaxis = {}, yaxis = {}, ...rest } = layout;
  const whole = {
    width: element.clientWidth,
    showlegend: false,
    dragmode: zoom ? "zoom" : false,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FONT, size: 12, color: css("soft") },
    hoverlabel: {
      bgcolor: css("card"),
      bordercolor: css("line"),
      font: { color: css("ink"), size: 12, family: FONT },
      align: "left",
      namelength: -1,
    },
    hovermode: "closest",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("soft"), activecolor: css("accent") },
    ...rest,
    xaxis: axis({ fixedrange: !zoom, ...xaxis }),
    yaxis: axis({ fixedrange: !zoom, ...yaxis }),
  };
  const config = {
    displayModeBar: zoom && element.clientWidth > 420 ? "hover" : false,
    displaylogo: false,
    modeBarButtons: [["zoom2d", "resetScale2d", "toImage"]],
    doubleClick: "reset",
    scrollZoom: false,
  };
  return Plotly.react(element, traces, whole, config);
}

// Keys of a legend: a line with its mark (`color`, `symbol`, `markColor`, `dash`), or a filled square.
function lineKey(text, { color, symbol, markColor = color, dash = "", line = true }) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const shape = (tag, properties) => {
    const part = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(properties)) part.setAttribute(name, value);
    svg.append(part);
  };
  for (const [name, value] of Object.entries({
    width: 26,
    height: 12,
    viewBox: "-13 -6 26 12",
    "aria-hidden": "true",
  }))
    svg.setAttribute(name, value);
  if (line)
    shape("line", { x1: -13, x2: 13, y1: 0, y2: 0, stroke: color, "stroke-width": 2, "stroke-dasharray": dash });
  if (symbol) shape("path", { d: PATHS[symbol], fill: markColor, "fill-rule": "evenodd" });
  return make("span", { className: "key" }, svg, make("span", { text }));
}

function squareKey(text, color, glyph = "", ink = "") {
  const square = make("i", { className: "square", text: glyph, "aria-hidden": "true" });
  square.style.background = color;
  square.style.color = ink;
  square.style.fontStyle = "normal";
  return make("span", { className: "key" }, square, make("span", { text }));
}

function rampKey(colors, ticks) {
  const gradient = make("div", { className: "gradient" });
  gradient.style.background = `linear-gradient(to right, ${colors.join(", ")})`;
  return make(
    "div",
    { className: "ramp" },
    gradient,
    make("div", { className: "ends" }, ...ticks.map((text) => make("span", { text }))),
  );
}

const attributeKey = (name) => lineKey(name, { color: attributeColor(name), symbol: attributeSymbol(name) });

// A view is a part of the page and the function that draws it: when it is near the window and out of date.
const views = [];
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) entry.target.view.near = entry.isIntersecting;
    drawNear();
  },
  { rootMargin: "400px 0px" },
);

function addView(element, draw) {
  const view = { draw, near: false, stale: true };
  element.view = view;
  views.push(view);
  watcher.observe(element);
  return view;
}

function drawNear() {
  for (const view of views) {
    if (view.near && view.stale) redraw(view);
  }
}

// One part, at once: what a control inside it changed.
function redraw(view) {
  view.stale = false;
  view.draw();
}

function refresh() {
  for (const view of views) view.stale = true;
  drawNear();
  whenIdle(drawRest);
}

// What is further away is drawn when there is time, one part at a time, so that the page can be searched and printed.
const whenIdle = (work) => (window.requestIdleCallback ? requestIdleCallback(work) : setTimeout(work, 200));

function drawRest() {
  const view = views.find(({ stale }) => stale);
  if (!view) return;
  redraw(view);
  whenIdle(drawRest);
}
