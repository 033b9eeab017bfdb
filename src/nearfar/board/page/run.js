// A run's page: what it is doing, curves, findings, results, a batch, examples, a map, questions, files.

import { el } from "/page/serving-parts.js";
import { drawCurves } from "/page/charts.js";
import { mapPanel } from "/page/map.js";
import { $, ago, follow, get, interval, number, show, signed, status, table, verdictClass, visible, work } from "/page/shared.js";

const key = location.pathname.split("/").pop();
const api = `/api/runs/${key}`;
const state = { content: null, tab: location.hash.slice(1) || "training", kept: new Map() };

// -- findings ------------------------------------------------------------------------------------------------
function finding(f) {
  const evidence = typeof f.evidence === "string" ? { text: f.evidence } : f.evidence || {};
  const numbers = Object.entries(evidence).filter(([name, value]) => name !== "text" && typeof value === "number");
  const tried = [f.override, ...(f.then || [])].filter(Boolean);
  const severity = ["error", "warning"].includes(f.severity) ? f.severity : "note";
  return el("article", { class: `finding ${severity}` },
    el("h3", {}, el("span", { class: "severity" }, severity), " ", visible(f.title || f.id)),
    evidence.text ? el("p", {}, visible(evidence.text)) : null,
    f.cause ? el("p", {}, el("span", { class: "muted" }, "Likely cause: "), visible(f.cause)) : null,
    state.content.row.kind === "nearfar" && tried.length ? el("p", {}, el("span", { class: "muted" }, "Try: "), tried.flatMap((each, i) => [i ? ", then " : "", el("code", {}, visible(each))])) : null,
    f.advice ? el("p", {}, visible(f.advice)) : null,
    el("details", {}, el("summary", {}, visible(f.id)),
      numbers.length ? el("dl", {}, numbers.flatMap(([name, value]) => [el("dt", {}, visible(name)), el("dd", {}, String(Number(value.toPrecision(4))))])) : null,
      f.source ? el("p", { class: "muted" }, visible(f.source)) : null));
}

function verdict(content) {
  const { diagnosis } = content;
  const grave = diagnosis.findings.filter((f) => f.severity !== "note");
  const kind = grave.some((f) => f.severity === "error") ? "bad" : grave.length || !diagnosis.judged ? "even" : "good";
  return el("div", { class: `verdict ${kind}` },
    diagnosis.gain ? el("p", {}, visible(diagnosis.gain)) : null,
    el("p", {}, el("span", { class: "muted" }, "Doctor: "), visible(diagnosis.verdict)),
    diagnosis.read_as.length ? el("details", {}, el("summary", {}, "How this log was read"), el("ul", {}, diagnosis.read_as.map((line) => el("li", {}, visible(line))))) : null);
}

// -- training ------------------------------------------------------------------------------------------------
function grid(host, curves) {
  const known = new Map([...host.children].map((card) => [card.dataset.title, card]));
  const cards = curves.map((each) => {
    const card = known.get(each.title) || el("figure", { class: "chart", "data-title": each.title }, el("figcaption", {}, visible(each.title)), el("div", {}));
    return [card, each];
  });
  const wanted = cards.map(([card]) => card);
  if (wanted.length !== host.children.length || wanted.some((card, i) => host.children[i] !== card)) host.replaceChildren(...wanted);
  for (const [card, each] of cards) drawCurves(card.lastChild, each);
}

function training(host) {
  const content = state.content;
  if (!host.querySelector(".charts")) {
    const more = el("details", { class: "aside", ontoggle: () => { if (more.open) grid(more.querySelector(".charts"), state.content.more); } }, el("summary", {}, "More of every step"), el("div", { class: "charts" }));
    host.replaceChildren(el("div", { class: "findings" }), el("div", { class: "charts main" }), more);
  }
  const opened = new Set([...host.querySelectorAll(".finding details[open] summary")].map((node) => node.textContent));
  host.querySelector(".findings").replaceChildren(verdict(content), ...content.diagnosis.findings.map(finding));
  for (const node of host.querySelectorAll(".finding summary")) if (opened.has(node.textContent)) node.parentNode.open = true;
  const charts = host.querySelector(".charts.main");
  if (content.curves.length) grid(charts, content.curves);
  else charts.replaceChildren(el("p", { class: "empty" }, "Nothing is logged yet: curves appear with the first steps."));
  const more = host.querySelector("details.aside:last-child");
  more.hidden = !content.more.length;
  if (more.open) grid(more.querySelector(".charts"), content.more);
}

