// The page: takes a picture, shows its classes, and offers downloads and curl commands.

import { credentials, curlCommand, Failure, getJson, segment, useKey } from "./api.js";
import { create, element } from "./dom.js";
import { BACKGROUND, decodeMask } from "./mask.js";
import { drawLegend, drawTimes, duration, markLegend, share } from "./panel.js";
import { listen } from "./sources.js";
import { Viewer } from "./viewer.js";
import { imageViews, MASK, STATISTICS } from "./views.js";

const TRIES_WHEN_BUSY = 3;
const MAX_WAIT_S = 60;
const BUSY = [429, 503];
const NAMED_CLASSES = 4; // in the introduction

const listOf = new Intl.ListFormat("en-GB");
/** Report a change to screen readers. */
const announce = (text) => (element("status").textContent = text);
const chosenModel = () => element("model-choice").value || undefined;

const viewer = new Viewer({ onToggle: toggle, onPoint: point, announce });

let workingSize = 512; // of the default model, until GET /model answers
let labels = null; // Promise of the answer to GET /classes for the chosen model
let views = [MASK];
let picture = null; // the latest {blob, name, url?}
let refused = null; // the picture of a request that the server answered with 401
let current = null; // the result shown: {picture, parameters, png, classes, background}
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
    const parameters = { max_side: maxSide(), model: chosenModel() };
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
    showFailure(error instanceof Failure ? error : new Failure("This page has a fault", String(error)));
  }
}

/** The picture as an ImageBitmap, turned as its EXIF says; null if the browser cannot read it. */
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

