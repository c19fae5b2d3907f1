"""``ptl tokens train``: a tokenizer of one's own text, as a plain folder that ``from_pretrained`` reads."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROBES = ("Où est Shanghai ?\n\tEn Chine. ", "2+2=4 \U0001f600 \x00 漢字\r\n", "def f(x):\n    return x\n")
"""Texts that must come back letter for letter, whatever the corpus was."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def train(options: argparse.Namespace) -> int:
    """Runs the command; raises ValueError for a user's mistake."""
    from ptl.apps.tokens_add import wanted_tokens
    from ptl.data.durable import write_text
    from ptl.data.token_sets import TEMPLATES
    from ptl.data.tokenizer import load_tokenizer, resolve_template
    from ptl.data.tokenizer_training import texts_of, train_tokenizer

    asked = options.set or options.token or options.tag
    tokens = wanted_tokens(options.set, options.token, options.tag) if asked else []
    placed = next((token.text for token in tokens if token.id is not None), None)
    if placed is not None:
        raise ValueError(f"{placed!r} is given an id: a new tokenizer's special tokens take the last ids, leave it out")
    template = options.template or next((TEMPLATES[name] for name in options.set if name in TEMPLATES), None)
    strange = [file.name for file in options.out.iterdir() if file.name not in _FILES] if options.out.exists() else []
    if strange:
        raise ValueError(
            f"--out {options.out} holds {strange[0]}, which is no file of a tokenizer: give another folder"
        )
    refused: list[str] = []
    texts = (text for path in options.files for text in texts_of(path, refused))
    source = resolve_template(template)
    tokenizer = train_tokenizer(_shown(texts), options.size, tokens=tokens, template=source)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = load_tokenizer(folder)
        for text in _PROBES:
            if again.decode(again(text)["input_ids"]) != text:
                raise ValueError(f"a fault of ptl: the tokenizer does not give {text!r} back; nothing was written")
        options.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == "tokenizer.json"):
            write_text(
                options.out / file.name, file.read_text(encoding="utf-8")
            )  # what makes it a tokenizer comes last
    if refused:
        print(f"{len(refused):,} rows could not be read (first: {refused[0]})", file=sys.stderr)
    print(f"wrote {options.out}: {len(again):,} tokens, byte-level BPE; a text ends with {again.eos_token!r}")
    if len(again) < options.size:
        print(f"the text has no pair left that occurs twice, so these are fewer than --size {options.size:,}")
    return 0


def _shown(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with the number of letters read so far on a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task, letters = progress.add_task("reading"), 0
        for text in texts:
            letters += len(text)
            progress.update(task, description=f"read {letters / 1e6:,.1f} million letters")
            yield text
        progress.update(task, description=f"read {letters / 1e6:,.1f} million letters; merging pairs")
