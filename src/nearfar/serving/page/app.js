// The page: what is asked, and where the answer goes.

import { ask, choices, el, field, ItemInput, NumbersInput, PairInput, PictureInput, TextInput } from "./parts.js";
import { showHits, showItems, showPredictions, slideMap } from "./results.js";

const $ = (id) => document.getElementById(id);
const glide = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth");
const state = { mode: "search", view: null, target: null, item: null, inputs: {}, slides: new Map() };
let about;

// -- what is asked -------------------------------------------------------------------------------------------
function newInput(name, form, kind, text) {
  if (form === "text") return new TextInput(name, kind, text);
  if (form === "numbers") return new NumbersInput(name);
  if (form === "pair") return new PairInput(name, about.named_pairs);
  return new PictureInput(name);
}

function drawForm() {
  const modes = [["predict", "Predict"], ["search", "Search"]].filter(([mode]) => (mode === "search" ? about.searches.length : Object.keys(about.predicts).length));
  choices($("modes"), "mode", modes, state.mode, (mode) => { state.mode = mode; state.item = null; $("results").replaceChildren(); drawForm(); });
  $("picker").hidden = true;
  $("problem").hidden = true;
  const searching = state.mode === "search";
  $("go").textContent = searching ? "Search" : "Predict";
  $("draw").hidden = !searching || !about.gallery;
  $("input").replaceChildren();
  $("options").replaceChildren();
  state.inputs = {};
  if (searching) drawSearch();
  else drawPredict();
}

function drawSearch() {
  const asked = [...new Set(about.searches.map(([view]) => view))];
  if (!asked.includes(state.view)) state.view = ["text", "picture", "pair"].map((form) => asked.find((view) => about.views[view].form === form)).find(Boolean) || asked[0];
  choices($("views"), "view", asked.map((view) => [view, view]), state.view, (view) => { state.view = view; state.item = null; state.target = null; drawForm(); });
  const targets = about.searches.filter(([view]) => view === state.view).map(([, target]) => target);
  if (!targets.includes(state.target)) state.target = targets.find((target) => target !== state.view) || targets[0];
  if (state.item) {
    const chosen = new ItemInput(state.item, state.view, () => { state.item = null; drawForm(); });
    $("input").append(chosen.node);
  } else {
    const { form, kind } = about.views[state.view];
    state.inputs.query = newInput(`Query: ${state.view}`, form, kind);
    $("input").append(state.inputs.query.node);
  }
  if (targets.length > 1) {
    const select = el("select", { onchange: () => { state.target = select.value; } }, targets.map((target) => el("option", { value: target }, target)));
    select.value = state.target;
    $("options").append(field("Look for", select));
  }
  state.count = el("select", {}, [6, 12, 24, 60].map((k) => el("option", { value: k }, String(k))));
  state.count.value = "12";
  $("options").append(field("How many", state.count));
  if (about.columns.length) {
    state.where = el("input", { type: "text", placeholder: `${about.columns[0]}=…` });
    $("options").append(field("Only where", state.where));
  } else state.where = null;
}

function drawPredict() {
  $("views").replaceChildren();
  for (const [name, form] of Object.entries(about.predicts)) {
    const words = { pair: "Two objects in a picture", image: "Picture" }[name] || name;
    const input = newInput(words, form, about.views[name]?.kind || "text");
    state.inputs[name] = input;
    $("input").append(input.node);
  }
}

// -- asking --------------------------------------------------------------------------------------------------
function busy(on, words = "") {
  $("go").disabled = on;
  $("status").textContent = words;
  $("results").setAttribute("aria-busy", String(on));
}

function problem(error) {
  const list = (error.problems || []).filter((each) => each.reason && !error.message.includes(each.reason));
  $("problem").replaceChildren(error.message, ...(list.length ? [el("ul", {}, list.map((each) => el("li", {}, `${each.where}: ${each.reason}`)))] : []));
  $("problem").hidden = false;
}

async function send() {
  $("problem").hidden = true;
  const began = performance.now();
  try {
    busy(true, "…");
    if (state.mode === "search") await search(began);
    else await predict();
    if (innerWidth < 700) $("results").scrollIntoView({ behavior: glide(), block: "start" });
  } catch (error) {
    busy(false);
    problem(error);
  }
}

