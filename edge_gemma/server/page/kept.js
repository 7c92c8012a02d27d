/* What this browser keeps over a reload: conversations, and small settings under a name.

Owns: how much is kept, what another tab keeps. Does not know: what is shown, the server. */

const MOST_CHATS = 50;
const MOST_KEPT = 4_000_000; // characters of all conversations; browsers have room for 5 million
const KEPT_FILE = 300_000; // characters of a file in base64; longer ones are not kept
const CHAT = "edge_gemma.chat.";
const unkept = {}; // settings that there was no room for
const names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));

/* All conversations, the newest first. */
export let chats = names.flatMap((name) => loadChat(name.slice(CHAT.length))).sort((a, b) => b.when - a.when);

/* What is kept under a name; "" if nothing is. */
export const remembered = (name) => unkept[name] ?? localStorage.getItem(`edge_gemma.${name}`) ?? "";

export function remember(name, value) {
  unkept[name] = store(`edge_gemma.${name}`, value) ? undefined : value;
}

/* Returns whether there was room. */
function store(name, text) {
  try {
    localStorage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}

export function newChat() {
  const id = String(Date.now() + Math.random());
  return { id, when: Date.now(), title: "", system: remembered("system"), messages: [] };
}

/* A list of one conversation. What cannot be read is removed, and the list is empty. */
function loadChat(id) {
  try {
    const chat = { ...JSON.parse(localStorage.getItem(CHAT + id)), id };
    chat.messages = chat.messages.map((each) => ({ content: "", reasoning: "", calls: [], files: [], ...each }));
    if (chat.messages.every(isWhole)) return [chat];
  } catch {} // whoever wrote it
  localStorage.removeItem(CHAT + id);
  return [];
}

function isWhole({ content, reasoning, calls, files }) {
  return [content, reasoning].every((text) => typeof text === "string") && [...calls, ...files].every(Boolean);
}

/* Keeps a conversation as the newest; the oldest make room. Returns whether there was. */
export function keepChat(chat) {
  chat.when = Date.now();
  chats = [chat, ...chats.filter((each) => each !== chat)];
  const text = JSON.stringify(chat, (name, value) => (name === "url" && value.length > KEPT_FILE ? "" : value));
  const size = (sum, { id }) => sum + (localStorage.getItem(CHAT + id) ?? "").length;
  const fits = () => chats.length <= MOST_CHATS && chats.slice(1).reduce(size, text.length) <= MOST_KEPT;
  while (text.length <= MOST_KEPT) {
    if (fits() && store(CHAT + chat.id, text)) return true;
    if (chats.length === 1) break;
    dropChat(chats.at(-1));
  }
  return false;
}

export function dropChat(chat) {
  chats = chats.filter((each) => each !== chat);
  localStorage.removeItem(CHAT + chat.id);
}

/* Takes over what other tabs keep and drop, but for what isOurs; calls with each that was taken over. */
export function follow(isOurs, call) {
  addEventListener("storage", ({ key }) => {
    const id = key?.startsWith(CHAT) && key.slice(CHAT.length);
    if (!id || isOurs(id)) return;
    const kept = loadChat(id);
    chats = [...kept, ...chats.filter((each) => each.id !== id)];
    call(id, kept[0]);
  });
}
