"""Markdown of answers to sanitized HTML, block by block, so that a streamed answer is rendered in linear time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

# CommonMark with GitHub's tables, strikethrough and autolinks. HTML in an answer is shown as text.
_PARSER = MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": True}).enable(
    ["table", "strikethrough", "linkify"]
)
# `file.py` and `a.b@c` are not links.
_PARSER.linkify.set({"fuzzy_link": False, "fuzzy_email": False})

_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_BLOCKS = {"blockquote", "hr", "li", "ol", "p", "pre", "table", "tbody", "td", "th", "thead", "tr", "ul"}
_SANITIZER = nh3.Cleaner(
    tags=_HEADINGS | _BLOCKS | {"a", "br", "code", "em", "s", "strong"},
    attributes={"a": {"href", "title"}, "ol": {"start"}, "td": {"align"}, "th": {"align"}},
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
    set_tag_attribute_values={"a": {"target": "_blank"}},
    link_rel="noopener noreferrer",
)

_LINE_END = re.compile(r"\r\n?|\n")


@dataclass(frozen=True)
class Rendered:
    """Top-level blocks of a text as HTML.

    `finished` blocks do not change as text is appended, except that a link reference may be defined later; `open`
    are the rest. `consumed` is the length of the text of the finished blocks in UTF-16 code units, the unit of
    JavaScript strings.
    """

    finished: list[str]
    open: list[str]
    consumed: int


def render_markdown(text: str) -> Rendered:
    """Render `text` as HTML without scripts, styles or images; links only to http, https and mail addresses."""
    env: EnvType = {}
    tokens = _PARSER.parse(text, env)
    line_starts = [0] + [match.end() for match in _LINE_END.finditer(text)]
    starts = [index for index, token in enumerate(tokens) if token.level == 0 and token.nesting >= 0]
    html = [
        _SANITIZER.clean(_PARSER.renderer.render(tokens[start:end], _PARSER.options, env))
        for start, end in zip(starts, [*starts[1:], len(tokens)])
    ]
    # A block is finished once the next one begins on a complete line: a partial line may still turn out to belong to
    # the block before it, such as a "2" that becomes the "2." of a list.
    first_lines = [tokens[start].map[0] for start in starts]
    num_finished = max((index for index, line in enumerate(first_lines) if line + 1 < len(line_starts)), default=0)
    finished_text = text[: line_starts[first_lines[num_finished]]] if num_finished else ""
    return Rendered(html[:num_finished], html[num_finished:], len(finished_text.encode("utf-16-le")) // 2)


def _image_as_link(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    """Render an image as a link, because the page loads nothing from other hosts."""
    image = tokens[index]
    text = Token("text", "", 0, content=renderer.renderInlineAsText(image.children, options, env))
    if sum(token.nesting for token in tokens[:index] if token.type.startswith("link_")):
        return renderer.render([text], options, env)  # the image is already inside a link
    link = Token("link_open", "a", 1, attrs={"href": image.attrGet("src") or ""})
    return renderer.render([link, text, Token("link_close", "a", -1)], options, env)


def _align_without_style(state: StateCore) -> None:
    """Set the alignment of a column as an attribute: the page's CSP forbids inline styles."""
    for token in state.tokens:
        if token.type in ("th_open", "td_open") and (style := token.attrs.pop("style", None)):
            token.attrs["align"] = str(style).removeprefix("text-align:")


_PARSER.add_render_rule("image", _image_as_link)
_PARSER.core.ruler.push("align_without_style", _align_without_style)
