/* The page: conversations with the models of the server that it came from.

Owns: what is said, what is drawn, what buttons and keys do. Does not know: the server's protocol, what is kept. A
model's text becomes elements in markdown.js alone; everything else is set as text. */

import { chats, dropChat, follow, keepChat, newChat, remember, remembered } from "./kept.js";
import { markdown } from "./markdown.js";
import { Problem, api, events, readFile, sent } from "./server.js";
import { listen } from "./speech.js";

const $ = (id) => document.getElementById(id);
const running = new Map(); // id of a chat -> what stops the answer that it waits for: an AbortController
const drawn = new WeakMap(); // conversation, message, call or file -> the element that shows it
let chat = chats.find(({ id }) => id === remembered("chat")) ?? newChat(); // the one on the screen
let models = [];
let files = []; // to be sent with the next message
let microphone = null; // a promise of what ends it, while it is on

/* Keeps a conversation over a reload. */
function keep(kept) {
  if (!keepChat(kept)) tell("There is no room in this browser to keep this conversation over a reload.");
}

function show(next) {
  chat = next;
  remember("chat", chat.id);
  draw();
}

function forget(gone) {
  running.get(gone.id)?.abort();
  dropChat(gone);
  show(gone === chat ? (chats[0] ?? newChat()) : chat);
  $("new").focus();
  tell(`Deleted: ${gone.title}`, "Undo", () => {
    keep(gone);
    show(gone);
  });
}

/* The element that shows a thing: of a template, the same one each time. parts: class of a place in it -> text or
elements to be there, or what a click there does. A place for which there is nothing is hidden. */
function fill(id, thing, parts) {
  const element = drawn.get(thing) ?? $(id).content.firstElementChild.cloneNode(true);
  drawn.set(thing, element);
  for (const [name, part] of Object.entries(parts)) {
    const place = element.querySelector(`.${name}`);
    place.hidden = !part;
    if (part instanceof Function) place.onclick = part;
    else if (Array.isArray(part) && part.length === place.children.length) continue; // they keep the focus
    else if (part) place.replaceChildren(...[part].flat());
  }
  return element;
}

function draw() {
  drawChats();
  const shown = new Set(chat.messages.map((each) => drawn.get(each) ?? drawMessage(each)));
  for (const element of [...$("messages").children]) if (!shown.has(element)) element.remove();
  $("messages").append(...[...shown].filter((element) => !element.isConnected)); // what stands is not laid out again
  drawState();
  $("talk").scrollTo({ top: $("talk").scrollHeight });
}

const drawChats = () => $("chats").replaceChildren(...chats.map(drawEntry));

function drawEntry(each) {
  const entry = fill("entry", each, { title: each.title, open: () => show(each), close: () => forget(each) });
  entry.querySelector(".open").ariaCurrent = String(each === chat);
  entry.querySelector(".close").ariaLabel = `Delete: ${each.title}`;
  return entry;
}

function set(name, value) {
  remember(name, value);
  drawState();
}

/* Shows what is set and what can be done now. */
function drawState() {
  const busy = running.has(chat.id);
  if (!busy && document.activeElement === $("stop")) $("box").focus();
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("box").readOnly = Boolean(microphone);
  $("microphone").ariaPressed = String(Boolean(microphone));
  $("think").ariaPressed = String(remembered("think") === "on");
  document.documentElement.dataset.theme = remembered("theme");
  for (const each of document.querySelectorAll("[data-needs]")) each.hidden = !each.dataset.needs.split(" ").some(able);
}

function drawMessage(message) {
  const { role, content, reasoning, calls, error, speed } = message;
  if (role === "user") {
    const shown = message.files.map(drawFile);
    return fill("question", message, { shown, text: content, change: () => edit(message) });
  }
  return fill("answer", message, {
    text: reasoning.trim(),
    steps: calls.map((call) => fill("step", call, { name: call.name, given: call.arguments })),
    prose: content && markdown(content),
    error,
    copy: navigator.clipboard && content && (() => navigator.clipboard.writeText(content).then(() => tell("Copied."))),
    again: () => answer(before(message)),
    speed,
  });
}

