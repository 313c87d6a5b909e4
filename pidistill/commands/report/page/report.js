"use strict";
// Everything that a model, an environment or a config wrote reaches the page through textContent only.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs, ROLLOUTS = DATA.rollouts.rows;
const COLORS = ["#2459c4", "#d1590b", "#1a8a52", "#a1309e", "#b8860b", "#0b8ea3", "#c2334d", "#6a5acd", "#557a0f", "#7a5230"];
const DASHES = [[], [6, 4], [2, 3], [9, 3, 2, 3], [1, 5], [12, 4]];
const MISSING = -32768, SCALE = 1000;

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};
const color = (i) => COLORS[i % COLORS.length];
const shown = (value, digits = 3) => {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3)) return value.toExponential(1);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(digits));
};
const last = (values) => { for (let i = (values || []).length - 1; i >= 0; i--) if (values[i] !== null) return values[i]; return null; };
const first = (values) => { for (const value of values || []) if (value !== null) return value; return null; };

// ---------------------------------------------------------------------------------------------------- health
const CHARTS = [
  ["Reward and success", "of the rollouts that are trained on", ["reward_mean", "success_frac"]],
  ["Success in evaluation", "without PI, greedy and sampled; with PI: the ceiling", ["eval_student_success_greedy", "eval_student_success", "eval_teacher_success"]],
  ["What PI still adds", "success with PI − success without", ["eval_privileged_gain"]],
  ["KL between the views", "nats per token; falls as the student learns what the teacher does", ["kl_teacher_student_nats", "kl_student_teacher_nats"]],
  ["KL by quarter of the completion", "nats per token", ["kl_teacher_student_q1", "kl_teacher_student_q2", "kl_teacher_student_q3", "kl_teacher_student_q4"]],
  ["Entropy", "nats per token; a fall to 0 is a collapse", ["entropy_nats", "teacher_entropy_nats"]],
  ["−log prob of the samples", "nats per token", ["student_nll_nats", "teacher_nll_nats"]],
  ["Leak rate", "share of rollouts that say a leak phrase", ["leak_frac", "eval_leak_frac", "eval_privileged_overlap_frac"]],
  ["Length", "policy tokens per rollout", ["completion_tokens_mean", "eval_completion_tokens_mean"]],
  ["Cut off", "share of rollouts at the token limit", ["truncated_frac", "turn_truncated_frac", "eval_truncated_frac"]],
  ["Clipped", "share of tokens without policy gradient", ["clip_frac"]],
  ["Ratio", "1 at a round's first update", ["ratio_mean", "student_ratio_mean", "importance_weight_mean"]],
  ["Effective sample size", "share of the policy tokens", ["ess_frac", "importance_truncated_frac"]],
  ["Sampler against trainer", "nats; above 0.1 in the mean a run stops", ["sampler_mismatch_mean_nats", "sampler_mismatch_k3_nats", "sampler_mismatch_max_nats"]],
  ["Groups without a lesson", "share of rollouts whose advantage is 0", ["zero_advantage_frac"]],
  ["Loss", "per policy token", ["loss", "sft_loss"]],
  ["Gradient norm", "before clipping", ["grad_norm"]],
  ["Learning rate", "", ["lr"]],
  ["Time by phase", "seconds of a step", ["time_rollout_s", "time_score_s", "time_update_s"]],
  ["Tokens per second", "sampled and trained, all processes", ["tokens_per_s"]],
  ["Weights of the objective", "", ["alpha", "beta", "reward_weight"]],
  ["Parts of the reward", "means per rollout", /^reward\//],
  ["Parts of the evaluated reward", "means per rollout", /^eval_reward\//],
  ["Left out", "rollouts and rows, by reason", /^(eval_)?dropped(_rows)?\//],
];
const visible = RUNS.map((run, i) => i < 8);
let plots = [];

const namesOf = (wanted) => {
  const all = new Set(RUNS.filter((_, i) => visible[i]).flatMap((run) => Object.keys(run.metrics)));
  const names = wanted instanceof RegExp ? [...all].filter((name) => wanted.test(name)).sort() : wanted.filter((name) => all.has(name));
  const counts = wanted instanceof RegExp && wanted.source.includes("dropped");
  return counts ? names.filter((name) => RUNS.some((run) => (run.metrics[name] || []).some((value) => value))) : names;
};

function chart(title, about, wanted) {
  const names = namesOf(wanted);
  const series = [];
  RUNS.forEach((run, i) => visible[i] && names.forEach((name, j) => {
    const points = [];
    (run.metrics[name] || []).forEach((value, row) => value !== null && points.push([run.metrics.step[row], value]));
    if (points.length) series.push({ i, j, name, points });
  }));
  const twins = dropTwins(series, names);
  if (!series.length) return null;
  const alone = visible.filter(Boolean).length === 1;
  const stroke = (one) => (alone ? color(one.j) : color(one.i)), dash = (one) => (alone ? DASHES[0] : DASHES[one.j % DASHES.length]);
  const steps = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  const at = new Map(steps.map((step, i) => [step, i]));
  const columns = series.map((one) => {
    const column = new Array(steps.length).fill(null);
    for (const [step, value] of one.points) column[at.get(step)] = value;
    return column;
  });
  const values = series.map((one) => make("b", {}, shown(last(one.points.map((point) => point[1])))));
  const legend = make("div", { class: "legend" }, ...entries(series, values, names, alone), ...twins.map((text) => make("span", { class: "twin" }, text)));
  const card = make("div", { class: "card chart" }, make("h3", {}, title), make("p", {}, about), make("div"), legend);
  const place = card.children[2];
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--soft"), line = getComputedStyle(document.documentElement).getPropertyValue("--line");
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "11px system-ui, sans-serif" };
  const alarms = RUNS.flatMap((run, i) => (visible[i] ? run.alarms.map((alarm) => [alarm[0], alone ? "#d99a1c" : color(i)]) : []));
  const options = {
    width: 330, height: 170, legend: { show: false }, cursor: { sync: { key: "step" }, points: { size: 6 }, y: false },
    scales: { x: { time: false } }, axes: [{ ...axis, size: 26 }, { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => shown(tick)) }],
    series: [{}, ...series.map((one) => ({
      stroke: stroke(one), dash: dash(one), width: 1.6, spanGaps: true, points: { show: one.points.length < 12, size: 5, fill: stroke(one) },
    }))],
    hooks: {
      draw: [(plot) => {
        plot.ctx.save();
        for (const [step, stroke] of alarms) {
          const x = plot.valToPos(step, "x", true), { top, height } = plot.bbox, size = 5 * (devicePixelRatio || 1);
          plot.ctx.strokeStyle = plot.ctx.fillStyle = stroke; plot.ctx.setLineDash([3, 3]); plot.ctx.globalAlpha = 0.6;
          plot.ctx.beginPath(); plot.ctx.moveTo(x, top); plot.ctx.lineTo(x, top + height); plot.ctx.stroke();
          plot.ctx.globalAlpha = 1;
          plot.ctx.beginPath(); plot.ctx.moveTo(x - size, top - size); plot.ctx.lineTo(x + size, top - size); plot.ctx.lineTo(x, top + size); plot.ctx.fill();
        }
        plot.ctx.restore();
      }],
      setCursor: [(plot) => {
        const at = plot.cursor.idx;
        series.forEach((one, k) => {
          let row = at === null || at === undefined ? steps.length - 1 : at;
          while (row > 0 && columns[k][row] === null) row--;
          values[k].textContent = shown(columns[k][row]);
        });
      }],
    },
  };
  plots.push({ place, build: () => new uPlot({ ...options, width: Math.max(240, place.clientWidth) }, [steps, ...columns], place) });
  return card;
}
// Two names that have the same numbers in every run are one line: the second would hide the first.
function dropTwins(series, names) {
  const numbers = (name) => JSON.stringify(series.filter((one) => one.name === name).map((one) => [one.i, one.points]));
  const said = [];
  for (const name of [...names]) {
    const twin = names.slice(0, names.indexOf(name)).find((other) => numbers(other) === numbers(name) && numbers(name) !== "[]");
    if (!twin) continue;
    said.push(`${name}: the same as ${twin}`);
    names.splice(names.indexOf(name), 1);
    for (let k = series.length - 1; k >= 0; k--) if (series[k].name === name) series.splice(k, 1);
  }
  return said;
}
// One run: a colour for each name. Several: a colour for each run, a dash for each name.
function entries(series, values, names, alone) {
  if (alone) return series.map((one, k) => make("span", {}, swatch(color(one.j), []), one.name, " ", values[k]));
  if (names.length === 1 && series.length <= 12) return series.map((one, k) => make("span", {}, swatch(color(one.i), []), RUNS[one.i].name, " ", values[k]));
  return names.map((name) => {
    const own = series.map((one, k) => [one, k]).filter(([one]) => one.name === name);
    const shades = series.length > 12 ? [] : own.flatMap(([one, k]) => [" ", make("span", { class: "dot", style: `background:${color(one.i)}` }), " ", values[k]]);
    return make("span", { class: "row" }, swatch("currentColor", own.length ? DASHES[own[0][0].j % DASHES.length] : []), name, ...shades);
  });
}
function swatch(stroke, dash) {
  const ends = [];
  let at = 0;
  dash.forEach((length, k) => { ends.push(`${k % 2 ? "transparent" : stroke} ${at}px ${at + length}px`); at += length; });
  return make("i", { class: "swatch", style: `background:${dash.length ? `repeating-linear-gradient(90deg,${ends.join(",")})` : stroke}` });
}

const meanOfLast = (values, count) => {
  const known = (values || []).filter((value) => value !== null).slice(-count);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};
function health() {
  const page = make("div");
  const rows = RUNS.map((run, i) => [run, i]).filter(([, i]) => visible[i]);
  const columns = [
    ["steps", (m) => last(m.step)], ["reward, last 5 steps", (m) => meanOfLast(m.reward_mean, 5)], ["success without PI", (m) => last(m.eval_student_success)],
    ["greedy", (m) => last(m.eval_student_success_greedy)], ["with PI", (m) => last(m.eval_teacher_success)], ["gap", (m) => last(m.eval_privileged_gain)],
    ["KL at the start", (m) => first(m.kl_teacher_student_nats)], ["KL now", (m) => last(m.kl_teacher_student_nats)], ["entropy", (m) => last(m.entropy_nats)],
    ["leak", (m) => last(m.leak_frac)], ["tokens/s", (m) => last(m.tokens_per_s)],
  ].filter(([, get]) => rows.some(([run]) => get(run.metrics) !== null));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...["run", "alarms", ...columns.map(([name]) => name)].map((name) => make("th", {}, name)))));
  table.append(make("tbody", {}, ...rows.map(([run, i]) => make("tr", {},
    make("td", {}, make("span", { class: "dot", style: `background:${color(i)}` }), " ", run.name),
    make("td", { class: run.alarms.length ? "loud" : "calm" }, run.alarms.length ? String(run.alarms.length) : last(run.metrics.step) === null ? "–" : "none"),
    ...columns.map(([, get]) => make("td", {}, shown(get(run.metrics))))))));
  page.append(make("h2", {}, "Now"), make("div", { class: "card scroll" }, table));
  const alarms = rows.flatMap(([run, i]) => run.alarms.map(([, name, text]) => make("div", { class: "alarm" },
    ...(rows.length > 1 ? [make("span", { class: "dot", style: `background:${color(i)}` }), " ", run.name, " · "] : []), make("b", {}, name), " · ", text)));
  if (alarms.length) page.append(make("details", { class: "alarms", open: alarms.length <= 6 }, make("summary", {}, `${alarms.length} ${alarms.length > 1 ? "alarms" : "alarm"}`), ...alarms));
  plots = [];
  const cards = CHARTS.map((entry) => chart(...entry)).filter(Boolean);
  if (cards.length) page.append(make("h2", {}, "Curves over optimiser steps"), make("div", { class: "charts" }, ...cards));
  return page;
}

