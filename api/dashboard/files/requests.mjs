// Requests: found by their ID, the latest of them, and how one went.

import { useEffect, useRef, useState } from "./vendor/hooks.mjs";
import { Ago, Badge, brief, count, Head, html, moment, NONE, Question, span, Trouble } from "./parts.mjs";
import { ask, board, clock, events, route, session, use } from "./state.mjs";

const STATES = ["queued", "running", "fulfilled", "errored", "expired", "timed-out", "cancelled", "dead"];
const ENDED = STATES.slice(2);
const SETTLE_MS = 150;

export function Requests() {
  return html`<${List} version="" />`;
}

function List({ version }) {
  use(board);
  const [page, setPage] = useState(null);
  const [status, setStatus] = useState("");
  const [trouble, setTrouble] = useState(null);
  const turn = useRef(0);
  const read = async (cursor = "") => {
    const mine = ++turn.current;
    try {
      const found = await ask("GET", "requests", { query: { status, functionVersionId: version, cursor, limit: 25 } });
      if (mine === turn.current) setPage((before) => ({ requests: cursor ? [...before.requests, ...found.requests] : found.requests, cursor: found.cursor }));
      setTrouble(null);
    } catch (error) {
      if (mine === turn.current) setTrouble(error);
    }
  };
  const shown = session.account !== "*" && session.may("invoke_function");
  useEffect(() => {
    if (shown) read();
  }, [status, version, shown]);
  const row = board.rows("functions").get(version);
  const title = version ? `Requests of ${row?.name ?? brief(version)}` : "Requests";
  if (!shown) {
    return html`<${Head} title=${title} /><p class="notice">${session.account === "*" ? "Choose one account to see its requests." : html`The key lacks the scope <code>invoke_function</code>, so requests are not shown.`}</p>`;
  }
  return html`<${Head} title=${title}><${Find} /><//>
    <${Trouble} error=${trouble} />
    <section class="card flush" aria-label="Latest requests">
      <div class="head"><h2>Latest</h2><span class="row">
        <select aria-label="Status" value=${status} onChange=${(event) => setStatus(event.target.value)}><option value="">any status</option>
          ${STATES.map((each) => html`<option key=${each} value=${each}>${each}</option>`)}</select>
        <button onClick=${() => read()}>Reload</button></span></div>
      ${page && !page.requests.length ? html`<p class="empty-state">There are none.</p>` : html`<table class="table"><caption class="unseen">Latest requests</caption>
        <thead><tr><th scope="col">Request</th><th scope="col" class="mid">Function</th><th scope="col">Status</th><th scope="col" class="mid">Accepted</th>
          <th scope="col" class="number">Took</th></tr></thead>
        <tbody>${(page?.requests ?? []).map((each) => html`<tr key=${each.requestId}>
          <td><a class="mono" href=${`#/requests/${each.requestId}`}>${brief(each.requestId)}</a></td>
          <td class="mid">${nameOf(each.functionVersionId)}</td>
          <td><${Badge} state=${each.status} /><span class="sub">${each.cause ?? null}</span></td>
          <td class="mid"><${Ago} at=${each.createdAt} /></td>
          <td class="number">${each.finishedAt ? span(seconds(each.finishedAt) - seconds(each.createdAt)) : NONE}</td></tr>`)}</tbody></table>`}
      ${page?.cursor && html`<div class="pager"><span></span><button onClick=${() => read(page.cursor)}>Show more</button></div>`}
    </section>`;
}

function Find() {
  const [id, setId] = useState("");
  const submit = (event) => {
    event.preventDefault();
    if (id.trim()) location.hash = `#/requests/${encodeURIComponent(id.trim())}`;
  };
  return html`<form class="row" role="search" onSubmit=${submit}><input type="search" aria-label="Request ID" placeholder="Request ID" value=${id} onInput=${(event) => setId(event.target.value)} />
    <button>Find</button></form>`;
}

function nameOf(version) {
  const row = board.rows("functions").get(version);
  return row ? html`<a href=${`#/functions/${row.id}`}>${row.name}</a>` : html`<span class="mono">${brief(version)}</span>`;
}

const seconds = (text) => Date.parse(text) / 1000;

// -- one --

export function Request({ id }) {
  use(route);
  const [, which, version] = route.parts;
  return which === "of" ? html`<${List} version=${version} />` : html`<${Receipt} id=${id} key=${id} />`;
}

function Receipt({ id }) {
  use(board);
  const [found, setFound] = useState(null);
  const [trouble, setTrouble] = useState(null);
  const [told, setTold] = useState({});
  const [asked, setAsked] = useState(false);
  useEffect(() => {
    let due;
    let stream;
    const read = async () => {
      try {
        const receipt = await ask("GET", `requests/${encodeURIComponent(id)}`);
        setFound(receipt);
        setTrouble(null);
        return receipt;
      } catch (error) {
        setTrouble(error);
        return null;
      }
    };
    const soon = () => {
      clearTimeout(due);
      due = setTimeout(read, SETTLE_MS);
    };
    const begin = async () => {
      const receipt = await read();
      if (!receipt || ENDED.includes(receipt.status)) return;
      stream = events(`requests/${encodeURIComponent(id)}/events`);
      stream.addEventListener("queued", (event) => (setTold({ place: JSON.parse(event.data).positionInQueue }), soon()));
      stream.addEventListener("started", () => (setTold({}), soon()));
      stream.addEventListener("progress", (event) => setTold({ percent: JSON.parse(event.data).percentComplete }));
      stream.addEventListener("done", () => (stream.close(), setTold({}), soon()));
    };
    begin();
    return () => {
      clearTimeout(due);
      stream?.close();
    };
  }, [id]);
  const cancel = async (yes) => {
    setAsked(false);
    if (yes) await ask("DELETE", `requests/${encodeURIComponent(id)}`).catch(setTrouble);
  };
  const open = found && !ENDED.includes(found.status);
  return html`<${Head} title=${`Request ${brief(id)}`}><span class="row">${found && html`<${Badge} state=${found.status} />`}<${Find} /></span><//>
    <${Trouble} error=${trouble} />
    ${found && html`
      ${told.place > 0 && html`<p class="notice" role="status">It is number ${count(told.place)} in its queue.</p>`}
      ${told.percent !== undefined && html`<p class="notice good" role="status">Its container says: ${told.percent} % done.</p>`}
      <${Timeline} of=${found} />
      <div class="columns"><${Facts} of=${found} /><${Times} of=${found.timings} /></div>
      ${open && html`<div class="row"><button class="danger" onClick=${() => setAsked(true)}>Cancel this request</button></div>`}`}
    ${asked && html`<${Question} title="Cancel this request?" action="Cancel the request" danger onAnswer=${cancel}>No attempt starts from now on, and one that runs is told to stop.<//>`}`;
}

