/* Text that a model wrote, as elements of the page.

Owns: the only way from a model's text to elements, which leads through DOMPurify. Does not know: conversations. */

const escaped = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
const TAGS =
  "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre s strong table tbody td th thead tr ul #text";
const ALLOWED = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

marked.use({
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text), // HTML is shown as it was written
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`, // nothing is loaded
  },
});

/* Markdown as a document fragment. */
export function markdown(text) {
  const fragment = DOMPurify.sanitize(marked.parse(text), ALLOWED);
  const away = { target: "_blank", rel: "noopener noreferrer" };
  for (const link of fragment.querySelectorAll("a")) Object.assign(link, away);
  for (const block of fragment.querySelectorAll("pre, table")) block.tabIndex = 0; // wide ones are scrolled with keys
  return fragment;
}
