/* The page: conversations with the models of the server that it came from.

Owns: what is said, what is drawn, what buttons and keys do. Does not know: the server's protocol, what is kept. A
model's text becomes elements in markdown.js alone; everything else is set as text. */

import { dropChat, keepChat, loadChats, newChat, remember, remembered } from "./kept.js";
import { markdown } from "./markdown.js";
import { Problem, api, events, sent } from "./server.js";
import { listen } from "./speech.js";

const MOST_FILE = 20 << 20; // bytes of a file that is sent
const WIDEST = 1568; // pixels of a picture
const DRAW_MS = 60; // at least between two drawings of an answer that is being written
const SOUNDS = ["wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "webm"];

const $ = (id) => document.getElementById(id);
const running = new Map(); // id of a chat -> the AbortController of the answer that it waits for, with its `message`
const drawn = new WeakMap(); // message -> its element
let chats = []; // the newest first
let chat = null; // the one on the screen
let models = [];
let files = []; // to be sent with the next message
let microphone = null; // what ends it, while it is on
let keyAsked = null; // the answer to the question for the key, while it is asked

/* Makes an element. "aria-..." and "class" are attributes. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria-|class$)/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

const button = (text, onclick, properties = {}) => make("button", { type: "button", onclick, ...properties }, text);

function iconButton(name, label, onclick) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return button(svg, onclick, { class: "icon", "aria-label": label });
}

/* ---- Conversations ---- */

/* Keeps a conversation over a reload. */
function keep(kept) {
  if (!chats.includes(kept)) return;
  const gone = keepChat(kept);
  chats = chats.filter(({ id }) => id === kept.id || !gone.includes(id));
  if (gone.includes(kept.id)) tell("This conversation is too long to be kept over a reload.");
}

function show(next) {
  chat = next;
  remember("chat", chat.id);
  openSide(false);
  draw();
  scrollDown();
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

function draw() {
  drawChats();
  $("empty").hidden = chat.messages.length > 0;
  $("messages").replaceChildren(...chat.messages.map(drawMessage));
  drawFiles();
  drawState();
}

function drawChats() {
  const entries = chats.map((each) => {
    const open = button(each.title, () => show(each), { class: "open" });
    if (each === chat) open.setAttribute("aria-current", "true");
    return make("li", {}, open, iconButton("close", `Delete: ${each.title}`, () => forget(each)));
  });
  $("chats").replaceChildren(...entries);
}

/* Shows what can be done now. */
function drawState() {
  const focused = document.activeElement === $("stop");
  $("stop").hidden = !running.has(chat.id);
  $("send").hidden = running.has(chat.id);
  if (focused && $("stop").hidden) $("box").focus();
  const [hears, sees] = [reads("audio"), reads("image")];
  $("attach").hidden = !hears && !sees;
  $("camera").hidden = !sees;
  $("microphone").hidden = !hears;
  $("pick").accept = [hears && "audio/*", sees && "image/*"].filter(Boolean).join(",");
  const kinds = [hears && "sound files", sees && "pictures"].filter(Boolean).join(" and ");
  $("hint").textContent = kinds ? `Write below, or drop ${kinds} anywhere.` : "Write below.";
}

function drawMessage(message) {
  const element = drawn.get(message) ?? make("article", { class: message.role });
  drawn.set(message, element);
  element.setAttribute("aria-label", message.role === "user" ? "You" : "Model");
  element.replaceChildren(...(message.role === "user" ? asked(message) : answered(message, element)));
  return element;
}

function asked(message) {
  const parts = (message.files ?? []).map(drawFile);
  if (message.content) parts.push(make("p", { class: "text" }, message.content));
  return [make("div", { class: "bubble" }, ...parts), make("footer", {}, button("Edit", () => edit(message)))];
}

function answered(message, element) {
  const parts = [];
  const waits = running.get(chat.id)?.message === message;
  if (message.reasoning) {
    const open = element.querySelector(".thoughts")?.open ?? false;
    const title = waits && !message.content ? "Thinking …" : "Thoughts";
    const text = make("div", { class: "text" }, message.reasoning.trim());
    parts.push(make("details", { class: "thoughts", open }, make("summary", {}, title), text));
  }
  for (const call of message.calls ?? []) {
    const title = make("summary", {}, "Tool asked for: ", make("code", {}, call.name));
    parts.push(make("details", { class: "step" }, title, make("pre", { tabIndex: 0 }, call.arguments)));
  }
  if (message.content) parts.push(make("div", { class: "prose" }, markdown(message.content)));
  else if (waits && !message.reasoning) parts.push(make("p", { class: "waiting", "aria-hidden": "true" }, "···"));
  if (message.error) parts.push(make("p", { class: "error" }, message.error));
  return waits ? parts : [...parts, make("footer", {}, ...answerButtons(message))];
}

function answerButtons(message) {
  const again = button("Try again", () => regenerate(message));
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(message.content);
    copy.textContent = "Copied";
  });
  const speed = make("span", { class: "speed" }, message.speed ?? "");
  return navigator.clipboard && message.content ? [copy, again, speed] : [again, speed];
}