function Timeline({ of }) {
  use(clock);
  const begins = seconds(of.createdAt);
  const ends = of.finishedAt ? seconds(of.finishedAt) : Math.max(clock.now, begins + 0.001);
  const bars = spans(of, ends);
  const place = (at) => `${(100 * Math.min(1, Math.max(0, at - begins) / Math.max(ends - begins, 0.001))).toFixed(3)}%`;
  const width = (bar) => `${(100 * Math.max(0, bar.to - bar.from) / Math.max(ends - begins, 0.001)).toFixed(3)}%`;
  return html`<section class="card" aria-label="Timeline"><div class="head"><h2>Timeline</h2><span>${span(ends - begins)} ${of.finishedAt ? "in all" : "so far"}</span></div>
    <ol class="timeline">${bars.map((bar, number) => html`<li key=${number}>
      <span class="what">${bar.what}<small>${bar.more}</small></span>
      <span class="track" aria-hidden="true"><span class="span ${bar.kind}" style=${{ left: place(bar.from), width: width(bar) }}></span></span>
      <span class="long">${span(bar.to - bar.from)}</span></li>`)}</ol></section>`;
}

// Waiting and attempts in turn: between two attempts it waits.
function spans(of, ends) {
  const bars = [];
  let from = seconds(of.createdAt);
  for (const attempt of of.attempts) {
    const started = seconds(attempt.startedAt);
    bars.push({ what: bars.length ? "Waited again" : "Waited in the queue", more: moment(new Date(from * 1000)), kind: "waits", from, to: Math.max(from, started) });
    const ended = attempt.endedAt ? seconds(attempt.endedAt) : ends;
    const kind = attempt.outcome === "fulfilled" ? "ended" : attempt.outcome === "running" ? "runs" : "failed";
    bars.push({ what: `Attempt ${attempt.number}: ${attempt.outcome}`, more: `on ${attempt.instanceId.slice(0, 13)}${attempt.reason ? `: ${attempt.reason}` : ""}`, kind, from: started, to: Math.max(started, ended) });
    from = ended;
  }
  if (!of.finishedAt && of.status === "queued") bars.push({ what: bars.length ? "Waits again" : "Waits in the queue", more: moment(new Date(from * 1000)), kind: "waits", from, to: ends });
  else if (of.finishedAt && (!of.attempts.length || ends - from > 0.05)) bars.push({ what: of.attempts.length ? `Then ${of.status}` : `Waited, then ${of.status}`, more: of.reason ?? "", kind: "waits", from, to: ends });
  return bars;
}

function Facts({ of }) {
  const row = board.rows("functions").get(of.functionVersionId);
  const facts = [
    ["Request", html`<span class="mono">${of.requestId}</span>`],
    ["Function", row ? html`<a href=${`#/functions/${row.id}`}>${row.name}</a>` : html`<span class="mono">${of.functionId ?? NONE}</span>`],
    ["Accepted", moment(of.createdAt)],
    ["Ended", of.finishedAt && moment(of.finishedAt)],
    ["Must begin by", of.queueDeadlineAt && !of.startedAt && moment(of.queueDeadlineAt)],
    ["Must end by", !of.finishedAt && moment(of.deadlineAt)],
    ["HTTP status", of.statusCode],
    ["Reason", of.reason],
    ["Died of", of.cause && html`<a href="#/dead-letters">${of.cause}</a>`],
    ["Started again as", of.redrivenAs && html`<a class="mono" href=${`#/requests/${of.redrivenAs}`}>${of.redrivenAs}</a>`],
  ];
  return html`<section class="card"><div class="head"><h2>Receipt</h2></div><dl class="facts">
    ${facts.filter(([, value]) => value).map(([name, value]) => html`<dt key=${name}>${name}</dt><dd>${value}</dd>`)}</dl></section>`;
}

const PHASES = [["queueSeconds", "Waiting"], ["coldStartSeconds", "… of it, for a cold start"], ["retriesSeconds", "Attempts that came to nothing"], ["inputSeconds", "Fetching its input"],
  ["containerSeconds", "In the container"], ["uploadSeconds", "Storing its result"], ["totalSeconds", "In all"]];

function Times({ of }) {
  if (!of) return null;
  return html`<section class="card"><div class="head"><h2>Where the time went</h2></div><dl class="facts">
    ${PHASES.filter(([name]) => of[name] !== undefined && of[name] !== null).map(([name, title]) => html`<dt key=${name}>${title}</dt><dd>${span(of[name])}</dd>`)}</dl></section>`;
}
