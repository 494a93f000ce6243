// What is deployed, how well it is, and why not.

import { Age, Badge, byName, count, FunctionName, Head, html, several, Table, typeOf } from "./parts.mjs";
import { board, session, use } from "./state.mjs";

// What needs somebody comes first.
const WORST_FIRST = ["ERROR", "DEGRADED", "DEGRADING", "DEPLOYING", "DRAINING", "REMOVING"];

export function Deployments() {
  use(board);
  if (!session.may("deploy_function")) {
    return html`<${Head} title="Deployments" /><p class="notice">The key lacks the scope <code>deploy_function</code>, so deployments are not shown.</p>`;
  }
  const rows = [...board.rows("deployments").values()];
  const unwell = rows.filter((row) => row.health.length).sort((one, other) => one.name.localeCompare(other.name));
  const columns = [
    { name: "name", title: "Function", value: (row) => row.name, show: (row) => html`<${FunctionName} row=${row} account=${session.account === "*"} />` },
    { name: "state", title: "Health", value: (row) => (WORST_FIRST.includes(row.state) ? WORST_FIRST.indexOf(row.state) : WORST_FIRST.length), show: (row) => html`<${Badge} state=${row.state} />${row.waitsFor && html`<span class="sub">${row.waitsFor.slice(-120)}</span>`}` },
    { name: "least", title: "Instances", value: (row) => row.specifications.reduce((sum, each) => sum + each.least, 0), show: (row) => html`<${Specifications} row=${row} />` },
    { name: "running", title: "Running", number: true, from: "mid", value: (row) => row.running,
      show: (row) => html`${count(row.running)}${row.starting > 0 && html`<span class="sub">${count(row.starting)} starting</span>`}` },
    { name: "updated", title: "Changed", number: true, from: "mid", value: (row) => row.updatedAt, show: (row) => html`<${Age} since=${row.updatedAt} /> ago` },
  ];
  return html`<${Head} title="Deployments" />
    ${unwell.slice(0, 10).map((row) => html`<section class="card" key=${row.id}>
      <div class="head"><h2><a href=${`#/functions/${row.versionId}`}>${row.name}</a></h2><${Badge} state=${row.state} /></div><${Troubles} row=${row} /></section>`)}
    <${Table} caption="All deployments" columns=${columns} rows=${rows} search=${byName} sort=${{ by: "state" }} empty=${board.at ? "Nothing is deployed." : "Reading …"} />`;
}

export function Specifications({ row }) {
  return row.specifications.map((each, number) => html`<div key=${number}>${each.least === each.most ? count(each.least) : `${count(each.least)} to ${count(each.most)}`} × ${each.gpu}
    <span class="sub">${[typeOf(each), each.concurrency > 1 && `${several(each.concurrency, "request")} each`].filter(Boolean).join(", ")}</span></div>`);
}

export function Troubles({ row }) {
  const kind = (each) => [each.gpu, typeOf(each)].filter(Boolean).join(" ");
  return row.health.map((each, number) => html`<div key=${number}>
    <strong>${kind(each)}</strong><pre class="log" tabindex="0" aria-label=${`What is wrong with ${kind(each)}`}>${each.error}</pre></div>`);
}