function drawFile(file) {
  const src = `data:${file.type};base64,${file.data}`;
  if (!file.data) return make("p", { class: "small" }, `${file.name} (not kept)`);
  if (file.kind === "image") return make("img", { src, alt: file.name });
  return make("audio", { src, controls: true, "aria-label": file.name });
}

function drawFiles() {
  $("files").hidden = !files.length;
  const entry = (file) => make("li", {}, file.name, iconButton("close", `Remove ${file.name}`, () => removeFile(file)));
  $("files").replaceChildren(...files.map(entry));
}

function removeFile(file) {
  files = files.filter((each) => each !== file);
  drawFiles();
  $("box").focus();
}

/* A line for the person, with something to do about it. */
function tell(text, action = "", act = () => {}) {
  $("told").textContent = text;
  Object.assign($("act"), { textContent: action, hidden: !action, onclick: () => (tell(""), act()) });
  $("notice").hidden = !text;
}

/* The key as the person gives it, "" for none. wrong: the one that was tried. */
function askKey(wrong) {
  keyAsked ??= new Promise((done) => {
    $("door-title").textContent = wrong ? "That is not the server's key" : "This server needs its key";
    $("key").value = $("door").returnValue = "";
    $("door").onclose = () => done($("door").returnValue === "keep" ? $("key").value.trim() : "");
    $("door").showModal();
  }).finally(() => (keyAsked = null));
  return keyAsked;
}

async function loadModels() {
  try {
    models = (await (await api("/v1/models", askKey)).json()).data;
  } catch (error) {
    return tell(error.message, "Try again", loadModels);
  }
  $("model").replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
  const wanted = remembered("model");
  $("model").value = models.some(({ id }) => id === wanted) ? wanted : models[0].id;
  drawState();
}

/* Whether the chosen model reads "audio" or "image". */
function reads(kind) {
  return models.find(({ id }) => id === $("model").value)?.architecture?.input_modalities?.includes(kind) ?? false;
}

/* ---- Asking and answering ---- */

/* Asks the model for an answer to a conversation as it stands. */
async function answer(asked) {
  const message = { role: "assistant", content: "" };
  const history = asked.messages.filter((each) => each.content || each.files?.some(({ data }) => data)).map(sent);
  const system = asked.system ? [{ role: "system", content: asked.system }] : [];
  const chat_template_kwargs = { enable_thinking: remembered("think") === "on" };
  const body = { model: $("model").value, messages: [...system, ...history], stream: true, chat_template_kwargs };
  const control = Object.assign(new AbortController(), { message });
  running.set(asked.id, control);
  asked.messages.push(message);
  asked.when = Date.now();
  chats = [asked, ...chats.filter((each) => each !== asked)];
  keep(asked);
  draw();
  scrollDown();
  $("said").textContent = "Waiting for the answer.";
  try {
    await read(asked, message, body, control.signal);
  } catch (error) {
    if (control.signal.aborted) message.speed = "stopped";
    else message.error = error instanceof Problem ? error.message : `The answer broke off: ${error.message}`;
  }
  running.delete(asked.id);
  keep(asked);
  if (asked !== chat) return;
  followed(() => drawMessage(message));
  drawState();
  const text = drawn.get(message).querySelector(".prose")?.textContent ?? "";
  $("said").textContent = message.error ?? `The model says: ${text}`;
}

