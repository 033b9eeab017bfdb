// Answers of the server as a page: hits, slides, predictions.

import { boxesOver, el, enlarged, plate } from "./parts.js";

const percent = (value) => `${(100 * value).toFixed(value < 0.1 && value > 0 ? 1 : 0)} %`;
const short = (value) => (typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value));
const width = (node, share) => { node.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`; return node; };

// -- items ---------------------------------------------------------------------------------------------------
function values(item, order, small = false) {
  const parts = [];
  for (const view of order) {
    const value = item.shown[view];
    if (!value) continue;
    if (value.url) parts.push(plate(value, item.id, small));
    if (value.kind === "molecule") parts.push(el("p", { class: "words code" }, value.text));
    else if (value.text && !value.url) parts.push(el("p", { class: value.kind === "text" ? "words" : "words code" }, value.text));
  }
  return parts;
}

function card(hit, target, use) {
  const order = [target, ...Object.keys(hit.shown).filter((view) => view !== target)];
  const columns = Object.entries(hit.columns || {}).filter(([name]) => !(hit.spot && ["slide", "x", "y"].includes(name)));
  const place = hit.spot ? [[hit.spot.slide ? `spot on ${hit.spot.slide}` : "spot", `${short(hit.spot.x)}, ${short(hit.spot.y)}`]] : [];
  const pictured = order.filter((view) => hit.shown[view]?.url).length === 1;
  return el("li", { class: pictured ? "card pictured" : "card", id: `item-${hit.position}` },
    el("div", { class: "rank" },
      el("b", {}, String(hit.rank)),
      el("div", { class: "meter", "aria-hidden": "true" }, width(el("i"), hit.score)),
      el("span", {}, el("span", { class: "unseen" }, "cosine "), hit.score.toFixed(3))),
    values(hit, order),
    el("p", { class: "id", title: hit.id }, hit.id),
    columns.length || place.length
      ? el("dl", {}, [...columns, ...place].flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]))
      : null,
    el("div", { class: "foot" }, use ? el("button", { type: "button", class: "link", onclick: () => use(hit) }, "More like this", el("span", { class: "unseen" }, ` ${hit.id}`)) : null));
}

export function showHits(host, answer, about, use) {
  const hits = answer.hits;
  if (!hits.length) {
    host.replaceChildren(el("p", { class: "empty" }, "No item of the gallery passes this filter."));
    return;
  }
  const title = `${hits.length === 1 ? "The nearest item" : `The ${hits.length} nearest items`}`;
  host.replaceChildren(
    el("div", { class: "lead" }, el("h2", {}, title), el("p", { class: "muted" }, about)),
    el("ol", { class: "cards" }, hits.map((hit) => card(hit, answer.target, use))));
}

// The views to show of an item: those that were asked for, and one with a picture.
function seen(item, views) {
  if (views.some((view) => item.shown[view]?.url)) return views;
  const picture = Object.keys(item.shown).find((view) => item.shown[view].url);
  return picture ? [picture, ...views.filter((view) => item.shown[view]?.kind === "text")] : views;
}

export function showItems(host, page, views, choose, again) {
  host.replaceChildren(
    el("div", { class: "lead" },
      el("h2", {}, "Pick a query"),
      el("p", { class: "muted" }, `drawn from ${page.total.toLocaleString("en")} items`),
      el("button", { type: "button", class: "link", onclick: again }, "Draw others")),
    el("ul", {}, page.items.map((item) => el("li", {},
      el("button", { type: "button", onclick: () => choose(item) }, values(item, seen(item, views), true), el("span", { class: "id" }, item.id))))));
  host.hidden = false;
}

// -- slides --------------------------------------------------------------------------------------------------
// The spots of a slide; those that were hit are filled, and the nearest one is the largest.
export function slideMap(slide, hits, use) {
  const canvas = el("canvas", { role: "img", "aria-label": `Slide ${slide.slide}: ${hits.length} of ${slide.x.length} spots are hits` });
  const ranks = new Map(hits.map((hit) => [hit.position, hit.rank]));
  const low = [Math.min(...slide.x), Math.min(...slide.y)];
  const size = [Math.max(...slide.x) - low[0] || 1, Math.max(...slide.y) - low[1] || 1];
  const wide = 900;
  const tall = Math.round(Math.min(1.2, Math.max(0.3, size[1] / size[0])) * wide);
  const pad = 24;
  const scale = Math.min((wide - 2 * pad) / size[0], (tall - 2 * pad) / size[1]);
  const at = (i) => [pad + (slide.x[i] - low[0]) * scale, pad + (slide.y[i] - low[1]) * scale];
  canvas.width = wide;
  canvas.height = tall;
  const radius = Math.max(2, Math.min(11, Math.sqrt((wide * tall) / slide.x.length) / 3.4));

  const paint = () => {
    const colours = getComputedStyle(document.documentElement);
    const ink = (name) => colours.getPropertyValue(name).trim();
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, wide, tall);
    pen.fillStyle = ink("--line");
    const lit = [];
    slide.positions.forEach((position, i) => {
      if (ranks.has(position)) { lit.push([ranks.get(position), i]); return; }
      pen.beginPath();
      pen.arc(...at(i), radius, 0, 7);
      pen.fill();
    });
    for (const [rank, i] of lit.sort((a, b) => b[0] - a[0])) {
      pen.fillStyle = rank === 1 ? ink("--mark") : ink("--accent");
      pen.beginPath();
      pen.arc(...at(i), radius * (rank === 1 ? 1.7 : 1.25), 0, 7);
      pen.fill();
    }
  };
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  canvas.addEventListener("click", (event) => {
    const frame = canvas.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * wide;
    const y = ((event.clientY - frame.top) / frame.height) * tall;
    let best = -1;
    let least = (2.5 * radius) ** 2;
    slide.positions.forEach((_, i) => {
      const [a, b] = at(i);
      const far = (a - x) ** 2 + (b - y) ** 2;
      if (far < least) { least = far; best = i; }
    });
    if (best >= 0) use(slide.positions[best]);
  });
  const on = hits.filter((hit) => hit.spot?.slide === slide.slide).length;
  return el("figure", { class: "slide", "data-slide": slide.slide }, canvas,
    el("figcaption", { class: "muted" }, `${slide.slide || "the slide"}: ${on} of the hits, the nearest largest; a click searches with a spot`));
}

// -- predictions ---------------------------------------------------------------------------------------------
const POLARITIES = ["negative", "neutral", "positive"];

export function showPredictions(host, answer, shownInput) {
  host.replaceChildren(...answer.rows.map((row, i) => (row
    ? el("article", { class: "prediction" }, prediction(row, shownInput(i)))
    : el("article", { class: "prediction" }, el("p", { class: "problem" }, answer.problems.find((each) => each.where === `values.${i}`)?.reason || "not predicted")))));
}

function prediction(row, input) {
  const used = new Set();
  const parts = [];
  const boxes = boxesOf(row, used);
  if (input?.url) parts.push(photo(input, boxes));
  else if (input?.text) parts.push(el("p", { class: "quote" }, input.text));
  const aspects = aspectsOf(row, used);
  if (aspects.length) parts.push(...aspectBars(aspects));
  parts.push(...classBars(row, used, input?.names));
  if (boxes) parts.push(boxTable(boxes));
  parts.push(...vectors(row, used));
  const rest = Object.entries(row).filter(([name, value]) => !used.has(name) && value !== null && value !== "");
  if (rest.length) parts.push(plainTable(rest));
  return parts;
}

function aspectsOf(row, used) {
  const mentions = [];
  for (const name of Object.keys(row)) {
    if (!name.endsWith(" polarity")) continue;
    const aspect = name.slice(0, -" polarity".length);
    const shares = POLARITIES.map((polarity) => row[`${aspect} ${polarity}`]);
    if (!shares.every((share) => typeof share === "number")) continue;
    for (const column of [name, `${aspect} mentioned`, ...POLARITIES.map((polarity) => `${aspect} ${polarity}`)]) used.add(column);
    used.add("aspects");
    mentions.push({ aspect, polarity: row[name] || "", mentioned: row[`${aspect} mentioned`], shares });
  }
  return mentions.sort((a, b) => Boolean(b.polarity) - Boolean(a.polarity) || b.mentioned - a.mentioned);
}

function aspectBars(aspects) {
  const mentioned = aspects.filter((each) => each.polarity).length;
  const line = (each) => el("li", { class: each.polarity ? "" : "off" },
    el("span", { class: "label" }, each.aspect, " ", each.polarity ? el("span", { class: `tag ${each.polarity}` }, each.polarity) : null),
    el("span", { class: "bar", role: "img", "aria-label": POLARITIES.map((polarity, i) => `${polarity} ${percent(each.shares[i])}`).join(", ") },
      each.shares.map((share, i) => width(el("i", { class: POLARITIES[i] }), share))),
    el("span", { class: "number" }, percent(each.mentioned)));
  const shown = aspects.filter((each, i) => each.polarity || i < 3);
  const others = aspects.filter((each) => !shown.includes(each));
  return [
    el("h3", {}, mentioned ? `${mentioned} ${mentioned === 1 ? "aspect is" : "aspects are"} mentioned` : "No aspect is mentioned"),
    el("p", { class: "legend" }, POLARITIES.map((polarity) => el("span", {}, el("i", { class: polarity }), polarity)), el("span", {}, "right: probability of a mention")),
    el("ul", { class: "bars" }, shown.map(line)),
    others.length ? el("details", {}, el("summary", { class: "muted" }, `${others.length} further aspects`), el("ul", { class: "bars" }, others.map(line))) : null,
  ].filter(Boolean);
}

function classBars(row, used, names) {
  const parts = [];
  for (const prefix of ["", "probe/"]) {
    const shares = [];
    for (const [name, value] of Object.entries(row)) {
      const match = name.startsWith(`${prefix}p(`) && name.endsWith(")") && typeof value === "number";
      if (match) { shares.push([name.slice(prefix.length + 2, -1), value]); used.add(name); }
    }
    const answer = prefix ? row.probe : row.relation ?? row.class ?? row.label;
    if (!shares.length) continue;
    shares.sort((a, b) => b[1] - a[1]);
    for (const name of prefix ? ["probe", "probe/probability"] : ["relation", "class", "label", "probability"]) used.add(name);
    const [first, second] = names?.length === 2 ? names : [row.subject, row.object];
    const subject = !prefix && first && second ? `${first} ${answer} ${second}` : answer ?? shares[0][0];
    used.add("subject");
    used.add("object");
    const line = ([name, share]) => el("li", { class: name === String(answer) ? "" : "off" },
      el("span", { class: "label" }, name),
      el("span", { class: "bar", role: "img", "aria-label": percent(share) }, width(el("i"), share)),
      el("span", { class: "number" }, percent(share)));
    parts.push(el("h3", {}, subject, prefix ? el("span", { class: "muted" }, " · linear probe") : null), el("ul", { class: "bars" }, shares.slice(0, 8).map(line)));
    if (shares.length > 8) parts.push(el("details", {}, el("summary", { class: "muted" }, `${shares.length - 8} further`), el("ul", { class: "bars" }, shares.slice(8).map(line))));
  }
  if (row.knn !== undefined) {
    const share = row["knn/share"];
    parts.push(el("p", {}, el("strong", {}, String(row.knn) || "no label"), el("span", { class: "muted" }, share !== undefined && share !== null ? ` by the nearest training items, ${percent(share)} of which have it` : " by the nearest training items")));
    for (const name of ["knn", "knn/share"]) used.add(name);
    const nearest = row["knn/nearest"];
    const cosines = row["knn/cosine"];
    if (Array.isArray(nearest) && Array.isArray(cosines)) {
      parts.push(el("p", { class: "muted" }, `nearest: ${nearest.map((name, i) => `${name} (${Number(cosines[i]).toFixed(3)})`).join(", ")}`));
      used.add("knn/nearest");
      used.add("knn/cosine");
    }
  }
  return parts;
}

// Boxes of a detector: lists of boxes and scores, or objects with both.
function boxesOf(row, used) {
  if (!Array.isArray(row.boxes)) return null;
  used.add("boxes");
  for (const name of ["scores", "labels", "categories"]) if (Array.isArray(row[name])) used.add(name);
  return row.boxes.map((box, i) => (Array.isArray(box)
    ? { box, score: row.scores?.[i], label: (row.labels || row.categories)?.[i] }
    : { box: box.box || box.bbox, score: box.score, label: box.label ?? box.category }))
    .filter((each) => Array.isArray(each.box) && each.box.length === 4)
    .sort((a, b) => (b.score ?? 0) - (a.score ?? 0));
}

function photo(input, boxes) {
  const image = enlarged(el("img", { src: input.url, alt: "The picture that was asked about" }));
  const frame = el("div", { class: "photo" }, image);
  const slider = el("input", { type: "range", min: 0, max: 1, step: 0.01 });
  slider.value = Math.min(0.5, Math.floor(100 * Math.max(0, ...(boxes || []).map((each) => each.score ?? 1))) / 100);
  const count = el("output", {});
  const paint = () => {
    frame.querySelectorAll("svg, .at").forEach((node) => node.remove());
    const sides = [image.naturalWidth || 1, image.naturalHeight || 1];
    if (input.pair) { frame.append(boxesOver(input.pair, sides)); return; }
    if (!boxes) return;
    const shown = boxes.filter((each) => each.score === undefined || each.score === null || each.score >= slider.valueAsNumber);
    count.textContent = `${shown.length} of ${boxes.length} boxes, score from ${slider.valueAsNumber.toFixed(2)} on`;
    const over = boxesOver(shown.map((each) => each.box), sides);
    over.querySelectorAll("rect.second").forEach((rect) => rect.setAttribute("class", "first"));
    frame.append(over);
    for (const each of shown.slice(0, 60)) {
      const words = [each.label, typeof each.score === "number" ? each.score.toFixed(2) : null].filter((part) => part !== undefined && part !== null).join(" ");
      const tag = el("span", { class: "at", "aria-hidden": "true" }, words);
      tag.style.left = `${(100 * each.box[0]) / sides[0]}%`;
      tag.style.top = `${Math.max(4, (100 * each.box[1]) / sides[1])}%`;
      frame.append(tag);
    }
  };
  image.addEventListener("load", paint);
  if (!boxes) return frame;
  slider.addEventListener("input", paint);
  return el("div", { class: "input" }, frame, el("label", { class: "field" }, el("span", { class: "name" }, "Least score of a box"), slider, count));
}

function boxTable(boxes) {
  const cells = ["score", "left", "top", "right", "bottom"];
  const labelled = boxes.some((each) => each.label !== undefined && each.label !== null);
  return el("details", {}, el("summary", { class: "muted" }, `${boxes.length} boxes as numbers`),
    el("div", { class: "wide" }, el("table", {},
      el("thead", {}, el("tr", {}, [...(labelled ? ["label"] : []), ...cells].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, boxes.slice(0, 100).map((each) => el("tr", {}, labelled ? el("td", {}, String(each.label)) : null, el("td", { class: "number" }, each.score === undefined || each.score === null ? "" : each.score.toFixed(3)), each.box.map((edge) => el("td", { class: "number" }, short(Number(edge)))))))))); 
}

// Many numbers under common names, such as the expression of genes: the highest as bars.
function vectors(row, used) {
  const numbers = Object.entries(row).filter(([name, value]) => !used.has(name) && typeof value === "number" && name !== "row");
  if (numbers.length < 12) return [];
  numbers.forEach(([name]) => used.add(name));
  numbers.sort((a, b) => b[1] - a[1]);
  const most = Math.max(...numbers.map(([, value]) => Math.abs(value))) || 1;
  const line = ([name, value]) => el("li", {}, el("span", { class: "label" }, name), el("span", { class: "bar", "aria-hidden": "true" }, width(el("i"), value / most)), el("span", { class: "number" }, short(value)));
  return [el("h3", {}, `Highest of ${numbers.length.toLocaleString("en")} numbers`), el("ul", { class: "bars" }, numbers.slice(0, 15).map(line))];
}

function plainTable(entries) {
  const words = (value) => (Array.isArray(value) ? (value.length > 12 ? `${value.length} numbers` : value.map(short).join(", ")) : typeof value === "object" ? JSON.stringify(value) : short(value));
  return el("div", { class: "wide" }, el("table", {}, el("tbody", {}, entries.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, words(value)))))));
}
