"""The ``ptl`` command. Light sub-commands answer without loading torch; the rest goes to Lightning's CLI."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

TRAINING = {
    "fit": "train an objective on a data module",
    "validate": "compute the validation metrics of a model or checkpoint",
    "test": "compute the test metrics of a model or checkpoint",
    "predict": "write the answers of a model or checkpoint to the prompts of a data module",
}
LIGHT = {
    "data": ("ptl.apps.data", "preview, audit or prepare training data"),
    "tokens": ("ptl.apps.tokens", "give a base model new tokens; train a tokenizer"),
    "export": ("ptl.apps.export", "merge adapters and write a plain Hugging Face folder"),
    "synth": ("ptl.apps.synth", "sample answers to rank; let a teacher score or answer a data set; make a student"),
    "rank": ("ptl.apps.rank", "a page where people rank answers; measure reward models on rankings"),
    "compare": ("ptl.apps.compare", "runs side by side: what differs, metrics over seeds, cost, curves"),
    "chat": ("ptl.apps.chat", "talk to a model or to a run folder"),
    "serve": ("ptl.apps.serve", "a model behind OpenAI's API on this machine, and a page to talk to it"),
    "plan": ("ptl.apps.plan", "memory and time of a run by arithmetic: what fits, and which strategy to choose"),
    "doctor": ("ptl.apps.doctor", "is this machine, or every rank of a job, fit to train"),
}


def usage() -> str:
    """The text of ``ptl --help``."""
    rows = [*TRAINING.items(), *((name, text) for name, (_, text) in LIGHT.items())]
    lines = "\n".join(f"  {name:<10}{text}" for name, text in rows)
    return (
        "usage: ptl COMMAND [options]\n\n"
        f"commands:\n{lines}\n\n"
        "ptl fit -c configs/recipes/demo.yaml             a recipe\n"
        "ptl fit -c recipe.yaml -c more.yaml --key value  layers; later ones win\n"
        "ptl COMMAND --help                               options of a command"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns 0, or 2 for a user's mistake after one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"ptl {version('ptl')}")
        return 0
    command = args[0]
    if command in LIGHT:
        return importlib.import_module(LIGHT[command][0]).main(args[1:])
    if command in TRAINING:
        from ptl.trainer_cli import run

        return run(args)
    near = difflib.get_close_matches(command, [*TRAINING, *LIGHT], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    print(f"ptl: error: unknown command {command!r}{hint} (ptl --help lists them)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