function drawFile({ kind, name, url }) {
  if (!url) return fill("unkept", {}, { name });
  if (kind === "image") return Object.assign(new Image(), { src: url, alt: name });
  return Object.assign(new Audio(url), { controls: true, ariaLabel: name });
}

/* The box takes the focus of what is gone. */
const refocus = () => document.activeElement === document.body && $("box").focus();

/* Draws what came to an answer, and stays at the end if the end was seen. */
function redraw(message) {
  const talk = $("talk");
  const isDown = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
  drawMessage(message);
  if (isDown) talk.scrollTo({ top: talk.scrollHeight });
}

/* A line for the person, with something to do about it. */
function tell(text, action = "", act = () => {}) {
  $("told").textContent = text;
  Object.assign($("act"), { textContent: action, hidden: !action, onclick: () => (tell(""), act()) });
  $("notice").hidden = !text;
}

/* Asks the person in a dialog. Returns the text of its field, null if the person does not want to. */
async function askIn(dialog, text = "") {
  const field = dialog.querySelector("textarea, input");
  field.value = text;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  return dialog.returnValue === "keep" ? field.value.trim() : null;
}

/* The key as the person gives it, null for none. wrong: the one that was tried. */
function askKey(wrong) {
  $("door-title").textContent = wrong ? "That is not the server's key" : "This server needs its key";
  return askIn($("door"));
}

async function loadModels() {
  try {
    models = (await (await api("/v1/models", askKey)).json()).data;
  } catch (error) {
    return tell(error.message, "Try again", loadModels);
  }
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === remembered("model"))));
  drawState();
}

/* Whether the chosen model reads "audio" or "image", or is capable of "thinking". */
function able(what) {
  const { architecture, capabilities = [] } = models.find(({ id }) => id === $("model").value) ?? {};
  return [...(architecture?.input_modalities ?? []), ...capabilities].includes(what);
}

const before = (message) => chat.messages.slice(0, chat.messages.indexOf(message));

/* Asks the model to answer these messages, which become those of the conversation. */
async function answer(messages) {
  const asked = chat;
  const message = { role: "assistant", content: "", reasoning: "", calls: [] };
  const control = new AbortController();
  running.set(asked.id, control);
  asked.messages = [...messages, message];
  keep(asked);
  draw();
  refocus();
  $("said").textContent = "Waiting for the answer.";
  try {
    await read(asked, message, control.signal);
  } catch (error) {
    if (control.signal.aborted) message.speed = "stopped";
    else message.error = error instanceof Problem ? error.message : `The answer broke off: ${error.message}`;
  }
  running.delete(asked.id);
  if (chats.includes(asked)) keep(asked); // it was not deleted
  redraw(message);
  drawState();
  const text = drawn.get(message).querySelector(".prose").textContent;
  if (asked === chat) $("said").textContent = message.error ?? `The model says: ${text}`;
}

async function read(asked, message, signal) {
  const system = { role: "system", content: asked.system };
  const messages = [system, ...asked.messages].map(sent).filter(({ content }) => content);
  const chat_template_kwargs = { enable_thinking: able("thinking") && remembered("think") === "on" };
  const body = JSON.stringify({ model: $("model").value, messages, stream: true, chat_template_kwargs });
  let timer = 0;
  for await (const data of events(await api("/v1/chat/completions", askKey, { method: "POST", body, signal }))) {
    if (data === "[DONE]") return;
    const { error, choices = [], timings } = JSON.parse(data);
    if (error) throw new Problem(error.message);
    add(message, choices[0]?.delta ?? {});
    if (timings) message.speed = speed(timings);
    timer ||= setTimeout(() => {
      timer = 0;
      if (asked === chat) redraw(message);
    }, 100); // milliseconds between two drawings
  }
  throw new Problem("The answer broke off: the server hung up.");
}

/* Adds what came to a message. */
function add(message, { content = "", reasoning_content: thought = "", tool_calls: calls = [] }) {
  message.content += content;
  message.reasoning += thought;
  for (const { index, function: { name = "", arguments: given = "" } } of calls) {
    const call = (message.calls[index] ??= { name: "", arguments: "" });
    call.name += name;
    call.arguments += given;
  }
}

