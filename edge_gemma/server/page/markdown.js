/* Text that a model wrote, as elements of the page.

Owns: the only way from a model's text to elements, which leads through DOMPurify. Does not know: conversations. */

const LONGEST = 30_000; // characters; what is longer could keep the parser busy for seconds
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
const escaped = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

marked.use({
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text), // HTML is shown as it was written
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`, // nothing is loaded
  },
});

/* Markdown as HTML. What is too long or nested too deep stays as it was written. */
function parse(text) {
  try {
    if (text.length <= LONGEST) return marked.parse(text);
  } catch {} // the parser's stack
  return `<pre>${escaped(text)}</pre>`;
}

/* Markdown as a document fragment. */
export function markdown(text) {
  const fragment = DOMPurify.sanitize(parse(text), ALLOWED);
  const away = { target: "_blank", rel: "noopener noreferrer" };
  for (const link of fragment.querySelectorAll("a")) Object.assign(link, away);
  for (const block of fragment.querySelectorAll("pre, table")) block.tabIndex = 0; // wide ones are scrolled with keys
  return fragment;
}