// ---------------------------------------------------------------------------------------------------- evaluations
const LEADING = ["success", "reward_mean", "leak_frac", "completion_tokens_mean", "truncated_frac"];
function evaluations() {
  const page = make("div");
  const rows = RUNS.flatMap((run, i) => (visible[i] ? Object.entries(run.evaluations).map(([view, numbers]) => [run, i, view, numbers]) : []));
  if (rows.length) {
    const keys = [...new Set(rows.flatMap(([, , , numbers]) => Object.keys(numbers)))].filter((key) => !key.endsWith("_interval") && !LEADING.includes(key) && key !== "samples" && key !== "rollouts");
    const columns = [...LEADING.filter((key) => rows.some(([, , , numbers]) => key in numbers)), ...keys];
    const cell = (numbers, key) => {
      const interval = numbers[`${key}_interval`];
      return shown(numbers[key]) + (Array.isArray(interval) ? ` [${shown(interval[0])}, ${shown(interval[1])}]` : "");
    };
    page.append(make("h2", {}, "Evaluated rows, with 95% intervals of a bootstrap over rows (over clusters of rows where their number is given)"), make("div", { class: "card scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ...["run", "view", "success", "samples", ...columns].map((name, k) => make("th", {}, k === 2 ? "" : name)))),
      make("tbody", {}, ...rows.map(([run, i, view, numbers]) => make("tr", {},
        make("td", {}, make("span", { class: "dot", style: `background:${color(i)}` }), " ", run.name), make("td", {}, view), make("td", {}, bar(numbers)),
        make("td", {}, shown(numbers.samples)), ...columns.map((key) => make("td", {}, cell(numbers, key)))))))));
  }
  const during = RUNS.map((run, i) => [run, i]).filter(([run, i]) => visible[i] && Object.keys(run.metrics).some((name) => name.startsWith("eval_")));
  if (during.length) {
    const names = [...new Set(during.flatMap(([run]) => Object.keys(run.metrics).filter((name) => name.startsWith("eval_"))))];
    page.append(make("h2", {}, "During training, on validation rows: first → last evaluation"), make("div", { class: "card scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", {}, ""), ...during.map(([run]) => make("th", {}, run.name)))),
      make("tbody", {}, ...names.map((name) => make("tr", {}, make("td", {}, name), ...during.map(([run]) => make("td", {}, `${shown(first(run.metrics[name]))} → ${shown(last(run.metrics[name]))}`))))))));
  }
  if (!page.children.length) page.append(make("p", {}, "No evaluation: run evaluate_distributed on the checkpoint, or set eval_dataset."));
  return page;
}
function bar(numbers) {
  const node = make("span", { class: "bar" }), percent = (value) => `${100 * Math.min(1, Math.max(0, value))}%`, interval = numbers.success_interval;
  node.append(make("i", { style: `width:${percent(numbers.success || 0)}` }));
  if (Array.isArray(interval)) {
    node.append(make("u", { style: `left:${percent(interval[0])};width:${percent(interval[1] - interval[0])}` }), ...interval.map((end) => make("s", { style: `left:${percent(end)}` })));
  }
  return node;
}

