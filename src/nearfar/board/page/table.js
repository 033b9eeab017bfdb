// The table of runs: sorted by a click on a column's name, filtered by words and conditions, followed while runs train.

import { el } from "/page/serving-parts.js";
import { $, ago, follow, interval, number, show, signed, status, verdictClass, visible } from "/page/shared.js";

const store = (name, fallback) => { try { return JSON.parse(localStorage.getItem(name)) ?? fallback; } catch { return fallback; } };
const keep = (name, value) => { try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* a browser that keeps nothing */ } };
const state = { rows: [], options: [], sort: store("board-sort", { by: "written", down: true }), chosen: new Set(), hidden: store("board-hidden", {}) };

const short = (key) => key.replace(/\.(name|kind)$/, "");
const word = (value) => (value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : visible(value));

// A long name is broken where its parts end.
const breakable = (name) => visible(name).split(/(?<=[/,])/).flatMap((part) => [part, el("wbr")]);

function result(row) {
  const r = row.result;
  if (!r) return "";
  const title = `${visible(r.words)} on ${visible(r.split)}${r.chance === null || r.chance === undefined ? "" : `, chance ${number(r.chance)}`}`;
  return el("span", { title }, el("b", {}, number(r.value)), " ", el("span", { class: "muted" }, interval(r.low, r.high)));
}

function findings(row) {
  if (row.status === "broken") return el("span", { class: "tag negative", title: visible(row.problem) }, "cannot be read");
  if (row.findings === null) return el("span", { class: "muted" }, "…");
  const grave = row.findings.filter(([severity]) => severity !== "note");
  if (!grave.length) return el("span", { class: "muted" }, row.findings.length ? `${row.findings.length} note${row.findings.length > 1 ? "s" : ""}` : "none");
  return el("span", { class: "pills" }, grave.map(([severity, id]) => el("span", { class: `pill ${severity === "error" ? "error" : "warning"}`, title: severity }, id)));
}

// name, what it is sorted and filtered by, what it shows, whether it is a number
function columns() {
  const result0 = (row) => row.result?.value ?? null;
  const base = [
    { id: "status", value: (row) => row.status || "log", cell: (row) => status(row.status) },
    { id: "system", value: (row) => row.system ?? row.kind, cell: (row) => (row.system ? word(row.system) : el("span", { class: "muted", title: row.kind }, row.kind.replace(/ [\w.-]+\.\w+$/, ""))) },
    ...state.options.map((key) => ({ id: key, head: short(key), value: (row) => (typeof row.options[key] === "number" ? row.options[key] : word(row.options[key])), cell: (row) => word(row.options[key]), option: true })),
    { id: "seed", value: (row) => row.seed, number: true },
    { id: "epoch", value: (row) => row.epoch, cell: (row) => (row.epoch === null ? "" : row.epochs ? `${row.epoch} / ${row.epochs}` : String(row.epoch)), number: true },
    { id: "step", value: (row) => row.step, number: true },
    { id: "loss", value: (row) => row.loss, cell: (row) => (row.loss === null ? "" : number(row.loss)), number: true },
    { id: "metric", value: (row) => row.result?.words ?? "", cell: (row) => word(row.result?.words) },
    { id: "result", value: result0, cell: result, number: true },
    { id: "chance", value: (row) => row.result?.chance ?? null, cell: (row) => (Number.isFinite(row.result?.chance) ? number(row.result.chance) : ""), number: true },
    { id: "gain", head: "by training", value: (row) => row.gain?.value ?? null, cell: (row) => (row.gain ? el("span", { class: verdictClass(row.gain.verdict), title: visible(row.gain.verdict) }, signed(row.gain.value)) : ""), number: true },
    { id: "findings", value: (row) => (row.findings ?? []).reduce((sum, [s]) => sum + ({ error: 1000, warning: 1 }[s] ?? 0), 0), text: (row) => (row.findings ?? []).map(([, id]) => id).join(" "), cell: findings },
    { id: "seconds", value: (row) => row.seconds, cell: (row) => (row.seconds === null ? "" : number(row.seconds)), number: true },
    { id: "written", head: "changed", value: (row) => row.written, cell: (row) => ago(row.written), number: true },
  ];
  return [{ id: "name", value: (row) => row.name, fixed: true, cell: (row) => el("a", { href: `/run/${row.key}` }, breakable(row.name)) }, ...base];
}
const away = ["step", "chance", "seconds"]; // columns that are not shown until they are chosen
const shownByDefault = (column, at) => !away.includes(column.id) && !(column.option && at > 6);
const isShown = (column, at) => column.fixed || (state.hidden[column.id] === undefined ? shownByDefault(column, at) : !state.hidden[column.id]);