// -- results -------------------------------------------------------------------------------------------------
function results(host) {
  const { results: tables, monitor } = state.content;
  if (!tables.length) {
    const newest = Object.entries(state.content.row.newest || {});
    host.replaceChildren(el("p", { class: "muted" }, "Results with intervals stand here once the run is finished. The newest validation:"),
      newest.length ? table(["metric", "value"], newest.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, visible(name)), el("td", { class: "number" }, number(value))))) : el("p", { class: "empty" }, "none yet"));
    return;
  }
  host.replaceChildren(el("p", { class: "muted" }, "Intervals are at 95 % and hold for new items and this trained model; a different seed may give a different result (compare several seeds)."),
    ...tables.map(({ split, question, rows }) => {
      const gains = rows.some((row) => row.gain);
      const galleries = rows.some((row) => row.gallery);
      const heads = ["metric", "value", "95 % interval", "chance", ...(gains ? ["before training", "changed by training", ""] : []), ...(galleries ? ["gallery"] : []), "n"];
      return el("div", { class: "sheet" }, el("h2", {}, visible(question ? `${split} · ${question}` : split)), table(heads, rows.map((row) => el("tr", { class: row.metric === monitor ? "monitor" : "" },
        el("th", { scope: "row" }, visible(row.words), row.control ? el("span", { class: "muted" }, " (control)") : null),
        el("td", { class: "number" }, number(row.value)), el("td", { class: "number" }, interval(row.low, row.high)), el("td", { class: "number" }, number(row.chance)),
        gains ? [el("td", { class: "number" }, number(row.before)), el("td", { class: "number" }, row.gain ? `${signed(row.gain.value)} ${interval(row.gain.low, row.gain.high, signed)}` : "–"), el("td", { class: verdictClass(row.gain?.verdict) }, row.gain ? visible(row.gain.verdict) : "")] : null,
        galleries ? el("td", { class: "number" }, row.gallery ? visible(row.gallery) : "–") : null,
        el("td", { class: "number" }, `${row.n}${row.trivial ? " (trivial)" : ""}`)))));
    }), el("div", { class: "sections" }));
  get(`${api}/sections`).then((sections) => host.querySelector(".sections")?.replaceChildren(...sections.map(section)), () => {});
}

const cell = (value) => (value === null ? "–" : typeof value === "number" && !Number.isInteger(value) ? number(value) : visible(value));
function section({ title, lead, tables, pictures }) {
  return el("div", { class: "sheet" }, el("h2", {}, visible(title)), lead ? el("p", { class: "muted" }, visible(lead)) : null,
    tables.map((each) => [table(each.columns.map(visible), each.rows.map((row) => el("tr", {}, row.map((value) => el("td", { class: typeof value === "number" ? "number" : "" }, cell(value)))))), each.caption ? el("p", { class: "muted" }, visible(each.caption)) : null]).flat(),
    pictures.length ? el("div", { class: "pictures" }, pictures.map((p) => el("figure", {}, p.picture ? el("img", { src: p.picture, alt: p.caption, loading: "lazy" }) : null, el("figcaption", { class: "muted" }, visible(p.caption))))) : null);
}

// -- items ---------------------------------------------------------------------------------------------------
function item(shown, lines, kind = "") {
  return el("div", { class: `item ${kind}` },
    shown.picture ? el("div", { class: "plate" }, el("img", { src: shown.picture, alt: shown.text || "", loading: "lazy" })) : null,
    shown.text ? el("p", { class: "text", title: visible(shown.text) }, visible(shown.text)) : null,
    lines.map((line) => (line ? el("p", { class: "muted" }, line) : null)));
}

