"""``ptl tokens``: new tokens for a base model, or a tokenizer of your own text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="ptl tokens", description="Give a model new tokens, or train a tokenizer.")
    parts = parser.add_subparsers(dest="part", required=True, metavar="{add,train}")
    _add_options(parts.add_parser("add", help="write a model that has more tokens, once, before it is trained"))
    _train_options(parts.add_parser("train", help="train a byte-level BPE tokenizer on text"))
    options = parser.parse_args(list(argv))
    try:
        _check_target(options.out, options.overwrite)
        if options.part == "add":
            from ptl.apps.tokens_add import add

            return add(options)
        from ptl.apps.tokens_train import train

        return train(options)
    except (ValueError, OSError) as mistake:
        print(f"ptl tokens {options.part}: error: {mistake}", file=sys.stderr)
        return 2


def _add_options(parser: argparse.ArgumentParser) -> None:
    from ptl.data.token_sets import SETS

    parser.add_argument("model", help="folder or hub name of a base model, in floats and without an adapter")
    _common(parser, "the chat template: a packaged name, a .jinja file or Jinja text; that of the set by default")
    sets = "; ".join(f"{name}: {' '.join(token.text for token in tokens)}" for name, tokens in SETS.items())
    parser.add_argument("--set", nargs="+", default=[], choices=tuple(SETS), metavar="NAME", help=sets)
    parser.add_argument(
        "--token", action="append", default=[], metavar="TOKEN[=ID]", help="a special token, at an id of your choice"
    )
    parser.add_argument(
        "--tag", action="append", default=[], metavar="TAG[=ID]", help="a token that stays in decoded answers"
    )
    parser.add_argument(
        "--init",
        choices=("mean", "description"),
        default="mean",
        help="new rows start at the mean of all rows, or of the rows of a description",
    )
    parser.add_argument(
        "--describe", action="append", default=[], metavar="TOKEN=TEXT", help="what a token stands for, in words"
    )
    parser.add_argument(
        "--noise", type=float, default=0.1, help="of new rows, over the spread of the old ones (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--multiple", type=int, default=64, help="rows are rounded up to a multiple where they grow (%(default)s)"
    )
    parser.add_argument(
        "--show", action="store_true", help="print the tokens, and a dialogue as the model will read it"
    )


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help=".txt, .jsonl, .json, .csv or .parquet files or folders, or hub names")
    _common(parser, "a chat template to keep with it: a packaged name, a .jinja file or Jinja text")
    parser.add_argument("--size", type=int, default=32000, help="tokens, special ones included (%(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME", help="ready sets, as `ptl tokens add` has them")
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN", help="a special token")
    parser.add_argument("--tag", action="append", default=[], metavar="TAG", help="a token that stays in decoded text")


def _common(parser: argparse.ArgumentParser, template: str) -> None:
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--template", help=template)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what `ptl tokens` or a training wrote at --out"
    )


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"--out {out} is not empty: give another folder, or --overwrite to replace what is there")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
