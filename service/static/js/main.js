// The page: from a picture to what is shown, downloaded and copied.

import { address, credentials, curlCommand, Failure, segment, useKey } from "./api.js";
import { decodeMask } from "./mask.js";
import { drawLegend, drawTimes, duration, markLegend, share } from "./panel.js";
import { listen } from "./sources.js";
import { Viewer } from "./viewer.js";

const TRIES_WHEN_BUSY = 3;
const LONGEST_WAIT_S = 60;
const BUSY = [429, 503];

const element = (id) => document.getElementById(id);
const say = (text) => (element("status").textContent = text);

const viewer = new Viewer({ onToggle: toggle, onPoint: point, say });

let workingSize = 512; // the model's own; /model tells
let picture = null; // {blob, name, url?}: the last one given
let refused = null; // what was given without a key that the server takes
let current = null; // {picture, parameters, png, classes}: what is shown
let shown = new Set();
let running = new AbortController();

// ---- from a picture to its result ------------------------------------------------------------------

async function start(given) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  picture = given;
  refused = null;
  element("notice").textContent = "";
  setState("busy");
  try {
    const photo = readPhoto(given.blob);
    showPreview(photo, signal);
    const parameters = { max_side: maxSide(), model: element("model-choice").value || undefined };
    const answer = await segmentPatiently(given.blob, parameters, signal);
    await showAnswer(answer, parameters, await photo, signal);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) {
      refused = given;
      setState(current ? "result" : "empty");
      askForKey();
      return;
    }
    if (!(error instanceof Failure)) console.error(error);
    showFailure(error instanceof Failure ? error : new Failure("This page failed", String(error)));
  }
}

/** The picture as an ImageBitmap, upright as its EXIF says; null if this browser cannot read it. */
async function readPhoto(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    return null;
  }
}

async function showPreview(photo, signal) {
  const preview = element("preview");
  preview.hidden = true;
  if (!(await photo) || signal.aborted) return;
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(picture.blob);
  preview.hidden = false;
}

/** Segment; while the server is busy, wait as long as it asks and try again. */
async function segmentPatiently(blob, parameters, signal) {
  const onUpload = (part) => {
    // All of it is sent: how long the rest takes, nobody knows.
    if (part < 1) showPhase(`Uploading ${Math.floor(part * 100)}%`, part);
    else showPhase("Looking at every pixel…");
  };
  for (let tried = 1; ; tried++) {
    showPhase("Uploading…");
    say("Working on it");
    try {
      const wanted = { ...parameters, mask: "png" };
      return await segment(blob, wanted, { as: "application/json", signal, onUpload });
    } catch (error) {
      const waitable = BUSY.includes(error.status) && error.retryAfterS <= LONGEST_WAIT_S;
      if (!waitable || tried === TRIES_WHEN_BUSY) throw error;
      say(error.title);
      await countDown(error.retryAfterS, (left) => showPhase(`${error.title}. Next try in ${left} s`), signal);
    }
  }
}

async function countDown(seconds, onSecond, signal) {
  for (let left = seconds; left > 0; left--) {
    onSecond(left);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    signal.throwIfAborted();
  }
}

async function showAnswer({ blob, stages, totalMs }, parameters, photo, signal) {
  const answer = JSON.parse(await blob.text());
  const png = Uint8Array.from(atob(answer.mask), (character) => character.charCodeAt(0));
  const mask = await decodeMask(png);
  if (photo?.width !== mask.width || photo?.height !== mask.height) {
    // Not a format of this browser (TIFF), or turned otherwise: show the photo that the server saw.
    const plain = { ...parameters, view: "overlay", alpha: 0 };
    const seen = await segment(picture.blob, plain, { as: "image/png", signal });
    photo = await createImageBitmap(seen.blob);
  }
  signal.throwIfAborted();

  current = { picture, parameters, png, classes: answer.classes };
  setState("result");
  viewer.show(photo, mask, new Map(answer.classes.map((one) => [one.id, one])));
  photo.close();
  drawLegend(element("legend"), answer.classes, { onToggle: toggle, onPoint: point });
  setShown(answer.classes.map((one) => one.id).filter((id) => id !== 0));
  viewer.setOpacity(opacity());
  viewer.setContours(element("contours-on").checked);
  drawTimes(element("times"), stages, totalMs);
  element("total-time").textContent = duration(totalMs);
  element("facts").textContent = `${picture.name} · ${mask.width} × ${mask.height}`;
  element("download-note").textContent = "";
  const found = answer.classes.map((one) => `${one.name} ${share(one.fraction)}`).join(", ");
  say(`Done. Found: ${found}`);
}

// ---- states ------------------------------------------------------------------------------------------

function setState(state) {
  document.body.dataset.state = state;
  for (const part of ["busy", "error", "result"]) element(part).hidden = part !== state;
}

function showPhase(text, part) {
  element("phase").textContent = text;
  if (part === undefined) element("progress").removeAttribute("value");
  else element("progress").value = part;
}

function showFailure({ title, detail, passing, requestId }) {
  setState("error");
  element("error-title").textContent = title;
  element("error-detail").textContent = detail;
  element("error-reference").textContent = requestId ? `Request ${requestId}` : "";
  element("retry").hidden = !passing;
  element("back").hidden = !current;
}

function cancel() {
  running.abort();
  goBack();
  say("Cancelled");
  element(current ? "stage" : "file").focus();
}

/** To the last result, or to the beginning. */
function goBack() {
  picture = current?.picture ?? null;
  setState(current ? "result" : "empty");
}