async function read(asked, message, body, signal) {
  const since = performance.now();
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal };
  let [first, timer, pause] = [0, 0, DRAW_MS];
  for await (const data of events(await api("/v1/chat/completions", askKey, options))) {
    if (data === "[DONE]") return;
    const { error, choices = [], timings } = JSON.parse(data);
    if (error) throw new Problem(error.message);
    if (add(message, choices[0]?.delta ?? {})) first ||= performance.now() - since;
    if (timings) message.speed = speed(first, timings);
    timer ||= setTimeout(() => {
      timer = 0;
      const start = performance.now();
      if (asked === chat && running.has(asked.id)) followed(() => drawMessage(message));
      pause = Math.max(DRAW_MS, 5 * (performance.now() - start)); // long answers leave the browser time too
    }, pause);
  }
  throw new Problem("The answer broke off: the server hung up.");
}

/* Adds what came to a message. Returns whether it was anything. */
function add(message, { content, reasoning_content: thought, tool_calls: calls }) {
  if (content) message.content += content;
  if (thought) message.reasoning = (message.reasoning ?? "") + thought;
  for (const { index = 0, function: { name = "", arguments: more = "" } = {} } of calls ?? []) {
    message.calls ??= [];
    const call = (message.calls[index] ??= { name: "", arguments: "" });
    call.name += name;
    call.arguments += more;
  }
  return Boolean(content || thought || calls);
}

function speed(first, { predicted_n: tokens, predicted_per_second: rate }) {
  const rated = rate ? `${rate.toFixed(1)} tokens/s, ` : "";
  return `first word after ${(first / 1000).toFixed(2)} s, ${rated}${tokens} token${tokens === 1 ? "" : "s"}`;
}

const scrollDown = () => $("talk").scrollTo({ top: $("talk").scrollHeight });

/* Draws, and stays at the end if the end was seen. */
function followed(draws) {
  const isDown = $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;
  draws();
  if (isDown) scrollDown();
}

function send() {
  const content = $("box").value.trim();
  if (running.has(chat.id) || !(content || files.length)) return;
  microphone?.(true);
  tell("");
  chat.title ||= (content || files[0].name).replace(/\s+/g, " ").slice(0, 60);
  chat.messages.push({ role: "user", content, ...(files.length && { files }) });
  files = [];
  write("");
  answer(chat);
}

function regenerate(message) {
  if (running.has(chat.id)) return;
  chat.messages.length = chat.messages.indexOf(message);
  answer(chat);
  $("box").focus();
}

/* Lets the person write a message anew; what came after it is answered anew. */
function edit(message) {
  const box = make("textarea", { value: message.content, rows: 4, "aria-label": "Message, edited" });
  const away = button("Cancel", () => drawMessage(message));
  const good = make("button", { class: "strong" }, "Send");
  const form = make("form", { class: "edit" }, box, make("div", { class: "row end" }, away, good));
  box.onkeydown = (event) => {
    if (event.key === "Escape") away.click();
    if (isEnter(event)) form.requestSubmit();
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    if (running.has(chat.id) || !(box.value.trim() || message.files)) return;
    message.content = box.value.trim();
    chat.messages.length = chat.messages.indexOf(message) + 1;
    answer(chat);
    $("box").focus();
  };
  drawn.get(message).replaceChildren(form);
  box.focus();
}

/* ---- Files ---- */

async function addFiles(list) {
  const read = (file) => readFile(file).catch((error) => tell(`${file.name}: ${error.message}`));
  for (const file of list) files.push(await read(file));
  files = files.filter(Boolean);
  drawFiles();
  $("box").focus();
}

/* Takes files that were dropped or pasted; text goes where it would. */
function addFilesOf(event, carried) {
  if (!carried.files.length) return;
  event.preventDefault();
  addFiles([...carried.files]);
}

/* A file as it is kept and sent. Throws Problem. */
async function readFile(file) {
  const format = file.name.split(".").pop().toLowerCase();
  const isSound = file.type.startsWith("audio/") || SOUNDS.includes(format);
  const kind = file.type.startsWith("image/") ? "image" : isSound ? "audio" : "";
  const called = { image: "pictures", audio: "sound files", "": "such files" }[kind];
  if (!kind || !reads(kind)) throw new Problem(`this model does not read ${called}.`);
  if (file.size > MOST_FILE) throw new Problem(`it is too large, ${MOST_FILE >> 20} MB at most.`);
  const blob = kind === "image" ? await smaller(file) : file;
  const reader = new FileReader();
  await new Promise((onload, onerror) => Object.assign(reader, { onload, onerror }).readAsDataURL(blob));
  const data = reader.result.slice(reader.result.indexOf(",") + 1);
  return { kind, name: file.name, type: blob.type || "audio/wav", format, data };
}

