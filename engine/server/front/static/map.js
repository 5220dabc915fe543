// The KV pool as a grid of blocks. Colours: reports/drawing/style.py and reports/drawing/kv_map.py.
import { element } from "./feed.js";

export const SHADES = ["#0072B2", "#F0B84A", "#7A3B00", "#8CCDF2", "#00664A", "#E8A3CC", "#994400", "#B9D989", "#5B2A4C", "#7FD1B6",
  "#004A75", "#F5D76E", "#D55E00", "#009E73", "#C9B2E8", "#E69F00"];
export const CLASSES = {
  token_states: "token states", reservation: "reservation", internal: "internal fragmentation",
  external: "external fragmentation", shortage: "shortage", cached: "cached prefixes", free: "free",
};
const EXTERNAL = -4, SHARED = -3, CACHED = -2, FREE = -1;
const COLORS = { external: "#CC79A7", shortage: "#56B4E9", cached: "#009E73" };
const TINT = 0.28; // how much of its colour an empty slot keeps
const AXIS = 46, GAP = 1, MAX_CELL = 40;

// A request is never of the colour of cached prefixes.
const OWNERS = SHADES.filter((color) => color !== COLORS.cached);
export const shade = (number) => OWNERS[number % OWNERS.length];
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const count = new Intl.NumberFormat("en");
export const plain = (value) => count.format(value);

function mix(color, back, share) {
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const one = parts(color), other = parts(back);
  return `rgb(${one.map((value, i) => Math.round(value * share + other[i] * (1 - share))).join(" ")})`;
}