// -- filter --------------------------------------------------------------------------------------------------
const CONDITION = /^([^<>=]+)(<=|>=|<|>|=)(.*)$/;
function passes(row, words, wanted, every) {
  if (wanted && row.status !== wanted) return false;
  const text = [row.name, row.kind, row.status, row.system, ...Object.entries(row.options).map(([k, v]) => `${short(k)}=${word(v)}`), ...(row.findings ?? []).flat(), row.result?.words].join(" ").toLowerCase();
  return words.every((each) => {
    const match = CONDITION.exec(each);
    const column = match && every.find((one) => one.id.toLowerCase() === match[1] || (one.head ?? "").toLowerCase() === match[1]);
    if (!column) return text.includes(each);
    const value = column.value(row);
    const number = Number(match[3]);
    if (match[2] === "=") return typeof value === "number" && match[3] !== "" && Number.isFinite(number) ? value === number : String(value ?? "").toLowerCase() === match[3];
    if (value === null || value === "" || !Number.isFinite(Number(value)) || !Number.isFinite(number)) return false;
    return { "<": value < number, ">": value > number, "<=": value <= number, ">=": value >= number }[match[2]];
  });
}

function compared(a, b) {
  const empty = (x) => x === null || x === undefined || x === "";
  if (empty(a) || empty(b)) return empty(a) - empty(b); // what has no value comes last, whichever way
  const by = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return state.sort.down ? -by : by;
}

// -- drawing -------------------------------------------------------------------------------------------------
function drawHead(shown) {
  const all = el("input", { type: "checkbox", "aria-label": "Select all runs that are shown", onchange: () => { for (const row of state.visible) { if (all.checked) state.chosen.add(row.key); else state.chosen.delete(row.key); } draw(); } });
  all.checked = state.visible.length > 0 && state.visible.every((row) => state.chosen.has(row.key));
  const heads = shown.map((column) => {
    const sorted = state.sort.by === column.id;
    const button = el("button", { type: "button", onclick: () => { state.sort = { by: column.id, down: sorted ? !state.sort.down : Boolean(column.number) }; keep("board-sort", state.sort); draw(); } },
      visible(column.head ?? column.id), sorted ? (state.sort.down ? " ↓" : " ↑") : "");
    return el("th", { scope: "col", class: column.number ? "number" : "", "aria-sort": sorted ? (state.sort.down ? "descending" : "ascending") : null, "data-column": column.id }, button);
  });
  $("rows").tHead.replaceChildren(el("tr", {}, el("th", { class: "box" }, all), heads));
}

