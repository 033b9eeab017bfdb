// A reader of openapi.json: what can be asked, with its fields and an example for the shell.

import { ask, el } from "./parts.js";

const host = document.getElementById("api");

const named = (reference) => reference.split("/").pop();

function words(schema, schemas, depth = 0) {
  if (!schema) return "";
  if (schema.$ref) return named(schema.$ref);
  const several = schema.anyOf || schema.oneOf;
  if (several) return [...new Set(several.map((each) => words(each, schemas, depth)))].join(" or ");
  if (schema.prefixItems) return `[${schema.prefixItems.map((each) => words(each, schemas, depth)).join(", ")}]`;
  if (schema.type === "array") return `list of ${words(schema.items, schemas, depth + 1)}`;
  if (schema.type === "object") return schema.additionalProperties && schema.additionalProperties !== true ? `{name: ${words(schema.additionalProperties, schemas, depth + 1)}}` : "object";
  return schema.type || "any";
}

function fields(reference, schemas) {
  const schema = reference?.$ref ? schemas[named(reference.$ref)] : reference;
  if (!schema?.properties) return null;
  const required = new Set(schema.required || []);
  return el("div", { class: "wide" }, el("table", {},
    el("thead", {}, el("tr", {}, ["field", "type", ""].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, Object.entries(schema.properties).map(([name, each]) => el("tr", {},
      el("td", {}, el("code", {}, name), required.has(name) ? "" : el("span", { class: "muted" }, " optional")),
      el("td", {}, words(each, schemas)),
      el("td", {}, each.description || ""))))));
}

function example(path, verb, schemas) {
  const address = `${location.origin}${path}`;
  const bodies = {
    "/embed": { values: ["a text"] },
    "/search": { query: "a text", k: 5 },
    "/predict": { values: ["a text"] },
  };
  if (verb === "get") return `curl '${address}'`;
  return `curl '${address}' -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(bodies[path] || {})}'`;
}

function section(path, verb, operation, schemas) {
  const body = operation.requestBody?.content?.["application/json"]?.schema;
  const answer = operation.responses?.["200"]?.content?.["application/json"]?.schema;
  const parameters = operation.parameters || [];
  return el("details", {},
    el("summary", {}, el("code", {}, el("span", { class: "verb" }, verb.toUpperCase()), ` ${path}`), el("span", {}, operation.summary || "")),
    el("div", { class: "inside" },
      operation.description ? el("p", {}, operation.description) : null,
      el("pre", { tabindex: 0 }, example(path, verb, schemas)),
      parameters.length ? el("h2", {}, "Parameters") : null,
      parameters.length ? el("div", { class: "wide" }, el("table", {}, el("tbody", {}, parameters.map((each) => el("tr", {}, el("td", {}, el("code", {}, each.name)), el("td", {}, words(each.schema, schemas)), el("td", {}, each.description || "")))))) : null,
      body ? el("h2", {}, "Request") : null, body ? fields(body, schemas) : null,
      answer ? el("h2", {}, "Answer") : null, answer ? fields(answer, schemas) : null,
      el("p", { class: "muted" }, `Errors: ${Object.keys(operation.responses || {}).filter((status) => status !== "200").join(", ") || "none"}; their reason stands in “error”.`)));
}

try {
  const api = await ask("openapi.json");
  document.getElementById("name").textContent = `${api.info.title} ${api.info.version}`;
  const schemas = api.components?.schemas || {};
  for (const [path, verbs] of Object.entries(api.paths)) {
    for (const [verb, operation] of Object.entries(verbs)) host.append(section(path, verb, operation, schemas));
  }
  host.querySelector("details")?.setAttribute("open", "");
  host.append(el("h2", {}, "Types"));
  for (const [name, schema] of Object.entries(schemas)) {
    const rows = fields(schema, schemas);
    if (rows && !name.startsWith("HTTP") && !name.startsWith("Validation")) {
      host.append(el("details", {}, el("summary", {}, el("code", {}, name), el("span", { class: "muted" }, schema.description || "")), el("div", { class: "inside" }, rows)));
    }
  }
} catch (error) {
  host.append(el("p", { class: "problem" }, error.message));
}