// ---------------------------------------------------------------------------------------------------- configuration
function configuration() {
  const page = make("div"), difference = Object.entries(DATA.difference);
  const value = (text) => (text === null ? "–" : text);
  if (difference.length) {
    page.append(make("h2", {}, `Keys that differ (${difference.length})`), make("div", { class: "card scroll" }, make("table", { class: "keys" },
      make("thead", {}, make("tr", {}, make("th", {}, "key"), ...RUNS.map((run, i) => visible[i] ? make("th", {}, run.name) : null))),
      make("tbody", {}, ...difference.map(([key, values]) => make("tr", {}, make("td", {}, key), ...values.map((text, i) => visible[i] ? make("td", { class: "wrap" }, value(text)) : null)))))));
  } else if (RUNS.length > 1) page.append(make("p", {}, "The configurations are the same."));
  RUNS.forEach((run, i) => {
    const keys = Object.keys(run.config).sort();
    if (!visible[i] || !keys.length) return;
    page.append(make("h2", {}, make("span", { class: "dot", style: `background:${color(i)}` }), " ", run.name), make("details", { class: "card", open: RUNS.length === 1 },
      make("summary", {}, `${run.folder}/config.yaml, ${keys.length} keys`), make("table", { class: "keys" }, make("tbody", {}, ...keys.map((key) => make("tr", {}, make("td", {}, key), make("td", { class: "wrap" }, value(run.config[key]))))))));
  });
  return page;
}

