/* Speech that is written down by the server while it is spoken.

Owns: the microphone, the events of OpenAI's realtime transcription. Does not know: where the words go. */

import { remembered } from "./kept.js";
import { Problem } from "./server.js";

const RATE = 16000; // samples a second
const LAST_WORDS_MS = 15_000; // waited for once the microphone is off

/* Hears the microphone, and tells what is spoken while it is spoken.

write: called with all words so far. fail: with a line for the person. over: when it has ended. Returns what ends it:
called once it waits for the last words, called again, or with true, it does not. */
export function listen(calls) {
  return open(calls).catch(({ message }) => {
    calls.fail(message);
    calls.over();
    return calls.over;
  });
}

async function open({ model, write, fail, over }) {
  const { heard, context, recorder } = await record();
  const socket = openSocket();
  const items = new Map(); // utterance -> its text
  let state = "on";
  let updates = 0; // of the session that the server has made
  const mute = () => heard.getTracks().forEach((track) => track.stop());
  const close = () => {
    if (state === "over") return;
    state = "over";
    mute();
    context.close();
    socket.close();
    over();
  };
  await new Promise((done) => Object.assign(socket, { onopen: done, onerror: done }));
  if (socket.readyState !== WebSocket.OPEN) {
    close();
    throw new Problem("The server does not take live speech, or too many speak: try again later.");
  }
  const post = (event) => socket.send(JSON.stringify(event));
  const update = (turn_detection) => {
    const input = { format: { type: "audio/pcm", rate: RATE }, transcription: { model }, turn_detection };
    post({ type: "session.update", session: { type: "transcription", audio: { input } } });
  };
  socket.onclose = close;
  socket.onmessage = ({ data }) => {
    const { type, item_id: item, delta, transcript, error } = JSON.parse(data);
    if (type.endsWith(".delta")) items.set(item, (items.get(item) ?? "") + delta);
    if (type.endsWith(".completed")) items.set(item, transcript);
    const words = [...items.values()].map((text) => text.trim()).filter(Boolean).join(" ");
    if (words) write(words);
    if (error && (state === "on" || item)) fail(error.message);
    if (type === "session.updated") updates += 1;
    if (state === "ending" && updates > 1) close();
  };
  update({ type: "server_vad" });
  recorder.port.onmessage = ({ data }) => {
    const audio = btoa(String.fromCharCode(...new Uint8Array(data.buffer)));
    post({ type: "input_audio_buffer.append", audio });
  };
  return (now = false) => {
    if (now || state !== "on") return close();
    state = "ending";
    recorder.port.onmessage = null;
    mute();
    post({ type: "input_audio_buffer.commit" });
    update(null); // answered once all that has come is written
    setTimeout(close, LAST_WORDS_MS);
  };
}

async function record() {
  if (!navigator.mediaDevices) throw new Problem("Browsers give the microphone to pages of localhost or https only.");
  const heard = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } }).catch(() => {
    throw new Problem("The browser does not give the microphone: allow it for this page.");
  });
  let context = new AudioContext({ sampleRate: RATE });
  let source = null;
  try {
    source = context.createMediaStreamSource(heard);
  } catch {
    context = new AudioContext(); // a browser that does not change a microphone's rate: the recorder does
    source = context.createMediaStreamSource(heard);
  }
  await context.audioWorklet.addModule("/page/recorder.js");
  const recorder = new AudioWorkletNode(context, "recorder");
  source.connect(recorder).connect(context.destination); // it is silent; what is not connected is not run
  return { heard, context, recorder };
}

function openSocket() {
  const key = remembered("key");
  const url = `${location.origin.replace(/^http/, "ws")}/v1/realtime?intent=transcription`;
  return new WebSocket(url, ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])]);
}
