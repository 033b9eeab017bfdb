// Charts by Plotly, in the colours of the page. Names come from runs: markup in them is shown and not read.

import { visible } from "/page/shared.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const LIGHT = ["#2563a8", "#c2571a", "#2f8f5b", "#8a4fa0", "#a08a1a", "#c03a5b", "#3d8f9e", "#5b6673"];
const DARK = ["#74aef0", "#f0a06a", "#74cf9c", "#c79be0", "#dcc662", "#f08aa4", "#7fcfde", "#b3bcc6"];
export const colours = () => (dark.matches ? DARK : LIGHT);
export const plain = (text) => visible(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function layout(more = {}) {
  const axis = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, tickfont: { size: 11 }, automargin: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: colours(),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--ink") },
    margin: { l: 48, r: 12, t: 8, b: 40 }, height: 280, hovermode: "closest", dragmode: "zoom", uirevision: "kept",
    legend: { orientation: "h", y: -0.24, yanchor: "top", font: { size: 11 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
    hoverlabel: { bgcolor: css("--sheet"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 }, namelength: 60 },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

// The page has its words before the charts have their library.
const library = new Promise((resolve, reject) => {
  const script = Object.assign(document.createElement("script"), { src: "/page/plotly.js", onload: () => resolve(window.Plotly), onerror: () => reject(new Error("the charts' library was not loaded")) });
  document.head.append(script);
});
const drawn = new Map();

// Draws, or changes what is drawn; the newest wish counts.
export async function draw(node, traces, options, config = {}) {
  const again = () => draw(node, traces, options, config);
  drawn.set(node, again);
  const Plotly = await library;
  if (drawn.get(node) !== again || !node.isConnected) return;
  const all = typeof traces === "function" ? traces() : traces;
  await Plotly.react(node, all, layout(options), { responsive: true, displaylogo: false, displayModeBar: false, ...config });
}

dark.addEventListener("change", () => { for (const [node, again] of drawn) { if (node.isConnected) again(); else drawn.delete(node); } });

// Lines by name with dashed levels: what `Curves` of nearfar.lab.curves are; `colour` says which of the colours a line has.
export function drawCurves(node, curves, legend = true) {
  const entries = Object.entries(curves.series);
  const xs = entries.flatMap(([, [x]]) => x);
  const [from, to] = [Math.min(...xs), Math.max(...xs)];
  const traces = () => [
    ...Object.entries(curves.levels).map(([name, value]) => ({
      x: [from, to], y: [value, value], mode: "lines", name: plain(name), showlegend: false,
      line: { dash: "dash", width: 1, color: css("--soft") }, hovertemplate: `${plain(name)}: %{y:.4g}<extra></extra>`,
    })),
    ...entries.map(([name, [x, y]], i) => ({
      x, y, name: plain(name), mode: x.length <= 40 ? "lines+markers" : "lines",
      line: { width: 1.8, color: colours()[(curves.colour?.[name] ?? i) % colours().length] }, marker: { size: 5 }, hovertemplate: "%{y:.4g}<extra>%{fullData.name}</extra>",
    })),
  ];
  const annotations = Object.entries(curves.levels).map(([name, value]) => ({
    ...(name.startsWith("floor") ? { x: 0, xanchor: "left" } : { x: 1, xanchor: "right" }), xref: "paper", y: value, yanchor: "bottom", text: plain(name), showarrow: false, font: { size: 11, color: css("--soft") },
  }));
  const whole = curves.xlabel.startsWith("epoch") && to - from < 12 ? { dtick: 1 } : {};
  return draw(node, traces, {
    annotations, showlegend: legend && entries.length > 1, hovermode: "x unified",
    xaxis: { title: { text: plain(curves.xlabel), standoff: 6 }, ...whole }, yaxis: { title: { text: plain(curves.ylabel), standoff: 6 } },
  });
}

// Intervals around zero: [words, value, low, high].
export function drawIntervals(node, rows) {
  const kinds = rows.map(([, , low, high]) => (low > 0 ? css("--good") : high < 0 ? css("--bad") : css("--even")));
  const names = rows.map(([name]) => plain(name));
  return draw(node, [{
    x: rows.map(([, value]) => value), y: names, mode: "markers", marker: { size: 9, color: kinds },
    error_x: { type: "data", symmetric: false, array: rows.map(([, v, , high]) => high - v), arrayminus: rows.map(([, v, low]) => v - low), thickness: 2, width: 0, color: css("--soft") },
    hovertemplate: "%{y}: %{x:+.4f}<extra></extra>",
  }], {
    height: 90 + 26 * rows.length, showlegend: false, margin: { l: 12, r: 12, t: 8, b: 44 },
    xaxis: { title: { text: "paired difference, 95 % interval" }, zeroline: true, zerolinecolor: css("--soft") }, yaxis: { autorange: "reversed", automargin: true },
  });
}
