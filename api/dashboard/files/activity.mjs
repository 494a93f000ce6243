// What was done, minute by minute.

import { html } from "./parts.mjs";

export function timesOf() {
  return null;
}

export function Activity() {
  return html``;
}
