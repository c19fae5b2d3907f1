"""``ptl synth idk | idk-report``: teach a model to say that it does not know, and measure what came of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ptl.apps.synth_candidates import device, model_digest


def add_parsers(commands: Any) -> None:
    """Adds both commands' arguments to those of ``ptl synth``."""
    build = commands.add_parser(
        "idk", help="ask a model what it knows, and make rows of right answers and refusals", allow_abbrev=False
    )
    build.add_argument("sources", nargs="+", metavar="QUESTIONS", help="rows with question and answers, or chats")
    build.add_argument("--model", required=True, help="run folder, model folder, adapter folder or hub name")
    build.add_argument("--out", required=True, metavar="FILE.jsonl", help="rows to learn from; others lie beside it")
    build.add_argument("--samples", type=int, default=3, help="answers to each question (default %(default)s)")
    build.add_argument("--temperature", type=float, default=0.7, help="of the draws (default %(default)s)")
    build.add_argument("--top-p", type=float, default=1.0, help="share of the probability that is drawn from")
    build.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
    _asking(build)
    build.add_argument(
        "--known", type=float, default=1.0, help="least share of right answers that is known (default 1)"
    )
    build.add_argument("--unknown", type=float, default=0.0, help="most share that is not known (default 0)")
    build.add_argument("--between", choices=("drop", "hedge"), default="drop", help="what becomes of the others")
    build.add_argument("--max-refusals", type=float, default=0.5, help="most share of refusals (default %(default)s)")
    build.add_argument("--language", choices=("auto", "en", "fr"), default="auto", help="of the refusals")
    build.add_argument("--held-out", type=float, default=0.2, help="share of the questions (default %(default)s)")
    build.add_argument("--mix", action="append", default=[], metavar="FILE", help="general conversations to mix in")
    build.add_argument("--mix-share", type=float, help="share of them in the file (default 0.3 with --mix)")
    build.add_argument("--system", help="system message for questions that have none")
    build.add_argument("--format", default="auto", help="format of the rows (default: told from each row)")
    build.add_argument("--split", default="train", help="split of hub data sets (default %(default)s)")
    build.add_argument("--column", action="append", default=[], metavar="FIELD=COLUMN", help="rename a column")
    build.add_argument("--role", action="append", default=[], metavar="NAME=ROLE", help="map a role")
    build.add_argument("--limit", type=int, help="read the first rows only")
    build.epilog = (
        "All graded answers stay in FILE.graded.jsonl: with other bounds, shares or --mix the command asks nothing "
        "again. Processes that a launcher starts (RANK, WORLD_SIZE) share the work; a command that was stopped goes on "
        "when it is run again."
    )
    measure = commands.add_parser(
        "idk-report", help="what models answer and refuse of held-out questions, before and after", allow_abbrev=False
    )
    measure.add_argument("models", nargs="+", metavar="MODEL", help="run folders, model folders; the first is before")
    measure.add_argument("--held-out", required=True, metavar="FILE", help="held-out file of `ptl synth idk`")
    measure.add_argument("--out", required=True, metavar="FOLDER", help="for report.json, report.md and report.png")
    _asking(measure)
    measure.epilog = "Each model answers greedily. Processes share the work, and go on after a stop, as for `idk`."


def _asking(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default %(default)s)")
    command.add_argument("--batch-tokens", type=int, default=8192, help="most tokens of a batch (default %(default)s)")
    command.add_argument("--template", help="packaged name, .jinja file or Jinja text (default: the model's own)")
    command.add_argument("--dtype", choices=("auto", "bf16", "fp32", "fp16"), default="auto", help="of the weights")
    command.add_argument("--judge", metavar="MODEL", help="model that is asked where no rule finds an accepted answer")


class Asked(NamedTuple):
    """A model that is ready to be asked."""

    model: Any
    renderer: Any
    digest: str


def _load(name: str, template: str | None, dtype: str) -> Asked:
    from ptl.apps.runs import load_model, quiet_libraries
    from ptl.data.render import Renderer
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.names import base_spec, resolve_model

    quiet_libraries()
    found = resolve_model(name)
    renderer = Renderer(load_tokenizer(found.name, template=template))
    model = load_model(found, dtype=dtype, device=device())
    return Asked(model, renderer, model_digest(found, base_spec(found, dtype=dtype)))


def _judge(name: str | None, dtype: str) -> tuple[Any, str | None]:
    """The judge and its digest, or None for both."""
    if name is None:
        return None, None
    from ptl.synth.judge import Judge

    loaded = _load(name, None, dtype)
    return Judge(loaded.model, loaded.renderer), loaded.digest