function hatch(context, color, ratio) {
  const tile = document.createElement("canvas"), side = Math.round(6 * ratio);
  tile.width = tile.height = side;
  const pen = tile.getContext("2d");
  pen.fillStyle = color; pen.fillRect(0, 0, side, side);
  pen.strokeStyle = css("--paper"); pen.globalAlpha = 0.6; pen.lineWidth = 1.2 * ratio;
  pen.beginPath();
  for (const shift of [-side, 0, side]) { pen.moveTo(shift, 0); pen.lineTo(shift + side, side); }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

export class PoolMap {
  // `root` gets a canvas of at most `height` CSS pixels; with `own`, this page's requests stand out.
  constructor(root, height, own = false) {
    this.root = root; this.height = height; this.own = own; this.frame = null; this.colors = new Map(); this.left = new Set();
    this.canvas = root.querySelector("canvas");
    this.tip = element("div", "tip"); this.tip.hidden = true; root.append(this.tip);
    new ResizeObserver(() => this.paint()).observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.colors.clear(); this.paint(); });
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
  }

  draw(frame) {
    this.frame = frame;
    this.mine = new Set(this.own ? frame.requests.filter((row) => row.mine).map((row) => row.number) : []);
    // What our requests left in the cache, for as long as nobody else has had it since.
    frame.cells.forEach((owner, i) => { if (this.mine.has(owner)) this.left.add(i); else if (owner !== CACHED) this.left.delete(i); });
    this.paint();
  }

  // What a free block is: all of them are of the head of the queue's class, as in the reports.
  freeClass() {
    const { shortage, external, free } = this.frame.classes;
    return shortage ? "shortage" : external && !free ? "external" : "free";
  }

  layout() {
    const { cells } = this.frame, width = this.root.clientWidth - AXIS;
    let columns = 1;
    for (const size of Array.from({ length: MAX_CELL - 1 }, (_, i) => MAX_CELL - i)) {
      columns = Math.max(1, Math.floor(width / size));
      if (columns > 16) columns -= columns % 8; // block numbers at the left are easy to add to
      if (Math.ceil(cells.length / columns) * size <= this.height) break;
    }
    const side = width / columns, rows = Math.ceil(cells.length / columns);
    return { columns, rows, side, tall: Math.min(side, MAX_CELL, Math.max(2, this.height / rows)) };
  }

  paint() {
    if (!this.frame || !this.root.clientWidth) return;
    const { cells, filled, stride } = this.frame, at = this.layout(), ratio = devicePixelRatio || 1;
    const { columns, rows, side, tall } = at, canvas = this.canvas;
    const width = Math.round(this.root.clientWidth * ratio), height = Math.round((rows * tall + 2) * ratio);
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width; canvas.height = height; canvas.style.height = height / ratio + "px";
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const left = hatch(context, css("--accent"), ratio), { mine } = this;
    const fixed = {
      [FREE]: { free: css("--empty"), ...COLORS }[this.freeClass()], [SHARED]: css("--ink"),
      [EXTERNAL]: COLORS.external, [CACHED]: hatch(context, COLORS.cached, ratio),
    };
    const gap = tall > 5 ? GAP : 0, accent = css("--accent"), other = css("--other"), paper = css("--paper");
    for (let i = 0; i < cells.length; i++) {
      const x = AXIS + (i % columns) * side, y = 1 + Math.floor(i / columns) * tall, owner = cells[i];
      const from = Math.round(x * ratio) / ratio, wide = Math.round((x + side) * ratio) / ratio - from - gap;
      if (owner < 0) {
        context.fillStyle = owner === CACHED && this.left.has(i) ? left : fixed[owner];
        context.fillRect(from, y, wide, tall - gap);
        continue;
      }
      const color = !this.own ? shade(owner) : mine.has(owner) ? accent : other, full = filled[i] / 255;
      if (full < 1) {
        context.fillStyle = this.tinted(color, paper);
        context.fillRect(from, y, wide, tall - gap);
      }
      context.fillStyle = color;
      context.fillRect(from, y, wide * full, tall - gap);
    }
    this.drawAxis(context, at, stride);
  }

  tinted(color, paper) {
    const key = color + paper;
    if (!this.colors.has(key)) this.colors.set(key, mix(color, paper, TINT));
    return this.colors.get(key);
  }

  drawAxis(context, { columns, rows, tall }, stride) {
    context.fillStyle = css("--muted"); context.font = "11px " + css("--font");
    context.textAlign = "right"; context.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(22 / tall));
    for (let row = 0; row < rows; row += every) {
      context.fillText(plain(row * columns * stride + 1), AXIS - 8, 1 + row * tall + Math.min(tall, 16) / 2);
    }
  }

  point(event) {
    if (!this.frame) return;
    const { columns, side, tall } = this.layout(), { cells, filled, stride, block_size: size } = this.frame;
    const column = Math.floor((event.offsetX - AXIS) / side), row = Math.floor((event.offsetY - 1) / tall);
    const i = row * columns + column;
    this.tip.hidden = column < 0 || column >= columns || !(i in cells);
    if (this.tip.hidden) return;
    const first = i * stride + 1, last = Math.min(first + stride - 1, this.frame.num_virtual_blocks);
    const where = last > first ? `blocks ${plain(first)} to ${plain(last)}` : `block ${plain(first)}`;
    this.tip.textContent = `${where}: ${this.who(i, Math.round((filled[i] / 255) * size), size)}`;
    const left = Math.min(event.offsetX + 12, this.root.clientWidth - this.tip.offsetWidth);
    this.tip.style.left = Math.max(0, left) + "px";
    this.tip.style.top = event.offsetY + 18 + "px";
  }

  who(i, slots, size) {
    const owner = this.frame.cells[i], mapped = this.frame.num_virtual_blocks === this.frame.num_blocks;
    if (owner === FREE) return mapped ? CLASSES[this.freeClass()] : "not mapped";
    if (owner === CACHED) return this.left.has(i) ? "cached; your request left it" : "a cached prefix that no request uses now";
    if (owner === SHARED) return "shared by several requests";
    if (owner === EXTERNAL) return "external fragmentation: a region was rounded up";
    const row = this.frame.requests.find((one) => one.number === owner);
    const mine = this.own && row?.mine ? "yours" : `request ${owner}`;
    return `${mine}, ${slots} of ${size} slots filled` + (row?.state === "held" ? "; it has finished and waits for its batch" : "");
  }
}

// The pool's classes as a bar, with a legend that counts.
export class ClassBar {
  constructor(bar, legend) {
    this.parts = Object.keys(CLASSES).map((name) => {
      const part = element("div", name), entry = element("span"), value = element("span");
      part.title = CLASSES[name];
      entry.append(element("i", name), value); bar.append(part); legend.append(entry);
      return { name, part, entry, value };
    });
  }

  draw({ classes }) {
    const total = Object.values(classes).reduce((sum, value) => sum + value, 0);
    for (const { name, part, entry, value } of this.parts) {
      const slots = classes[name], rare = ["external", "shortage", "internal"].includes(name);
      part.style.width = (100 * slots) / total + "%";
      entry.hidden = rare && !slots;
      const text = `${CLASSES[name]} ${plain(slots)}`;
      if (value.textContent !== text) value.textContent = text;
    }
  }
}