async function examples(host) {
  const every = await get(`${api}/examples`);
  if (!every.length) {
    host.replaceChildren(el("p", { class: "empty" }, "This run has no examples: they are written when a run of retrieval is finished."));
    return;
  }
  host.replaceChildren(el("p", { class: "muted" }, "The first answers to a query, drawn from the evaluated split; the right one is framed."),
    ...every.map((example) => el("div", { class: "sheet example" },
      el("div", {}, el("p", { class: "muted" }, `${visible(example.kind)}: the right answer is at rank ${example.rank} of ${example.gallery}`), item(example.query, [])),
      el("div", { class: "items" }, example.items.map((each) => item(each, [`${each.rank}. ${number(each.score)}${each.correct ? " · right" : ""}`], each.correct ? "right" : ""))))));
}

// -- a batch -------------------------------------------------------------------------------------------------
function batch(host) {
  if (!state.content.has?.checkpoint) {
    host.replaceChildren(el("p", { class: "empty" }, "A batch is explained under the weights of a checkpoint, and this run has none yet."));
    return;
  }
  const which = el("input", { type: "number", min: 1, value: 1, "aria-label": "Number of the batch in the epoch" });
  const weights = el("select", { "aria-label": "Weights" }, el("option", { value: "last" }, "newest weights"), el("option", { value: "best" }, "best weights"));
  const outcome = el("div", {});
  const go = async (event) => {
    event.preventDefault();
    button.disabled = true;
    try {
      const answer = await work(`${api}/explain`, { batch: which.valueAsNumber || 1, checkpoint: weights.value }, outcome);
      which.max = answer.batches;
      outcome.replaceChildren(...explained(answer));
    } catch (error) {
      outcome.replaceChildren(el("p", { class: "problem", role: "alert" }, visible(error.message)));
    }
    button.disabled = false;
  };
  const button = el("button", { class: "primary" }, "Explain this batch");
  host.replaceChildren(el("p", { class: "muted" }, "Positives, hardest negatives and what was left out, row by row: the run's data and model are loaded for it."),
    el("form", { class: "tools", onsubmit: go }, el("label", {}, "Batch ", which), weights, button), outcome);
}

function explained({ title, about, batches, pairs }) {
  const others = (kind, rows) => rows.map((other) => item(other.shown, [
    `${kind} · ${visible(other.shown.id)}`, `cosine ${signed(other.similarity)} · p ${number(other.probability)}`,
    other.why ? `${kind === "negative" ? "likely a positive: " : ""}${visible(other.why)}` : null,
  ], kind === "positive" ? "right" : kind === "negative" && other.why ? "wrong" : ""));
  return [el("h2", {}, visible(title)), el("p", { class: "muted" }, visible(`${about} The epoch has ${batches} batches.`)),
    ...pairs.flatMap((pair) => [
      el("h3", {}, visible(pair.name)),
      el("p", { class: "muted" }, visible(`${pair.queries} queries among ${pair.keys} keys at temperature ${Number(pair.temperature.toPrecision(4))}. ${pair.notes.map((note) => `${note}. `).join("")}${pair.likely_false ? `${pair.likely_false} of the negatives shown are likely positives (red).` : ""}`)),
      ...pair.rows.map((row) => el("div", { class: "sheet example" },
        el("div", {}, item(row.shown, [visible(row.shown.id), `${row.candidates} candidates, ${row.masked} left out`, `p(positive) ${number(row.p_positive)}`])),
        el("div", { class: "items" }, others("positive", row.positives), others("negative", row.negatives), others("left out", row.left_out)))),
    ])];
}