// ---------------------------------------------------------------------------------------------------- the reader
const BLOB = document.getElementById("blob").textContent;
function decode(row) {
  const text = atob(BLOB.substr(row.at, row.chars)), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const size = DATA.rollouts.bits / 8, Ids = size === 2 ? Uint16Array : Uint32Array;
  const ids = new Ids(bytes.slice(0, row.count * size).buffer), columns = {};
  row.names.forEach((name, k) => {
    const from = row.count * size + k * row.logged * 2;
    columns[name] = Array.from(new Int16Array(bytes.slice(from, from + row.logged * 2).buffer), (v) => (v === MISSING ? null : v / SCALE));
  });
  return { tokens: Array.from(ids, (id) => DATA.rollouts.tokens[id]), columns };
}
const NAMES = {
  log_ratio: "log-ratio: teacher − student", kl_teacher_student: "kl(teacher‖student)", kl_student_teacher: "kl(student‖teacher)", jsd: "JSD",
  student_logprobs: "student's log-prob", teacher_logprobs: "teacher's log-prob", sampled_logprobs: "log-prob when sampled",
  student_entropy: "student's entropy", teacher_entropy: "teacher's entropy", advantage: "advantage", mismatch: "trainer − sampler",
};
const ABOUT = {
  log_ratio: "Blue: the teacher, who sees the privileged information, finds the token likelier than the student does. Red: less likely.",
  kl_teacher_student: "How far the two distributions are apart before this token: where the teacher has something to teach.",
  kl_student_teacher: "How far the two distributions are apart before this token, weighted by the student.",
  mismatch: "What the trainer computes minus what the sampler recorded: rounding, or a fault.",
  advantage: "What the reward says of the token: blue is pushed up, red is pushed down.",
};
const SIGNED = ["log_ratio", "advantage", "mismatch"];
const state = { at: 0, by: null, pair: false, found: [], filters: { run: "", from: "", to: "", low: "", high: "", success: "", leak: "", cut: "", view: "", words: "", sort: "step" } };

function columnsOf(row) {
  const { columns } = decode(row);
  const minus = (a, b) => a.map((v, i) => (v === null || b[i] === null || b[i] === undefined ? null : v - b[i]));
  const { student_logprobs: student, teacher_logprobs: teacher, sampled_logprobs: sampled } = columns;
  const trained = row.sampled_by === "teacher" ? teacher : student;
  return {
    ...(student && teacher ? { log_ratio: minus(teacher, student) } : {}), ...columns,
    ...(trained && sampled ? { mismatch: minus(trained, sampled) } : {}),
  };
}

const yes = (filter, value) => filter === "" || (filter === "yes") === Boolean(value);
function matches(row) {
  const f = state.filters;
  if (f.run !== "" && row.run !== +f.run) return false;
  if (f.from !== "" && row.step < +f.from) return false;
  if (f.to !== "" && row.step > +f.to) return false;
  if (f.low !== "" && !(row.reward >= +f.low)) return false;
  if (f.high !== "" && !(row.reward <= +f.high)) return false;
  if (!yes(f.success, row.success) || !yes(f.leak, row.leak) || !yes(f.cut, row.cut)) return false;
  if (f.view !== "" && row.sampled_by !== f.view) return false;
  return f.words === "" || searched(row).includes(f.words.toLowerCase());
}
function searched(row) {
  if (row.searched === undefined) {
    const texts = DATA.rollouts.texts;
    row.searched = [row.example, texts[row.student], texts[row.teacher], ...row.reads.map(([, text]) => texts[text]), decode(row).tokens.join("")].join("\n").toLowerCase();
  }
  return row.searched;
}
const SORTS = {
  step: ["step", (row) => row.step], reward: ["reward, low to high", (row) => row.reward ?? 0], kl: ["mean KL, high to low", (row) => -(row.kl ?? 0)],
  ratio: ["log-ratio, high to low", (row) => -(row.log_ratio ?? 0)], length: ["length, long to short", (row) => -row.policy_tokens],
};

