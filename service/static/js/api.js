// A client of the service's API: requests, error messages, curl commands.

/** A failed request, with a message for the user. */
export class Failure extends Error {
  constructor(title, detail, { status = 0, retryAfterS = 1, requestId = "" } = {}) {
    super(title);
    Object.assign(this, { title, detail, status, retryAfterS, requestId });
  }

  /** Whether the same request may succeed later. */
  get temporary() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

const TITLES = {
  "body-too-large": "This file is too large",
  "deadline-exceeded": "The request took too long",
  "image-too-large": "This picture has too many pixels",
  "internal-error": "Something went wrong on the server",
  "invalid-parameter": "The server does not accept this setting",
  "no-image": "This file is empty",
  "not-ready": "The server is starting or stopping",
  "overloaded": "The server is busy",
  "rate-limited": "Too many requests",
  "undecodable-image": "This picture is damaged",
  "unknown-model": "The server does not have this model",
  "unsupported-image-type": "This file is not a supported picture",
};

const ADVICE = {
  "body-too-large": "Choose a smaller file, or save the picture at a lower quality.",
  "deadline-exceeded": "Try again, or choose less detail.",
  "image-too-large": "Resize the picture and try again.",
  "not-ready": "Try again in a moment.",
  "overloaded": "Try again in a moment.",
  "rate-limited": "Try again later.",
  "undecodable-image": "The file may be incomplete. Try another copy.",
};

const KEY = "api-key";

/** Send this API key with every request until the tab is closed. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The headers that carry the API key; empty without a key. */
export function credentials() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** A URL of the service under any root path. Parameters that are undefined are left out. */
export function address(path, parameters = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== undefined) url.searchParams.set(name, value);
  }
  return url.href;
}

/** GET a JSON document. Rejects with a Failure, or with a TypeError without a connection. */
export async function getJson(path, parameters) {
  const response = await fetch(address(path, parameters), { headers: credentials() });
  if (!response.ok) throw new Failure(response.statusText, "", { status: response.status });
  return response.json();
}

/**
 * Send a picture to /segment. `picture`: a Blob; `as`: the accepted media type;
 * `onUpload(part)`: called with the uploaded part, 0 to 1. Resolves to {blob, stages, totalMs}.
 * Rejects with a Failure, or with an AbortError after `signal` aborts.
 *
 * Uses XMLHttpRequest because fetch does not report upload progress.
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
    // Not the service's own error, but for example a proxy's page: report the status only.
  }
  const kind = problem.type?.split("/").pop();
  const detail = [problem.detail && sentence(problem.detail), ADVICE[kind]];
  return new Failure(
    TITLES[kind] ?? problem.title ?? "The server could not answer",
    detail.filter(Boolean).join(" ") || `The status is ${request.status} ${request.statusText}.`,
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

/** The POSIX shell command of a request to /segment. `picture`: {name, url?}. */
export function curlCommand(picture, parameters, accept, output) {
  const body = picture.url
    ? `curl -s ${quote(picture.url)} | curl --data-binary @-`
    : `curl --data-binary ${quote(`@${picture.name}`)}`;
  const header = accept ? ` -H ${quote(`Accept: ${accept}`)}` : "";
  // In double quotes, so that the shell inserts the key and this page does not show it.
  const key = credentials().Authorization ? ' -H "Authorization: Bearer $FCN_API_KEY"' : "";
  return `${body}${header}${key} \\\n  ${quote(address("segment", parameters))} \\\n  -o ${output}`;
}