// -- use, files ----------------------------------------------------------------------------------------------
function use(host) {
  if (!state.content.has?.checkpoint && state.content.row.kind === "nearfar") {
    host.replaceChildren(el("p", { class: "empty" }, "There is no checkpoint yet that could be asked."));
    return;
  }
  const outcome = el("div", {});
  const button = el("button", { class: "primary", type: "button", onclick: async () => {
    button.disabled = true;
    try {
      const { address, note } = await work(`${api}/use`, {}, outcome);
      outcome.replaceChildren(...[note ? el("p", { class: "muted" }, visible(note)) : null, el("p", {}, el("a", { href: address, class: "button", target: "_blank", rel: "noopener" }, "Open its page"))].filter(Boolean));
    } catch (error) {
      outcome.replaceChildren(el("p", { class: "problem", role: "alert" }, visible(error.message)));
    }
    button.disabled = false;
  } }, "Load the model");
  host.replaceChildren(el("p", { class: "muted" }, "Search in the run's own data, or predict, with its best weights: the page of nearfar serve. Vectors are kept in the cache, and nothing is written into the run."), button, outcome);
}

async function files(host) {
  const every = await get(`${api}/files`);
  host.replaceChildren(el("p", { class: "muted" }, visible(state.content.path)), ...every.map(({ name, text }, i) => el("details", { class: "aside", open: i === 0 }, el("summary", {}, name), el("pre", {}, visible(text)))));
}

// -- the page ------------------------------------------------------------------------------------------------
const TABS = [
  ["training", "Training", training, true], ["results", "Results", results, true], ["batch", "A batch", batch], ["examples", "Examples", examples],
  ["map", "Map", (host) => mapPanel(host, api, state.content)], ["use", "Search, predict", use], ["files", "Files", files],
];

function tabs() {
  const own = state.content.row.kind === "nearfar";
  const some = TABS.filter(([id]) => own || id === "training");
  if (!some.some(([id]) => id === state.tab)) state.tab = "training";
  $("tabs").hidden = some.length < 2;
  $("tabs").replaceChildren(...some.map(([id, words]) => el("a", { href: `#${id}`, "aria-current": id === state.tab ? "page" : null }, words)));
}

async function panel() {
  const [id, , draw, live] = TABS.find(([each]) => each === state.tab);
  let host = state.kept.get(id);
  const fresh = !host;
  if (fresh) state.kept.set(id, (host = el("div", { class: `part part-${id}` })));
  if ($("panel").firstChild !== host) $("panel").replaceChildren(host);
  if (!fresh && !live) return;
  try {
    await draw(host);
  } catch (error) {
    state.kept.delete(id);
    host.replaceChildren(el("p", { class: "problem", role: "alert" }, visible(error.message)));
  }
}

function changed(content) {
  const before = state.content;
  state.content = content;
  const { row } = content;
  document.title = `${content.name} · nearfar`;
  $("name").textContent = visible(content.name);
  if (before && (before.row.status !== row.status || before.has?.checkpoint !== content.has?.checkpoint)) {
    for (const [id, , , live] of TABS) if (!live && ["batch", "examples", "use"].includes(id) && id !== state.tab) state.kept.delete(id);
  }
  about();
  tabs();
  panel();
}

function about() {
  const { row } = state.content;
  const where = [row.epoch === null ? null : `epoch ${row.epoch}${row.epochs ? ` of ${row.epochs}` : ""}`, row.step === null ? null : `step ${row.step}`, row.loss === null ? null : `loss ${number(row.loss)}`, `changed ${ago(row.written)}`];
  $("about").replaceChildren(status(row.status), " · ", visible([row.system ?? state.content.kind, ...where].filter(Boolean).join(" · ")));
}

addEventListener("hashchange", () => { state.tab = location.hash.slice(1) || "training"; if (state.content) { tabs(); panel(); } });
setInterval(() => { if (state.content && !document.hidden) about(); }, 5000);

await follow(api, changed, (problem) => {
  show($("problem"), problem);
  $("panel").classList.toggle("stale", Boolean(problem));
  if (problem && !state.content) { $("name").textContent = "This run cannot be shown"; $("panel").replaceChildren(el("p", {}, el("a", { href: "/" }, "All runs"))); }
}, (last) => (!last || last.row.status === "training" ? 2000 : 6000));