async function search(began) {
  const body = { tower: state.view, target: state.target, k: Number(state.count.value) };
  if (state.item) body.item = state.item.position;
  else body.query = await state.inputs.query.value();
  if (state.where?.value.trim()) body.where = [state.where.value.trim()];
  const answer = await ask("search", body);
  const seconds = (performance.now() - began) / 1000;
  busy(false, "");
  showHits($("results"), answer, `${answer.tower} → ${answer.target}, ${about.gallery.toLocaleString("en")} items, ${seconds < 10 ? seconds.toFixed(2) : Math.round(seconds)} s`, useItem);
  await showSlides(answer.hits);
}

async function showSlides(hits) {
  const names = [...new Set(hits.filter((hit) => hit.spot).map((hit) => hit.spot.slide))].slice(0, 3);
  const figures = [];
  for (const name of names) {
    if (!state.slides.has(name)) state.slides.set(name, await ask(`gallery/slide?name=${encodeURIComponent(name)}`));
    figures.push(slideMap(state.slides.get(name), hits, useSpot));
  }
  if (figures.length) $("results").firstElementChild.after(el("div", { class: "slides" }, figures));
}

async function predict() {
  const columns = {};
  const shown = {};
  for (const [name, input] of Object.entries(state.inputs)) {
    columns[name] = [await input.value()];
    if (input instanceof TextInput) shown.text = columns[name][0];
    if (input.url) shown.url = input.url;
    if (input instanceof PairInput) { shown.pair = input.boxes.slice(); shown.names = input.called; }
  }
  const answer = await ask("predict", { columns });
  busy(false, "");
  showPredictions($("results"), answer, () => shown);
}

// -- the gallery ---------------------------------------------------------------------------------------------
function useItem(item) {
  const views = [...new Set(about.searches.map(([view]) => view))].filter((view) => item.shown[view]);
  if (!views.length) return;
  if (!views.includes(state.view)) { state.view = views[0]; state.target = null; }
  state.item = item;
  drawForm();
  scrollTo({ top: 0, behavior: glide() });
  send();
}

async function useSpot(position) {
  try {
    const page = await ask(`gallery?start=${position}&count=1`);
    useItem(page.items[0]);
  } catch (error) { problem(error); }
}

async function pick() {
  $("problem").hidden = true;
  try {
    const page = await ask("gallery?draw=true&count=12");
    showItems($("picker"), page, [state.view], useItem, pick);
    $("picker").querySelector("li button")?.focus();
  } catch (error) { problem(error); }
}

// -- start ---------------------------------------------------------------------------------------------------
function headline() {
  const { results } = about;
  document.title = `${about.name} · nearfar`;
  $("name").textContent = about.name;
  const parts = [about.system];
  if (about.gallery) parts.push(`${about.gallery.toLocaleString("en")} items to search in`);
  if (typeof results.value === "number") {
    const interval = typeof results.low === "number" ? ` [${results.low.toFixed(3)}, ${results.high.toFixed(3)}]` : "";
    const chance = typeof results.chance === "number" ? `, chance ${Number(results.chance.toPrecision(2))}` : "";
    parts.push(`${results.words} ${results.value.toFixed(3)}${interval}${chance} (${results.split})`);
  }
  $("about").textContent = parts.join(" · ");
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); }
});
$("draw").addEventListener("click", pick);
document.addEventListener("paste", (event) => {
  for (const input of Object.values(state.inputs)) if (input.pasted?.(event)) { event.preventDefault(); return; }
});
for (const event of ["dragover", "drop"]) document.addEventListener(event, (e) => e.preventDefault());

try {
  about = await ask("describe");
  headline();
  state.mode = Object.keys(about.predicts).length ? "predict" : "search";
  if (!about.searches.length && !Object.keys(about.predicts).length) {
    $("ask").replaceChildren(el("p", {}, "This run embeds, and there is nothing to search in: start the server with --gallery DATA. The API embeds: "), el("a", { href: "docs" }, "API"));
  } else drawForm();
} catch (error) {
  $("name").textContent = "nearfar";
  problem(error);
}