function reader() {
  if (!ROLLOUTS.length) return make("p", {}, "No rollouts: the run wrote no training_rollouts.jsonl (rollout_log_total=0, or an older version).");
  const f = state.filters;
  const choose = (name, text, options) => make("div", {}, make("label", { for: `f-${name}` }, text), make("select", { id: `f-${name}`, onchange: (e) => { f[name] = e.target.value; refilter(); } },
    ...options.map(([value, shownAs]) => make("option", { value, selected: f[name] === value }, shownAs))));
  const number = (name, text) => make("div", {}, make("label", { for: `f-${name}` }, text), make("input", { id: `f-${name}`, type: "number", step: "any", value: f[name], oninput: (e) => { f[name] = e.target.value; refilter(); } }));
  const either = [["", "all"], ["yes", "yes"], ["no", "no"]];
  const filters = make("div", { class: "filters" },
    make("div", { class: "wide" }, make("input", { id: "f-words", type: "search", placeholder: "words in prompts and completion", value: f.words, oninput: (e) => { f.words = e.target.value; refilter(); } })),
    number("from", "step from"), number("to", "to"), number("low", "reward from"), number("high", "to"),
    choose("success", "success", either), choose("leak", "leak", either), choose("cut", "cut off", either),
    choose("view", "sampled by", [["", "both"], ["student", "student"], ["teacher", "teacher"]]));
  if (RUNS.length > 1) filters.append(make("div", { class: "wide" }, choose("run", "run", [["", "all"], ...RUNS.map((run, i) => [String(i), run.name])])));
  filters.append(make("div", { class: "wide" }, choose("sort", "order", Object.entries(SORTS).map(([key, [text]]) => [key, text]))));
  const page = make("div", { class: "reader" },
    make("aside", { class: "card side" }, filters, make("div", { class: "count", id: "count" }),
      make("div", { class: "columns" }, make("span", {}, "step"), make("span", {}, "row"), make("span", {}, "reward")), make("div", { class: "list", id: "list" })),
    make("section", { id: "rollout" }));
  queueMicrotask(refilter);
  return page;
}

function refilter() {
  const kept = state.found[state.at], key = SORTS[state.filters.sort][1];
  state.found = ROLLOUTS.map((_, i) => i).filter((i) => visible[ROLLOUTS[i].run] && matches(ROLLOUTS[i])).sort((a, b) => key(ROLLOUTS[a]) - key(ROLLOUTS[b]) || a - b);
  state.at = Math.max(0, state.found.indexOf(kept));
  const logged = DATA.logged > ROLLOUTS.length ? ` (of ${DATA.logged.toLocaleString("en")} logged)` : "";
  document.getElementById("count").replaceChildren(`${state.found.length.toLocaleString("en")} of ${ROLLOUTS.length.toLocaleString("en")} rollouts${logged}`);
  listed = [0, 0];
  show();
}
let listed = [0, 0];
const WINDOW = 300;
function list() {
  const place = document.getElementById("list");
  if (state.at < listed[0] || state.at >= listed[1]) {
    const from = Math.max(0, state.at - WINDOW / 3);
    listed = [from, Math.min(state.found.length, from + WINDOW)];
    const more = (text, to) => make("button", { onclick: () => { state.at = to; show(); } }, "", make("span", { class: "what" }, text), "");
    place.replaceChildren(...(from > 0 ? [more(`… ${from} before`, from - 1)] : []), ...state.found.slice(...listed).map((i, k) => {
      const row = ROLLOUTS[i], at = listed[0] + k;
      return make("button", { "data-at": at, onclick: () => { state.at = at; show(); } },
        make("span", {}, RUNS.length > 1 ? make("span", { class: "dot", style: `background:${color(row.run)}`, title: RUNS[row.run].name }) : null, ` ${row.step}`),
        make("span", { class: "what", title: row.example }, row.example),
        make("span", {}, row.leak ? make("span", { class: "flag bad" }, "leak") : null, row.cut ? make("span", { class: "flag warn" }, "cut") : null,
          make("span", { class: `reward ${row.success === undefined ? "" : row.success ? "good" : "bad"}` }, shown(row.reward ?? null))));
    }), ...(listed[1] < state.found.length ? [more(`… ${state.found.length - listed[1]} more`, listed[1])] : []));
  }
  for (const node of place.querySelectorAll("[aria-current]")) node.removeAttribute("aria-current");
  const current = place.querySelector(`[data-at="${state.at}"]`);
  if (current) { current.setAttribute("aria-current", "true"); current.scrollIntoView({ block: "nearest" }); }
}
const move = (by) => { if (state.found.length) { state.at = (state.at + by + state.found.length) % state.found.length; show(); } };

function show() {
  const place = document.getElementById("rollout");
  if (!place) return;
  tip.style.display = "none";
  if (!state.found.length) { place.replaceChildren(make("p", {}, "No rollout matches.")); document.getElementById("list").replaceChildren(); return; }
  list();
  const row = ROLLOUTS[state.found[state.at]], columns = columnsOf(row), names = Object.keys(columns);
  if (!names.includes(state.by)) state.by = names.includes("log_ratio") ? "log_ratio" : names[0];
  place.replaceChildren(...[chips(row), prompts(row), completion(row, columns), siblings(row)].filter(Boolean));
}

function chips(row) {
  const chip = (text, kind = "") => make("span", { class: `chip ${kind}` }, text);
  const parts = Object.entries(row.reward_parts || {}).map(([name, value]) => chip(`${name} ${shown(value)}`));
  return make("div", { class: "head" }, make("div", { class: "chips" },
    RUNS.length > 1 ? make("span", { class: "chip" }, make("span", { class: "dot", style: `background:${color(row.run)}` }), ` ${RUNS[row.run].name}`) : null, make("b", {}, row.example), chip(`step ${row.step}`), chip(`sampled by the ${row.sampled_by}`),
    row.reward === undefined ? chip(row.sampled ? "no reward" : "demonstration") : chip(`reward ${shown(row.reward)}`, row.success ? "good" : "bad"), ...parts,
    row.advantage === null ? null : chip(`advantage ${shown(row.advantage)}`),
    chip(`stopped: ${row.stop_reason}`, row.cut ? "warn" : ""), row.leak ? chip("leak", "bad") : null, chip(`${shown(row.policy_tokens)} tokens`),
    row.kl === null ? null : chip(`KL ${shown(row.kl)} per token`)),
    make("span", { class: "step" }, make("button", { title: "previous (←)", onclick: () => move(-1) }, "←"), make("span", {}, `${state.at + 1} / ${state.found.length}`), make("button", { title: "next (→)", onclick: () => move(1) }, "→")));
}

