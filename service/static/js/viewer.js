// The picture with its classes: layers, the class under the pointer, the keyboard's crosshair.

import { css, element } from "./dom.js";
import { BACKGROUND, outlines, paint } from "./mask.js";
import { Viewport } from "./viewport.js";

// Below the canvas limit of iOS. A larger photo is scaled down on screen; its mask keeps its size.
const MAX_CANVAS_PIXELS = 16_000_000;
const PIXELATED_FROM_SCALE = 3;

export class Viewer {
  #stage = element("stage");
  #photo = element("photo");
  #overlay = element("overlay");
  #contours = element("contours");
  #crosshair = element("crosshair");
  #tip = element("tip");
  #viewport;
  #mask = null;
  #classes = new Map();
  #shown = new Set();
  #cursor = null; // the crosshair's pixel
  #pointed = null; // the class under pointer or crosshair

  /**
   * `onToggle(id)`: show or hide a class; `onPoint(id or null)`: the class under the pointer changed;
   * `announce(text)`: for screen readers.
   */
  constructor({ onToggle, onPoint, announce }) {
    Object.assign(this, { onToggle, onPoint, announce });
    this.#viewport = new Viewport(this.#stage, element("layers"), {
      onPick: (point) => this.#toggleAt(point),
      onMove: () => this.#moved(),
    });
    this.#stage.addEventListener("pointermove", (event) => this.#hover(event));
    this.#stage.addEventListener("pointerleave", () => this.#point(null));
    this.#stage.addEventListener("keydown", (event) => this.#key(event));
    this.#stage.addEventListener("blur", () => this.#moveCursor(null));
    element("zoom-in").addEventListener("click", () => this.#viewport.zoom(1.5));
    element("zoom-out").addEventListener("click", () => this.#viewport.zoom(1 / 1.5));
    element("zoom-fit").addEventListener("click", () => this.#viewport.fit());
  }

  /** `photo`: an ImageBitmap of the mask's size; `classes`: Map of id to {name, color}. */
  show(photo, mask, classes) {
    this.#mask = mask;
    this.#classes = classes;
    const fit = Math.min(1, Math.sqrt(MAX_CANVAS_PIXELS / (mask.width * mask.height)));
    for (const canvas of [this.#photo, this.#overlay]) {
      canvas.width = Math.max(1, Math.floor(mask.width * fit));
      canvas.height = Math.max(1, Math.floor(mask.height * fit));
    }
    const context = this.#photo.getContext("2d");
    // As in the service: transparent pixels are white.
    context.fillStyle = "white";
    context.fillRect(0, 0, this.#photo.width, this.#photo.height);
    context.drawImage(photo, 0, 0, this.#photo.width, this.#photo.height);
    this.#contours.setAttribute("viewBox", `0 0 ${mask.width} ${mask.height}`);
    this.#contours.replaceChildren(...this.#drawOutlines());
    this.#stage.style.setProperty("--aspect", mask.width / mask.height);
    this.#moveCursor(null);
    this.#viewport.show(mask.width, mask.height);
  }

  /** Ids of the classes whose colours and outlines are shown. */
  get shown() {
    return this.#shown;
  }

  setShown(shown) {
    this.#shown = new Set(shown);
    paint(this.#overlay, this.#mask, this.#classes, this.#shown);
    for (const outline of this.#contours.children) {
      outline.toggleAttribute("hidden", !this.#shown.has(Number(outline.dataset.id)));
    }
  }

  setOpacity(alpha) {
    this.#overlay.style.opacity = alpha;
  }

  setContours(on) {
    this.#contours.toggleAttribute("hidden", !on);
  }

  /** Emphasise the outline of one class, or of none (null). */
  highlight(id) {
    for (const outline of this.#contours.children) {
      outline.classList.toggle("strong", Number(outline.dataset.id) === id);
    }
  }

  #drawOutlines() {
    const svg = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
    return [...outlines(this.#mask)].map(([id, data]) => {
      const group = svg("g");
      group.dataset.id = id;
      for (const layer of ["under", "over"]) {
        const path = svg("path");
        path.setAttribute("d", data);
        path.setAttribute("class", layer);
        group.append(path);
      }
      // A label set may use dark colours: halfway to white they stand out on any photo.
      const light = this.#classes.get(id).color.map((part) => Math.round((part + 255) / 2));
      group.style.setProperty("--color", css(light));
      return group;
    });
  }

  #moved() {
    this.#overlay.classList.toggle("pixels", this.#viewport.scale >= PIXELATED_FROM_SCALE);
    if (this.#cursor) this.#showTip(this.#viewport.toClient(this.#cursor));
    else this.#tip.hidden = true;
  }

  #idAt({ x, y }) {
    return this.#mask.ids[y * this.#mask.width + x];
  }

  #hover(event) {
    const client = { x: event.clientX, y: event.clientY };
    const point = this.#viewport.toPicture(client);
    this.#point(point && this.#idAt(point));
    if (point) this.#showTip(client);
  }

  #point(id) {
    if (id === null) this.#tip.hidden = true;
    if (id === this.#pointed) return;
    this.#pointed = id;
    this.highlight(id);
    this.onPoint(id);
  }

  #describe(id) {
    const hidden = id !== BACKGROUND && !this.#shown.has(id);
    return this.#classes.get(id).name + (hidden ? " (hidden)" : "");
  }

  #showTip({ x, y }) {
    const id = this.#pointed;
    if (id === null) return;
    this.#tip.querySelector("span").textContent = this.#describe(id);
    this.#tip.querySelector("i").style.background = css(this.#classes.get(id).color);
    this.#tip.hidden = false;
    const box = this.#stage.getBoundingClientRect();
    const left = Math.min(x - box.left + 14, box.width - this.#tip.offsetWidth - 4);
    const below = y - box.top + 18;
    const above = y - box.top - this.#tip.offsetHeight - 10;
    const top = below + this.#tip.offsetHeight > box.height ? above : below;
    this.#tip.style.transform = `translate(${Math.max(left, 4)}px, ${Math.max(top, 4)}px)`;
  }

  #toggleAt(point) {
    const id = this.#idAt(point);
    this.#point(id);
    if (id !== BACKGROUND) this.onToggle(id);
    this.#showTip(this.#viewport.toClient(point));
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = Math.max(1, Math.round(this.#mask.width * (event.shiftKey ? 0.1 : 0.02)));
    const at = () => (this.#cursor ? this.#viewport.toClient(this.#cursor) : undefined);
    const actions = {
      ArrowLeft: () => this.#stepCursor(-step, 0),
      ArrowRight: () => this.#stepCursor(step, 0),
      ArrowUp: () => this.#stepCursor(0, -step),
      ArrowDown: () => this.#stepCursor(0, step),
      Enter: () => this.#cursor && this.#toggleAt(this.#cursor),
      " ": () => this.#cursor && this.#toggleAt(this.#cursor),
      Escape: () => this.#moveCursor(null),
      "+": () => this.#viewport.zoom(1.5, at()),
      "=": () => this.#viewport.zoom(1.5, at()),
      "-": () => this.#viewport.zoom(1 / 1.5, at()),
      0: () => this.#viewport.fit(),
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  #stepCursor(dx, dy) {
    const { width, height } = this.#mask;
    const from = this.#cursor;
    // The first key places it in the middle.
    const to = from
      ? { x: from.x + dx, y: from.y + dy }
      : { x: Math.floor(width / 2), y: Math.floor(height / 2) };
    this.#moveCursor({
      x: Math.min(Math.max(to.x, 0), width - 1),
      y: Math.min(Math.max(to.y, 0), height - 1),
    });
  }

  #moveCursor(point) {
    const had = this.#cursor !== null;
    this.#cursor = point;
    this.#crosshair.hidden = point === null;
    if (point === null) {
      if (had) this.#point(null);
      return;
    }
    this.#crosshair.style.left = `${((point.x + 0.5) / this.#mask.width) * 100}%`;
    this.#crosshair.style.top = `${((point.y + 0.5) / this.#mask.height) * 100}%`;
    const before = had ? this.#pointed : null;
    this.#point(this.#idAt(point));
    if (this.#pointed !== before) this.announce(this.#describe(this.#pointed));
    this.#viewport.reveal(point);
  }
}
