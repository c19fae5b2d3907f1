"""Tokenizers and chat templates by name, folder or file; nothing is fetched that is already on this machine."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from ptl.models.gguf import is_gguf, plain_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEMPLATES = resources.files("ptl.data") / "templates"
PACKAGED_TEMPLATES = tuple(
    sorted(entry.name.removesuffix(".jinja") for entry in _TEMPLATES.iterdir() if entry.name.endswith(".jinja"))
)
"""Names of the chat templates that come with ptl: ``chatml`` (tools, reasoning) and ``im_sep``."""


def load_tokenizer(
    name: str | Path, *, template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, with the chat template to use.

    A tokenizer without a template is returned as it is: plain text needs none, and ``Renderer`` says what to set where
    a conversation needs one.

    Args:
        name: folder that ``save_pretrained`` wrote, hub name, ``.gguf`` file, or ``gguf://PACKAGE/FILE.gguf``. A GGUF
            file is read as a model of that name is: out of the plain folder that it is converted to the first time.
        template: None keeps the tokenizer's own chat template; else a packaged name (``chatml``, ``im_sep``), the path
            of a ``.jinja`` file, or the Jinja text itself.
        trust_remote_code: run Python code that the model's author put beside the tokenizer.

    Raises:
        ValueError: no such folder or name, no fast tokenizer in it, or no such template.
    """
    source = resolve_template(template)
    location = str(plain_folder(str(name))) if is_gguf(str(name)) else str(name)
    looks_local = Path(location).is_absolute() or location.startswith(".") or location.count("/") > 1
    if looks_local and not Path(location).is_dir():
        raise ValueError(
            f"tokenizer: no folder {location!r}; expected a folder that holds tokenizer.json, or a hub name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        cause = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            cause = "it is made of Python code of its author; set trust_remote_code: true to run that"
        raise ValueError(
            f"tokenizer: cannot load {str(name)!r}; expected a folder that holds tokenizer.json and "
            f"tokenizer_config.json, a .gguf file, or a hub name that is cached or can be reached ({cause})"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: {str(name)!r} has no fast tokenizer (tokenizer.json); ptl needs its character offsets to know "
            "which tokens are trained"
        )
    if source is not None:
        tokenizer.chat_template = source
    return tokenizer


def resolve_template(template: str | Path | None) -> str | None:
    """The Jinja text of a chat template given by packaged name, by path or as text; None stays None.

    Raises:
        ValueError: neither a packaged name, nor a file, nor Jinja text.
    """
    if template is None:
        return None
    text = str(template)
    if "{%" in text or "{{" in text:
        return text
    if text in PACKAGED_TEMPLATES:
        return (_TEMPLATES / f"{text}.jinja").read_text(encoding="utf-8")
    path = Path(text)
    if not path.is_file():
        raise ValueError(
            f"template: got {text!r}; expected one of {', '.join(PACKAGED_TEMPLATES)}, the path of a .jinja file, or "
            "Jinja text"
        )
    return path.read_text(encoding="utf-8")
