// A mask: class ids, and what is drawn from them.

/**
 * Class ids of the service's mask PNG: {width, height, ids}, ids: Uint8Array, row after row.
 *
 * Read from the file itself and not through a canvas: browsers that guard against fingerprinting
 * change what a canvas gives back. The service writes 8-bit indices without filters.
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

/** Paint the shown classes' colours, opaque, on a canvas of any size; the rest stays clear. */
export function paint(canvas, mask, colors, shown) {
  const { width, height } = canvas;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const rgba = new Uint32Array(image.data.buffer);
  const byId = new Uint32Array(256);
  for (const id of shown) byId[id] = pack(colors.get(id));

  const column = Uint32Array.from({ length: width }, (_, x) => Math.floor((x * mask.width) / width));
  for (let y = 0; y < height; y++) {
    const row = Math.floor((y * mask.height) / height) * mask.width;
    for (let x = 0; x < width; x++) rgba[y * width + x] = byId[mask.ids[row + column[x]]];
  }
  context.putImageData(image, 0, 0);
}

/** One pixel of ImageData as a number, in this machine's byte order. */
function pack([red, green, blue]) {
  return new Uint32Array(Uint8Array.of(red, green, blue, 255).buffer)[0];
}

/**
 * Outlines along the pixels' edges: Map of class id to SVG path data, background left out. The
 * picture's own border is nobody's outline.
 */
export function outlines({ width, height, ids }) {
  const pieces = new Map();
  const add = (id, piece) => {
    if (id !== 0) pieces.has(id) ? pieces.get(id).push(piece) : pieces.set(id, [piece]);
  };
  // Runs of the same two classes on both sides of a line become one stroke for each of them.
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