/** Segment. While the server is busy, wait for the time that it asks for and try again. */
async function segmentPatiently(blob, parameters, signal) {
  const onUpload = (part) => {
    // The server does not report its progress after the upload.
    if (part < 1) showPhase(`Uploading ${Math.floor(part * 100)}%`, part);
    else showPhase("Processing…");
  };
  for (let tried = 1; ; tried++) {
    showPhase("Uploading…");
    announce("Processing the picture");
    try {
      const wanted = { ...parameters, mask: "png" };
      return await segment(blob, wanted, { as: "application/json", signal, onUpload });
    } catch (error) {
      const waitable = BUSY.includes(error.status) && error.retryAfterS <= MAX_WAIT_S;
      if (!waitable || tried === TRIES_WHEN_BUSY) throw error;
      announce(error.title);
      await countDown(error.retryAfterS, (left) => showPhase(`${error.title}. Retrying in ${left} s`), signal);
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
    // The browser cannot read the format (TIFF) or turns it differently: show the server's photo.
    const plain = { ...parameters, view: "overlay", alpha: 0 };
    const seen = await segment(picture.blob, plain, { as: "image/png", signal });
    photo = await createImageBitmap(seen.blob);
  }
  const background = (await labels)?.classes.find(({ id }) => id === BACKGROUND)?.name;
  signal.throwIfAborted();

  current = { picture, parameters, png, classes: answer.classes, background };
  setState("result");
  viewer.show(photo, mask, new Map(answer.classes.map((one) => [one.id, one])));
  photo.close();
  drawLegend(element("legend"), answer.classes, { onToggle: toggle, onPoint: point });
  showAll();
  viewer.setOpacity(opacity());
  viewer.setContours(element("contours-on").checked);
  drawTimes(element("times"), stages, totalMs);
  element("total-time").textContent = duration(totalMs);
  element("facts").textContent = `${picture.name} · ${mask.width} × ${mask.height}`;
  element("download-note").textContent = "";
  const found = answer.classes.map((one) => `${one.name} ${share(one.fraction)}`).join(", ");
  announce(`Done. Found: ${found}`);
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

function showFailure({ title, detail, temporary, requestId }) {
  setState("error");
  element("error-title").textContent = title;
  element("error-detail").textContent = detail;
  element("error-reference").textContent = requestId ? `Request ${requestId}` : "";
  element("retry").hidden = !temporary;
  element("back").hidden = !current;
}

function cancel() {
  running.abort();
  goBack();
  announce("Cancelled");
  element(current ? "stage" : "file").focus();
}

/** Return to the last result, or to the start. */
function goBack() {
  picture = current?.picture ?? null;
  setState(current ? "result" : "empty");
}

// ---- the API key, if the server requires one ---------------------------------------------------------

function askForKey() {
  const sent = credentials().Authorization;
  element("key-detail").textContent = sent
    ? "The server does not accept this key."
    : "The key is kept until you close this tab.";
  element("key").hidden = false;
  element("key-input").focus();
}

function takeKey(event) {
  event.preventDefault();
  useKey(element("key-input").value);
  element("key").hidden = true;
  showService();
  if (refused) start(refused);
  else element("file").focus();
}

// ---- which classes the result shows ------------------------------------------------------------------

/** The classes of the result that can be shown or hidden. */
const foreground = () => current.classes.filter(({ id }) => id !== BACKGROUND);

function setShown(ids) {
  viewer.setShown(ids);
  markLegend(element("legend"), { shown: viewer.shown });
  element("show-all").hidden = foreground().every(({ id }) => viewer.shown.has(id));
  refreshCurl();
}

function showAll() {
  setShown(foreground().map(({ id }) => id));
}

function toggle(id) {
  const wasShown = viewer.shown.has(id);
  setShown(wasShown ? [...viewer.shown].filter((one) => one !== id) : [...viewer.shown, id]);
  const { name } = current.classes.find((one) => one.id === id);
  announce(`${name} ${wasShown ? "hidden" : "shown"}`);
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

/** The parameter max_side; undefined for standard detail, which is the model's working size. */
function maxSide() {
  const times = Number(element("detail").value);
  return times === 1 ? undefined : Math.round(workingSize * times);
}

// ---- downloads and curl --------------------------------------------------------------------------------

/** Fill the list of downloads and the list of curl commands. */
function offerViews() {
  element("downloads").replaceChildren(...views.map(downloadButton));
  element("curl-view").replaceChildren(...curlViews().map(({ title }) => new Option(title)));
  if (current) refreshCurl();
}

function downloadButton(view) {
  const button = create("button", "button", view.title);
  button.type = "button";
  button.addEventListener("click", () => download(view, button));
  return button;
}

const curlViews = () => [...views, STATISTICS];

/** The parameters of the request for a view with the settings of this page. */
function parametersOf({ name, parameters }) {
  const asked = { ...current.parameters, view: name };
  const kept = foreground().filter(({ id }) => viewer.shown.has(id));
  if (parameters.includes("classes") && kept.length < foreground().length) {
    asked.classes = kept.map((one) => one.name).join(",") || current.background;
  }
  if (parameters.includes("alpha")) asked.alpha = opacity();
  return asked;
}

function refreshCurl() {
  const view = curlViews()[element("curl-view").selectedIndex];
  element("curl").textContent = curlCommand(current.picture, parametersOf(view), view.accept, view.file);
}

async function copyCurl() {
  const text = element("curl").textContent;
  try {
    await navigator.clipboard.writeText(text);
    flash(element("copy"), "Copied");
  } catch {
    // Without HTTPS the page cannot write to the clipboard: select the text for Ctrl+C.
    getSelection().selectAllChildren(element("curl"));
    flash(element("copy"), "Press Ctrl+C");
  }
}

function flash(button, text) {
  const before = (button.dataset.text ??= button.textContent);
  button.textContent = text;
  announce(text);
  setTimeout(() => (button.textContent = before), 2000);
}

/** Save a view. Only the mask is here already; the server renders the others at full size. */
async function download(view, button) {
  const note = element("download-note");
  note.textContent = "";
  button.setAttribute("aria-busy", "true");
  try {
    const { blob } = view === MASK
      ? { blob: new Blob([current.png], { type: "image/png" }) }
      : await segment(current.picture.blob, parametersOf(view), { as: view.type });
    save(blob, `${current.picture.name.replace(/\.\w+$/, "")}-${view.file}`);
  } catch (error) {
    if (error.status === 401) askForKey();
    note.textContent = `${error.title ?? "The download failed"}. ${error.detail ?? error}`;
    announce(note.textContent);
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

// ---- what the service offers -------------------------------------------------------------------------

/** GET a JSON document; null if that fails: the request for a picture then reports the failure. */
async function ask(path, parameters) {
  const sent = credentials().Authorization;
  try {
    return await getJson(path, parameters);
  } catch (error) {
    // The user may have entered another key since.
    if (error.status === 401 && sent === credentials().Authorization) askForKey();
    return null;
  }
}

function showService() {
  showModels();
  showClasses();
  showViews();
}

async function showModels() {
  const [model, listed] = await Promise.all([ask("model"), ask("models")]);
  if (!model || !listed) return;
  workingSize = model.working_size;
  element("model").textContent = `${model.name} ${model.version}, ${model.precision}`;
  // An empty value leaves the parameter out: the server then takes its default.
  const choices = listed.models.map((one) => new Option(one.name, one.default ? "" : one.name));
  element("model-choice").replaceChildren(...choices);
  element("models").hidden = choices.length < 2;
}

async function showClasses() {
  labels = ask("classes", { model: chosenModel() });
  const answer = await labels;
  if (!answer) return;
  const names = answer.classes.filter(({ id }) => id !== BACKGROUND).map(({ name }) => name);
  const more = names.length - NAMED_CLASSES;
  if (more > 1) names.splice(NAMED_CLASSES, more, `${more} other classes`);
  element("known").textContent = names.length ? `The model recognises ${listOf.format(names)}.` : "";
}

async function showViews() {
  const answer = await ask("views");
  if (answer) views = [MASK, ...imageViews(answer.views)];
  offerViews();
}

// ---- events ------------------------------------------------------------------------------------------

listen({ onPicture: start, onTrouble: (text) => (element("notice").textContent = text) });
element("key").addEventListener("submit", takeKey);
element("cancel").addEventListener("click", cancel);
element("retry").addEventListener("click", () => start(picture));
element("back").addEventListener("click", goBack);
element("model-choice").addEventListener("change", showClasses);
for (const setting of ["detail", "model-choice"]) {
  element(setting).addEventListener("change", () => picture && start(picture));
}
element("opacity").addEventListener("input", refreshOpacity);
element("contours-on").addEventListener("change", (event) => viewer.setContours(event.target.checked));
element("show-all").addEventListener("click", showAll);
element("curl-view").addEventListener("change", refreshCurl);
element("copy").addEventListener("click", copyCurl);
refreshOpacity();
offerViews();
showService();
