// What all pages of the board share: numbers and times in words, asking again and again, long work.

import { el, Refused } from "/page/serving-parts.js";

export const $ = (id) => document.getElementById(id);

// Characters that reverse the order of what is read are written out, as in a terminal.
const steering = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
export const visible = (text) => String(text).replace(steering, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

// As in the terminal and the report: three decimals, two digits of small numbers. Not finite: a dash.
export function number(value) {
  const x = typeof value === "string" ? Number(value) : value;
  if (typeof x !== "number" || !Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  if (size >= 10) return x.toFixed(1);
  return size > 0 && size < 0.005 ? String(Number(x.toPrecision(2))) : x.toFixed(3);
}
export const signed = (value) => (Number.isFinite(Number(value)) ? `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(Math.abs(value) >= 10 ? 1 : 3)}` : "–");
export const interval = (low, high, show = number) => (low === null || low === undefined ? "" : `[${show(low)}, ${show(high)}]`);

export function ago(seconds) {
  const age = Math.max(0, Date.now() / 1000 - seconds);
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) if (age >= size) return `${Math.floor(age / size)} ${unit} ago`;
  return age < 5 ? "now" : `${Math.floor(age)} s ago`;
}

export const status = (word) => el("span", { class: `status ${["training", "finished", "stopped", "broken"].includes(word) ? word : ""}` }, word || "log");

export const verdictClass = (verdict) => ({ better: "good", worse: "bad" })[verdict] || "even";

export function show(host, problem) {
  host.textContent = problem ? visible(problem) : "";
  host.hidden = !problem;
}

async function fetched(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the board does not answer; is it still running?");
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new Refused(answer, response.status);
  return [answer, response.headers.get("etag")];
}

export const get = async (path) => (await fetched(path))[0];
export const post = async (path, body) => (await fetched(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }))[0];

// Asks again after so many milliseconds (`pause` of the last answer) while the page is looked at; `changed` is called
// with an answer that differs from the last one.
export function follow(path, changed, failed, pause) {
  let tag = null;
  let last = null;
  let timer = null;
  const ask = async () => {
    clearTimeout(timer);
    if (!document.hidden) {
      try {
        const [answer, own] = await fetched(path);
        last = answer;
        failed(null);
        if (!own || own !== tag) changed(answer);
        tag = own;
      } catch (error) {
        tag = null;
        failed(error.message);
      }
    }
    timer = setTimeout(ask, pause(last));
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
  return ask();
}

// Long work: begun by a request, looked at until it is done; what it is doing is shown in `host`.
export async function work(path, body, host) {
  host.replaceChildren(el("p", { class: "working", role: "status" }, "…"));
  let job = await post(path, body);
  while (job.state === "waiting" || job.state === "working") {
    const words = job.state === "waiting" ? "waiting for earlier work" : job.says || "working";
    host.firstChild.textContent = `${visible(words)} · ${Math.round(job.seconds)} s`;
    await new Promise((resolve) => setTimeout(resolve, 300));
    job = await get(`/api/jobs/${job.id}`);
  }
  host.replaceChildren();
  if (job.state === "failed") throw new Error(job.problem);
  return job.result;
}

export function table(heads, rows, attributes = {}) {
  return el("div", { class: "wide" }, el("table", attributes,
    el("thead", {}, el("tr", {}, heads.map((head, i) => el("th", { scope: "col", class: numeric(rows, i) ? "number" : "" }, head)))),
    el("tbody", {}, rows)));
}
const numeric = (rows, i) => Boolean(rows[0]?.children[i]?.classList.contains("number"));