// ---- the key, for servers that ask for one -----------------------------------------------------------

function askForKey() {
  const sent = credentials().Authorization;
  element("key-detail").textContent = sent
    ? "The server does not know the key that was sent."
    : "It is kept until this tab is closed.";
  element("key").hidden = false;
  element("key-input").focus();
}

function takeKey(event) {
  event.preventDefault();
  useKey(element("key-input").value);
  element("key").hidden = true;
  askForModels();
  if (refused) start(refused);
  else element("file").focus();
}

// ---- what is seen of the result ----------------------------------------------------------------------

function setShown(ids) {
  shown = new Set(ids);
  viewer.setShown(shown);
  markLegend(element("legend"), { shown });
  const all = current.classes.filter(({ id }) => id !== 0);
  element("show-all").hidden = shown.size === all.length;
  refreshCurl();
}

function toggle(id) {
  const wasShown = shown.has(id);
  setShown(wasShown ? [...shown].filter((one) => one !== id) : [...shown, id]);
  const { name } = current.classes.find((one) => one.id === id);
  say(`${name} ${wasShown ? "hidden" : "shown"}`);
}

function point(id) {
  viewer.highlight(id);
  markLegend(element("legend"), { pointed: id });
}

const opacity = () => element("opacity").value / 100;

function refreshOpacity() {
  element("opacity-value").textContent = `${element("opacity").value}%`;
  viewer.setOpacity(opacity());
  if (current) refreshCurl();
}

/** What to ask for: undefined for standard detail, so that the model's own size holds. */
function maxSide() {
  const times = Number(element("detail").value);
  return times === 1 ? undefined : Math.round(workingSize * times);
}

// ---- downloads and curl --------------------------------------------------------------------------------

const VIEWS = {
  mask: { file: "mask.png" },
  overlay: { file: "overlay.png" },
  cutout: { file: "cutout.png" },
  json: { file: "answer.json", as: "application/json" },
};

/** The request that gives a view as it is seen now. */
function request(view) {
  const asked = { ...current.parameters };
  if (view === "overlay" || view === "cutout") {
    asked.view = view;
    if (current.classes.some(({ id }) => id !== 0 && !shown.has(id))) {
      const names = current.classes.filter(({ id }) => shown.has(id)).map(({ name }) => name);
      asked.classes = names.join(",") || "background";
    }
  }
  if (view === "overlay") asked.alpha = opacity();
  return asked;
}

function refreshCurl() {
  const view = element("curl-view").value;
  const { as, file } = VIEWS[view];
  element("curl").textContent = curlCommand(current.picture, request(view), as, file);
}

async function copyCurl() {
  const text = element("curl").textContent;
  try {
    await navigator.clipboard.writeText(text);
    flash(element("copy"), "Copied");
  } catch {
    // Without https there is no clipboard to write to: leave it selected for Ctrl+C.
    getSelection().selectAllChildren(element("curl"));
    flash(element("copy"), "Press Ctrl+C");
  }
}

function flash(button, text) {
  const before = (button.dataset.text ??= button.textContent);
  button.textContent = text;
  say(text);
  setTimeout(() => (button.textContent = before), 2000);
}

/** The mask is here already; other views are the server's too, so that they are whole and exact. */
async function download(view, button) {
  const note = element("download-note");
  note.textContent = "";
  button.setAttribute("aria-busy", "true");
  try {
    let blob = new Blob([current.png], { type: "image/png" });
    if (view !== "mask") ({ blob } = await segment(current.picture.blob, request(view), { as: "image/png" }));
    save(blob, `${current.picture.name.replace(/\.\w+$/, "")}-${VIEWS[view].file}`);
  } catch (error) {
    if (error.status === 401) askForKey();
    note.textContent = `${error.title ?? "The download failed"}. ${error.detail ?? error}`;
    say(note.textContent);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// ---- wiring ----------------------------------------------------------------------------------------------

listen({ onPicture: start, onTrouble: (text) => (element("notice").textContent = text) });
element("key").addEventListener("submit", takeKey);
element("cancel").addEventListener("click", cancel);
element("retry").addEventListener("click", () => start(picture));
element("back").addEventListener("click", goBack);
for (const setting of ["detail", "model-choice"]) {
  element(setting).addEventListener("change", () => picture && start(picture));
}
element("opacity").addEventListener("input", refreshOpacity);
element("contours-on").addEventListener("change", (event) => viewer.setContours(event.target.checked));
element("show-all").addEventListener("click", () =>
  setShown(current.classes.map(({ id }) => id).filter((id) => id !== 0)));
element("curl-view").addEventListener("change", refreshCurl);
element("copy").addEventListener("click", copyCurl);
for (const button of document.querySelectorAll("[data-download]")) {
  button.addEventListener("click", () => download(button.dataset.download, button));
}
refreshOpacity();

async function askForModels() {
  const ask = async (path) => {
    const answer = await fetch(address(path), { headers: credentials() });
    if (answer.status === 401) askForKey();
    if (!answer.ok) throw new Error(answer.statusText);
    return answer.json();
  };
  try {
    const [model, { models }] = await Promise.all([ask("model"), ask("models")]);
    workingSize = model.working_size;
    element("model").textContent = `${model.name} ${model.version}, ${model.precision}`;
    // No value, no parameter: the default is the server's own.
    const choices = models.map((one) => new Option(one.name, one.default ? "" : one.name));
    element("model-choice").replaceChildren(...choices);
    element("models").hidden = models.length < 2;
  } catch {
    // The page says it when a picture is sent.
  }
}

askForModels();
