/* The page: conversations with the models of the server that it came from.

Owns: what is said, what is drawn, what buttons and keys do. Does not know: the server's protocol, what is kept. A
model's text becomes elements in markdown.js alone; everything else is set as text. */

import { dropChat, keepChat, loadChats, newChat, remember, remembered } from "./kept.js";
import { markdown } from "./markdown.js";
import { Problem, api, events, readFile, sent } from "./server.js";
import { listen } from "./speech.js";

const DRAW_MS = 100; // between two drawings of an answer that is being written

const $ = (id) => document.getElementById(id);
const running = new Map(); // id of a chat -> what stops the answer that it waits for: an AbortController
const drawn = new WeakMap(); // message -> its element
let chats = []; // the newest first
let chat = null; // the one on the screen
let models = [];
let files = []; // to be sent with the next message
let microphone = null; // a promise of what ends it, while it is on

/* ---- Conversations ---- */

/* Keeps a conversation over a reload. The oldest of the others make room. */
function keep(kept) {
  if (!chats.includes(kept)) return;
  const others = chats.filter((each) => each !== kept);
  while (!keepChat(kept, others)) {
    if (!others.length) return tell("This conversation is too long to be kept over a reload.");
    dropChat(others.pop().id);
  }
  chats = chats.filter((each) => each === kept || others.includes(each));
}

function show(next) {
  chat = next;
  remember("chat", chat.id);
  $("side").hidePopover();
  draw();
}

function forget(gone) {
  running.get(gone.id)?.abort();
  chats = chats.filter((each) => each !== gone);
  dropChat(gone.id);
  show(gone === chat ? (chats[0] ?? newChat()) : chat);
  $("new").focus();
  tell(`Deleted: ${gone.title}`, "Undo", () => {
    chats = [gone, ...chats];
    keep(gone);
    show(gone);
  });
}

/* ---- Drawing ---- */

/* A copy of a template. parts: class of a place in it -> what is put there, or what a click there does. A place for
which there is nothing is taken out. */
function fill(id, parts) {
  const element = $(id).content.firstElementChild.cloneNode(true);
  for (const [name, part] of Object.entries(parts)) {
    const place = element.querySelector(`.${name}`);
    if (!part) place.remove();
    else if (part instanceof Function) place.onclick = part;
    else place.append(...[part].flat());
  }
  return element;
}

function draw() {
  $("chats").replaceChildren(...chats.map(drawEntry));
  $("messages").replaceChildren(...chat.messages.map(drawMessage));
  drawState();
  scrollDown();
}

function drawEntry(each) {
  const entry = fill("entry", { title: each.title, open: () => show(each), close: () => forget(each) });
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
  const element = message.role === "user" ? drawQuestion(message) : drawAnswer(message);
  drawn.get(message)?.replaceWith(element);
  drawn.set(message, element);
  return element;
}

function drawQuestion(message) {
  const { content, files: shown = [] } = message;
  return fill("question", { shown: shown.map(drawFile), text: content, change: () => edit(message) });
}

function drawAnswer(message) {
  const { content, reasoning, calls, error, speed } = message;
  const element = fill("answer", {
    text: reasoning.trim(),
    steps: calls.map((call) => fill("step", { name: call.name, given: call.arguments })),
    prose: content && markdown(content),
    error,
    copy: navigator.clipboard && content && (({ target }) => copy(target, content)),
    again: () => answer(before(message)),
    speed,
  });
  element.querySelector(".thoughts").open = drawn.get(message)?.querySelector(".thoughts").open;
  return element;
}

async function copy(button, text) {
  await navigator.clipboard.writeText(text);
  button.textContent = "Copied";
}

function drawFile({ kind, name, url }) {
  if (!url) return fill("unkept", { name });
  if (kind === "image") return Object.assign(new Image(), { src: url, alt: name });
  return Object.assign(new Audio(url), { controls: true, ariaLabel: name });
}

/* The box takes the focus of what is gone. */
const refocus = () => document.activeElement === document.body && $("box").focus();

const scrollDown = () => $("talk").scrollTo({ top: $("talk").scrollHeight });

/* Draws a message anew, and stays at the end if the end was seen. */
function redraw(message) {
  const isDown = $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;
  drawMessage(message);
  if (isDown) scrollDown();
}

/* A line for the person, with something to do about it. */
function tell(text, action = "", act = () => {}) {
  $("told").textContent = text;
  Object.assign($("act"), { textContent: action, hidden: !action, onclick: () => (tell(""), act()) });
  $("notice").hidden = !text;
}

/* Asks the person in a dialog. Returns the text of its field, null if the person does not want to. */
async function askIn(dialog, field, text = "") {
  field.value = text;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  return dialog.returnValue === "keep" ? field.value.trim() : null;
}

/* The key as the person gives it, null for none. wrong: the one that was tried. */
function askKey(wrong) {
  $("door-title").textContent = wrong ? "That is not the server's key" : "This server needs its key";
  return askIn($("door"), $("key"));
}

async function loadModels() {
  try {
    models = (await (await api("/v1/models", askKey)).json()).data;
  } catch (error) {
    return tell(error.message, "Try again", loadModels);
  }
  const chosen = remembered("model");
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
  drawState();
}