def idk(args: argparse.Namespace, rank: int, world_size: int) -> int:
    """Writes the files, or this process's share of the graded answers."""
    from dataclasses import replace

    from ptl.apps.data import sources_of
    from ptl.data.files import resolve
    from ptl.data.sources import Source
    from ptl.synth.asking import LeftOut
    from ptl.synth.idk import Asking, grade_all
    from ptl.synth.idk_files import paths_of, write_files
    from ptl.synth.idk_questions import reader
    from ptl.synth.idk_rows import Choice
    from ptl.synth.progress import Progress
    from ptl.synth.questions import read_questions

    paths = paths_of(args.out)
    names = ("samples", "temperature", "top_p", "max_new_tokens", "seed", "system", "batch_tokens")
    asking = Asking(model="", renderer="", **{name: getattr(args, name) for name in names})
    share = (0.3 if args.mix else 0.0) if args.mix_share is None else args.mix_share
    if share > 0 and not args.mix:
        raise ValueError("--mix-share needs general data: give --mix FILE")
    bounds = {
        name: getattr(args, name) for name in ("known", "unknown", "between", "max_refusals", "held_out", "language")
    }
    choice = Choice(**bounds, mix_share=share)
    sources, mix = sources_of(args), [Source(path=path) for path in args.mix]
    for source in (*sources, *mix):
        resolve(source)  # a file that is not there is told before a model is loaded
    loaded = _load(args.model, args.template, args.dtype)
    judge, judged_by = _judge(args.judge, args.dtype)
    asking = replace(asking, model=loaded.digest, renderer=loaded.renderer.fingerprint(), judge=judged_by)
    left_out = LeftOut()
    asked = read_questions(sources, reader(sources), loaded.renderer, left_out, system=asking.system)
    with Progress(f"{args.model} answers", "questions", None) as progress:
        how: dict[str, Any] = {"name": args.model, "judge": judge, "rank": rank, "world_size": world_size}
        how["report"] = progress.add
        graded = grade_all(loaded.model, asked, loaded.renderer, paths.graded, asking, left_out, **how)
    if graded.rows is None:
        print(f"{paths.graded} waits for other processes, or for this command to be run again")
        return 0
    manifest = write_files(paths, choice, asking, mix, left_out, name=args.model, judge=args.judge)
    print(summary(paths.train, manifest))
    return 0


def summary(path: Path, manifest: dict[str, Any]) -> str:
    """What came of the questions, in a few lines."""
    total = manifest["total"]

    def told(*names: str) -> str:
        return ", ".join(f"{total.get(name, 0):,} {name.replace('_', ' ')}" for name in names)

    left_out = ", ".join(
        f"{n:,} {why} (first {manifest['first_left_out'][why]})" for why, n in manifest["left_out"].items()
    )
    lines = [
        f"{path}: {manifest['rows']:,} rows: {total.get('answer', 0):,} right answers, {total.get('hedge', 0):,} "
        f"hedged, {total.get('refusal', 0):,} refusals, {manifest['mixed']['rows']:,} general",
        f"questions: {told('known', 'between', 'unknown')}; of these {told('held_out')}",
        f"without a row: {told('dropped', 'capped', 'no_finished_answer')}; left out: {left_out or 'none'}",
    ]
    if manifest["mixed"]["rows"] < manifest["mixed"]["wanted"]:
        lines.append(
            f"--mix has {manifest['mixed']['rows']:,} rows of {manifest['mixed']['wanted']:,} that were wanted"
        )
    return "\n".join(lines)


def idk_report(args: argparse.Namespace, rank: int, world_size: int) -> int:
    """Asks each model the held-out questions and writes the report, or this process's share of the answers."""
    from ptl.data.files import resolve
    from ptl.data.sources import Source
    from ptl.synth.idk_files import read_rows
    from ptl.synth.idk_report import measure, write_report

    if len(set(args.models)) < len(args.models):
        raise ValueError(f"a model is named twice: {args.models}")
    out = Path(args.out).expanduser()
    source = Source(path=args.held_out)
    resolve(source)
    judge = _judge(args.judge, args.dtype)
    files = [_answers(args, name, source, out, judge, rank, world_size) for name in args.models]
    if not all(files):
        print(f"{out} waits for other processes, or for this command to be run again")
        return 0
    answers = {name: list(read_rows(file)) for name, file in zip(args.models, files) if file}
    report = measure(answers)
    report |= {"held_out": args.held_out, "max_new_tokens": args.max_new_tokens, "judge": args.judge}
    write_report(report, answers, out)
    print((out / "report.md").read_text(encoding="utf-8").partition("\n## ")[0].strip())
    return 0


def _answers(
    args: argparse.Namespace,
    name: str,
    source: Any,
    out: Path,
    judge: tuple[Any, str | None],
    rank: int,
    world_size: int,
) -> Path | None:
    """The file of a model's answers; None where other processes have not written their share."""
    from ptl.synth.asking import LeftOut
    from ptl.synth.idk import Asking, grade_all
    from ptl.synth.idk_questions import held_out_reader
    from ptl.synth.progress import Progress
    from ptl.synth.questions import read_questions

    numbers = {"max_new_tokens": args.max_new_tokens, "batch_tokens": args.batch_tokens}
    Asking(model="", renderer="", samples=1, temperature=0.0, **numbers)  # tells a bad number before a model is loaded
    loaded = _load(name, args.template, args.dtype)
    asking = Asking(
        model=loaded.digest,
        renderer=loaded.renderer.fingerprint(),
        judge=judge[1],
        samples=1,
        temperature=0.0,
        **numbers,
    )
    path = out / f"answers-{loaded.digest[:12]}.jsonl"
    left_out = LeftOut()
    asked = read_questions([source], held_out_reader(), loaded.renderer, left_out)
    with Progress(f"{name} answers", "questions", None) as progress:
        report: Callable[[int], None] = progress.add
        how: dict[str, Any] = {
            "name": name,
            "judge": judge[0],
            "rank": rank,
            "world_size": world_size,
            "report": report,
        }
        graded = grade_all(loaded.model, asked, loaded.renderer, path, asking, left_out, **how)
    if left_out.counts:
        print(f"{name}: left out: {left_out.told()}")
    return None if graded.rows is None else path
