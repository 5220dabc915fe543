import { byId, element, setText, showAbout, watch } from "./feed.js";
import { ClassBar, PoolMap, plain, shade } from "./map.js";
import { Chart, History } from "./charts.js";

const LATELY = 30, ROWS = 24; // s, rows of the table
const map = new PoolMap(byId("map"), 340), bar = new ClassBar(byId("bar"), byId("legend")), history = new History();
const charts = [
  new Chart(byId("load"), { unit: "requests", lines: [{ name: "running", key: "running", color: "#0072B2" }, { name: "waiting", key: "waiting", color: "#E69F00", dash: [6, 4] }] }),
  new Chart(byId("rate"), { unit: "tokens/s", lines: [{ name: "generated", key: "generated", color: "#009E73" }, { name: "prompt", key: "prompt", color: "#CC79A7", dash: [6, 4] }] }),
  new Chart(byId("latency"), { unit: "ms", log: true, lines: [{ name: "time to first token", key: "ttft", color: "#D55E00" }, { name: "between tokens", key: "itl", color: "#56B4E9", dash: [6, 4] }] }),
];
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const seconds = (value) => (value < 1 ? `${+(1000 * value).toPrecision(3)} ms` : `${+value.toPrecision(3)} s`);

function latencyTile(name) {
  const { mean, bound, total } = history.latency(name, LATELY);
  if (!total) return ["–", "none measured"];
  return [seconds(mean), bound === Infinity ? "mean" : `mean; 99 % ≤ ${seconds(bound)}`];
}

function tiles(frame) {
  const { counters, classes, running, waiting } = frame;
  const slots = Object.values(classes).reduce((sum, value) => sum + value, 0);
  const owned = classes.token_states + classes.reservation + classes.internal;
  const errors = counters.failed + counters.http_5xx + counters.failed_steps;
  const lately = history.grown("failed", LATELY) + history.grown("http_5xx", LATELY) + history.grown("failed_steps", LATELY);
  return {
    "running": [plain(running), `${plain(waiting)} waiting`],
    "tokens per second": [plain(Math.round(history.rate("generated", 2))), `${plain(counters.generated)} in all`],
    "time to first token": latencyTile("ttft"),
    "time per output token": latencyTile("tpot"),
    "between tokens": latencyTile("itl"),
    "pool owned": [percent(owned / slots), `${percent(owned ? classes.token_states / owned : 0)} of it holds tokens`],
    "prefix hits": [counters.queries ? percent(counters.hits / counters.queries) : "–", `${plain(frame.shared_saved)} slots saved by sharing now`],
    "preemptions": [plain(counters.preemptions), `${plain(counters.finished)} requests finished`],
    "errors": [plain(errors), lately ? `${plain(lately)} in the last ${LATELY} s` : "since the start", errors > 0],
    "refused or ended early": [plain(counters.refused + counters.aborted), `${plain(counters.refused)} refused, ${plain(counters.http_4xx)} answers 4xx`],
  };
}

function showTiles(values) {
  const holder = byId("tiles");
  for (const [name, [value, remark, bad = false]] of Object.entries(values)) {
    let tile = holder.querySelector(`[data-name="${name}"]`);
    if (!tile) {
      tile = element("div", "tile"); tile.dataset.name = name;
      tile.append(element("div", "name", name), element("div", "value"), element("div", "remark"));
      holder.append(tile);
    }
    tile.classList.toggle("bad", bad);
    setText(tile.children[1], value);
    setText(tile.children[2], remark);
  }
}

function showRows(frame) {
  const { requests } = frame;
  const rows = requests.slice(0, ROWS).map((one) => {
    const row = element("tr"), first = element("td", "text"), mark = element("i");
    mark.style.background = one.slots ? shade(one.number) : "var(--empty)";
    first.append(mark, String(one.number)); row.append(first);
    for (const value of [one.state, one.id, one.user]) row.append(element("td", "text", value));
    for (const value of [one.prompt, one.output, one.computed, one.slots]) row.append(element("td", "", plain(value)));
    return row;
  });
  byId("rows").replaceChildren(...rows);
  byId("table").classList.toggle("nameless", !requests.some((one) => one.id));
  const all = frame.running + frame.waiting;
  setText(byId("number"), all > ROWS ? `${ROWS} of ${plain(all)}` : all ? "" : "none");
}

watch((frame) => {
  history.add(frame);
  showAbout(frame);
  const cell = frame.stride > 1 ? `; a cell is ${frame.stride} blocks` : "";
  setText(byId("shape"), `${plain(frame.num_blocks)} blocks of ${frame.block_size} slots${cell}`);
  map.draw(frame);
  bar.draw(frame);
  showTiles(tiles(frame));
  for (const chart of charts) chart.draw(history.samples);
  showRows(frame);
});
