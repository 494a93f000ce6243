// Charts that are drawn again for each change, and for light and dark.

import { useEffect, useRef } from "./vendor/hooks.mjs";
import { html } from "./parts.mjs";

const HEIGHT = 150;
// A line that has just begun is drawn at the right of so many seconds.
const LEAST_S = 120;
const BAR_S = 60;
const WHOLE = [1, 2, 5].flatMap((one) => Array.from({ length: 9 }, (_, power) => one * 10 ** power)).sort((one, other) => one - other);
// Of times: what clocks and people count in, in seconds.
const SPANS = [...[0.001, 0.01, 0.1, 1].flatMap((one) => [one, one * 2, one * 5]), 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 43_200, 86_400, 172_800, 604_800];
const dark = matchMedia("(prefers-color-scheme: dark)");

// `series`: {title, hue 1 to 4, values, show (value to text), bars, fill}; `times` in seconds. `summary` is for those who
// do not see it.
export function Chart({ title, times, series, summary, empty, marks, whole }) {
  const place = useRef();
  const plot = useRef();
  const shape = series.map((each) => each.title).join();
  const drawn = times.length > 1;
  useEffect(() => {
    if (!drawn) return undefined;
    const box = place.current;
    const draw = () => {
      plot.current?.destroy();
      plot.current = new uPlot(options(series, box.clientWidth, { marks, whole }), data(times, series), box);
    };
    draw();
    const sized = new ResizeObserver(() => plot.current?.setSize({ width: box.clientWidth, height: HEIGHT }));
    sized.observe(box);
    dark.addEventListener("change", draw);
    return () => {
      sized.disconnect();
      dark.removeEventListener("change", draw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape, drawn]);
  // Most looks bring most charts nothing new, and drawing is what costs.
  const now = data(times, series);
  useEffect(() => {
    plot.current?.setData(now);
  }, [JSON.stringify(now)]);
  return html`<section class="card chart">
    <h2>${title}</h2>
    <ul class="key">${series.map((each) => html`<li key=${each.title} class="hue-${each.hue}">${each.title} <b>${each.show(each.now !== undefined ? each.now : each.values.at(-1))}</b></li>`)}</ul>
    <div class="plot" ref=${place} role="img" aria-label=${`${title}: ${summary}`}>
      ${!drawn && html`<span class="empty">${empty}</span>`}
    </div>
  </section>`;
}

function data(times, series) {
  return [times, ...series.map((each) => each.values)];
}

// `marks`: points without neighbours are to be seen too; `whole`: there are no halves of what is counted.
function options(series, width, { marks, whole }) {
  const hue = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // The last bar is not cut in half.
  const after = series[0].bars ? BAR_S / 2 : 0;
  const soft = hue("--soft");
  const axis = { stroke: soft, grid: { stroke: hue("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  return {
    width,
    height: HEIGHT,
    // At the right there is room for half of the last time's label.
    padding: [8, 24, 0, 0],
    legend: { show: false },
    cursor: { points: { size: 6 }, y: false, drag: { setScale: false, x: false, y: false } },
    scales: { x: { range: (_, least, most) => [Math.min(least, most - LEAST_S), most + after] }, y: { range: (_, __, most) => [0, most > 0 ? most * 1.1 : 1] } },
    axes: [
      { ...axis, space: 70, size: 26, values: [[60, "{HH}:{mm}", null, null, null, null, null, null, 1], [1, "{HH}:{mm}:{ss}", null, null, null, null, null, null, 1]] },
      { ...axis, space: 30, size: 52, incrs: whole ? WHOLE : SPANS, values: (_, ticks) => ticks.map((tick) => (tick ? series[0].show(tick) : "0")) },
    ],
    series: [
      {},
      ...series.map((each) => {
        const colour = hue(`--chart-${each.hue}`);
        const line = { label: each.title, stroke: colour, width: 1.75, points: { show: Boolean(marks) && !each.bars, size: 4, fill: colour }, spanGaps: false };
        if (each.fill) line.fill = `color-mix(in srgb, ${colour} 18%, transparent)`;
        if (each.bars) Object.assign(line, { paths: uPlot.paths.bars({ size: [0.8, 24, 2] }), fill: colour, width: 0 });
        return line;
      }),
    ],
  };
}
