"""Text of a model as HTML that is safe to show: Markdown and code, and nothing of it ever runs.

Raw HTML is escaped, so it is seen as it was written. Links lead to http, https or mail only, images are not fetched but
named, and no attribute holds a style or a script.
"""

from __future__ import annotations

import json
import re
from functools import cache
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from ptl.types import Message

LONGEST = 30_000
"""Characters up to which Markdown is read; its time can grow with their square. Longer text is shown as it is."""

LINKS = re.compile(r"(https?://|mailto:)", re.IGNORECASE)


def message_html(message: Message) -> dict[str, str]:
    """A turn for the page: its role, its text and, where it has one, its reasoning."""
    html = to_html(message.content) if message.content else ""
    for call in message.tool_calls:
        html += _code(json.dumps(call.get("function", call), ensure_ascii=False, indent=2), "json")
    out = {"role": message.role, "html": html}
    if message.reasoning:
        out["reasoning"] = to_html(message.reasoning)
    return out


def to_html(text: str) -> str:
    """Markdown text as HTML."""
    if len(text) > LONGEST:
        return f'<div class="plain">{escape(text)}</div>'
    return _markdown().render(text)


@cache
def _markdown() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "breaks": True})
    md.enable(["table", "strikethrough"])
    md.validateLink = lambda url: LINKS.match(url) is not None  # pyright: ignore[reportAttributeAccessIssue]
    md.core.ruler.push("tame", _tame)
    md.add_render_rule("image", _image)
    md.add_render_rule("fence", _fence)
    return md


def _tame(state: Any) -> None:
    """Attributes that the page's security policy refuses, or its headings and links need otherwise."""
    for token in state.tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 3)}"  # below the page's own headings
        if "style" in token.attrs:
            token.attrs["class"] = f"align-{str(token.attrs.pop('style')).rpartition(':')[2]}"
        for child in token.children or ():
            if child.type == "link_open":
                child.attrs.update(target="_blank", rel="noopener noreferrer nofollow")


def _image(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    return f'<span class="image">![{escape(token.content)}]({escape(str(token.attrs.get("src", "")))})</span>'


def _fence(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    words = tokens[index].info.split(maxsplit=1)
    return _code(tokens[index].content, words[0] if words else "")


def _code(text: str, language: str) -> str:
    label = f'<span class="language">{escape(language)}</span>' if language else ""
    # A block that is wider than the page scrolls, for which keyboards need to focus it.
    return f'<div class="code">{label}<pre tabindex="0"><code>{_highlight(text, language)}</code></pre></div>'


def _highlight(text: str, language: str) -> str:
    """Code with a ``<span class="tok-...">`` a token; escaped as it is where the language is not known."""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return escape(text)
    return highlight(text, lexer, HtmlFormatter(nowrap=True, classprefix="tok-"))
