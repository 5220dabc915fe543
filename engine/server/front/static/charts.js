// Lines over the last minutes, drawn by uPlot in the page's colours.
import { element } from "./feed.js";
import { css, plain } from "./map.js";

const SPAN = 180, HEIGHT = 170; // s, px
const STEPS = Array.from({ length: 10 }, (_, i) => [1, 2, 5].map((one) => one * 10 ** i)).flat();

export class Chart {
  // `lines`: {name, key, color, dash}. `unit` is said at the axis. `log`: the axis is logarithmic.
  constructor(root, { unit, lines, log = false }) {
    Object.assign(this, { root, unit, lines, log, data: null, plot: null });
    const series = element("div", "series");
    for (const { name, color, dash } of lines) {
      const entry = element("span"), mark = element("i");
      mark.style.borderTopColor = color; mark.style.borderTopStyle = dash ? "dashed" : "solid";
      entry.append(mark, name); series.append(entry);
    }
    this.place = element("div");
    root.append(series, this.place);
    new ResizeObserver(() => this.plot?.setSize({ width: this.place.clientWidth, height: HEIGHT })).observe(this.place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.plot?.destroy(); this.plot = null; this.draw(this.samples); });
  }

  options() {
    const axis = { stroke: css("--muted"), font: "11px " + css("--font"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false } };
    const power = (value, round) => 10 ** round(Math.log10(value));
    const whole = (low, high) => [power(Math.min(low, 1), Math.floor), power(Math.max(high, 10), Math.ceil)];
    const powers = (low, high) => Array.from({ length: Math.round(Math.log10(high / low)) + 1 }, (_, i) => low * 10 ** i);
    const ends = (low, high) => (this.log ? whole(low, high) : [0, Math.max(1, high * 1.1)]);
    return {
      width: this.place.clientWidth, height: HEIGHT, legend: { show: false }, cursor: { drag: { x: false, y: false } },
      scales: {
        x: { time: false, range: (_, low) => [Math.min(low, -30), 0] },
        y: { distr: this.log ? 3 : 1, range: (_, low, high) => ends(low ?? 1, high ?? 1) },
      },
      axes: [
        { ...axis, size: 26, space: 60, values: (_, ticks) => ticks.map((tick) => (tick ? `${tick} s` : "now")) },
        {
          ...axis, size: 50, space: 28,
          // Counts have whole ticks.
          ...(this.log ? { splits: (_, __, low, high) => powers(low, high) } : { incrs: STEPS }),
          values: (_, ticks) => ticks.map((tick) => plain(tick)),
        },
      ],
      series: [{}, ...this.lines.map(({ name, color, dash }) => ({ label: name, stroke: color, width: 2, dash, points: { show: false } }))],
    };
  }

  draw(samples) {
    this.samples = samples;
    if (!samples?.length || !this.place.clientWidth) return;
    const now = samples[samples.length - 1].time;
    const data = [samples.map((one) => one.time - now), ...this.lines.map(({ key }) => samples.map((one) => one[key]))];
    if (this.plot) this.plot.setData(data);
    else this.plot = new window.uPlot(this.options(), data, this.place);
    this.root.setAttribute("aria-label", this.lines.map(({ name, key }) => `${name} ${samples[samples.length - 1][key] ?? "none"}`).join(", ") + ` ${this.unit}`);
  }
}

// Keeps what frames told over the span of the charts, and answers what happened lately.
export class History {
  constructor() { this.samples = []; this.frames = []; }

  add(frame) {
    const last = this.frames[this.frames.length - 1];
    // Another server, or one that was started anew: its counters begin again.
    if (last && (frame.counters.steps < last.counters.steps || frame.time < last.time)) { this.frames = []; this.samples = []; }
    this.frames.push({ time: frame.time, counters: frame.counters, latency: frame.latency });
    while (frame.time - this.frames[0].time > SPAN) this.frames.shift();
    const ms = (name) => { const mean = this.latency(name, 5).mean; return mean === null ? null : 1000 * mean; };
    this.samples.push({
      time: frame.time, running: frame.running, waiting: frame.waiting, generated: this.rate("generated", 2), prompt: this.rate("prompt", 2),
      ttft: ms("ttft"), itl: ms("itl"),
    });
    while (frame.time - this.samples[0].time > SPAN) this.samples.shift();
  }

  before(seconds) {
    const now = this.frames[this.frames.length - 1].time;
    return this.frames.find((one) => now - one.time <= seconds + 0.1);
  }

  // How much a counter grew in the last seconds.
  grown(name, seconds) { return this.frames[this.frames.length - 1].counters[name] - this.before(seconds).counters[name]; }

  rate(name, seconds) {
    const time = this.frames[this.frames.length - 1].time - this.before(seconds).time;
    return time > 0 ? this.grown(name, seconds) / time : 0;
  }

  // Mean of what was measured in the last seconds, and the bound that 99 % of it kept; null where nothing was.
  latency(name, seconds) {
    const now = this.frames[this.frames.length - 1].latency[name], then = this.before(seconds).latency[name];
    const counts = now.counts.map((value, i) => value - then.counts[i]);
    const total = counts.reduce((sum, value) => sum + value, 0);
    if (!total) return { mean: null, bound: null, total: 0 };
    let seen = 0;
    const at = counts.findIndex((value) => (seen += value) >= 0.99 * total);
    return { mean: (now.sum - then.sum) / total, bound: now.bounds[at] ?? Infinity, total };
  }
}
