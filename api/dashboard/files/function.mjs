// One version: its queue, what runs it, and what is wrong with it.

import { Activity, useActivity } from "./activity.mjs";
import { Specifications, Troubles } from "./deployments.mjs";
import { Depth, Figures } from "./overview.mjs";
import { Badge, Head, html } from "./parts.mjs";
import { board, session, use } from "./state.mjs";
import { WorkerTable } from "./workers.mjs";

export function FunctionView({ id }) {
  use(board);
  const row = board.rows("functions").get(id) ?? board.rows("deployments").get(id);
  const points = useActivity(row);
  if (!row) return html`<${Head} title="Function" /><p class="notice">${board.at ? "There is no such version in this account." : "Reading …"}</p>`;
  const deployment = board.rows("deployments").get(id);
  const workers = [...board.rows("workers").values()].filter((worker) => worker.versionId === id);
  return html`<${Head} title=${row.name}><${Badge} state=${row.status} /><//>
    ${row.queued !== undefined && html`<${Figures} rows=${[row]} recent=${row.recent} />
      <div class="charts"><${Depth} history=${board.perVersion.get(id) ?? []} /><${Activity} points=${points} recent=${row.recent} /></div>`}
    <div class="columns">
      <section class="card"><div class="head"><h2>Version</h2></div>
        <dl class="facts">
          <dt>Function</dt><dd class="mono">${row.functionId}</dd>
          <dt>Version</dt><dd class="mono">${row.versionId}</dd>
          <dt>Account</dt><dd>${row.account}</dd>
          ${session.may("invoke_function") && html`<dt>Requests</dt><dd><a href=${`#/requests/of/${id}`}>those of this version</a></dd>`}
        </dl>
      </section>
      ${session.may("deploy_function") && html`<section class="card"><div class="head"><h2>Deployment</h2>${deployment && html`<${Badge} state=${deployment.state} />`}</div>
        ${deployment ? html`<${Specifications} row=${deployment} /><${Troubles} row=${deployment} />` : "It is not deployed."}</section>`}
    </div>
    ${session.may("list_functions_details") && html`<${WorkerTable} rows=${workers} />`}`;
}
