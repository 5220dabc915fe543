// Paints the KV map and lets it be zoomed. Data: a PNG (owners above, fills below) and a JSON block beside the canvas.
for (const root of document.querySelectorAll(".kvmap")) {
  const spec = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const canvas = root.querySelector("canvas"), output = root.querySelector("output"), image = root.querySelector("img");
  const hint = output.textContent, left = 62, bottom = 42, top = 6, right = 12;
  let owner, fill, picture, view;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  // Maps that are compared have axes of one scale: what a shorter run or a smaller pool leaves stays blank.
  const length = spec.numBlocks * spec.unit;  // of the map itself, in units of the axis down
  const whole = () => ({ x0: 0, x1: spec.axisEnd, y0: 0, y1: spec.axisLength });

  function decode() {
    const scratch = document.createElement("canvas"), cells = spec.rows * spec.columns;
    scratch.width = spec.columns; scratch.height = 2 * spec.rows;
    const context = scratch.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const data = context.getImageData(0, 0, spec.columns, 2 * spec.rows).data;
    owner = new Int32Array(cells); fill = new Uint8Array(cells);
    for (let i = 0; i < cells; i++) {
      owner[i] = ((data[4 * i] << 16) | (data[4 * i + 1] << 8) | data[4 * i + 2]) - spec.firstCode;
      fill[i] = data[4 * (cells + i)];
    }
  }

  function paint() {
    const shades = spec.shades.map(rgb), dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const fixed = {};
    for (const [code, [, color]] of Object.entries(spec.nobody)) fixed[code] = rgb(color[0] === "#" ? color : css(color));
    const back = dark ? 20 : 255;
    picture = document.createElement("canvas"); picture.width = spec.columns; picture.height = spec.rows;
    const context = picture.getContext("2d"), pixels = context.createImageData(spec.columns, spec.rows);
    for (let i = 0; i < owner.length; i++) {
      const color = owner[i] < 0 ? fixed[owner[i]] : shades[spec.requests[owner[i]][1]];
      const keep = owner[i] < 0 ? 1 : 1 - spec.tint * (1 - fill[i] / 255);
      for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = back + (color[c] - back) * keep;
      pixels.data[4 * i + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  }

  function ticks(low, high, most, least) {
    let step = Math.max(least, Math.pow(10, Math.floor(Math.log10((high - low) / most))));
    for (const factor of [1, 2, 5, 10]) if ((high - low) / (step * factor) <= most) { step *= factor; break; }
    const result = [];
    for (let v = Math.ceil(low / step) * step; v <= high + 1e-9 * step; v += step) result.push(+v.toPrecision(12));
    return result;
  }

  function draw() {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio; canvas.height = height * ratio;
    const context = canvas.getContext("2d"), w = width - left - right, h = height - top - bottom;
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    const sx = spec.columns / spec.end, sy = spec.rows / length;
    context.drawImage(picture, view.x0 * sx, view.y0 * sy, (view.x1 - view.x0) * sx, (view.y1 - view.y0) * sy, left, top, w, h);
    context.fillStyle = css("--muted"); context.font = "12px " + getComputedStyle(root).fontFamily;
    context.textAlign = "center"; context.textBaseline = "top";
    for (const t of ticks(view.x0, view.x1, Math.min(8, w / 48), 0)) context.fillText(t, left + (w * (t - view.x0)) / (view.x1 - view.x0), top + h + 6);
    context.fillText(w < 240 ? "time (s)" : "time since the start of the run (s)", left + w / 2, top + h + 24);
    context.textAlign = "right"; context.textBaseline = "middle";
    for (const b of ticks(view.y0, view.y1, Math.min(8, h / 24), 1)) context.fillText(b.toLocaleString("en"), left - 8, top + (h * (b - view.y0)) / (view.y1 - view.y0));
    context.save(); context.translate(11, top + h / 2); context.rotate(-Math.PI / 2);
    context.textAlign = "center"; context.fillText(spec.axisLabel, 0, 0); context.restore();
  }

  function clamp(low, high, most) {
    const size = Math.min(high - low, most), start = Math.min(Math.max(low, 0), most - size);
    return [start, start + size];
  }
  function show(x0, x1, y0, y1) {
    [x0, x1] = clamp(x0, x1, spec.axisEnd); [y0, y1] = clamp(y0, y1, spec.axisLength);
    view = { x0, x1, y0, y1 }; draw();
  }
  function at(event) {
    const box = canvas.getBoundingClientRect();
    const u = (event.clientX - box.left - left) / (box.width - left - right);
    const v = (event.clientY - box.top - top) / (box.height - top - bottom);
    return { u, v, x: view.x0 + u * (view.x1 - view.x0), y: view.y0 + v * (view.y1 - view.y0) };
  }
  function zoom(factor, u, v) {
    const w = Math.max((view.x1 - view.x0) * factor, spec.axisEnd / 500), h = Math.max((view.y1 - view.y0) * factor, 4 * spec.unit);
    const x = view.x0 + u * (view.x1 - view.x0), y = view.y0 + v * (view.y1 - view.y0);
    show(x - u * w, x - u * w + w, y - v * h, y - v * h + h);
  }
  function point(event) {
    const { u, v, x, y } = at(event);
    if (u < 0 || u >= 1 || v < 0 || v >= 1 || x >= spec.end || y >= length) { output.textContent = hint; return; }
    const row = Math.floor((y * spec.rows) / length), column = Math.floor((x * spec.columns) / spec.end);
    const i = row * spec.columns + column, slots = Math.round((fill[i] / 255) * spec.blockSize);
    const who = owner[i] < 0 ? spec.nobody[owner[i]][0]
      : "request " + spec.requests[owner[i]][0] + ", " + slots + " of " + spec.blockSize + " slots filled";
    output.textContent = x.toPrecision(4) + " s, block " + (Math.floor(y / spec.unit) + 1) + ": " + who;
  }

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => { drag = { event, view }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointerleave", () => { output.textContent = hint; });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      const box = canvas.getBoundingClientRect(), old = drag.view;
      const dx = ((drag.event.clientX - event.clientX) / (box.width - left - right)) * (old.x1 - old.x0);
      const dy = ((drag.event.clientY - event.clientY) / (box.height - top - bottom)) * (old.y1 - old.y0);
      show(old.x0 + dx, old.x1 + dx, old.y0 + dy, old.y1 + dy);
    }
    point(event);
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const { u, v } = at(event);
    zoom(event.deltaY < 0 ? 0.8 : 1.25, Math.min(Math.max(u, 0), 1), Math.min(Math.max(v, 0), 1));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => show(0, spec.axisEnd, 0, spec.axisLength));
  for (const button of root.querySelectorAll("button")) {
    const factor = Number(button.dataset.zoom);
    button.addEventListener("click", () => (factor ? zoom(factor, 0.5, 0.5) : show(0, spec.axisEnd, 0, spec.axisLength)));
  }
  const start = () => { decode(); paint(); view = whole(); draw(); new ResizeObserver(draw).observe(canvas); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paint(); draw(); });
  if (image.complete && image.naturalWidth) start(); else image.addEventListener("load", start);
}