function prompts(row) {
  const texts = DATA.rollouts.texts, student = texts[row.student], teacher = texts[row.teacher], pi = row.pi === null ? null : texts[row.pi];
  return make("div", { class: "pair" },
    make("div", { class: "card" }, make("h3", {}, "The student's prompt"), make("pre", { class: "text" }, ...folded(student))),
    make("div", { class: "card" }, make("h3", {}, pi === null ? `The teacher's prompt (${row.reads.length ? "PI comes with later turns" : "this row has no PI"})` : "The teacher's prompt, PI marked"), make("pre", { class: "text" }, ...marked(student, teacher, pi))));
}
function marked(student, teacher, pi) {
  let from = pi ? teacher.indexOf(pi) : -1, to = from + (pi || "").length;
  if (from < 0) {
    if (student === teacher) return folded(teacher);
    for (from = 0; from < student.length && student[from] === teacher[from];) from++;
    let tail = 0;
    while (tail < student.length - from && tail < teacher.length - from && student[student.length - 1 - tail] === teacher[teacher.length - 1 - tail]) tail++;
    to = teacher.length - tail;
  }
  return [...folded(teacher.slice(0, from)), make("mark", {}, ...folded(teacher.slice(from, to))), ...folded(teacher.slice(to))];
}

// A long stretch shows its two ends; a click shows the rest.
const LONG = 900, HEAD = 420, TAIL = 280;
function folded(text) {
  if (text.length <= LONG) return speech(text);
  const space = (at) => { const found = text.slice(at, at + 60).search(/\s/); return found < 0 ? at : at + found; };
  const from = space(HEAD), to = Math.max(from, space(text.length - TAIL)), middle = text.slice(from, to);
  const more = make("button", { class: "more", onclick: () => more.replaceWith(...speech(middle)) }, `… ${middle.length.toLocaleString("en")} more characters …`);
  return [...speech(text.slice(0, from)), more, ...speech(text.slice(to))];
}
// Marks of a chat template are soft, and the role after one is bold, so that what was said stands out.
const CONTROL = "<\\|[^|<>\\s]{1,60}\\|>|</?(?:s|bos|eos|pad|unk|think|tool_call|tool_response|start_of_turn|end_of_turn)>|\\[/?INST\\]";
const ROLE_MARK = new RegExp(`(${CONTROL})((?<=<\\|im_start\\|>|<\\|start_header_id\\|>|<start_of_turn>|<\\|start\\|>)\\w+)?`, "g");
const IS_CONTROL = new RegExp(`^(?:${CONTROL})$`);
function speech(text) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(ROLE_MARK)) {
    nodes.push(text.slice(at, found.index), make("span", { class: "control" }, found[1]));
    if (found[2]) nodes.push(make("b", { class: "role" }, found[2]));
    at = found.index + found[0].length;
  }
  return [...nodes, text.slice(at)].filter((node) => node !== "");
}

// The other rollouts of the row at this step are what the reward of this one was compared with.
function siblings(row) {
  const at = state.found.map((i, place) => [ROLLOUTS[i], place]).filter(([other]) => other !== row && other.run === row.run && other.step === row.step && other.group === row.group && other.example === row.example);
  if (!at.length) return null;
  return make("div", { class: "card siblings" }, make("h3", {}, "The same row at this step"), ...at.map(([other, place]) => make("button", { onclick: () => { state.at = place; show(); } },
    make("span", { class: `reward ${other.success ? "good" : "bad"}` }, shown(other.reward ?? null)), make("span", { class: "what" }, decode(other).tokens.slice(0, 80).join("").replace(/\s+/g, " ")))));
}

// A sequential scale for one sign, a diverging one for both: blue is "the teacher likes it more", red is "less".
const tint = (name, value, most) => {
  if (value === null) return "repeating-linear-gradient(45deg,#8886 0 3px,transparent 3px 6px)";
  const share = Math.min(1, Math.abs(value) / most), strength = (share ** 0.7 * 78).toFixed(0);
  if (SIGNED.includes(name)) return `color-mix(in srgb, ${value > 0 ? "#2f7de1" : "#e0503c"} ${strength}%, transparent)`;
  return `color-mix(in srgb, ${name.endsWith("logprobs") ? "#8a4fd1" : "#e08a1e"} ${strength}%, transparent)`;
};
const mostOf = (values) => {
  const known = values.filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  return Math.max(0.05, known.length ? known[Math.floor(0.98 * (known.length - 1))] : 1);
};

