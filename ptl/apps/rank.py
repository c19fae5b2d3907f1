"""``ptl rank serve | settle | eval``: a local web page where people order answers, and what comes of their order."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ptl.apps.ranking.evaluate import add_eval, evaluate

NEEDED = "the page needs starlette, uvicorn, markdown-it-py and Pygments: pip install 'ptl[rank]'"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="ptl rank", description="Human rankings of answers.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    page = commands.add_parser("serve", help="a page where people order the answers to each prompt", allow_abbrev=False)
    page.add_argument("file", metavar="FILE", help="JSONL with a prompt and its completions a line")
    page.add_argument("--out", metavar="FILE.jsonl", help="where rankings are added (default: FILE.rankings.jsonl)")
    page.add_argument("--annotator", metavar="NAME", help="who ranks; without it the page asks each visitor")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    page.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    page.add_argument("--lang", choices=("auto", "en", "fr"), default="auto", help="auto: the browser's")
    page.add_argument("--seed", type=int, default=0, help="of the order in which answers are shown (default 0)")
    page.epilog = (
        "A ranking is on disk before the page says so; a server that was stopped or killed goes on when it is started "
        "again. On an address that other machines reach, the link holds a token that visitors need."
    )
    settled = commands.add_parser("settle", help="mark the verdicts that were revised later", allow_abbrev=False)
    settled.add_argument(
        "file", metavar="FILE.jsonl", help="what ptl rank serve wrote; a server that is stopped does it"
    )
    add_eval(commands)
    return top


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 2 after one line on stderr."""
    try:
        args = parser().parse_args(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return {"serve": serve, "settle": settle_file, "eval": evaluate}[args.command](args)
    except (ValueError, OSError) as mistake:
        if os.environ.get("PTL_TRACEBACK"):
            raise
        print(f"ptl rank: error: {mistake}", file=sys.stderr)
        return 2


def serve(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C."""
    try:
        import uvicorn  # noqa: F401  what ``run`` needs

        from ptl.apps.guard import entrance, listen, run
        from ptl.apps.ranking.server import LONGEST_NAME, Session, build_app
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "ptl":
            raise
        raise ValueError(f"{NEEDED} ({missing.name} is missing)") from None
    from ptl.apps.ranking.prompts import read_items
    from ptl.apps.ranking.store import Store

    path = Path(args.file).expanduser()
    out = Path(args.out).expanduser() if args.out else path.with_suffix(".rankings.jsonl")
    if out.resolve() == path.resolve():
        raise ValueError(f"--out {out} is the file that is ranked: give another")
    name = unicodedata.normalize("NFC", args.annotator).strip() if args.annotator is not None else None
    if name is not None and not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
        raise ValueError(f"--annotator {args.annotator!r}: expected a name of 1 to {LONGEST_NAME} characters")
    items = read_items(path)
    listener = listen(args.host, args.port)
    try:
        store = Store(out, items)
        door, url = entrance(args.host, listener, "rank")
        done, people = store.count()
        print(f"{len(items)} prompts of {path}; rankings go to {out} ({done} there, of {people} annotators)")
        if store.strangers:
            print(f"{store.strangers} rows of {out} are about prompts that are not in {path}; they stay as they are")
        app = build_app(Session(items, store, args.seed, name, args.lang), door)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes the signal on once it has stopped
            run(app, listener, lambda: print(f"open {url}   (Ctrl-C stops)", flush=True))
        done, people = store.count()
        store.close(settled=True)
        print(f"stopped; {out} has rankings of {done} prompts, counted for each of {people} annotators")
    finally:
        listener.close()
    return 0


def settle_file(args: argparse.Namespace) -> int:
    """Settles a file that no server writes."""
    from ptl.apps.ranking.settle import settle

    superseded = settle(Path(args.file).expanduser())
    print(f"{args.file}: {superseded} verdicts were revised later and are left out in training")
    return 0