function speed({ ttft_ms: first, predicted_n: tokens, predicted_per_second: rate }) {
  const rated = rate ? `${rate.toFixed(1)} tokens/s, ` : "";
  return `first word after ${(first / 1000).toFixed(2)} s, ${rated}${tokens} tokens`;
}

function send(event) {
  event.preventDefault();
  const content = $("box").value.trim();
  if (running.has(chat.id) || !(content || files.length)) return;
  microphone?.then((end) => end(true));
  tell("");
  chat.title ||= (content || files[0].name).replace(/\s+/g, " ").slice(0, 60);
  const message = { role: "user", content, files };
  $("box").value = "";
  setFiles([]);
  answer([...chat.messages, message]);
}

/* Lets the person write a message anew; what came after it is answered anew. */
async function edit(message) {
  const earlier = before(message); // another tab may change the conversation meanwhile
  const content = await askIn($("edit"), message.content);
  if (content) answer([...earlier, { ...message, content }]);
}

async function instruct() {
  const text = await askIn($("instructions"), chat.system);
  if (text === null) return;
  chat.system = text;
  remember("system", text);
  if (chats.includes(chat)) keep(chat);
}

/* Sets the files that the next message takes along. */
function setFiles(next) {
  files = next;
  const remove = (file) => setFiles(files.filter((each) => each !== file));
  $("files").replaceChildren(...files.map((file) => fill("file", file, { name: file.name, away: () => remove(file) })));
  refocus();
}

/* Takes files that were picked, dropped or pasted; text goes where it would. */
function addFiles(event) {
  const list = (event.dataTransfer ?? event.clipboardData ?? event.target).files ?? [];
  if (list.length) event.preventDefault();
  for (const file of list) {
    const failed = (error) => tell(`${file.name}: ${error.message}`);
    readFile(file, able).then((read) => setFiles([...files, read]), failed);
  }
  if (event.target.type === "file") event.target.value = ""; // the same one may be picked again
}

function switchTheme() {
  const other = matchMedia("(prefers-color-scheme: dark)").matches ? "light" : "dark";
  set("theme", remembered("theme") === other ? "" : other);
}

/* Turns the microphone on or off. Its words follow what was written before. */
async function speak() {
  if (microphone) return (await microphone)();
  const written = $("box").value.trimEnd();
  const write = (text) => ($("box").value = written ? `${written} ${text}` : text);
  const over = () => ((microphone = null), drawState());
  microphone = listen({ model: $("model").value, write, fail: tell, over });
  drawState();
}

const stop = () => running.get(chat.id)?.abort();

function press(event) {
  const { key, shiftKey, isComposing, target } = event;
  if (key === "Escape" && !document.querySelector("dialog[open], :popover-open")) stop();
  if (key !== "Enter" || shiftKey || isComposing || target.enterKeyHint !== "send") return;
  event.preventDefault();
  target.form.requestSubmit(target.form.querySelector("[type=submit]"));
}

const CLICKS = {
  attach: () => $("pick").click(), camera: () => $("shoot").click(), dismiss: () => tell(""), microphone: speak,
  new: () => (show(newChat()), $("box").focus()), settings: instruct, stop, theme: switchTheme,
  think: () => set("think", remembered("think") ? "" : "on"),
};
for (const [id, act] of Object.entries(CLICKS)) $(id).onclick = act;
for (const name of ["change", "drop", "paste"]) document.addEventListener(name, addFiles);
document.ondragover = (event) => event.dataTransfer.types.includes("Files") && event.preventDefault();
document.onkeydown = press;
$("composer").onsubmit = send;
$("model").onchange = () => set("model", $("model").value);
window.onpagehide = () => chats.filter(({ id }) => running.has(id)).forEach(keep);
window.onunhandledrejection = ({ reason }) => tell(`Something went wrong in this page: ${reason}`);
follow((id) => running.has(id), (id, kept) => (id === chat.id ? show(kept ?? newChat()) : drawChats()));

show(chat);
await loadModels();
if (matchMedia("(hover: hover)").matches && !document.querySelector("dialog[open]")) $("box").focus();
