// What views are made of.

import htm from "./vendor/htm.mjs";
import { useEffect, useRef, useState } from "./vendor/hooks.mjs";
import { h } from "./vendor/preact.mjs";
import { clock, use } from "./state.mjs";

export const html = htm.bind(h);

const PAGE_ROWS = 25;

// -- figures and words --

const counts = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const moments = new Intl.DateTimeFormat("en", { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });

export const NONE = "–";

export function count(number) {
  if (number === undefined || number === null) return NONE;
  return number >= 100_000 ? short.format(number) : counts.format(number);
}

export function several(number, one) {
  return `${count(number)} ${one}${number === 1 ? "" : "s"}`;
}

export function span(seconds) {
  if (seconds === undefined || seconds === null || Number.isNaN(seconds)) return NONE;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 59.5) return `${Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)}m ${String(whole % 60).padStart(2, "0")}s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)}h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")}m`;
  return `${Math.floor(whole / 86_400)}d ${Math.floor((whole % 86_400) / 3600)}h`;
}

export function bytes(number) {
  if (number < 1024) return `${number} B`;
  const power = Math.min(4, Math.floor(Math.log2(number) / 10));
  return `${(number / 1024 ** power).toFixed(number / 1024 ** power < 10 ? 1 : 0)} ${["", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

// Of what has one type of instance only, that is its name again.
export function typeOf(row) {
  return row.instanceType === row.gpu ? null : row.instanceType;
}

export function moment(text) {
  return text ? moments.format(new Date(text)) : NONE;
}

export function brief(id) {
  return id ? id.slice(0, 8) : NONE;
}

// An age grows, so that parts of seconds would only flicker.
function age(since) {
  const seconds = Math.max(0, Math.floor(clock.now - since));
  return seconds < 60 ? `${seconds} s` : span(seconds);
}

export function Age({ since }) {
  use(clock);
  return since ? html`<span>${age(since)}</span>` : NONE;
}

export function Ago({ at }) {
  use(clock);
  return html`<time dateTime=${at} title=${moment(at)}>${age(Date.parse(at) / 1000)} ago</time>`;
}

const KINDS = {
  good: ["ACTIVE", "RUNNING", "fulfilled", "running"],
  warn: ["DEPLOYING", "DEGRADING", "DEGRADED", "STARTING", "DRAINING", "REMOVING", "queued", "returned"],
  bad: ["ERROR", "ERRORED", "QUARANTINED", "errored", "dead", "expired", "timed-out", "failed", "lost"],
};

export function Badge({ state }) {
  const kind = Object.keys(KINDS).find((name) => KINDS[name].includes(state)) ?? "";
  return html`<span class="badge ${kind}">${state.toLowerCase()}</span>`;
}

// -- boxes --

export function Tile({ label, hint, bad, children }) {
  return html`<div class="tile ${bad ? "bad" : ""}"><dt>${label}</dt><dd>${children}${hint && html`<span class="hint">${hint}</span>`}</dd></div>`;
}

export function Head({ title, children }) {
  const heading = useRef();
  useEffect(() => {
    document.title = `${title} · fnqueue`;
    if (moved) heading.current.focus();
    moved = true;
  }, [title]);
  return html`<div class="head"><h1 tabindex="-1" ref=${heading}>${title}</h1>${children}</div>`;
}
// The first page that is shown leaves the focus at its top, for the skip link.
let moved = false;

export function Meter({ of, part, label }) {
  const share = of ? Math.min(1, part / of) : 0;
  return html`<span class="meter" role="img" aria-label=${label}><i style=${{ width: `${share * 100}%` }}></i></span>`;
}

export function Trouble({ error }) {
  return error ? html`<p class="notice bad" role="alert">${error.message}</p>` : null;
}

// A question before what cannot be undone. `ask` of it resolves to whether to go on.
export function Question({ title, children, action, danger, onAnswer }) {
  const dialog = useRef();
  useEffect(() => dialog.current.showModal(), []);
  const answer = (yes) => (event) => {
    event.preventDefault();
    dialog.current.close();
    onAnswer(yes);
  };
  return html`<dialog ref=${dialog} aria-labelledby="question" onCancel=${answer(false)}>
    <form onSubmit=${answer(true)}>
      <h2 id="question">${title}</h2>
      <p>${children}</p>
      <div class="row">
        <button type="button" onClick=${answer(false)}>Keep</button>
        <button class=${danger ? "danger" : "main"}>${action}</button>
      </div>
    </form>
  </dialog>`;
}

// -- tables --

// `columns`: {name, title, value (to sort by), show, number, from ("mid" or "wide": the screens that have it)}.
export function Table({ caption, columns, rows, search, sort, empty, id }) {
  const [order, setOrder] = useState(sort);
  const [words, setWords] = useState("");
  const [page, setPage] = useState(0);
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const found = wanted.length ? rows.filter((row) => wanted.every((word) => search(row).includes(word))) : rows;
  const column = columns.find((each) => each.name === order.by) ?? columns[0];
  // Rows stay where they are under a pointer, and under the focus, which would be lost on the way.
  const body = useRef();
  const before = useRef({});
  const held = before.current.order === order && body.current?.matches(":hover, :focus-within");
  const place = (row) => (held ? (before.current.places.get(row.id) ?? before.current.places.size) : 0);
  const natural = (one, other) => compare(column.value(one), column.value(other)) * (order.down ? -1 : 1) || compare(one.id, other.id);
  const sorted = [...found].sort((one, other) => place(one) - place(other) || natural(one, other));
  before.current = { order, places: new Map(sorted.map((row, at) => [row.id, at])) };
  const pages = Math.max(1, Math.ceil(sorted.length / PAGE_ROWS));
  const at = Math.min(page, pages - 1);
  const shown = sorted.slice(at * PAGE_ROWS, (at + 1) * PAGE_ROWS);
  const sortBy = (each) => () => {
    setOrder({ by: each.name, down: order.by === each.name ? !order.down : Boolean(each.number) });
    setPage(0);
  };
  return html`<section class="card flush" id=${id} aria-label=${caption}>
    <div class="head">
      <h2>${caption}</h2>
      ${search && rows.length > 5 && html`<input type="search" placeholder="Filter" aria-label=${`Filter ${caption.toLowerCase()}`} value=${words}
        onInput=${(event) => (setWords(event.target.value), setPage(0))} />`}
    </div>
    ${!sorted.length
      ? html`<p class="empty-state">${rows.length ? "Nothing matches." : empty}</p>`
      : html`<table class="table">
          <caption class="unseen">${caption}</caption>
          <thead><tr>${columns.map((each) => html`<th key=${each.name} scope="col" class="${each.number ? "number" : ""} ${each.from ?? ""}"
            aria-sort=${each.name === column.name ? (order.down ? "descending" : "ascending") : null}>
            <button type="button" onClick=${sortBy(each)}>${each.title}</button></th>`)}</tr></thead>
          <tbody ref=${body}>${shown.map((row) => html`<tr key=${row.id}>${columns.map((each) => html`<td key=${each.name}
            class="${each.number ? "number" : ""} ${each.from ?? ""}">${each.show(row)}</td>`)}</tr>`)}</tbody>
        </table>`}
    ${pages > 1 && html`<div class="pager">
      <span aria-live="polite">${count(at * PAGE_ROWS + 1)} to ${count(at * PAGE_ROWS + shown.length)} of ${count(sorted.length)}</span>
      <span class="row">
        <button type="button" disabled=${!at} onClick=${() => setPage(at - 1)}>Previous</button>
        <button type="button" disabled=${at >= pages - 1} onClick=${() => setPage(at + 1)}>Next</button>
      </span></div>`}
  </section>`;
}

function compare(one, other) {
  if (typeof one === "string" || typeof other === "string") return String(one ?? "").localeCompare(String(other ?? ""));
  return (one ?? -1) - (other ?? -1);
}

export function FunctionName({ row, account }) {
  return html`<a class="name" href=${`#/functions/${row.versionId}`}>${row.name}</a>
    <span class="sub">${account ? `${row.account} · ` : null}<span class="mono">${brief(row.versionId)}</span></span>`;
}

export const byName = (row) => `${row.name} ${row.versionId} ${row.functionId} ${row.account} ${row.status}`.toLowerCase();
