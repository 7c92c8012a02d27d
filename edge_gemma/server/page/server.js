/* The server that the page came from.

Owns: its key, its errors as lines for a person, streams of events, the form of messages. Does not know: the screen. */

import { remember, remembered } from "./kept.js";

export class Problem extends Error {}

/* Fetches from the server. askKey: called with the key that was wrong, gives another, or "". Throws Problem. */
export async function api(path, askKey, options = {}) {
  for (;;) {
    const key = remembered("key");
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached.");
    });
    if (response.ok) return response;
    if (response.status !== 401) throw await problem(response);
    const given = await askKey(key);
    remember("key", given);
    if (!given) throw new Problem("The server needs its key.");
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
  const parts = files.filter(({ data }) => data).map(({ kind, type, data, format }) =>
    kind === "image"
      ? { type: "image_url", image_url: { url: `data:${type};base64,${data}` } }
      : { type: "input_audio", input_audio: { data, format } });
  if (!parts.length) return { role, content };
  return { role, content: content ? [{ type: "text", text: content }, ...parts] : parts };
}
