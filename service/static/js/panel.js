// Beside the picture: legend, times.

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

/** A class's share for people: "76.9%"; what rounds to nothing is "under 0.1%". */
export function share(fraction) {
  return fraction < 0.001 ? "under 0.1%" : percent.format(fraction);
}

export function duration(ms) {
  return ms < 1000 ? `${oneDigit.format(ms)} ms` : `${oneDigit.format(ms / 1000)} s`;
}

/** Fill the legend; `onToggle(id)` and `onPoint(id or null)` are its users' wishes. */
export function drawLegend(list, classes, { onToggle, onPoint }) {
  list.replaceChildren(...classes.map((one) => legendItem(one, { onToggle, onPoint })));
}

function legendItem({ id, name, color, fraction }, { onToggle, onPoint }) {
  const item = document.createElement("li");
  // Nothing is painted for the background, so there is nothing to hide.
  const row = document.createElement(id === 0 ? "div" : "button");
  row.className = "class";
  row.dataset.id = id;
  const swatch = document.createElement("i");
  swatch.className = "swatch";
  swatch.style.background = `rgb(${color.join(" ")})`;
  const label = document.createElement("span");
  label.className = "class-name";
  label.textContent = name;
  const part = document.createElement("span");
  part.className = "class-share";
  part.textContent = share(fraction);
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.style.setProperty("--part", fraction);
  row.append(swatch, label, part, bar);
  if (id !== 0) {
    row.type = "button";
    row.setAttribute("aria-pressed", "true");
    row.addEventListener("click", () => onToggle(id));
    for (const event of ["pointerenter", "focus"]) row.addEventListener(event, () => onPoint(id));
    for (const event of ["pointerleave", "blur"]) row.addEventListener(event, () => onPoint(null));
  }
  item.append(row);
  return item;
}

/** Mark the shown classes, and the one under the pointer. */
export function markLegend(list, { shown, pointed }) {
  for (const row of list.querySelectorAll(".class")) {
    const id = Number(row.dataset.id);
    if (shown && id !== 0) row.setAttribute("aria-pressed", shown.has(id));
    if (pointed !== undefined) row.classList.toggle("pointed", id === pointed);
  }
}

/** A row for each of the server's stages, and one for the way there and back. */
export function drawTimes(list, stages, totalMs) {
  const onTheServer = stages.reduce((sum, [, ms]) => sum + ms, 0);
  const rows = [...stages, ["way", Math.max(totalMs - onTheServer, 0)]];
  list.replaceChildren(
    ...rows.flatMap(([stage, ms]) => {
      const name = document.createElement("dt");
      name.textContent = stage === "way" ? "Transfer" : (STAGES[stage] ?? stage);
      const value = document.createElement("dd");
      value.textContent = duration(ms);
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.style.setProperty("--part", ms / totalMs);
      value.append(bar);
      return [name, value];
    }),
  );
}
