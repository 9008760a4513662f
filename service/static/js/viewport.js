// Zoom and pan: the position of the picture on the stage, and the gestures that change it.

const CLICK_SLACK_PX = 6;
const WHEEL_STEP = 0.0015;
const MAX_ZOOM = 12;

export class Viewport {
  #stage;
  #layers;
  #size = { width: 1, height: 1 };
  #scale = 1; // stage pixels per picture pixel
  #x = 0; // of the picture's top left corner, in stage pixels
  #y = 0;
  #fitted = true;
  #pointers = new Map();
  #travelled = 0;

  /** `onPick(point)`: the user clicked or tapped a pixel; `onMove()`: the position changed. */
  constructor(stage, layers, { onPick, onMove }) {
    this.#stage = stage;
    this.#layers = layers;
    this.onPick = onPick;
    this.onMove = onMove;
    new ResizeObserver(() => (this.#fitted ? this.fit() : this.#place())).observe(stage);
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    stage.addEventListener("pointerdown", (event) => this.#down(event));
    stage.addEventListener("pointermove", (event) => this.#drag(event));
    stage.addEventListener("pointerup", (event) => this.#up(event, true));
    stage.addEventListener("pointercancel", (event) => this.#up(event, false));
  }

  get scale() {
    return this.#scale;
  }

  /** Show the whole of a new picture of this size. */
  show(width, height) {
    this.#size = { width, height };
    this.fit();
  }

  fit() {
    this.#fitted = true;
    this.#scale = this.#fitScale();
    this.#place();
  }

  /** Zoom by a factor around `at`, in client coordinates (default: the middle of the stage). */
  zoom(factor, at = this.#middle()) {
    const box = this.#stage.getBoundingClientRect();
    const fit = this.#fitScale();
    const scale = Math.min(Math.max(this.#scale * factor, fit), fit * MAX_ZOOM);
    const x = at.x - box.left;
    const y = at.y - box.top;
    this.#x = x - ((x - this.#x) * scale) / this.#scale;
    this.#y = y - ((y - this.#y) * scale) / this.#scale;
    this.#scale = scale;
    this.#fitted = scale <= fit * 1.001;
    this.#place();
  }

  /** The pixel of the picture at a point in client coordinates; null outside the picture. */
  toPicture({ x, y }) {
    const box = this.#stage.getBoundingClientRect();
    const column = Math.floor((x - box.left - this.#x) / this.#scale);
    const row = Math.floor((y - box.top - this.#y) / this.#scale);
    const inside = column >= 0 && row >= 0 && column < this.#size.width && row < this.#size.height;
    return inside ? { x: column, y: row } : null;
  }

  /** The client coordinates of the middle of a pixel of the picture. */
  toClient({ x, y }) {
    const box = this.#stage.getBoundingClientRect();
    return {
      x: box.left + this.#x + (x + 0.5) * this.#scale,
      y: box.top + this.#y + (y + 0.5) * this.#scale,
    };
  }

  /** Pan by the smallest distance that makes a pixel visible. */
  reveal(point) {
    const box = this.#stage.getBoundingClientRect();
    const { x, y } = this.toClient(point);
    const margin = 24;
    const into = (at, low, high) => Math.max(low + margin - at, 0) + Math.min(high - margin - at, 0);
    this.#x += into(x, box.left, box.right);
    this.#y += into(y, box.top, box.bottom);
    this.#place();
  }

  #fitScale() {
    const { clientWidth, clientHeight } = this.#stage;
    return Math.min(clientWidth / this.#size.width, clientHeight / this.#size.height) || 1;
  }

  #middle() {
    const box = this.#stage.getBoundingClientRect();
    return { x: box.left + box.width / 2, y: box.top + box.height / 2 };
  }

  #place() {
    const width = this.#size.width * this.#scale;
    const height = this.#size.height * this.#scale;
    // Centre the picture if it fits; otherwise leave no gap at any side.
    const settle = (at, length, room) =>
      length <= room ? (room - length) / 2 : Math.min(Math.max(at, room - length), 0);
    this.#x = settle(this.#x, width, this.#stage.clientWidth);
    this.#y = settle(this.#y, height, this.#stage.clientHeight);
    this.#layers.style.width = `${width}px`;
    this.#layers.style.height = `${height}px`;
    this.#layers.style.transform = `translate(${this.#x}px, ${this.#y}px)`;
    // While the whole picture is visible, vertical swipes scroll the page.
    this.#stage.style.touchAction = this.#fitted ? "pan-y" : "none";
    this.#stage.classList.toggle("zoomed", !this.#fitted);
    this.onMove();
  }

  #wheel(event) {
    // When the picture cannot get smaller, the wheel scrolls the page.
    if (event.deltaY > 0 && this.#fitted) return;
    event.preventDefault();
    const pixels = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 30 : 1);
    // Browsers report a touchpad's pinch as small wheel steps with Ctrl.
    this.zoom(Math.exp(-pixels * WHEEL_STEP * (event.ctrlKey ? 6 : 1)), event);
  }

  #down(event) {
    if (event.button !== 0) return;
    if (this.#pointers.size === 0) this.#travelled = 0;
    this.#pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    this.#stage.setPointerCapture(event.pointerId);
  }

  #drag(event) {
    const last = this.#pointers.get(event.pointerId);
    if (!last) return;
    const now = { x: event.clientX, y: event.clientY };
    const others = [...this.#pointers].filter(([id]) => id !== event.pointerId);
    this.#pointers.set(event.pointerId, now);
    this.#travelled += Math.hypot(now.x - last.x, now.y - last.y);
    if (this.#travelled < CLICK_SLACK_PX) return;
    if (others.length === 1) {
      const [, still] = others[0];
      const before = Math.hypot(last.x - still.x, last.y - still.y) || 1;
      const middle = { x: (now.x + still.x) / 2, y: (now.y + still.y) / 2 };
      this.zoom(Math.hypot(now.x - still.x, now.y - still.y) / before, middle);
    }
    const share = others.length + 1;
    this.#x += (now.x - last.x) / share;
    this.#y += (now.y - last.y) / share;
    this.#place();
  }

  #up(event, picks) {
    if (!this.#pointers.delete(event.pointerId)) return;
    if (picks && this.#pointers.size === 0 && this.#travelled < CLICK_SLACK_PX) {
      const point = this.toPicture({ x: event.clientX, y: event.clientY });
      if (point) this.onPick(point);
    }
  }
}
