// What runs functions: GPUs on offer, and workers.

import { Age, Badge, brief, byName, count, FunctionName, Head, html, Meter, NONE, Table, bytes, typeOf } from "./parts.mjs";
import { board, session, use } from "./state.mjs";

export function Workers() {
  use(board);
  const workers = [...board.rows("workers").values()];
  const seesWorkers = session.may("list_functions_details");
  return html`<${Head} title="Workers" />
    ${session.may("list_cluster_groups") && html`<${Gpus} rows=${[...board.rows("gpus").values()]} workers=${seesWorkers ? workers : null} />`}
    ${seesWorkers ? html`<${WorkerTable} rows=${workers} />` : html`<p class="notice">The key lacks the scope <code>list_functions_details</code>, so workers are not shown.</p>`}`;
}

function Gpus({ rows, workers }) {
  const used = (gpu) => (workers ?? []).filter((one) => one.gpu === gpu.gpu && one.instanceType === gpu.instanceType && one.backend === gpu.backend).length;
  const columns = [
    { name: "gpu", title: "GPU", value: (row) => row.gpu, show: (row) => html`<span class="name">${row.gpu}</span><span class="sub">${typeOf(row)}</span>` },
    { name: "where", title: "Where", from: "mid", value: (row) => row.cluster || row.backend, show: (row) => row.cluster || row.backend || NONE },
    { name: "each", title: "Each has", from: "mid", value: (row) => row.memoryBytes, show: (row) => [
      row.gpuCount ? `${row.gpuCount} GPU` : "", row.cpuCores ? `${row.cpuCores} cores` : "", row.memoryBytes ? bytes(row.memoryBytes) : ""].filter(Boolean).join(", ") || NONE },
    { name: "used", title: "Workers here", number: true, value: used, show: (row) => (workers ? count(used(row)) : NONE) },
    { name: "capacity", title: "Room for", number: true, value: (row) => row.capacity, show: (row) => count(row.capacity) },
  ];
  return html`<${Table} caption="GPUs on offer" columns=${columns} rows=${rows} sort=${{ by: "gpu" }} empty=${board.at ? "No controller offers any. Is one running?" : "Reading …"} />`;
}

export function WorkerTable({ rows }) {
  const columns = [
    { name: "id", title: "Worker", value: (row) => row.id, show: (row) => html`<span class="mono" title=${row.id}>${brief(row.id)}</span>${row.error && html`<span class="sub">${row.error.slice(-120)}</span>`}` },
    { name: "function", title: "Function", value: (row) => row.name, show: (row) => html`<${FunctionName} row=${row} />` },
    { name: "state", title: "State", value: (row) => row.state, show: (row) => html`<${Badge} state=${row.state} />` },
    { name: "gpu", title: "GPU", from: "mid", value: (row) => row.gpu, show: (row) => html`${row.gpu}<span class="sub">${row.location || row.instanceType}</span>` },
    { name: "busy", title: "Busy", number: true, value: (row) => row.busy / (row.slots || 1),
      show: (row) => html`<span class="mid"><${Meter} of=${row.slots} part=${row.busy} label=${`${row.busy} of ${row.slots} slots busy`} /></span>${count(row.busy)}/${count(row.slots)}` },
    { name: "age", title: "Age", number: true, from: "mid", value: (row) => -row.since, show: (row) => html`<${Age} since=${row.since} />` },
  ];
  return html`<${Table} caption="Workers" columns=${columns} rows=${rows} search=${(row) => `${byName(row)} ${row.id} ${row.gpu} ${row.state}`.toLowerCase()}
    sort=${{ by: "busy", down: true }} empty=${board.at ? "None runs." : "Reading …"} />`;
}