function draw() {
  const focused = document.activeElement?.dataset?.key;
  const every = columns();
  const shown = every.filter(isShown);
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const sorting = every.find((column) => column.id === state.sort.by) ?? every[0];
  state.visible = state.rows.filter((row) => passes(row, words, $("status").value, every))
    .map((row) => [sorting.value(row), row]).sort(([a], [b]) => compared(a, b)).map(([, row]) => row);
  drawHead(shown);
  $("rows").tBodies[0].replaceChildren(...state.visible.map((row) => {
    const box = el("input", { type: "checkbox", "aria-label": `Select ${row.name}`, "data-key": row.key, onchange: () => { if (box.checked) state.chosen.add(row.key); else state.chosen.delete(row.key); tools(); } });
    box.checked = state.chosen.has(row.key);
    return el("tr", { class: row.status === "broken" ? "broken" : "" }, el("td", { class: "box" }, box),
      shown.map((column) => { const content = column.cell ? column.cell(row) : word(column.value(row)); return column.fixed ? el("th", { scope: "row" }, content) : el("td", { class: column.number ? "number" : "" }, content); }));
  }));
  if (focused) document.querySelector(`[data-key="${focused}"]`)?.focus();
  if (!state.visible.length) $("rows").tBodies[0].append(el("tr", {}, el("td", { class: "empty", colspan: shown.length + 1 }, state.rows.length ? "No run passes this filter." : "No run is here yet. A run appears as soon as it starts: nearfar train experiment=pairs")));
  tools();
}

function tools() {
  const live = state.rows.filter((row) => row.status === "training").length;
  const passing = state.visible.length === state.rows.length ? "" : `${state.visible.length} of `;
  $("count").textContent = `${passing}${state.rows.length} run${state.rows.length === 1 ? "" : "s"}${live ? `, ${live} training` : ""}${state.unread ? `, reading ${state.unread} more` : ""}`;
  const chosen = state.rows.filter((row) => state.chosen.has(row.key));
  $("compare").textContent = chosen.length ? `Compare ${chosen.length}` : "Compare";
  $("compare").disabled = chosen.length < 2;
}

function chooser() {
  $("columns").replaceChildren(...columns().map((column, at) => {
    if (column.fixed) return null;
    const box = el("input", { type: "checkbox", onchange: () => { state.hidden[column.id] = !box.checked; keep("board-hidden", state.hidden); draw(); } });
    box.checked = isShown(column, at);
    return el("label", {}, box, " ", visible(column.head ?? column.id));
  }).filter(Boolean));
}

function below(answer) {
  const parts = [];
  const broken = answer.rows.filter((row) => row.status === "broken");
  if (broken.length) parts.push(el("details", { class: "aside", open: broken.length < 4 }, el("summary", {}, `${broken.length} run${broken.length > 1 ? "s" : ""} that cannot be read`), el("ul", {}, broken.map((row) => el("li", {}, visible(`${row.name}: ${row.problem}`))))));
  if (answer.skipped.length) parts.push(el("details", { class: "aside" }, el("summary", {}, `${answer.skipped.length} file${answer.skipped.length > 1 ? "s" : ""} here that the doctor does not read as a log`), el("ul", {}, answer.skipped.map((each) => el("li", {}, visible(`${each.name}: ${each.problem}`))))));
  $("below").replaceChildren(...parts);
}

function changed(answer) {
  Object.assign(state, { rows: answer.rows, options: answer.options, unread: answer.unread });
  $("root").textContent = visible(answer.root);
  document.title = `${answer.root} · nearfar`;
  const open = document.querySelector(".chooser").open;
  if (!open) chooser();
  draw();
  below(answer);
}

$("filter").addEventListener("input", draw);
$("status").addEventListener("change", draw);
document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());
$("compare").addEventListener("click", () => { location.href = `/compare?runs=${state.rows.filter((row) => state.chosen.has(row.key)).map((row) => row.key).join(",")}`; });
document.addEventListener("click", (event) => { const open = document.querySelector(".chooser[open]"); if (open && !open.contains(event.target)) open.open = false; });
setInterval(() => { if (!document.hidden && state.rows.length <= 1000) draw(); }, 30000);

await follow("/api/runs", changed, (problem) => show($("problem"), problem), (last) => (last?.unread ? 600 : !last || last.judging || last.rows.some((row) => row.status === "training") ? 2000 : 5000));
