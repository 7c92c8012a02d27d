/* What this browser keeps over a reload: conversations, and small settings under a name.

Owns: how much is kept, what another tab keeps. Does not know: what is shown, the server. */

const MOST_CHATS = 50;
const MOST_KEPT = 4_000_000; // characters of all conversations; browsers have room for 5 million
const KEPT_FILE = 300_000; // characters of a file in base64; longer ones are not kept
const CHAT = "edge_gemma.chat.";
const unkept = {}; // settings that there was no room for

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

/* All conversations, the newest first. */
export function loadChats() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
  return names.flatMap((name) => loadChat(name.slice(CHAT.length))).sort((one, other) => other.when - one.when);
}

/* A list of one conversation. What cannot be read is removed, and the list is empty. */
export function loadChat(id) {
  try {
    const chat = { ...JSON.parse(localStorage.getItem(CHAT + id)), id };
    const messages = chat.messages.map((each) => ({ content: "", reasoning: "", calls: [], files: [], ...each }));
    if (messages.every(isWhole)) return [{ ...chat, messages }];
  } catch {} // whoever wrote it
  dropChat(id);
  return [];
}

const isWhole = ({ content, reasoning, calls, files }) =>
  [content, reasoning].every((text) => typeof text === "string") && [...calls, ...files].every(Boolean);

export const dropChat = (id) => localStorage.removeItem(CHAT + id);

/* Keeps a conversation. The last of the others are dropped until there is room. Returns whether there was. */
export function keepChat(chat, others) {
  const text = JSON.stringify(chat, (name, value) => (name === "url" && value.length > KEPT_FILE ? "" : value));
  if (text.length > MOST_KEPT) return false;
  const size = (sum, { id }) => sum + (localStorage.getItem(CHAT + id) ?? "").length;
  const fits = () => others.length < MOST_CHATS && others.reduce(size, text.length) <= MOST_KEPT;
  while (!fits() || !store(CHAT + chat.id, text)) {
    if (!others.length) return false;
    dropChat(others.pop().id);
  }
  return true;
}

/* Calls with the id of each conversation that another tab keeps or drops. */
export function follow(call) {
  addEventListener("storage", ({ key }) => key?.startsWith(CHAT) && call(key.slice(CHAT.length)));
}
