// The small part of Markdown that models write, as DOM nodes. Text goes in as text: nothing in it becomes markup.

const FENCE = /^\s*(```|~~~)\s*([\w+#.-]*)\s*$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*\d+[.)]\s+(.*)$/;
const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*/gs;

export function renderMarkdown(text) {
  const fragment = document.createDocumentFragment();
  const lines = text.split("\n");
  let paragraph = [];
  let list = null;

  function endParagraph() {
    const content = paragraph.join("\n").trim();
    if (content) fragment.append(element("p", inline(content)));
    paragraph = [];
  }

  function addItem(tag, content) {
    endParagraph();
    if (list?.localName !== tag) fragment.append((list = element(tag)));
    list.append(element("li", inline(content)));
  }

  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = line.match(FENCE);
    const item = line.match(BULLET) ?? line.match(NUMBER);
    if (!item && line.trim()) list = null;
    if (fence) {
      endParagraph();
      let end = i + 1;
      while (end < lines.length && lines[end].trim() !== fence[1]) end++;
      const code = element("code", [lines.slice(i + 1, end).join("\n")]);
      const block = element("pre", [code]);
      block.tabIndex = 0; // a keyboard can scroll it
      fragment.append(block);
      i = end;
    } else if (line.match(HEADING)) {
      endParagraph();
      fragment.append(element("h3", inline(line.match(HEADING)[1])));
    } else if (item) {
      addItem(line.match(BULLET) ? "ul" : "ol", item[1]);
    } else if (line.trim()) {
      paragraph.push(line);
    } else {
      endParagraph();
    }
  }
  endParagraph();
  return fragment;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index));
    const [whole, , code, strong, emphasis] = match;
    if (code !== undefined) nodes.push(element("code", [code]));
    else if (strong !== undefined) nodes.push(element("strong", [strong]));
    else nodes.push(element("em", [emphasis]));
    end = match.index + whole.length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

export function element(tag, children = [], className = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
