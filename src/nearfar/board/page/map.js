// The map of a run's embeddings: zoomed with wheel or pinch, coloured by a column, an item shown where one points.

import { el } from "/page/serving-parts.js";
import { colours, draw, plain } from "/page/charts.js";
import { get, number, visible, work } from "/page/shared.js";

const narrow = () => innerWidth < 740;
const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "x"];
const AGAIN = "A map whose points show their items needs the run's model and data: they are loaded for it.";

export async function mapPanel(host, api, content) {
  const { methods, stored } = await get(`${api}/map`);
  const method = el("select", { "aria-label": "Projection" }, Object.entries(methods).map(([value, words]) => el("option", { value }, words)));
  const colour = el("select", { "aria-label": "Colour" }, el("option", { value: "view" }, "colour: view"));
  const mark = el("input", { type: "search", placeholder: "mark items with …", "aria-label": "Mark items" });
  const go = el("button", { class: "primary", type: "button" }, "Load the items");
  const save = el("a", { class: "button", hidden: true, download: "" }, "Parquet");
  const outcome = el("div", {});
  const lead = el("p", { class: "muted" });
  const chart = el("div", { class: "plane" });
  const card = el("aside", { class: "item pinned", "aria-live": "polite" }, el("p", { class: "muted" }, "Point at an item to see it."));
  const about = { map: stored, api, chart, card, colour, mark };
  const stage = el("div", { class: "map-stage", hidden: !stored }, el("div", { class: "sheet" }, chart), card);
  card.hidden = true;
  host.replaceChildren(lead, el("form", { class: "tools", onsubmit: (event) => event.preventDefault() }, method, colour, mark, go, save), outcome, stage);
  const paint = () => { if (about.map) plot(about); };
  const describe = () => {
    const { map } = about;
    const parts = [];
    if (map) {
      parts.push(map.ids ? `${map.ids.length.toLocaleString("en")} of ${map.among.toLocaleString("en")} items of ${map.split}, embedded with the best weights.` : `${map.views[0].x.length} rows of the evaluated split.`);
      if (map.explained !== null && map.explained !== undefined) parts.push(`The plane of the first two principal components holds ${Math.round(100 * map.explained)} % of the variance: what is far apart here is far apart, what is near need not be near.`);
      else if (map.method !== "pca") parts.push("Neighbours stay neighbours; distances between groups, and their sizes, mean little.");
    }
    if (!map?.ids) parts.push(AGAIN);
    lead.textContent = visible(parts.join(" "));
  };
  const load = async () => {
    go.disabled = true;
    try {
      about.map = await work(`${api}/map`, { method: method.value }, outcome);
      const chosen = colour.value;
      colour.replaceChildren(el("option", { value: "view" }, "colour: view"), ...about.map.columns.map((each) => el("option", { value: each.name }, `colour: ${visible(each.name)}`)));
      colour.value = about.map.columns.some((each) => each.name === chosen) ? chosen : "view";
      save.href = `${api}/map/points.parquet?method=${encodeURIComponent(method.value)}`;
      for (const node of [save, stage, card]) node.hidden = false;
      go.textContent = "Load again";
      go.className = "";
      describe();
      paint();
    } catch (error) {
      outcome.replaceChildren(el("p", { class: "problem", role: "alert" }, visible(error.message)));
    }
    go.disabled = false;
  };
  go.addEventListener("click", load);
  method.addEventListener("change", () => { if (about.map?.ids) load(); });
  colour.addEventListener("change", paint);
  let waiting = null;
  mark.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(paint, 150); });
  if (!content.has?.checkpoint) go.disabled = true;
  describe();
  if (stored) requestAnimationFrame(paint);
}

function marked(map, words) {
  if (!words || !map.ids) return null;
  const wanted = words.toLowerCase();
  const texts = (i) => [map.ids[i], ...map.views.map((view) => view.texts[i]), ...map.columns.filter((c) => c.kind === "class").map((c) => c.values[i])];
  return new Set(map.ids.map((_, i) => i).filter((i) => texts(i).some((text) => String(text).toLowerCase().includes(wanted))));
}

