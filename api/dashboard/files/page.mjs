// The page: who is logged in, where to go, and the view of where one is.

import { useEffect, useState } from "./vendor/hooks.mjs";
import { render } from "./vendor/preact.mjs";
import { DeadLetters } from "./letters.mjs";
import { Deployments } from "./deployments.mjs";
import { FunctionView } from "./function.mjs";
import { Overview } from "./overview.mjs";
import { count, html } from "./parts.mjs";
import { Request, Requests } from "./requests.mjs";
import { board, route, session, use } from "./state.mjs";
import { Workers } from "./workers.mjs";

const PLACES = [
  ["", "Overview"],
  ["workers", "Workers"],
  ["deployments", "Deployments"],
  ["dead-letters", "Dead letters"],
  ["requests", "Requests"],
];
const EVERYBODY = "*";

function Page() {
  use(session);
  const [trouble, setTrouble] = useState(null);
  useEffect(() => {
    session.begin().catch(setTrouble);
  }, []);
  if (trouble && session.who === undefined) return html`<main><p class="notice bad" role="alert">${trouble.message}</p></main>`;
  if (session.who === undefined) return html`<main aria-busy="true"></main>`;
  return session.who === null ? html`<${Login} />` : html`<${Frame} />`;
}

function Login() {
  const [key, setKey] = useState("");
  const [trouble, setTrouble] = useState("");
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    document.title = "Log in · fnqueue";
    document.querySelector("#key")?.focus();
  }, []);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      await session.logIn(key.trim());
    } catch (error) {
      setTrouble(error.status === 401 ? "This key is not valid." : error.message);
      setBusy(false);
    }
  };
  return html`<main class="login">
    <form class="card" onSubmit=${submit}>
      <h1 class="brand"><img src=${new URL("icon.svg", import.meta.url).href} alt="" /> fnqueue</h1>
      <label class="field" for="key">API key
        <input id="key" name="key" type="password" required autocomplete="current-password" spellcheck="false"
          aria-describedby="about-key" value=${key} onInput=${(event) => setKey(event.target.value)} />
      </label>
      <small id="about-key">You see and may do here what the key may by the API.</small>
      <p class="notice bad" role="alert" hidden=${!trouble}>${trouble}</p>
      <button class="main" disabled=${busy}>Log in</button>
    </form>
  </main>`;
}

function Frame() {
  use(route);
  const [place = "", id] = route.parts;
  useEffect(showPlace, [place]);
  return html`
    <a class="skip" href="#main" onClick=${toMain}>Skip to content</a>
    <header class="bar"><div>
      <a class="brand" href="#/"><img src=${new URL("icon.svg", import.meta.url).href} alt="" /> fnqueue</a>
      <nav aria-label="Places"><ul>${PLACES.map(([path, title]) => html`<li key=${path}>
        <a href=${`#/${path}`} aria-current=${path === place || (path === "" && place === "functions") ? "page" : null}>${title}
          ${path === "dead-letters" && html`<${DeadCount} />`}</a></li>`)}</ul></nav>
      <div class="who"><${Connection} /><${Account} /><button class="plain" onClick=${() => session.logOut()}>Log out</button></div>
    </div></header>
    <main id="main" tabindex="-1"><${Away} /><${View} place=${place} id=${id} key=${`${session.account}/${place}/${id}`} /></main>`;
}

// A phone is narrower than all places beside each other. `scrollIntoView` would move where the Tab key begins.
function showPlace() {
  const places = document.querySelector("nav");
  const here = places.querySelector("[aria-current]");
  if (here) places.scrollLeft = here.offsetLeft - places.offsetLeft - (places.clientWidth - here.offsetWidth) / 2;
}

// The address holds where one is, so the link must not change it.
function toMain(event) {
  event.preventDefault();
  document.querySelector("#main h1")?.focus();
}

function View({ place, id }) {
  if (place === "functions" && id) return html`<${FunctionView} id=${id} />`;
  if (place === "workers") return html`<${Workers} />`;
  if (place === "deployments") return html`<${Deployments} />`;
  if (place === "dead-letters") return html`<${DeadLetters} />`;
  if (place === "requests") return id ? html`<${Request} id=${id} />` : html`<${Requests} />`;
  return html`<${Overview} />`;
}

function DeadCount() {
  use(board);
  const dead = (board.deadLetters ?? []).reduce((sum, cause) => sum + cause.count, 0);
  return dead ? html`<span class="count">${count(dead)}</span>` : null;
}

function Connection() {
  use(board);
  const [kind, text] = { live: ["", "live"], away: ["away", "stores away"], connecting: ["wait", "connecting"] }[board.state];
  return html`<span class="live ${kind}" role="status">${text}</span>`;
}

function Away() {
  use(board);
  return board.state === "away" ? html`<p class="notice bad" role="alert">What is shown is old: ${board.detail}</p>` : null;
}

function Account() {
  use(session);
  const { who, account } = session;
  if (!who.allAccounts) return html`<span class="account mid" title="The account of your key">${who.account}</span>`;
  const others = who.accounts.filter((each) => each !== who.account);
  return html`<select aria-label="Account" value=${account} onChange=${(event) => session.choose(event.target.value)}>
    <option value=${who.account}>${who.account}</option>
    ${others.map((each) => html`<option key=${each} value=${each}>${each}</option>`)}
    <option value=${EVERYBODY}>all accounts</option>
  </select>`;
}

render(html`<${Page} />`, document.getElementById("page"));
