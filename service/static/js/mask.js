// The mask: class ids, decoded and drawn.

/** The background's class id in every model. The background is neither painted nor outlined. */
export const BACKGROUND = 0;

/**
 * Decode the service's mask PNG to {width, height, ids}. `ids`: a Uint8Array of class ids in
 * row-major order.
 *
 * A canvas cannot be used: browsers that resist fingerprinting change the pixels that a canvas
 * returns. The service writes 8-bit indices without filters.
 */
export async function decodeMask(png) {
  const view = new DataView(png.buffer, png.byteOffset, png.byteLength);
  const pieces = [];
  for (let at = 8; at < png.length; ) {
    const length = view.getUint32(at);
    const name = String.fromCharCode(...png.subarray(at + 4, at + 8));
    if (name === "IDAT") pieces.push(png.subarray(at + 8, at + 8 + length));
    at += length + 12;
  }
  const stream = new Blob(pieces).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = new Uint8Array(await new Response(stream).arrayBuffer());

  const width = view.getUint32(16);
  const height = view.getUint32(20);
  const ids = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const start = y * (width + 1);
    if (rows[start] !== 0) throw new Error(`row ${y} of the mask is filtered`);
    ids.set(rows.subarray(start + 1, start + 1 + width), y * width);
  }
  return { width, height, ids };
}

/**
 * Paint the colours of the shown classes, opaque, on a canvas of any size. The rest stays
 * transparent. `classes`: Map of id to {color}; `shown`: Set of ids.
 */
export function paint(canvas, mask, classes, shown) {
  const { width, height } = canvas;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const rgba = new Uint32Array(image.data.buffer);
  const byId = new Uint32Array(256);
  for (const id of shown) byId[id] = pack(classes.get(id).color);

  const column = Uint32Array.from({ length: width }, (_, x) => Math.floor((x * mask.width) / width));
  for (let y = 0; y < height; y++) {
    const row = Math.floor((y * mask.height) / height) * mask.width;
    for (let x = 0; x < width; x++) rgba[y * width + x] = byId[mask.ids[row + column[x]]];
  }
  context.putImageData(image, 0, 0);
}

/** An opaque pixel of ImageData as a 32-bit number in the machine's byte order. */
function pack([red, green, blue]) {
  return new Uint32Array(Uint8Array.of(red, green, blue, 255).buffer)[0];
}

/**
 * Outlines along pixel edges: Map of class id to SVG path data, without the background. The border
 * of the picture belongs to no outline.
 */
export function outlines({ width, height, ids }) {
  const pieces = new Map();
  const add = (id, piece) => {
    if (id !== BACKGROUND) pieces.has(id) ? pieces.get(id).push(piece) : pieces.set(id, [piece]);
  };
  // A run of edges between the same two classes becomes one stroke of each class.
  const walk = (lines, length, first, second, stroke) => {
    for (let line = 1; line < lines; line++) {
      for (let at = 0; at < length; ) {
        const start = at;
        const one = ids[first(line, at)];
        const other = ids[second(line, at)];
        do at++;
        while (at < length && ids[first(line, at)] === one && ids[second(line, at)] === other);
        if (one !== other) {
          const piece = stroke(line, start, at - start);
          add(one, piece);
          add(other, piece);
        }
      }
    }
  };
  walk(height, width, (y, x) => (y - 1) * width + x, (y, x) => y * width + x,
    (y, x, run) => `M${x} ${y}h${run}`);
  walk(width, height, (x, y) => y * width + x - 1, (x, y) => y * width + x,
    (x, y, run) => `M${x} ${y}v${run}`);
  return new Map([...pieces].map(([id, strokes]) => [id, strokes.join("")]));
}
