// What the server says, for whoever shows it: the session, answers of the API, and the live board.

import { useEffect, useState } from "./vendor/hooks.mjs";

const ROOT = new URL("../", import.meta.url);
const RENEW_MS = 5 * 60_000;
const LOOK_AGAIN_MS = 5_000;
const HISTORY = 300;
const MINUTES = 60;

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

// A value and those who show it. Many changes between two frames are shown once.
class Source {
  #listeners = new Set();
  #due = false;

  listen(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  changed() {
    if (this.#due) return;
    this.#due = true;
    const show = () => {
      this.#due = false;
      for (const listener of [...this.#listeners]) listener();
    };
    // No frames come to a page that nobody sees.
    if (document.hidden) setTimeout(show, 0);
    else requestAnimationFrame(show);
  }
}

export function use(source) {
  const [, again] = useState(0);
  useEffect(() => source.listen(() => again((n) => n + 1)), [source]);
  return source;
}

// -- the session --

class Session extends Source {
  who = undefined; // not known yet; null: nobody
  account = "";

  async begin() {
    const who = await this.#ask("GET");
    if (who) this.#take(who);
    else this.end();
  }

  async logIn(key) {
    this.#take(await this.#ask("POST", { key }));
  }

  async logOut() {
    try {
      await this.#ask("DELETE");
    } finally {
      this.end();
    }
  }

  choose(account) {
    this.account = account;
    board.follow(account);
    this.changed();
  }

  may(scope) {
    if (!this.who) return false;
    const own = this.account === this.who.account;
    return this.who.scopes.includes(own ? scope : "admin:" + scope);
  }

  end() {
    clearInterval(this.renewing);
    board.stop();
    this.who = null;
    this.changed();
  }

  #take(who) {
    const before = this.who;
    this.who = who;
    if (!before) {
      this.account = who.account;
      board.follow(this.account);
      this.renewing = setInterval(() => this.begin().catch(() => {}), RENEW_MS);
    }
    this.changed();
  }

  #ask(method, body) {
    return send(method, new URL("session", ROOT), body, this.who?.csrfToken);
  }
}

async function send(method, url, body, token) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (token && method !== "GET") headers["X-CSRF-Token"] = token;
  let response;
  try {
    response = await fetch(url, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Refused(0, "The server cannot be reached.");
  }
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, answer.detail || answer.title || `HTTP ${response.status}`);
  return answer;
}

function address(path, query = {}, account = session.account) {
  const url = new URL("data/" + path, ROOT);
  for (const [name, value] of Object.entries(query)) if (value !== undefined && value !== "") url.searchParams.set(name, value);
  if (account && account !== session.who?.account) url.searchParams.set("account", account);
  return url;
}

// An answer of the API's, for the account that is looked at. Throws Refused.
export async function ask(method, path, { query, body, account } = {}) {
  try {
    return await send(method, address(path, query, account), body, session.who?.csrfToken);
  } catch (error) {
    if (error.status === 401) session.end();
    throw error;
  }
}

export function events(path) {
  return new EventSource(address(path));
}

// -- the board --

class Board extends Source {
  #stream = null;
  #again = 0;

  constructor() {
    super();
    this.#clear();
  }

  follow(account) {
    this.stop();
    this.#clear();
    this.#open(account);
  }

  stop() {
    clearTimeout(this.#again);
    this.#stream?.close();
    this.#stream = null;
  }

  rows(name) {
    return this.tables[name];
  }

  #clear() {
    this.tables = { functions: new Map(), deployments: new Map(), workers: new Map(), gpus: new Map() };
    this.history = [];
    this.perVersion = new Map();
    this.points = [];
    this.recent = null;
    this.deadLetters = null;
    this.at = 0;
    this.state = "connecting";
    this.detail = "";
    this.changed();
  }

  #open(account) {
    const stream = (this.#stream = events("live"));
    const take = (event) => this.#take(JSON.parse(event.data));
    stream.addEventListener("everything", (event) => {
      for (const table of Object.values(this.tables)) table.clear();
      this.history = [];
      this.points = [];
      take(event);
    });
    stream.addEventListener("changes", take);
    stream.addEventListener("away", (event) => this.#say("away", JSON.parse(event.data).detail));
    stream.onerror = () => {
      if (this.#stream !== stream) return;
      this.#say("connecting", "");
      if (stream.readyState !== EventSource.CLOSED) return;
      // It was refused, which a browser does not try again: the session may have ended, or there are too many pages.
      this.#again = setTimeout(async () => {
        await session.begin().catch(() => {});
        if (session.who && this.#stream === stream) this.#open(account);
      }, LOOK_AGAIN_MS / 5);
    };
  }

  #say(state, detail) {
    this.state = state;
    this.detail = detail;
    this.changed();
  }

  #take(said) {
    for (const [name, rows] of Object.entries(said.put)) for (const row of rows) this.tables[name].set(row.id, row);
    for (const [name, ids] of Object.entries(said.gone)) for (const id of ids) this.tables[name].delete(id);
    this.history = [...this.history, ...said.history].slice(-HISTORY);
    for (const row of this.tables.functions.values()) this.#note(row, said.at);
    for (const id of this.perVersion.keys()) if (!this.tables.functions.has(id)) this.perVersion.delete(id);
    this.at = said.at;
    this.deadLetters = said.deadLetters;
    this.recent = said.recent;
    if (said.points.length) this.points = merged(this.points, said.points);
    this.skew = Date.now() / 1000 - said.at;
    this.#say("live", "");
  }

  // A version's own history is kept from when it first had something to do.
  #note(row, at) {
    const known = this.perVersion.get(row.id);
    if (!known && !row.queued && !row.running) return;
    const history = known ?? [];
    history.push([at, row.queued, row.running]);
    if (history.length > HISTORY) history.shift();
    this.perVersion.set(row.id, history);
  }
}

function merged(points, more) {
  const by = new Map([...points, ...more].map((point) => [point[0], point]));
  return [...by.values()].sort((one, other) => one[0] - other[0]).slice(-MINUTES);
}

// -- the clock, by which ages grow --

class Clock extends Source {
  constructor() {
    super();
    setInterval(() => this.changed(), 1000);
  }

  // Seconds, by the server's clock.
  get now() {
    return Date.now() / 1000 - (board.skew || 0);
  }
}

class Route extends Source {
  constructor() {
    super();
    addEventListener("hashchange", () => this.changed());
  }

  get parts() {
    return location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeURIComponent);
  }
}

export const board = new Board();
export const session = new Session();
export const clock = new Clock();
export const route = new Route();
