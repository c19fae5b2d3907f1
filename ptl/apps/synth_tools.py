"""``ptl synth tools``: rows in which the assistant asks for a tool instead of answering."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "fr")


def add_parsers(commands: Any) -> None:
    """Adds both commands' arguments to those of ``ptl synth``."""
    tools = commands.add_parser(
        "tools", help="make rows in which the assistant asks for a tool and answers from its result", allow_abbrev=False
    )
    tools.add_argument("--out", required=True, metavar="FILE.jsonl", help="rows to learn from; others lie beside it")
    tools.add_argument("--sums", type=int, default=0, metavar="N", help="arithmetic for the calculator")
    tools.add_argument("--programs", type=int, default=0, metavar="N", help="small programs for Python in the sandbox")
    tools.add_argument("--times", type=int, default=0, metavar="N", help="dates and times for the clock")
    tools.add_argument("--questions", nargs="+", default=[], metavar="FILE", help="questions with answers, for search")
    tools.add_argument("--documents", metavar="PATH", help="file or folder in which they are looked up")
    tools.add_argument("--language", choices=LANGUAGES, nargs="+", default=list(LANGUAGES), help="default: both")
    tools.add_argument(
        "--form", choices=("tags", "calls"), default="tags", help="<SEARCH-TOOL>...</SEARCH-TOOL>, or OpenAI's calls"
    )
    tools.add_argument("--held-out", type=float, default=0.1, help="share of the questions (default %(default)s)")
    tools.add_argument("--mix", action="append", default=[], metavar="FILE", help="conversations without tools")
    tools.add_argument("--mix-share", type=float, default=0.5, help="share of them in the file (default %(default)s)")
    tools.add_argument("--rephrase", metavar="MODEL", help="model that says each question once more in other words")
    tools.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
    tools.add_argument("--limit", type=int, help="read the first questions only")
    measure = commands.add_parser(
        "tools-report", help="whether models call the right tool and answer right with it", allow_abbrev=False
    )
    measure.add_argument("models", nargs="+", metavar="MODEL", help="run folders, model folders; the first is before")
    measure.add_argument("--held-out", required=True, metavar="FILE", help="held-out file of `ptl synth tools`")
    measure.add_argument("--documents", metavar="PATH", help="file or folder in which search looks")
    measure.add_argument("--ordinary", metavar="FILE", help="conversations whose first question needs no tool")
    measure.add_argument("--limit", type=int, help="first held-out questions, and as many ordinary ones")
    measure.add_argument("--out", required=True, metavar="FOLDER", help="for report.json, report.md and answers.jsonl")
    measure.add_argument("--template", help="packaged name, .jinja file or Jinja text (default: the model's own)")


def tools(args: argparse.Namespace, rank: int, world_size: int) -> int:
    """Writes the rows, the held-out questions and the manifest."""
    from ptl.data.sources import Source
    from ptl.synth.asking import LeftOut
    from ptl.synth.idk_files import write_rows
    from ptl.synth.idk_rows import mix_count, mixed_rows
    from ptl.synth.progress import Progress
    from ptl.synth.tool_rows import Making, make_rows, ordinary_rows
    from ptl.tools.load import load_tools
    from ptl.tools.toolbox import Toolbox

    out, held_out, manifest = _paths(args.out)
    _check(args)
    how = Making(form=args.form, held_out=args.held_out)
    mix = [Source(path=path) for path in args.mix]
    left_out = LeftOut()
    asked = list(_tasks(args, left_out))
    if rank:  # it takes minutes at most, and one process does it
        return 0
    rephrased: dict[str, Any] | None = None
    if args.rephrase:
        more, dropped = _rephrased(args, asked)
        rephrased = {"model": args.rephrase, "rows": len(more), "dropped": dict(sorted(dropped.items()))}
        asked = [*asked, *more]
    names = [name for name in ("calculator", "python", "clock") if any(task.tool == name for task in asked)]
    box = Toolbox(load_tools([*names, *([f"search={args.documents}"] if args.documents else [])]), processes=2)
    try:
        with Progress("tools answer", "questions", len(asked)) as progress:
            made = make_rows(asked, box, how, progress.add)
        if not made.train:
            raise ValueError(f"no row is left of {len(asked)} questions: {_told(made.counts)}")
        questions = [{"prompt": [{"role": "user", "content": row["question"]}], **row} for row in made.held_out]
        wanted = mix_count(len(made.train), args.mix_share) if mix else 0
        general = ordinary_rows(mixed_rows(mix, wanted, questions, left_out), box, how)
    finally:
        box.close()
    facts = {
        "form": args.form,
        "seed": args.seed,
        "tools": [tool.schema["function"] for tool in box.tools],
        "rows": len(made.train) + len(general),
        "without_tools": {"wanted": wanted, "rows": len(general)},
        "held_out": len(made.held_out),
        "questions": dict(sorted(made.counts.items())),
        "rephrased": rephrased,
        "left_out": dict(sorted(left_out.counts.items())),
    }
    write_rows(held_out, made.held_out)
    manifest.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_rows(out, [*made.train, *general])
    print(f"{out}: {facts['rows']:,} rows, {len(general):,} of them without tools; {_told(made.counts)}")
    print(f"{held_out}: {len(made.held_out):,} questions to measure with")
    if args.form == "tags":
        tags = " ".join(f"--tag '{mark}'" for tool in box.tools for mark in (tool.opening, tool.closing))
        print(f"give the model its tags once, before training: ptl tokens add MODEL --out NEW {tags}")
    return 0


