"use strict";

const METHODS = ["get", "post", "put", "patch", "delete"];

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function resolved(api, part) {
  if (!part || !part.$ref) return part;
  return part.$ref.slice(2).split("/").reduce((found, step) => found[step], api);
}

// A schema as a short text, each named model once per branch.
function outline(api, schema, indent = "", above = []) {
  if (!schema || !Object.keys(schema).length) return "anything";
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    return above.includes(name) ? name : outline(api, resolved(api, schema), indent, [...above, name]);
  }
  const choices = (schema.anyOf || schema.oneOf || []).filter((choice) => choice.type !== "null");
  if (choices.length) return choices.map((choice) => outline(api, choice, indent, above)).join(" | ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return "[" + outline(api, schema.items, indent, above) + "]";
  if (schema.properties) {
    const inner = indent + "  ";
    const lines = Object.entries(schema.properties).map(([name, property]) => {
      const needed = (schema.required || []).includes(name) ? "" : "?";
      return inner + name + needed + ": " + outline(api, property, inner, above);
    });
    return "{\n" + lines.join("\n") + "\n" + indent + "}";
  }
  return schema.format ? schema.type + " (" + schema.format + ")" : schema.type || "anything";
}

function rows(pairs) {
  return element("table", "", ...pairs.map(([name, text]) =>
    element("tr", "", element("td", "", element("code", name)), element("td", text))));
}

function contents(api, part) {
  return Object.entries(part.content || {}).map(([media, content]) =>
    element("pre", media + "\n" + outline(api, content.schema)));
}

function present(api, path, method, operation) {
  const head = element("summary", "", element("b", method.toUpperCase()), element("code", path),
    element("span", operation.summary));
  const made = element("details", "", head);
  if (operation.description) made.append(...operation.description.split("\n\n").map((text) => element("p", text)));
  if (operation.parameters) {
    made.append(element("h4", "Parameters"), rows(operation.parameters.map((each) =>
      [each.name + (each.required ? "" : "?"), [each.in, outline(api, each.schema), each.description || ""].join("; ")])));
  }
  if (operation.requestBody) made.append(element("h4", "Body"), ...contents(api, operation.requestBody));
  made.append(element("h4", "Answers"));
  for (const [status, reference] of Object.entries(operation.responses)) {
    const response = resolved(api, reference);
    made.append(rows([[status, response.description]]));
    if (!reference.$ref) made.append(...contents(api, response));
  }
  made.dataset.words = [method, path, operation.summary, operation.description, operation.tags].join(" ").toLowerCase();
  return made;
}

async function main() {
  const api = await (await fetch("openapi.json")).json();
  const page = document.getElementById("operations");
  for (const { name } of api.tags) {
    const found = Object.entries(api.paths).flatMap(([path, item]) =>
      METHODS.filter((method) => item[method] && item[method].tags.includes(name))
        .map((method) => present(api, path, method, item[method])));
    page.append(element("section", "", element("h2", name), ...found));
  }
  document.getElementById("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const each of page.querySelectorAll("details")) {
      each.hidden = !words.every((word) => each.dataset.words.includes(word));
    }
  });
}

main();