/* Whether the chosen model reads "audio" or "image", or is capable of "thinking". */
function able(what) {
  const { architecture, capabilities = [] } = models.find(({ id }) => id === $("model").value) ?? {};
  return [...(architecture?.input_modalities ?? []), ...capabilities].includes(what);
}

/* ---- Asking and answering ---- */

const before = (message) => chat.messages.slice(0, chat.messages.indexOf(message));

/* Asks the model to answer these messages, which become those of the conversation. */
async function answer(messages) {
  const asked = chat;
  const message = { role: "assistant", content: "", reasoning: "", calls: [] };
  const control = new AbortController();
  running.set(asked.id, control);
  asked.messages = [...messages, message];
  asked.when = Date.now();
  chats = [asked, ...chats.filter((each) => each !== asked)];
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
  keep(asked);
  if (asked !== chat) return;
  redraw(message);
  drawState();
  const text = drawn.get(message).querySelector(".prose")?.textContent ?? "";
  $("said").textContent = message.error ?? `The model says: ${text}`;
}

async function read(asked, message, signal) {
  const since = performance.now();
  const system = { role: "system", content: asked.system };
  const messages = [system, ...asked.messages].map(sent).filter(({ content }) => content);
  const chat_template_kwargs = { enable_thinking: able("thinking") && remembered("think") === "on" };
  const body = JSON.stringify({ model: $("model").value, messages, stream: true, chat_template_kwargs });
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal };
  let [first, timer] = [0, 0];
  for await (const data of events(await api("/v1/chat/completions", askKey, options))) {
    if (data === "[DONE]") return;
    const { error, choices = [], timings } = JSON.parse(data);
    if (error) throw new Problem(error.message);
    if (add(message, choices[0]?.delta ?? {})) first ||= performance.now() - since;
    if (timings) message.speed = speed(first, timings);
    timer ||= setTimeout(() => {
      timer = 0;
      if (asked === chat) redraw(message);
    }, DRAW_MS);
  }
  throw new Problem("The answer broke off: the server hung up.");
}

/* Adds what came to a message. Returns whether it was anything. */
function add(message, { content = "", reasoning_content: thought = "", tool_calls: calls = [] }) {
  message.content += content;
  message.reasoning += thought;
  for (const { index, function: { name = "", arguments: given = "" } } of calls) {
    const call = (message.calls[index] ??= { name: "", arguments: "" });
    call.name += name;
    call.arguments += given;
  }
  return content || thought || calls.length;
}

function speed(first, { predicted_n: tokens, predicted_per_second: rate }) {
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
  const content = await askIn($("edit"), $("edited"), message.content);
  if (content) answer([...before(message), { ...message, content }]);
}

/* ---- What the person does ---- */

/* Sets the files that the next message takes along. */
function setFiles(next) {
  files = next;
  const remove = (file) => setFiles(files.filter((each) => each !== file));
  $("files").replaceChildren(...files.map((file) => fill("file", { name: file.name, away: () => remove(file) })));
  refocus();
}

/* Takes files that were picked, dropped or pasted; text goes where it would. */
function addFiles(event, list) {
  if (list.length) event.preventDefault();
  for (const file of list) {
    const failed = (error) => tell(`${file.name}: ${error.message}`);
    readFile(file, able).then((read) => setFiles([...files, read]), failed);
  }
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

async function instruct() {
  const text = await askIn($("instructions"), $("system"), chat.system);
  if (text === null) return;
  chat.system = text;
  remember("system", text);
  keep(chat);
}

function press(event) {
  const { key, shiftKey, isComposing, target } = event;
  if (key === "Escape" && !document.querySelector("dialog[open], :popover-open")) running.get(chat.id)?.abort();
  if (key !== "Enter" || shiftKey || isComposing || target.enterKeyHint !== "send") return;
  event.preventDefault();
  target.form.requestSubmit(target.form.querySelector("[type=submit]"));
}

const on = (target, name, act) => target.addEventListener(name, act);
const CLICKS = {
  new: () => (show(newChat()), $("box").focus()), theme: switchTheme, settings: instruct,
  attach: () => $("pick").click(), camera: () => $("shoot").click(), microphone: speak,
  think: () => set("think", remembered("think") ? "" : "on"),
  stop: () => running.get(chat.id)?.abort(), dismiss: () => tell(""),
};
for (const [id, act] of Object.entries(CLICKS)) on($(id), "click", act);
for (const pick of [$("pick"), $("shoot")]) {
  on(pick, "change", (event) => (addFiles(event, pick.files), (pick.value = "")));
}
on($("model"), "change", () => set("model", $("model").value));
on($("composer"), "submit", send);
on(document, "keydown", press);
on(document, "dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
on(document, "drop", (event) => addFiles(event, event.dataTransfer.files));
on(document, "paste", (event) => addFiles(event, event.clipboardData.files));
on(window, "pagehide", () => keep(chat));
on(window, "unhandledrejection", (event) => tell(`Something went wrong in this page: ${event.reason}`));

chats = loadChats();
show(chats.find(({ id }) => id === remembered("chat")) ?? newChat());
await loadModels();
if (matchMedia("(hover: hover)").matches && !document.querySelector("dialog[open]")) $("box").focus();