def tools_report(args: argparse.Namespace, rank: int, world_size: int) -> int:
    """Measures models on held-out questions, with and without tools, and on ordinary ones."""
    from ptl.apps.runs import load_model, quiet_libraries
    from ptl.apps.synth_candidates import device
    from ptl.data.durable import write_text
    from ptl.data.render import Renderer
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.names import resolve_model
    from ptl.synth.idk_files import read_rows, write_rows
    from ptl.synth.progress import Progress
    from ptl.synth.tool_report import ask, graded, measures, page
    from ptl.tools.load import load_tools
    from ptl.tools.toolbox import Toolbox

    rows = list(read_rows(Path(args.held_out)))[: args.limit]
    if missing := [name for name in ("question", "tool", "answers") if not rows or name not in rows[0]]:
        raise ValueError(f"{args.held_out} has no {missing[0]}: give the held-out file of `ptl synth tools`")
    needed = list(dict.fromkeys(row["tool"] for row in rows))
    if "search" in needed and not args.documents:
        raise ValueError("the questions need a search: give --documents PATH")
    plain = _first_questions(args.ordinary, args.limit) if args.ordinary else []
    names = [f"search={args.documents}" if name == "search" else name for name in needed]
    box, none = Toolbox(load_tools(names), processes=2), Toolbox([])
    found, told = {}, []
    quiet_libraries()
    try:
        for name in args.models:
            resolved = resolve_model(name)
            model = load_model(resolved, device=device())
            renderer = Renderer(load_tokenizer(resolved.name, template=args.template))
            with Progress(f"{name} answers", "questions", 2 * len(rows) + len(plain)) as progress:
                parts = [
                    graded(some, ask(model, renderer, [row["question"] for row in some], tools, report=progress.add))
                    for some, tools in ((rows, box), (rows, none), (plain, box))
                ]
            found[name] = measures(*parts)
            kinds = ("with tools", "without tools", "ordinary")
            told += [{"model": name, "kind": kind, **row} for kind, part in zip(kinds, parts) for row in part]
    finally:
        box.close()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "answers.jsonl", told)
    write_text(out / "report.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.md", page(found))
    print(page(found), end="")
    return 0


def _first_questions(path: str, limit: int | None) -> list[dict[str, Any]]:
    """The first user turn of each conversation in a file."""
    from ptl.data.sources import Source
    from ptl.synth.asking import LeftOut
    from ptl.synth.idk_rows import mixed_rows

    rows = mixed_rows([Source(path=path)], limit or 200, [], LeftOut())
    firsts = (next((turn for turn in row["messages"] if turn["role"] == "user"), None) for row in rows)
    return [{"question": turn["content"], "answers": [], "tool": None} for turn in firsts if turn]


def _paths(out: str) -> tuple[Path, Path, Path]:
    path = Path(out).expanduser()
    if path.suffix != ".jsonl":
        raise ValueError(f"--out {out}: expected a .jsonl file")
    manifest = path.with_suffix(".manifest.json")
    if path.exists() and not manifest.exists():
        raise ValueError(f"{path} is there and was not made by this command: give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, path.with_suffix(".held_out.jsonl"), manifest


def _check(args: argparse.Namespace) -> None:
    for name in ("sums", "programs", "times", "seed"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, got {getattr(args, name)}")
    if not 0 <= args.mix_share < 1:
        raise ValueError(f"--mix-share must be 0 or more and below 1, got {args.mix_share:g}")
    if bool(args.questions) != bool(args.documents):
        raise ValueError("--questions and --documents go together: the questions are looked up in the documents")
    if not (args.sums or args.programs or args.times or args.questions):
        raise ValueError("what to ask? give --sums, --programs or --times a number, or --questions and --documents")


def _tasks(args: argparse.Namespace, left_out: Any) -> Iterator[Any]:
    from ptl.data.readers import rows_of
    from ptl.data.sources import BadRow, Source
    from ptl.synth.idk_questions import reader
    from ptl.synth.idk_texts import language_of
    from ptl.synth.tool_tasks import programs, searches, sums, times

    for make, count in ((sums, args.sums), (programs, args.programs), (times, args.times)):
        yield from make(count, args.seed, args.language)
    sources = [Source(path=path, limit=args.limit) for path in args.questions]
    read = reader(sources)

    def rows() -> Iterator[tuple[str, list[str], str]]:
        for place, source in enumerate(sources):
            for origin, row in rows_of(source):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    messages, _, known = read(row, place, origin)
                except BadRow as error:
                    left_out(error, origin)
                    continue
                yield messages[-1].content, list(known["answers"]), known["source"]

    yield from searches(rows(), language_of)


def _rephrased(args: argparse.Namespace, tasks: list[Any]) -> tuple[list[Any], Any]:
    from ptl.apps.runs import load_model, quiet_libraries
    from ptl.apps.synth_candidates import device
    from ptl.data.render import Renderer
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.names import resolve_model
    from ptl.synth.progress import Progress
    from ptl.synth.rephrase import rephrase

    quiet_libraries()
    found = resolve_model(args.rephrase)
    model, renderer = load_model(found, device=device()), Renderer(load_tokenizer(found.name))
    with Progress(f"{args.rephrase} rephrases", "questions", len(tasks)) as progress:
        return rephrase(model, renderer, tasks, seed=args.seed, report=progress.add)


def _told(counts: Any) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))
