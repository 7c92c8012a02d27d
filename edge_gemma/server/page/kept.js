/* What this browser keeps over a reload: conversations, and small settings under a name.

Owns: how much is kept, what makes room for what. Does not know: what is shown, the server. */

const MOST_CHATS = 50;
const MOST_KEPT = 4_000_000; // characters of all conversations; browsers have room for 5 million
const KEPT_FILE = 300_000; // characters of a file in base64; longer ones are not kept
const CHAT = "edge_gemma.chat.";

/* What is kept under a name; "" if nothing is. */
export const remembered = (name) => localStorage.getItem(`edge_gemma.${name}`) ?? "";

export function remember(name, value) {
  if (value) localStorage.setItem(`edge_gemma.${name}`, value);
  else localStorage.removeItem(`edge_gemma.${name}`);
}

export function newChat() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, when: Date.now(), title: "", system: remembered("system"), messages: [] };
}

/* All conversations, the newest first. What cannot be read is removed. */
export function loadChats() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
  return names.map(readChat).filter(Boolean).sort((one, other) => other.when - one.when);
}

function readChat(name) {
  try {
    const chat = JSON.parse(localStorage.getItem(name));
    if (Array.isArray(chat.messages) && name === CHAT + chat.id) return chat;
  } catch {
    // as any other that is none
  }
  localStorage.removeItem(name);
}

export const dropChat = (id) => localStorage.removeItem(CHAT + id);

/* Keeps a conversation. The oldest ones make room: returns the ids of what is not kept any more, its own if need be. */
export function keepChat(chat) {
  const text = JSON.stringify(chat, (name, value) => (name === "data" && value.length > KEPT_FILE ? "" : value));
  const others = loadChats().filter(({ id }) => id !== chat.id);
  const sizes = others.map(({ id }) => localStorage.getItem(CHAT + id).length);
  const gone = [];
  for (;;) {
    try {
      const size = sizes.reduce((sum, each) => sum + each, text.length);
      if (sizes.length < MOST_CHATS && size <= MOST_KEPT) {
        localStorage.setItem(CHAT + chat.id, text);
        return gone;
      }
    } catch {
      // this browser has less room
    }
    const oldest = others[sizes.length - 1] ?? chat;
    sizes.pop();
    dropChat(oldest.id);
    gone.push(oldest.id);
    if (oldest === chat) return gone;
  }
}
