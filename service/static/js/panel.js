// The panel beside the picture: legend, times.

import { create, css } from "./dom.js";
import { BACKGROUND } from "./mask.js";

const digits = { minimumFractionDigits: 1, maximumFractionDigits: 1 };
const percent = new Intl.NumberFormat("en", { style: "percent", ...digits });
const oneDigit = new Intl.NumberFormat("en", digits);

const STAGES = {
  decode: "Reading",
  preprocess: "Resizing",
  queue: "Waiting",
  infer: "Network",
  upsample: "Enlarging",
  encode: "Writing",
};

/** A fraction as text: "76.9%". A small one is "under 0.1%" rather than zero. */
export function share(fraction) {
  return fraction < 0.001 ? "under 0.1%" : percent.format(fraction);
}

export function duration(ms) {
  return ms < 1000 ? `${oneDigit.format(ms)} ms` : `${oneDigit.format(ms / 1000)} s`;
}

/** Fill the legend. `onToggle(id)`: a class was clicked; `onPoint(id or null)`: pointer or focus moved. */
export function drawLegend(list, classes, { onToggle, onPoint }) {
  list.replaceChildren(...classes.map((one) => legendItem(one, { onToggle, onPoint })));
}

function legendItem({ id, name, color, fraction }, { onToggle, onPoint }) {
  const item = create("li");
  // The background is not painted, so it cannot be hidden.
  const row = create(id === BACKGROUND ? "div" : "button", "class");
  row.dataset.id = id;
  const swatch = create("i", "swatch");
  swatch.style.background = css(color);
  const label = create("span", "class-name", name);
  row.append(swatch, label, create("span", "class-share", share(fraction)), bar(fraction));
  if (id !== BACKGROUND) {
    row.type = "button";
    row.setAttribute("aria-pressed", "true");
    row.addEventListener("click", () => onToggle(id));
    for (const event of ["pointerenter", "focus"]) row.addEventListener(event, () => onPoint(id));
    for (const event of ["pointerleave", "blur"]) row.addEventListener(event, () => onPoint(null));
  }
  item.append(row);
  return item;
}

/** A bar whose filled part is 0 to 1. */
function bar(part) {
  const made = create("span", "bar");
  made.style.setProperty("--part", part);
  return made;
}

/** Mark the shown classes, and the class under the pointer. */
export function markLegend(list, { shown, pointed }) {
  for (const row of list.querySelectorAll(".class")) {
    const id = Number(row.dataset.id);
    if (shown && id !== BACKGROUND) row.setAttribute("aria-pressed", shown.has(id));
    if (pointed !== undefined) row.classList.toggle("pointed", id === pointed);
  }
}

/** One row for each of the server's stages, and one for the transfer. */
export function drawTimes(list, stages, totalMs) {
  const onTheServer = stages.reduce((sum, [, ms]) => sum + ms, 0);
  const rows = stages.map(([stage, ms]) => [STAGES[stage] ?? stage, ms]);
  rows.push(["Transfer", Math.max(totalMs - onTheServer, 0)]);
  list.replaceChildren(
    ...rows.flatMap(([name, ms]) => {
      const value = create("dd", "", duration(ms));
      value.append(bar(ms / totalMs));
      return [create("dt", "", name), value];
    }),
  );
}
