// What was done, minute by minute.

import { useEffect, useState } from "./vendor/hooks.mjs";
import { Chart } from "./charts.mjs";
import { count, html, NONE, span } from "./parts.mjs";
import { ask } from "./state.mjs";

const HOUR = 60;
const EMPTY = "Nothing ended in the last hour";

// `points` as the server has them: [start of the minute, fulfilled, not fulfilled, wait p50, p90, run p50, p90].
export function Activity({ points, recent }) {
  const times = points.map((each) => each[0]);
  const column = (number) => points.map((each) => each[number]);
  const ended = column(1).map((fulfilled, at) => fulfilled + points[at][2]);
  const failed = column(2);
  const sum = (values) => values.reduce((total, each) => total + each, 0);
  const some = sum(ended) > 0;
  const shown = some ? times : [];
  return html`
    <${Chart} title="Ended per minute, last hour" whole times=${shown} empty=${EMPTY}
      series=${[
        { title: "all", hue: 2, values: ended, show: count, now: sum(ended), bars: true },
        { title: "not fulfilled", hue: 3, values: failed, show: count, now: sum(failed), bars: true },
      ]}
      summary=${`${count(sum(ended))} in the last hour, ${count(sum(failed))} of them not fulfilled`} />
    <${Quantiles} title="Wait in the queue" times=${shown} p50=${column(3)} p90=${column(4)} recent=${recent?.wait} hues=${[1, 4]} />
    <${Quantiles} title="Run" times=${shown} p50=${column(5)} p90=${column(6)} recent=${recent?.run} hues=${[1, 4]} />`;
}

function Quantiles({ title, times, p50, p90, recent, hues }) {
  const [half, most] = recent ?? [null, null];
  return html`<${Chart} title=${title} times=${times} empty=${EMPTY} marks
    series=${[
      { title: "p90", hue: hues[1], values: p90, show: span, now: most },
      { title: "p50", hue: hues[0], values: p50, show: span, now: half },
    ]}
    summary=${half === null ? "nothing in the last five minutes" : `half took at most ${span(half)}, nine of ten at most ${span(most)} in the last five minutes`} />`;
}

// One version's, asked for when its latest figures change: all together would be too much to send to every page.
export function useActivity(row) {
  const [points, setPoints] = useState([]);
  const changed = JSON.stringify(row?.recent ?? null);
  useEffect(() => {
    if (!row || row.queued === undefined) return;
    const path = `functions/${row.functionId}/versions/${row.versionId}/activity`;
    ask("GET", path, { query: { minutes: HOUR }, account: row.account }).then((found) => setPoints(pointsOf(found)), () => {});
  }, [row?.versionId, row?.queued === undefined, changed]);
  return points;
}

function pointsOf(found) {
  const last = Date.parse(found.until) / 1000 - 60;
  const by = new Map(found.minutes.map((each) => [Date.parse(each.startsAt) / 1000, each]));
  return Array.from({ length: HOUR }, (_, number) => {
    const at = last - 60 * (HOUR - 1 - number);
    const minute = by.get(at);
    const ended = minute ? Object.values(minute.ends).reduce((sum, each) => sum + each, 0) : 0;
    const fulfilled = minute?.ends.fulfilled ?? 0;
    const pair = (times) => [times?.p50Seconds ?? null, times?.p90Seconds ?? null];
    return [at, fulfilled, ended - fulfilled, ...pair(minute?.wait), ...pair(minute?.run)];
  });
}

export function rate(recent) {
  if (!recent) return NONE;
  return recent.perMinute >= 10 ? count(recent.perMinute) : recent.perMinute.toFixed(1);
}

export function pair(times) {
  return times && times[0] !== null ? `${span(times[0])} / ${span(times[1])}` : NONE;
}
