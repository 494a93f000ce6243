// How things stand, and all functions.

import { Activity, pair, rate } from "./activity.mjs";
import { Chart } from "./charts.mjs";
import { Age, Badge, byName, count, FunctionName, Head, html, Meter, NONE, several, span, Table, Tile } from "./parts.mjs";
import { board, session, use } from "./state.mjs";

export function Overview() {
  use(board);
  if (!session.may("queue_details")) {
    return html`<${Head} title="Overview" /><p class="notice">The key lacks the scope <code>queue_details</code>, so queues are not shown.</p>`;
  }
  const rows = [...board.rows("functions").values()];
  return html`<${Head} title="Overview" /><${Figures} rows=${rows} dead=${board.deadLetters} recent=${board.recent} />
    <div class="charts"><${Depth} history=${board.history} /><${Activity} points=${board.points} recent=${board.recent} /></div>
    <${Functions} rows=${rows} />`;
}

export function Figures({ rows, dead, recent }) {
  const sum = (name) => rows.reduce((total, row) => total + row[name], 0);
  const waiting = rows.filter((row) => row.oldestAt);
  const oldestAt = waiting.length ? Math.min(...waiting.map((row) => row.oldestAt)) : 0;
  const [slots, busy] = [sum("slots"), sum("busy")];
  const letters = (dead ?? []).reduce((total, cause) => total + cause.count, 0);
  return html`<dl class="tiles" aria-label="Now">
    <${Tile} label="Waiting">${count(sum("queued"))}<//>
    <${Tile} label="Running">${count(sum("running"))}<//>
    <${Tile} label="Oldest waiting">${oldestAt ? html`<${Age} since=${oldestAt} />` : NONE}<//>
    <${Tile} label="Slots busy" hint=${`on ${several(sum("workers"), "worker")}`}>${count(busy)} <small>of ${count(slots)}</small><//>
    <${Tile} label="Ended" hint="over five minutes">${rate(recent)} <small>/min</small><//>
    <${Tile} label="Wait, p50" hint=${`p90 ${span(recent?.wait[1])}`}>${span(recent?.wait[0])}<//>
    <${Tile} label="Run, p50" hint=${`p90 ${span(recent?.run[1])}`}>${span(recent?.run[0])}<//>
    ${dead && html`<${Tile} label="Dead letters" bad=${letters > 0}><a href="#/dead-letters">${count(letters)}</a><//>`}
  </dl>`;
}

export function Depth({ history }) {
  const waiting = history.map((each) => each[1]);
  const running = history.map((each) => each[2]);
  return html`<${Chart} title="Queue length" whole times=${history.map((each) => each[0])}
    series=${[
      { title: "waiting", hue: 1, values: waiting, show: count, fill: true },
      { title: "running", hue: 2, values: running, show: count },
    ]}
    summary=${`${count(waiting.at(-1))} waiting and ${count(running.at(-1))} running; at most ${count(Math.max(0, ...waiting))} waited`}
    empty="Begins when there is something to see" />`;
}

function Functions({ rows }) {
  const everybody = session.account === "*";
  const columns = [
    { name: "name", title: "Function", value: (row) => row.name, show: (row) => html`<${FunctionName} row=${row} account=${everybody} /><span class="phone"><${Badge} state=${row.status} /></span>` },
    { name: "status", title: "Status", value: (row) => row.status, show: (row) => html`<${Badge} state=${row.status} />`, from: "mid" },
    { name: "queued", title: "Waiting", number: true, value: (row) => row.queued, show: (row) => count(row.queued) },
    { name: "running", title: "Running", number: true, value: (row) => row.running, show: (row) => count(row.running) },
    { name: "oldest", title: "Oldest", number: true, from: "mid", value: (row) => (row.oldestAt ? -row.oldestAt : -1e15),
      show: (row) => html`<${Age} since=${row.oldestAt} />` },
    { name: "rate", title: "Per minute", number: true, from: "mid", value: (row) => row.recent?.perMinute ?? 0, show: (row) => rate(row.recent) },
    { name: "wait", title: "Wait p50 / p90", number: true, from: "wide", value: (row) => row.recent?.wait[1], show: (row) => pair(row.recent?.wait) },
    { name: "run", title: "Run p50 / p90", number: true, from: "wide", value: (row) => row.recent?.run[1], show: (row) => pair(row.recent?.run) },
    { name: "busy", title: "Slots busy", number: true, from: "mid", value: (row) => (row.slots ? row.busy / row.slots : -1),
      show: (row) => (row.slots ? html`<${Meter} of=${row.slots} part=${row.busy} label=${`${row.busy} of ${row.slots} slots busy`} />${count(row.busy)}/${count(row.slots)}` : NONE) },
  ];
  return html`<${Table} id="functions" caption="Functions" columns=${columns} rows=${rows} search=${byName} sort=${{ by: "queued", down: true }}
    empty=${board.at ? "There are no functions yet." : "Reading …"} />`;
}
