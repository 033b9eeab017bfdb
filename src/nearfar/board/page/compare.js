// Runs side by side: verdicts by the code of `nearfar compare`, and the curves of all of them.

import { el } from "/page/serving-parts.js";
import { drawCurves, drawIntervals } from "/page/charts.js";
import { $, get, interval, number, show, signed, table, verdictClass, visible, work } from "/page/shared.js";

const keys = (new URLSearchParams(location.search).get("runs") || "").split(",").filter(Boolean);
const state = { baseline: null, split: null };
const outcome = el("div", {});
const charts = el("div", { class: "charts" });
const list = el("p", { class: "pills legend" });
const more = el("details", { class: "aside", ontoggle: () => { if (more.open) curves(); } }, el("summary", {}, "Health of the embeddings, and the rest"), el("div", { class: "charts" }));
const contents = new Map();

const metricWords = (name) => visible(name.replaceAll("_to_", " → ").replaceAll("/", " · ").replaceAll("_", " "));

function tools(answer) {
  const arms = el("select", { "aria-label": "Baseline", onchange: () => { state.baseline = arms.value; verdicts(); } }, answer.arms.map((arm) => el("option", { value: arm.label }, visible(`baseline: ${arm.label}`))));
  arms.value = answer.arms.find((arm) => arm.baseline).label;
  const splits = el("select", { "aria-label": "Split", onchange: () => { state.split = splits.value; state.baseline = arms.value; verdicts(); } }, answer.splits.map((split) => el("option", { value: split }, `on ${visible(split)}`)));
  splits.value = answer.record.split;
  return el("div", { class: "tools" }, arms, splits);
}

function measured(answer) {
  const { record, arms, monitor } = answer;
  const others = arms.filter((arm) => !arm.baseline && record.differences[arm.label]);
  return answer.tables.map(({ question, rows }) => {
    const heads = ["metric", "chance", ...arms.map((arm) => `${visible(arm.label)} (${arm.runs.length} ${arm.runs.length === 1 ? "seed" : "seeds"})`), ...others.flatMap((arm) => [`${others.length > 1 ? `${visible(arm.label)} − baseline` : "paired difference"}`, "verdict", ...(answer.judged_together > 1 ? [`all ${answer.judged_together} together (Holm)`] : [])])];
    return el("div", { class: "sheet" }, question ? el("h2", {}, visible(question)) : null, table(heads, rows.map((row) => el("tr", { class: row.metric === monitor ? "monitor" : "" },
      el("th", { scope: "row" }, metricWords(row.metric), row.control ? el("span", { class: "muted" }, " (control)") : null), el("td", { class: "number" }, number(row.chance)),
      arms.map((arm) => { const mean = record.means[arm.label]?.[row.metric]; return el("td", { class: "number" }, mean ? [el("b", {}, number(mean[0])), " ", el("span", { class: "muted" }, interval(mean[1], mean[2]))] : "–"); }),
      others.flatMap((arm) => {
        const d = record.differences[arm.label][row.metric];
        const together = record.together[arm.label]?.[row.metric];
        return [el("td", { class: "number" }, d ? `${signed(d.value)} ${interval(d.low, d.high, signed)}` : "–"), el("td", { class: verdictClass(d?.verdict) }, d ? visible(d.verdict) : ""),
          answer.judged_together > 1 ? el("td", { class: verdictClass(together) }, together ? visible(together) : "–") : null];
      })))));
  });
}

function intervals(answer) {
  const { record, arms } = answer;
  return arms.filter((arm) => !arm.baseline && record.differences[arm.label]).map((arm) => {
    const node = el("div", {});
    const rows = Object.entries(record.differences[arm.label]).filter(([metric]) => !record.controls.includes(metric)).map(([metric, d]) => [metricWords(metric), d.value, d.low, d.high]);
    if (!rows.length) return null;
    requestAnimationFrame(() => drawIntervals(node, rows));
    return el("figure", { class: "chart" }, el("figcaption", {}, visible(`${arm.label} − ${record.baseline}`)), node);
  }).filter(Boolean);
}

