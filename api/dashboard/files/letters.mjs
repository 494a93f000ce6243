// Requests that died: of what, and what to do with them.

import { useEffect, useRef, useState } from "./vendor/hooks.mjs";
import { Ago, brief, bytes, count, Head, html, Question, several, Trouble } from "./parts.mjs";
import { ask, board, session, use } from "./state.mjs";

const MEANING = {
  "attempts-exhausted": "Every attempt that a request has came to nothing.",
  "worker-deaths": "Workers died while they ran it: the input may be what kills them.",
  "delivery-limit": "It was delivered as often as the queue allows.",
  rejected: "No worker could read its message, or it was not signed by this deployment.",
  "queue-full": "The queue was full when it was given back.",
  "dead-lettered": "The queue gave it up, and does not say why.",
};
const ONE_GO = 50;

export function DeadLetters() {
  use(board);
  const [cause, setCause] = useState("");
  const [page, setPage] = useState({ letters: [], cursor: "" });
  const [trouble, setTrouble] = useState(null);
  const [question, setQuestion] = useState(null);
  const [said, setSaid] = useState("");
  const [busy, setBusy] = useState(false);
  const causes = board.deadLetters;
  const seen = (causes ?? []).map((each) => `${each.cause}=${each.count}`).join();
  const wanted = useRef(0);

  const read = async (cursor = "") => {
    const turn = ++wanted.current;
    try {
      const found = await ask("GET", "dead-letters", { query: { cause, cursor, limit: 25, redriven: "false" } });
      if (turn !== wanted.current) return;
      setPage((before) => ({ letters: cursor ? [...before.letters, ...found.deadLetters] : found.deadLetters, cursor: found.cursor }));
      setTrouble(null);
    } catch (error) {
      if (turn === wanted.current) setTrouble(error);
    }
  };
  useEffect(() => {
    if (causes) read();
  }, [cause, seen]);

  if (session.account === "*") return html`<${Head} title="Dead letters" /><p class="notice">Choose one account to see its dead letters.</p>`;
  if (!session.may("invoke_function")) return html`<${Head} title="Dead letters" /><p class="notice">The key lacks the scope <code>invoke_function</code>, so dead letters are not shown.</p>`;

  const act = async (work) => {
    setBusy(true);
    setTrouble(null);
    try {
      setSaid(await work());
    } catch (error) {
      setTrouble(error);
    }
    setBusy(false);
    await read();
  };
  const redriveAll = (of) => setQuestion({
    title: `Start ${several(of.count, "request")} again?`,
    text: `All that died of “${of.cause}”, as new requests. They take their places at the end of the queue.`,
    action: "Start again",
    work: () => inGoes("redrive", of.cause, (done) => done.redriven.length, (sum) => `${count(sum)} started again.`, setSaid),
  });
  const purgeAll = (of) => setQuestion({
    title: `Throw ${several(of.count, "dead letter")} away?`,
    text: `All that died of “${of.cause}”, with their inputs; those too that were started again. This cannot be undone; the receipts stay.`,
    action: "Throw away",
    danger: true,
    work: () => inGoes("purge", of.cause, (done) => done.purged, (sum) => `${count(sum)} thrown away.`, setSaid),
  });
  const purgeOne = (letter) => setQuestion({
    title: "Throw this dead letter away?",
    text: `Request ${letter.requestId}, with its input. This cannot be undone.`,
    action: "Throw away",
    danger: true,
    work: async () => (await ask("DELETE", `dead-letters/${letter.requestId}`), "Thrown away."),
  });
  const redriveOne = (letter) => act(async () => {
    const done = await ask("POST", `dead-letters/${letter.requestId}/redrive`, { body: {} });
    return html`Started again as <a class="mono" href=${`#/requests/${done.redrivenAs}`}>${done.redrivenAs}</a>.`;
  });

  return html`<${Head} title="Dead letters"><${CauseChoice} causes=${causes ?? []} value=${cause} onChange=${setCause} /><//>
    <div role="status" aria-live="polite">${said && html`<p class="notice good">${said}</p>`}</div>
    <${Trouble} error=${trouble} />
    ${causes && !causes.length && html`<section class="card"><p class="empty-state">There are none. Requests come here when their attempts are used up.</p></section>`}
    ${causes && causes.length > 0 && html`<section class="causes" aria-label="By cause">${causes.map((each) => html`<article class="card cause" key=${each.cause}>
      <h2>${each.cause}</h2>
      <div><b>${count(each.count)}</b> <small>in ${several(each.versions.length, "version")}, the last <${Ago} at=${each.lastDiedAt} /></small></div>
      <p>${MEANING[each.cause] ?? null}</p>
      <div class="row"><button class="main" disabled=${busy} onClick=${() => redriveAll(each)}>Redrive all</button>
        <button class="danger" disabled=${busy} onClick=${() => purgeAll(each)}>Purge all</button></div>
    </article>`)}</section>`}
    ${page.letters.length > 0 && html`<section class="card flush" aria-label="Dead letters">
      <table class="table"><caption class="unseen">Dead letters, the latest first</caption>
        <thead><tr><th scope="col">Request</th><th scope="col" class="mid">Function</th><th scope="col">Cause</th><th scope="col" class="number mid">Attempts</th>
          <th scope="col" class="number wide">Input</th><th scope="col" class="mid">Died</th><th scope="col"><span class="unseen">Actions</span></th></tr></thead>
        <tbody>${page.letters.map((letter) => html`<tr key=${letter.requestId}>
          <td><a class="mono" href=${`#/requests/${letter.requestId}`}>${brief(letter.requestId)}</a></td>
          <td class="mid">${nameOf(letter)}</td>
          <td>${letter.cause}<span class="sub">${letter.reason ?? null}</span></td>
          <td class="number mid">${count(letter.attempts)}</td>
          <td class="number wide">${bytes(letter.sizeBytes)}</td>
          <td class="mid"><${Ago} at=${letter.diedAt} /></td>
          <td class="number"><span class="row"><button disabled=${busy} aria-label=${`Redrive ${letter.requestId}`} onClick=${() => redriveOne(letter)}>Redrive</button>
            <button class="danger mid" disabled=${busy} aria-label=${`Purge ${letter.requestId}`} onClick=${() => purgeOne(letter)}>Purge</button></span></td>
        </tr>`)}</tbody></table>
      ${page.cursor && html`<div class="pager"><span></span><button onClick=${() => read(page.cursor)}>Show more</button></div>`}
    </section>`}
    ${question && html`<${Question} title=${question.title} action=${question.action} danger=${question.danger}
      onAnswer=${(yes) => (setQuestion(null), yes && act(question.work))}>${question.text}<//>`}`;
}

function CauseChoice({ causes, value, onChange }) {
  return causes.length < 2 ? html`<span></span>` : html`<select aria-label="Show those that died of" value=${value} onChange=${(event) => onChange(event.target.value)}>
    <option value="">all causes</option>${causes.map((each) => html`<option key=${each.cause} value=${each.cause}>${each.cause}</option>`)}</select>`;
}

function nameOf(letter) {
  const row = board.rows("functions").get(letter.functionVersionId);
  return row ? html`<a href=${`#/functions/${row.id}`}>${row.name}</a>` : html`<span class="mono">${brief(letter.functionVersionId)}</span>`;
}

// The server does a bounded number in one call, and says where to go on.
async function inGoes(verb, cause, countOf, sentence, say) {
  let sum = 0;
  let left = 0;
  let cursor;
  do {
    const done = await ask("POST", `dead-letters/${verb}`, { body: { select: { causes: [cause] }, limit: ONE_GO, cursor } });
    sum += countOf(done);
    left += done.left?.length ?? 0;
    if (done.stopped) throw new Error(`${sentence(sum)} Then it stopped: ${done.stopped}`);
    cursor = done.cursor;
    say(`${sentence(sum)} Going on …`);
  } while (cursor);
  return sentence(sum) + (left ? ` ${count(left)} could not be.` : "");
}
