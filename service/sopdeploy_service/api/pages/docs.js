"use strict";
// The page at `/docs`: shows /openapi.json.

const nameOf = (schema) => schema.$ref.split("/").at(-1);
const anchor = (verb, path) => `${verb}${path.replaceAll(/[^\w]+/g, "-")}`;

/** Nodes that name the type of `schema`; named bodies are links. */
function typeNodes(schema) {
  if (!schema || Object.keys(schema).length === 0) return ["anything"];
  if (schema.$ref) return [make("a", { href: `#body-${nameOf(schema)}` }, nameOf(schema))];
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return choices.flatMap((choice, place) => [...(place ? [" or "] : []), ...typeNodes(choice)]);
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" or ")];
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.prefixItems) {
    return ["[", ...schema.prefixItems.flatMap((item, place) => [...(place ? [", "] : []), ...typeNodes(item)]), "]"];
  }
  if (schema.type === "array") return ["list of ", ...typeNodes(schema.items)];
  if (schema.type === "object" && typeof schema.additionalProperties === "object") {
    return ["object of ", ...typeNodes(schema.additionalProperties)];
  }
  if (schema.format === "binary") return ["bytes"];
  return [schema.type + limits(schema)];
}

/** Range and default of a simple `schema`. */
function limits({ minimum, maximum, default: preset }) {
  const range = minimum === undefined && maximum === undefined ? "" : `, ${minimum ?? ""} to ${maximum ?? ""}`;
  return range.trimEnd() + (preset === undefined || preset === null ? "" : `, default ${JSON.stringify(preset)}`);
}

/** Table of [name, note, nodes] rows. */
function table(rows) {
  return make("table", { className: "rows" }, make("tbody", {}, ...rows.map(([name, small, nodes]) =>
    make("tr", {},
      make("td", {}, name, ...(small ? [document.createElement("br"), make("small", {}, small)] : [])),
      make("td", {}, ...nodes)))));
}

/** Rows of media types and their schemas. */
function contentNodes(content) {
  return Object.entries(content ?? {}).map(([type, { schema }]) =>
    make("div", {}, make("code", {}, type), ...(schema ? [" ", ...typeNodes(schema)] : [])));
}

/** Example curl command of operation `about`. */
function curl(verb, path, about) {
  const given = (about.parameters ?? []).filter((entry) => entry.in === "query" && entry.required);
  const query = given.length ? `?${given.map((entry) => `${entry.name}=...`).join("&")}` : "";
  const url = new URL(path.slice(1), document.baseURI).href.replaceAll("%7B", "{").replaceAll("%7D", "}");
  const types = Object.keys(about.requestBody?.content ?? {});
  const words = ["curl"];
  if (verb !== "get" && !(verb === "post" && types.length)) words.push(`--request ${verb.toUpperCase()}`);
  if (types[0] === "image/*") words.push("--data-binary @photo.jpg");
  else if (types.length) words.push(`--header 'Content-Type: ${types[0]}'`, "--data @request.json");
  return `${words.join(" ")} '${url}${query}'`;
}

/** Rows of `responses`; statuses with the same body share a row. */
function responsesOf(responses) {
  const groups = new Map();
  for (const [status, { description, content }] of Object.entries(responses)) {
    const key = JSON.stringify(content ?? {});
    const group = groups.get(key) ?? { content, statuses: [] };
    group.statuses.push(make("div", {},
      make("code", { className: status < "400" ? "status good" : "status" }, status), ` ${description}`));
    groups.set(key, group);
  }
  return [...groups.values()].map(({ content, statuses }) => [make("div", {}, ...statuses), "", contentNodes(content)]);
}

/** Panel of one operation. */
function operation(verb, path, about) {
  const id = anchor(verb, path);
  const parts = [
    make("h2", { id: `${id}-title` }, make("span", { className: `verb ${verb}` }, verb.toUpperCase()), make("code", {}, path)),
    make("p", { className: "summary" }, about.summary ?? ""),
    make("div", { className: "prose" }, ...markdown(about.description ?? "")),
  ];
  if (about.parameters?.length) {
    parts.push(make("h3", {}, "Parameters"), table(about.parameters.map((entry) =>
      [make("code", {}, entry.name), `${entry.in}${entry.required ? ", required" : ""}`,
        [...typeNodes(entry.schema), ...(entry.description ? [make("div", {}, entry.description)] : [])]])));
  }
  if (about.requestBody) parts.push(make("h3", {}, "Body"), ...contentNodes(about.requestBody.content));
  parts.push(make("h3", {}, "Responses"), table(responsesOf(about.responses)));
  parts.push(make("h3", {}, "Example"), codeBlock(curl(verb, path, about), `curl for ${verb.toUpperCase()} ${path}`));
  return make("section", { className: "panel operation", id, "aria-labelledby": `${id}-title` }, ...parts);
}

/** Section of one named body. */
function body(name, schema) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([field, about]) =>
    [make("code", {}, field), required.has(field) ? "" : "optional",
      [...typeNodes(about), ...(about.description ? [make("div", {}, about.description)] : [])]]);
  const text = (schema.description ?? "").split("\n\n")[0];
  return make("section", { id: `body-${name}` }, make("h3", {}, name), ...markdown(text), table(rows));
}

/** Load openapi.json and show it. */
async function start() {
  byId("error").hidden = true;
  try {
    const api = await fetchJson("openapi.json");
    const all = Object.entries(api.paths).flatMap(([path, verbs]) =>
      Object.entries(verbs).map(([verb, about]) => [verb, path, about]));
    byId("facts").replaceChildren(...[api.info.summary, `version ${api.info.version}`].filter(Boolean)
      .map((fact) => make("li", {}, fact)));
    byId("contents").replaceChildren(make("ul", {}, ...all.map(([verb, path]) =>
      make("li", {}, make("a", { href: `#${anchor(verb, path)}` },
        make("span", { className: `verb ${verb}` }, verb.toUpperCase()), make("code", {}, path))))));
    byId("operations").replaceChildren(...all.map((entry) => operation(...entry)));
    byId("schemas").replaceChildren(...Object.entries(api.components.schemas).map((entry) => body(...entry)));
  } catch (problem) {
    byId("error").textContent = sentence(`openapi.json cannot be shown: ${problem.message}`);
    byId("error").hidden = false;
  }
}

onKey(() => void start());
void start();