async function verdicts() {
  try {
    const answer = await work("/api/compare", { runs: keys, ...state }, outcome);
    const refused = [...Object.entries(answer.record.refused), ...Object.entries(answer.left_out)];
    const first = answer.arms.find((arm) => !arm.baseline);
    const kind = verdictClass(answer.record.differences[first?.label]?.[answer.monitor]?.verdict);
    outcome.replaceChildren(tools(answer),
      el("div", { class: `verdict ${kind}` }, answer.paragraphs.map((text) => el("p", {}, visible(text)))),
      ...(refused.length ? [el("div", { class: "sheet" }, el("h2", {}, "Not compared"), el("ul", {}, refused.map(([name, reason]) => el("li", {}, visible(`${name}: ${reason}`)))))] : []),
      ...measured(answer), el("div", { class: "charts" }, intervals(answer)));
  } catch (error) {
    outcome.replaceChildren(el("div", { class: "verdict even" }, el("p", { role: "alert" }, visible(error.message))));
  }
}

// -- curves --------------------------------------------------------------------------------------------------
// Names without what they have in common: of a/b/lr=1 and a/b/lr=2 the last part.
function names() {
  const every = [...contents.values()].map((content) => content.name);
  const parts = every.map((name) => name.split("/"));
  let common = 0;
  while (parts.every((each) => each.length > common + 1 && each[common] === parts[0][common])) common += 1;
  return new Map([...contents.keys()].map((key, i) => [key, parts[i].slice(common).join("/")]));
}

// Runs whose names differ in the seed alone have one colour.
function colouring(short) {
  const arms = [...new Set([...short.values()].map(withoutSeed))];
  return new Map([...short].map(([key, name]) => [key, arms.indexOf(withoutSeed(name))]));
}
const withoutSeed = (name) => name.replace(/,?\bseed=\d+/, "");

// The lines of one name of all runs in one chart; of several lines of a loss the training one. A level is drawn where
// all runs of a chart have it in common.
function overlaid(short, colour) {
  const merged = new Map();
  for (const [key, content] of contents) {
    for (const curves of content.curves) {
      for (const [name, line] of Object.entries(curves.series)) {
        const main = name === "training" || name === "realised" || name.startsWith("training, by epoch");
        if (curves.title === "Training loss" && !main) continue;
        const title = main ? curves.title : `${curves.title}: ${name}`;
        if (!merged.has(title)) merged.set(title, { ...curves, title, first: main || curves.title === "Validation", series: {}, colour: {}, levels: {}, seen: [] });
        const chart = merged.get(title);
        chart.series[short.get(key)] = line;
        chart.colour[short.get(key)] = colour.get(key);
        chart.seen.push(Object.fromEntries(Object.entries(curves.levels).filter(([level]) => !level.startsWith("chance") || level.endsWith(name))));
      }
    }
  }
  for (const chart of merged.values()) {
    chart.levels = Object.fromEntries(Object.entries(chart.seen[0]).filter(([level, value]) => chart.seen.every((each) => Math.abs(each[level] - value) < 1e-6)));
  }
  return [...merged.values()];
}

function grid(host, every) {
  const known = new Map([...host.children].map((node) => [node.dataset.title, node]));
  host.replaceChildren(...every.map(({ title }) => known.get(title) || el("figure", { class: "chart", "data-title": title }, el("figcaption", {}, visible(title)), el("div", {}))));
  every.forEach((each, i) => drawCurves(host.children[i].lastChild, each, false));
}

async function curves() {
  const problems = [];
  await Promise.all(keys.map(async (key) => {
    try { contents.set(key, await get(`/api/runs/${key}`)); } catch (error) { contents.delete(key); problems.push(error.message); }
  }));
  const ordered = keys.filter((key) => contents.has(key)).map((key) => [key, contents.get(key)]);
  contents.clear();
  for (const [key, content] of ordered) contents.set(key, content);
  show($("problem"), [...new Set(problems)].join(" "));
  const short = names();
  const colour = colouring(short);
  list.replaceChildren(...[...contents].map(([key, content]) => el("a", { class: `pill c${colour.get(key) % 8}`, href: `/run/${key}`, title: visible(content.name) }, visible(short.get(key)))));
  const every = overlaid(short, colour);
  grid(charts, every.filter((each) => each.first));
  const rest = every.filter((each) => !each.first);
  more.hidden = !rest.length;
  if (more.open) grid(more.lastChild, rest);
  document.title = `${contents.size} runs · nearfar`;
  $("about").textContent = `${contents.size} runs`;
}

$("panel").replaceChildren(list, outcome, el("h2", {}, "Curves"), charts, more);
if (keys.length < 2) {
  show($("problem"), "Select two or more runs in the table, and compare them from there.");
} else {
  verdicts();
  await curves();
  setInterval(() => { if (!document.hidden && [...contents.values()].some((content) => content.row.status === "training")) curves(); }, 4000);
}