function completion(row, columns) {
  const both = columns.student_logprobs && columns.teacher_logprobs, pair = both && state.pair;
  const by = pair ? "student_logprobs" : state.by, box = make("div", { class: "card completion" });
  const most = pair ? Math.max(mostOf(columns.student_logprobs), mostOf(columns.teacher_logprobs)) : mostOf(columns[by] || []);
  const scale = SIGNED.includes(by)
    ? [`−${shown(most)}`, make("i", { style: `background:linear-gradient(90deg,${tint(by, -most, most)},transparent,${tint(by, most, most)})` }), `+${shown(most)}`]
    : ["0", make("i", { style: `background:linear-gradient(90deg,transparent,${tint(by, most, most)})` }), `${by.endsWith("logprobs") ? "−" : ""}${shown(most)}`];
  box.append(make("div", { class: "controls" }, make("h3", {}, "Completion"),
    make("label", {}, "colour: ", make("select", { id: "by", disabled: pair, onchange: (e) => { state.by = e.target.value; show(); } }, ...Object.keys(columns).map((name) => make("option", { value: name, selected: name === state.by }, NAMES[name] || name)))),
    make("span", { class: "scale" }, ...scale, by === "advantage" ? "" : " nats"),
    both ? make("label", {}, make("input", { type: "checkbox", id: "pair", checked: state.pair, style: "width:auto", onchange: (e) => { state.pair = e.target.checked; show(); } }), " student and teacher side by side") : null));
  if (ABOUT[by]) box.append(make("p", { class: "about" }, ABOUT[by]));
  const spans = [];
  if (pair) {
    box.append(make("div", { class: "pair" }, ...["student", "teacher"].map((view) => make("div", {}, make("h3", {}, `what the ${view} thinks: its log-prob`), ...turns(row, columns, `${view}_logprobs`, most, spans)))));
  } else {
    const values = columns[by] || [];
    if (values.length > 20) box.append(strip(values, by, most, spans));
    box.append(...turns(row, columns, by, most, spans));
  }
  if (row.policy_tokens > row.logged) box.append(make("p", { class: "count" }, `${row.policy_tokens - row.logged} more policy tokens were not logged (rollout_log_max_tokens)`));
  return box;
}

// What a reader cannot see gets a sign, so that its colour and its numbers have a place.
const UNSEEN = /^[\p{Cf}\p{Mn}\p{Me}\ufe0e\ufe0f]+$/u;
function piece(text) {
  const sign = (shape, title) => make("i", { class: "sign", title }, shape);
  let parts = [text];
  if (text === "") parts = [sign("◦", "part of a character that the next token ends")];
  else if (UNSEEN.test(text)) parts = [sign("▯", [...text].map((letter) => `U+${letter.codePointAt(0).toString(16).toUpperCase()}`).join(" ")), text];
  else if (text.includes("\n")) parts = text.split("\n").flatMap((line, k) => (k ? [sign("↵"), "\n", line] : [line]));
  const span = make("span", { class: IS_CONTROL.test(text) ? "control" : "" }, ...parts);
  span.piece = text;
  return span;
}

function turns(row, columns, by, most, spans) {
  const { tokens } = decode(row), values = columns[by] || [], out = [];
  let at = 0, policy = 0, turn = 0, said = 0;
  row.runs.forEach((length, k) => {
    if (!length) return;
    const own = k % 2 === 0, box = make("div", { class: "tokens" });
    for (let t = at; t < at + length; t++) {
      const span = piece(tokens[t]);
      if (own) {
        const index = policy++;
        span.style.background = tint(by, values[index] ?? null, most);
        span.dataset.index = index;
        (spans[index] ||= []).push(span);
      }
      box.append(span);
    }
    const read = !own && !(state.pair && by === "student_logprobs") && row.reads.find(([from]) => from === at);
    if (read) box.append(...teacherRead(tokens.slice(at, at + length).join(""), DATA.rollouts.texts[read[1]]));
    at += length;
    // The messages of the episode in order: one assistant turn per own stretch, then what the environment said.
    const speakers = [];
    if (own) { while (turn < row.turns.length && row.turns[turn].role !== "assistant") turn++; if (turn < row.turns.length) speakers.push(row.turns[turn++]); }
    else while (turn < row.turns.length && row.turns[turn].role !== "assistant") speakers.push(row.turns[turn++]);
    const calls = speakers.flatMap((message) => message.calls || []);
    const who = speakers.map((message) => [message.role, message.name].filter(Boolean).join(" ")).join(", ") || (own ? "assistant" : "environment");
    const reward = own && row.turn_rewards.length > 1 ? ` · reward ${shown(row.turn_rewards[said++] ?? null)}` : "";
    const single = row.runs.filter(Boolean).length === 1;
    const text = `${who} · ${length} tokens${reward}${calls.length ? ` · ${calls.join("; ")}` : ""}`;
    out.push(single && !calls.length ? box : make("details", { class: own ? "turn" : "turn other", open: own || length <= 60 || Boolean(read) }, make("summary", {}, text), box));
  });
  return out;
}

// What the teacher alone reads in the place of an answer of the environment: the answer, and the information that came with it.
const teacherRead = (answer, text) => [make("h4", {}, "The teacher reads, PI marked"), make("div", {}, ...marked(answer, text, null))];

function strip(values, by, most, spans) {
  const canvas = make("canvas", { class: "spark", title: "the same numbers token by token; click to go there", onclick: (e) => {
    const found = spans[Math.floor((e.offsetX / canvas.clientWidth) * values.length)];
    if (found) { found[0].scrollIntoView({ block: "center" }); for (const node of document.querySelectorAll(".tokens .on")) node.classList.remove("on"); found[0].classList.add("on"); }
  } });
  requestAnimationFrame(() => {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight, draw = canvas.getContext("2d");
    canvas.width = width * ratio; canvas.height = height * ratio; draw.scale(ratio, ratio);
    const low = Math.min(0, ...values.map((v) => v ?? 0)), high = Math.max(0, ...values.map((v) => v ?? 0)), y = (v) => 2 + ((high - v) / Math.max(1e-9, high - low)) * (height - 4);
    values.forEach((value, i) => {
      if (value === null) return;
      draw.fillStyle = SIGNED.includes(by) ? (value > 0 ? "#2f7de1" : "#e0503c") : by.endsWith("logprobs") ? "#8a4fd1" : "#e08a1e";
      draw.fillRect((i / values.length) * width, Math.min(y(0), y(value)), Math.max(1, width / values.length - 0.5), Math.abs(y(value) - y(0)));
    });
    draw.fillStyle = "#8888"; draw.fillRect(0, y(0), width, 1);
  });
  return canvas;
}

