"use strict";
(() => {
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const clouds = JSON.parse(document.getElementById("clouds").textContent).map((cloud) => ({
    points: new Int16Array(bytes(cloud.points).buffer),
    colours: bytes(cloud.colours),
    count: cloud.count,
  }));
  const canvases = [...document.querySelectorAll("canvas[data-cloud]")];
  // The same turn for all, so that they are compared from one side.
  const view = { turn: 0.6, tilt: -0.25, zoom: 1 };

  function draw(canvas) {
    const cloud = clouds[Number(canvas.dataset.cloud)];
    const side = Math.round(canvas.clientWidth * Math.min(2, window.devicePixelRatio || 1));
    if (!side) return;
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d");
    const image = context.createImageData(side, side);
    const nearest = new Float32Array(side * side).fill(Infinity);
    const [sin, cos] = [Math.sin(view.turn), Math.cos(view.turn)];
    const [up, level] = [Math.sin(view.tilt), Math.cos(view.tilt)];
    const grain = Math.max(1, Math.round(side / 130));
    for (let i = 0; i < cloud.count; i++) {
      const [x, y, z] = [0, 1, 2].map((axis) => (2 * cloud.points[3 * i + axis]) / 32767);
      const across = cos * x + sin * z;
      const ahead = cos * z - sin * x;
      const down = level * y - up * ahead;
      const away = 4 + up * y + level * ahead;
      if (away < 0.2) continue;
      const scale = (view.zoom * 1.75 * side) / away;
      const left = Math.round(side / 2 + scale * across);
      const top = Math.round(side / 2 + scale * down);
      for (let row = top; row < top + grain; row++) {
        for (let column = left; column < left + grain; column++) {
          if (row < 0 || column < 0 || row >= side || column >= side) continue;
          const place = row * side + column;
          if (away >= nearest[place]) continue;
          nearest[place] = away;
          image.data.set([cloud.colours[3 * i], cloud.colours[3 * i + 1], cloud.colours[3 * i + 2], 255], 4 * place);
        }
      }
    }
    context.putImageData(image, 0, 0);
  }

  let waiting = false;
  function drawAll() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      canvases.forEach(draw);
    });
  }

  function turn(across, down) {
    view.turn += across;
    view.tilt = Math.max(-1.5, Math.min(1.5, view.tilt + down));
    drawAll();
  }

  const keys = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
  for (const canvas of canvases) {
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons) turn(-event.movementX / 120, event.movementY / 120);
    });
    canvas.addEventListener("keydown", (event) => {
      if (!keys[event.key]) return;
      event.preventDefault();
      turn(...keys[event.key]);
    });
  }
  document.getElementById("nearer").addEventListener("click", () => { view.zoom *= 1.25; drawAll(); });
  document.getElementById("farther").addEventListener("click", () => { view.zoom /= 1.25; drawAll(); });
  window.addEventListener("resize", drawAll);
  drawAll();
})();