/* A picture as the model can use it: no wider or higher than WIDEST, and without what cameras write into files. */
async function smaller(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Problem("this browser cannot open the picture.");
  });
  const scale = Math.min(1, WIDEST / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", { width: Math.ceil(bitmap.width * scale), height: Math.ceil(bitmap.height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.9));
}

/* ---- What the person does ---- */

const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function write(text) {
  $("box").value = text;
  $("box").style.height = "auto";
  $("box").style.height = `${$("box").scrollHeight}px`;
}

function openSide(open) {
  document.body.classList.toggle("side", open);
  $("menu").setAttribute("aria-expanded", String(open));
  document.querySelector("main").inert = open;
  if (open) $("shut").focus();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  remember("theme", theme);
}

function setThink(on) {
  $("think").setAttribute("aria-pressed", String(on));
  remember("think", on ? "on" : "");
}

/* While the microphone is on, its words follow what was written before. */
function setSpeaking(end) {
  microphone = end;
  $("box").readOnly = Boolean(end);
  $("microphone").setAttribute("aria-pressed", String(Boolean(end)));
}

async function speak() {
  if (microphone) return microphone();
  const before = $("box").value.trimEnd();
  const words = (text) => write(before ? `${before} ${text}` : text);
  const over = () => setSpeaking(null);
  let early = null; // how it was ended while it was being opened
  setSpeaking((now = false) => (early = now));
  try {
    setSpeaking(await listen({ model: $("model").value, write: words, fail: tell, over }));
    if (early !== null) microphone(early);
  } catch (error) {
    over();
    tell(error instanceof Problem ? error.message : `The microphone cannot be used: ${error.message}`);
  }
}

function switchTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const next = (remembered("theme") || system) === "dark" ? "light" : "dark";
  setTheme(next === system ? "" : next);
}

function openInstructions() {
  $("system").value = chat.system ?? "";
  $("instructions").returnValue = "";
  $("instructions").showModal();
}

function keepInstructions() {
  if ($("instructions").returnValue !== "keep") return;
  chat.system = $("system").value.trim();
  remember("system", chat.system);
  keep(chat);
}

function shutSide() {
  openSide(false);
  $("menu").focus();
}

function leave() {
  if (document.body.classList.contains("side")) shutSide();
  else if (!document.querySelector("dialog[open]")) running.get(chat.id)?.abort();
}

const on = (target, name, act) => target.addEventListener(name, act);
const CLICKS = {
  new: () => (show(newChat()), $("box").focus()), menu: () => openSide(true), shut: shutSide, veil: shutSide,
  theme: switchTheme, settings: openInstructions, think: () => setThink(remembered("think") !== "on"),
  attach: () => $("pick").click(), camera: () => $("shoot").click(), microphone: speak,
  stop: () => running.get(chat.id)?.abort(), dismiss: () => tell(""),
};
for (const [id, act] of Object.entries(CLICKS)) on($(id), "click", () => act());
for (const pick of [$("pick"), $("shoot")]) {
  on(pick, "change", () => addFiles([...pick.files]).then(() => (pick.value = "")));
}
for (const each of document.querySelectorAll(".cancel")) on(each, "click", () => each.closest("dialog").close(""));
on($("instructions"), "close", keepInstructions);
on($("model"), "change", () => (remember("model", $("model").value), drawState()));
on($("composer"), "submit", (event) => (event.preventDefault(), send()));
on($("box"), "input", () => write($("box").value));
on($("box"), "keydown", (event) => isEnter(event) && (event.preventDefault(), send()));
on(document, "keydown", (event) => event.key === "Escape" && leave());
on(document, "dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
on(document, "drop", (event) => addFilesOf(event, event.dataTransfer));
on(document, "paste", (event) => addFilesOf(event, event.clipboardData));
on(window, "pagehide", () => keep(chat));
on(window, "unhandledrejection", (event) => tell(`Something went wrong in this page: ${event.reason}`));

setTheme(remembered("theme"));
setThink(remembered("think") === "on");
chats = loadChats();
show(chats.find(({ id }) => id === remembered("chat")) ?? newChat());
await loadModels();
if (matchMedia("(hover: hover)").matches && !document.querySelector("dialog[open]")) $("box").focus();
