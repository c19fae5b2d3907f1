"""What the site needs beside Markdown: formulas without a script, and links to files of the repository.

Formulas are LaTeX in ``math`` fences, which code hosts show by themselves. Here they become MathML when the site is
built, so that a reader's browser fetches and runs nothing for them.

A page may link to a file of the repository that is not in docs/, such as ``[README](../README.md)``: that works
wherever the repository is browsed. MkDocs knows the files of docs/ alone and would warn of it, so the file goes into
the site as a text, and the link to it there. A link to nothing keeps its warning, which ends the build.

In a table, code hosts want a bar within code as ``\\|``; Python-Markdown takes it as it is, and would show the
backslash.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from pymdownx.superfences import SuperFencesException

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
"""A link that leads upwards."""
ROW, CODE = re.compile(r"^\|.*\|$", re.MULTILINE), re.compile(r"`[^`]+`")


def formula(source: str, language: str, css_class: str, options: dict[str, Any], md: object, **more: Any) -> str:
    """The HTML of a ``math`` fence.

    Raises:
        SuperFencesException: a command that has no MathML, which would stand in the page as it is written.
    """
    made = convert(source.strip(), display="block")
    unknown = re.search(r">\s*(\\[^<]*)<", made)
    if unknown:
        raise SuperFencesException(f"no MathML for {unknown[1]} in the formula {source.strip()}")
    return f'<div class="formula">{made}</div>'


def on_config(config: Any) -> Any:
    """Gives the fences their formatter, which YAML could name only as a module on Python's path."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": formula})
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads the links to files of the repository to their texts in the site, and frees the bars within code."""
    folder = posixpath.dirname(page.file.src_uri)

    def led(link: re.Match[str]) -> str:
        inside = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        if inside.startswith(("docs/", "..")) or not (ROOT / inside).is_file():
            return link[0]
        text = f"repository/{inside}.txt"
        if files.get_file_from_path(text) is None:
            files.append(File.generated(config, text, content=(ROOT / inside).read_text(encoding="utf-8")))
        return f"]({posixpath.relpath(text, folder or '.')})"

    def freed(row: re.Match[str]) -> str:
        return CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0])

    return ROW.sub(freed, LINK.sub(led, markdown))
