/* Speech that is written down by the server while it is spoken.

Owns: the microphone, the events of OpenAI's realtime transcription. Does not know: where the words go. */

import { remembered } from "./kept.js";
import { Problem } from "./server.js";

const RATE = 16000; // samples a second
const LAST_WORDS_MS = 15_000; // waited for once the microphone is off

/* Hears the microphone, and tells what is spoken while it is spoken.

write: called with all words so far. fail: with a line for the person. over: when it has ended. Returns what ends it:
called once it waits for the last words, called again, or with true, it does not. */
export async function listen({ model, write, fail, over }) {
  const ends = [over]; // what is to be done at the end, once
  const close = () => ends.splice(0).forEach((end) => end());
  try {
    const { recorder, mute } = await record(ends);
    const socket = await connect(ends);
    return transcribe({ recorder, mute, socket, model, write, fail, close });
  } catch ({ message }) {
    close();
    fail(`The microphone cannot be used: ${message}`);
    return close;
  }
}

async function record(ends) {
  if (!navigator.mediaDevices) throw new Problem("Browsers give the microphone to pages of localhost or https only.");
  const heard = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const mute = () => heard.getTracks().forEach((track) => track.stop());
  ends.push(mute);
  const source = soundOf(heard);
  ends.push(() => source.context.close());
  await source.context.audioWorklet.addModule("/page/recorder.js");
  const recorder = new AudioWorkletNode(source.context, "recorder");
  source.connect(recorder).connect(source.context.destination); // it is silent; what is not connected is not run
  return { recorder, mute };
}

function soundOf(heard) {
  try {
    return new AudioContext({ sampleRate: RATE }).createMediaStreamSource(heard);
  } catch {
    return new AudioContext().createMediaStreamSource(heard); // Firefox does not change its rate: the recorder does
  }
}

async function connect(ends) {
  const key = remembered("key");
  const url = `${location.origin.replace(/^http/, "ws")}/v1/realtime?intent=transcription`;
  const socket = new WebSocket(url, ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])]);
  ends.push(() => socket.close());
  await new Promise((done) => Object.assign(socket, { onopen: done, onerror: done }));
  if (socket.readyState === WebSocket.OPEN) return socket;
  throw new Problem("The server does not take live speech, or too many speak: try again later.");
}

function transcribe({ recorder, mute, socket, model, write, fail, close }) {
  const items = new Map(); // utterance -> its text
  let ending = false;
  let updates = 0; // of the session that the server has made
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
    if (error && (item || !ending)) fail(error.message);
    if (type === "session.updated") updates += 1;
    if (ending && updates > 1) close();
  };
  update({ type: "server_vad" });
  recorder.port.onmessage = ({ data }) => {
    const audio = btoa(String.fromCharCode(...new Uint8Array(data.buffer)));
    post({ type: "input_audio_buffer.append", audio });
  };
  return (now = false) => {
    if (now || ending) return close();
    ending = true;
    recorder.port.onmessage = null;
    mute();
    post({ type: "input_audio_buffer.commit" });
    update(null); // answered once all that has come is written
    setTimeout(close, LAST_WORDS_MS);
  };
}
