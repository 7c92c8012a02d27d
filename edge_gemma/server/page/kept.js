/* What this browser keeps over a reload: conversations, and small settings under a name.

Owns: how much is kept. Does not know: what is shown, the server. */

const MOST_CHATS = 50;
const MOST_KEPT = 4_000_000; // characters of all conversations; browsers have room for 5 million
const KEPT_FILE = 300_000; // characters of a file in base64; longer ones are not kept
const CHAT = "edge_gemma.chat.";

/* What is kept under a name; "" if nothing is. */
export const remembered = (name) => localStorage.getItem(`edge_gemma.${name}`) ?? "";

export const remember = (name, value) => localStorage.setItem(`edge_gemma.${name}`, value);

export function newChat() {
  const id = String(Date.now() + Math.random());
  return { id, when: Date.now(), title: "", system: remembered("system"), messages: [] };
}

/* All conversations, the newest first. What cannot be read is removed. */
export function loadChats() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
  return names.flatMap(readChat).sort((one, other) => other.when - one.when);
}

function readChat(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    localStorage.removeItem(name);
    return [];
  }
}

export const dropChat = (id) => localStorage.removeItem(CHAT + id);

/* Keeps a conversation beside others. Returns whether there was room. */
export function keepChat(chat, others) {
  const text = JSON.stringify(chat, (name, value) => (name === "url" && value.length > KEPT_FILE ? "" : value));
  const size = others.reduce((sum, { id }) => sum + (localStorage.getItem(CHAT + id) ?? "").length, text.length);
  if (others.length >= MOST_CHATS || size > MOST_KEPT) return false;
  try {
    localStorage.setItem(CHAT + chat.id, text);
    return true;
  } catch {
    return false; // this browser has less room
  }
}
