/* The server that the page came from.

Owns: its key, its errors as lines for a person, streams of events, the form of messages and files. Does not know: the
screen. */

import { remember, remembered } from "./kept.js";

const MOST_FILE = 20 << 20; // bytes
const WIDEST = 1568; // pixels of a picture

export class Problem extends Error {}

/* Fetches from the server. askKey: called with the key that was wrong, gives another, or none. Throws Problem. */
export async function api(path, askKey, options = {}) {
  for (;;) {
    const key = remembered("key");
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Problem("The server cannot be reached.");
    });
    if (response.ok) return response;
    if (response.status !== 401) throw await problem(response);
    remember("key", (await askKey(key)) ?? "");
    if (!remembered("key")) throw new Problem("The server needs its key.");
  }
}

async function problem(response) {
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `the server answered ${response.status}`;
  if (response.status !== 429 && response.status !== 503) return new Problem(message);
  return new Problem(`Please wait ${response.headers.get("Retry-After") ?? "a few"} seconds: ${message}.`);
}

/* The data of server-sent events. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

/* A message as the server reads it. */
export function sent({ role, content, files = [] }) {
  const parts = files.filter(({ url }) => url).map(({ kind, url, format }) =>
    kind === "image"
      ? { type: "image_url", image_url: { url } }
      : { type: "input_audio", input_audio: { data: url.split(",")[1], format } });
  if (!parts.length) return { role, content };
  return { role, content: content ? [{ type: "text", text: content }, ...parts] : parts };
}

/* A file as it is kept and sent. able: whether the model reads "image" or "audio". Throws Problem. */
export async function readFile(file, able) {
  const kind = file.type.split("/")[0].replace("video", "audio"); // browsers call recordings of sound so
  if (kind === "text" || !able(kind)) throw new Problem(`this model does not read ${kind || "such"} files.`);
  if (file.size > MOST_FILE) throw new Problem(`it is too large, ${MOST_FILE >> 20} MB at most.`);
  const reader = new FileReader();
  reader.readAsDataURL(kind === "image" ? await smaller(file) : file);
  await new Promise((onload, onerror) => Object.assign(reader, { onload, onerror }));
  return { kind, name: file.name, format: file.name.split(".").pop().toLowerCase(), url: reader.result };
}

/* A picture as the model can use it: no wider or higher than WIDEST, and without what cameras write into files. */
async function smaller(file) {
  const picture = await createImageBitmap(file).catch(() => {
    throw new Problem("this browser cannot open the picture.");
  });
  const scale = Math.min(1, WIDEST / Math.max(picture.width, picture.height));
  const canvas = new OffscreenCanvas(Math.ceil(picture.width * scale), Math.ceil(picture.height * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 });
}
