"""Text of a model as HTML: Markdown and code are shown well, and nothing of it becomes more than text."""

import html
import re

import pytest

from ptl.apps.ranking.markup import LONGEST, to_html

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](data:text/html,<script>alert(1)</script>)",
    "[click](&#x6A;avascript:alert(1))",
    "![x](javascript:alert(1))",
    '![x" onerror="alert(1)](http://evil.example/a.png)',
    "<javascript:alert(1)>",
    '```"><script>alert(1)</script>\ncode </code></pre><script>alert(1)</script>\n```',
    "```html\n<script>alert(1)</script>\n```",
    '[a](http://e.example "x\\" onmouseover=\\"alert(1)")',
    '<a href="http://e.example" onclick="alert(1)">x</a>',
    "[x]: javascript:alert(1)\n\n[x]",
    "    <script>alert(1)</script>",
    "|<script>alert(1)</script>|b|\n|:-:|-|\n|<svg onload=alert(1)>|c|",
    "[local](/api/agreement)",
]
SAFE_TAGS = set(
    "a blockquote br code del div em h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul".split()  # noqa: SIM905
)
SAFE_ATTRIBUTES = {"class", "href", "target", "rel", "tabindex", "start", "title"}


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_model_writes_becomes_more_than_text(text):
    made = to_html(text)
    for tag, attributes in re.findall(r"</?([a-zA-Z][^\s/>]*)((?:\s[^>]*)?)>", made):
        assert tag in SAFE_TAGS, made
        assert {name for name, _ in re.findall(r'([\w-]+)="([^"]*)"', attributes)} <= SAFE_ATTRIBUTES, made
    assert all(re.match("(https?|mailto):", html.unescape(url)) for url in re.findall(r'href="([^"]*)"', made)), made
    if "script>" in text:
        assert "script" in html.unescape(re.sub("<[^>]*>", "", made))  # shown, not swallowed


def test_markdown_and_code_are_shown_well():
    made = to_html("# Title\n\n**bold** `x`\nnext\n\n```python\ndef f(): pass\n```\n\n|a|\n|-:|\n|1|")
    for part in ("<h4>Title</h4>", "<strong>bold</strong>", "<code>x</code><br />", 'class="align-right"'):
        assert part in made
    assert '<span class="tok-k">def</span>' in made and "style=" not in made
    assert 'rel="noopener noreferrer nofollow"' in to_html("[a](https://e.example)")


def test_a_text_that_is_too_long_for_markdown_is_shown_as_it_is():
    text = "<b>*" * (LONGEST // 4 + 1)
    assert html.unescape(to_html(text)) == f'<div class="plain">{text}</div>'