const percent = (share) => (share >= 0.9995 ? "100 %" : share >= 0.001 ? `${+(100 * share).toPrecision(3)} %` : "< 0.1 %");
const tip = make("div", { id: "tip" });
document.body.append(tip);
document.addEventListener("mousemove", (event) => {
  const span = event.target.closest ? event.target.closest("[data-index]") : null;
  if (!span) { tip.style.display = "none"; return; }
  const columns = (show.columns && show.columns.at === state.found[state.at] ? show.columns : (show.columns = { at: state.found[state.at], all: columnsOf(ROLLOUTS[state.found[state.at]]) })).all;
  const index = +span.dataset.index, chance = (name, value) => (name.endsWith("logprobs") && value !== null ? percent(Math.exp(value)) : "");
  const text = span.piece === "" ? "part of a character" : JSON.stringify(span.piece).slice(1, -1);
  tip.replaceChildren(make("code", {}, text), ` token ${index + 1}`, make("table", {}, make("tbody", {}, ...Object.entries(columns).map(([name, values]) =>
    make("tr", {}, make("td", {}, NAMES[name] || name), make("td", {}, values[index] === null || values[index] === undefined ? "–" : values[index].toFixed(3)), make("td", {}, chance(name, values[index] ?? null)))))));
  tip.style.display = "block";
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${event.clientY + 20 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 20}px`;
});

// ---------------------------------------------------------------------------------------------------- texts
function texts() {
  const page = make("div"), pairs = new Map();
  for (const row of DATA.texts) {
    if (!visible[row.run]) continue;
    const key = `${row.run} ${row.step} ${row.row}`;
    pairs.set(key, { ...(pairs.get(key) || {}), [row.view]: row });
  }
  if (!pairs.size) return make("p", {}, "No texts: set rollout_log_steps, and the run writes what student and teacher say to the same rows.");
  for (const pair of [...pairs.values()].reverse()) {
    const views = Object.keys(pair), one = pair[views[0]];
    page.append(make("h2", {}, [RUNS.length > 1 ? RUNS[one.run].name : null, one.step === undefined ? null : `step ${one.step}`, one.example].filter(Boolean).join(" · ")));
    page.append(make("div", { class: "pair" }, ...views.map((view) => make("div", { class: "card" },
      make("h3", {}, `${view}, reward ${shown(pair[view].reward)}${pair[view].stop_reason ? `, stopped: ${pair[view].stop_reason}` : ""}`),
      make("pre", { class: "text" }, pair[view].text)))));
  }
  return page;
}

// ---------------------------------------------------------------------------------------------------- pages and keys
const TABS = { Health: health, Evaluations: evaluations, Rollouts: reader, Texts: texts, Configuration: configuration };
let tab = "Health";
function open(name) {
  tab = name;
  for (const button of document.querySelectorAll("#tabs button")) button.setAttribute("aria-selected", String(button.textContent === name));
  document.getElementById("main").replaceChildren(TABS[name]());
  if (name === "Health") for (const plot of plots) plot.chart = plot.build();
}
document.getElementById("tabs").append(...Object.keys(TABS).map((name) => make("button", { role: "tab", onclick: () => { location.hash = name; } }, name)));
if (RUNS.length > 1) document.getElementById("runs").append(...RUNS.map((run, i) => make("label", {},
  make("input", { type: "checkbox", checked: visible[i], style: "width:auto", onchange: (e) => { visible[i] = e.target.checked; open(tab); } }), make("span", { class: "dot", style: `background:${color(i)}` }), run.name)));
addEventListener("hashchange", () => open(TABS[location.hash.slice(1)] ? location.hash.slice(1) : "Health"));
addEventListener("resize", () => { for (const plot of plots) if (plot.chart && plot.place.isConnected) plot.chart.setSize({ width: Math.max(240, plot.place.clientWidth), height: 170 }); });
addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const names = Object.keys(TABS), number = +event.key;
  if (number >= 1 && number <= names.length) location.hash = names[number - 1];
  else if (tab === "Rollouts" && ["ArrowRight", "j", "n"].includes(event.key)) { event.preventDefault(); move(1); }
  else if (tab === "Rollouts" && ["ArrowLeft", "k", "p"].includes(event.key)) { event.preventDefault(); move(-1); }
  else if (tab === "Rollouts" && event.key === "/") { event.preventDefault(); document.getElementById("f-words").focus(); }
});
open(TABS[location.hash.slice(1)] ? location.hash.slice(1) : "Health");
if (DATA.live) {
  const before = DATA.live;
  setInterval(() => fetch("version").then((answer) => answer.text()).then((now) => { if (now !== before) location.reload(); }).catch(() => {}), 2000);
}
document.documentElement.dataset.ready = String(Math.round(performance.now()));