function traces(map, by, chosen) {
  const column = map.columns.find((each) => each.name === by);
  const palette = colours();
  const style = (i, more) => ({ size: 6, symbol: SYMBOLS[i % SYMBOLS.length], opacity: 0.75, line: { width: 0 }, ...more });
  const point = (view, i, rows, name, marker, group) => ({
    x: rows.map((row) => view.x[row]), y: rows.map((row) => view.y[row]), mode: "markers", type: "scatter", name: plain(name), legendgroup: group,
    customdata: rows.map((row) => [row, i]), hoverinfo: map.ids ? "none" : "name", marker,
    selectedpoints: chosen ? rows.map((row, at) => (chosen.has(row) ? at : -1)).filter((at) => at >= 0) : undefined, unselected: { marker: { opacity: 0.06 } },
  });
  const every = map.views[0].x.map((_, row) => row);
  if (!column) return map.views.map((view, i) => point(view, i, every, view.name, style(i, { color: palette[i % palette.length] })));
  if (column.kind === "number") {
    const known = column.values.filter((value) => value !== null);
    const range = { cmin: Math.min(...known), cmax: Math.max(...known) };
    return map.views.map((view, i) => point(view, i, every, view.name, style(i, { color: column.values, colorscale: "Viridis", ...range, showscale: i === 0, colorbar: { thickness: 10, ...(narrow() ? { orientation: "h", y: -0.28 } : { len: 0.6 }), title: { text: plain(column.name), side: narrow() ? "top" : "right" } } })));
  }
  const classes = [...new Set(column.values)].sort();
  return classes.flatMap((each, c) => map.views.map((view, i) => ({
    ...point(view, i, every.filter((row) => column.values[row] === each), each === "" ? "none" : each, style(i, { color: palette[c % palette.length] }), `class ${c}`), showlegend: i === 0,
  })));
}

async function plot(about) {
  const { map, chart, card, colour, mark } = about;
  const chosen = marked(map, mark.value.trim());
  await draw(chart, () => traces(map, colour.value, chosen), {
    height: narrow() ? 440 : Math.max(380, Math.min(640, innerHeight - 260)), dragmode: "pan", margin: { l: 8, r: 8, t: 8, b: 8 }, uirevision: `${map.method} ${Boolean(map.ids)}`,
    xaxis: { showticklabels: false, showgrid: false, showline: false }, yaxis: { showticklabels: false, showgrid: false, showline: false, scaleanchor: "x" }, legend: { orientation: "h", y: -0.02, yanchor: "top", itemsizing: "constant" },
  }, { scrollZoom: true, displayModeBar: true, modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] });
  if (about.listening) return;
  about.listening = true;
  const pointed = (event) => { if (about.map.ids) showItem(about, ...event.points[0].customdata); };
  chart.on("plotly_hover", pointed);
  chart.on("plotly_click", pointed);
  card.tabIndex = -1;
}

function showItem({ map, api, card }, row, view) {
  if (card.dataset.at === `${row} ${view}`) return;
  card.dataset.at = `${row} ${view}`;
  const order = [map.views[view], ...map.views.filter((_, i) => i !== view)];
  card.replaceChildren(
    el("p", { class: "muted" }, visible(`${map.ids[row]} · ${map.views[view].name}`)),
    ...order.flatMap((each) => [
      each.pictures ? el("div", { class: "plate" }, el("img", { src: `${api}/map/picture?row=${row}&view=${encodeURIComponent(each.name)}`, alt: each.texts[row] || each.name })) : null,
      each.texts[row] ? el("p", { class: each.pictures ? "text code" : "text" }, visible(each.texts[row])) : null,
    ]).filter(Boolean),
    el("dl", {}, map.columns.flatMap((column) => (column.values[row] === null || column.values[row] === "" ? [] : [el("dt", {}, visible(column.name)), el("dd", {}, column.kind === "number" ? number(column.values[row]) : visible(column.values[row]))]))));
}
