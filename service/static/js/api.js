// The service's API as this page uses it: requests, errors in plain words, curl commands.

/** What went wrong, in words for whoever looks at the page. */
export class Failure extends Error {
  constructor(title, detail, { status = 0, retryAfterS = 1, requestId = "" } = {}) {
    super(title);
    Object.assign(this, { title, detail, status, retryAfterS, requestId });
  }

  /** Whether the same request may well succeed later. */
  get passing() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

const TITLES = {
  "body-too-large": "This file is too large",
  "deadline-exceeded": "It took too long",
  "image-too-large": "This picture has too many pixels",
  "internal-error": "Something went wrong on the server",
  "invalid-parameter": "The server does not accept this setting",
  "no-image": "This file is empty",
  "not-ready": "The server is just starting or stopping",
  "overloaded": "The server is busy",
  "rate-limited": "These were too many requests",
  "undecodable-image": "This picture is damaged",
  "unknown-model": "This model is not served",
  "unsupported-image-type": "This file is not a picture that can be read",
};

const ADVICE = {
  "body-too-large": "Choose a smaller file, or save the picture with less quality.",
  "deadline-exceeded": "Try again, or with less detail.",
  "image-too-large": "Make the picture smaller, and try again.",
  "not-ready": "Try again in a moment.",
  "overloaded": "Try again in a moment.",
  "rate-limited": "Try again later.",
  "undecodable-image": "It may have been cut off on its way here. Try another copy of it.",
};

const KEY = "api-key";

/** Send this API key from now on, until the tab is closed. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The headers that carry the key; none if there is none. */
export function credentials() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** An address of the service, wherever it is mounted; parameters that are undefined are left out. */
export function address(path, parameters = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== undefined) url.searchParams.set(name, value);
  }
  return url.href;
}

/**
 * Send a picture to /segment. `picture`: a Blob; `as`: the type wanted back.
 * `onUpload` is told the part that is sent, 0 to 1. Resolves to {blob, stages, totalMs}; rejects
 * with a Failure, or with an AbortError when `signal` says so.
 *
 * XMLHttpRequest, because fetch cannot tell how far an upload is.
 */
export function segment(picture, parameters, { as, signal, onUpload = () => {} }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const started = performance.now();
    request.open("POST", address("segment", parameters));
    const type = picture.type || "application/octet-stream";
    const headers = { Accept: as, "Content-Type": type, ...credentials() };
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.responseType = "blob";
    request.upload.onprogress = (event) => onUpload(event.loaded / event.total);
    request.onerror = () => reject(unreachable());
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    request.onload = async () => {
      if (request.status !== 200) return reject(await failure(request));
      const stages = parseTiming(request.getResponseHeader("Server-Timing") ?? "");
      resolve({ blob: request.response, stages, totalMs: performance.now() - started });
    };
    signal?.addEventListener("abort", () => request.abort());
    if (signal?.aborted) return reject(new DOMException("cancelled", "AbortError"));
    request.send(picture);
  });
}

/** "decode;dur=1.20, infer;dur=30" as [["decode", 1.2], ["infer", 30]]. */
function parseTiming(header) {
  return header.split(",").flatMap((part) => {
    const [, stage, ms] = part.match(/^\s*([\w-]+);.*dur=([\d.]+)/) ?? [];
    return stage ? [[stage, Number(ms)]] : [];
  });
}

function unreachable() {
  return new Failure(
    "The server cannot be reached",
    "Check that it is running and that this device is connected to it, then try again.",
  );
}

async function failure(request) {
  let problem = {};
  try {
    problem = JSON.parse(await request.response.text());
  } catch {
    // A proxy's own error page; the status says enough.
  }
  const kind = problem.type?.split("/").pop();
  const detail = [problem.detail && sentence(problem.detail), ADVICE[kind]];
  return new Failure(
    TITLES[kind] ?? problem.title ?? "The server could not answer",
    detail.filter(Boolean).join(" ") || `It said ${request.status} ${request.statusText}.`,
    {
      status: request.status,
      retryAfterS: Number(request.getResponseHeader("Retry-After")) || 1,
      requestId: problem.request_id,
    },
  );
}

function sentence(detail) {
  const text = detail.replace(
    /\b(\d{5,}) (bytes|pixels)/g,
    (_, count, unit) => `${Math.floor(count / 1e5) / 10} ${unit === "bytes" ? "MB" : "megapixels"}`,
  );
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** The command for a POSIX shell that asks what this page asked. `picture`: {name, url?}. */
export function curlCommand(picture, parameters, as, output) {
  const body = picture.url
    ? `curl -s ${quote(picture.url)} | curl --data-binary @-`
    : `curl --data-binary ${quote(`@${picture.name}`)}`;
  const accept = as ? ` -H ${quote(`Accept: ${as}`)}` : "";
  // In double quotes: the shell puts the key in, which is not shown.
  const key = credentials().Authorization ? ' -H "Authorization: Bearer $FCN_API_KEY"' : "";
  return `${body}${accept}${key} \\\n  ${quote(address("segment", parameters))} \\\n  -o ${output}`;
}
