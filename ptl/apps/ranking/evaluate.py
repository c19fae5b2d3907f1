"""``ptl rank eval``: how one or several reward models order the answers of a local file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ptl.data.scored_rankings import RankingRows, RenderedRankings, Scores

BATCH_TOKENS = 16384
AVERAGED = ("accuracy", "best_of_k", "tau")
REPORT = "report"


def add_eval(subparsers: Any) -> None:
    """Adds ``eval`` to the sub-commands of ``ptl rank``."""
    parser = subparsers.add_parser(
        "eval", help="score a file of rankings with reward models, RewardBench's format included", allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="chosen and rejected, or completions with ranks or scores")
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="RM",
        help="run folder, exported folder or hub name; several make an ensemble",
    )
    parser.add_argument("--subset-column", metavar="NAME", help="column that names a row's part (default: subset)")
    parser.add_argument("--out", metavar="FOLDER", help=f"write {REPORT}.json, {REPORT}.md and {REPORT}.png there")
    parser.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, help="tokens of a forward pass (default %(default)s)"
    )


def evaluate(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 2 after one line on stderr."""
    from ptl.apps.runs import quiet_libraries

    try:
        if args.batch_tokens < 1:
            raise ValueError(f"--batch-tokens is {args.batch_tokens}; expected 1 or more")
        if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
            raise ValueError(f"--out {args.out} is a file: give a folder")
        quiet_libraries()
        report = evaluation(args.file, args.model, subset_column=args.subset_column, batch_tokens=args.batch_tokens)
        _show(page(report))
        if args.out:
            write(report, Path(args.out))
            print(f"wrote {args.out}/{REPORT}.json, .md and .png")
    except (ValueError, OSError) as mistake:
        if os.environ.get("PTL_TRACEBACK"):
            raise
        print(f"ptl rank eval: error: {mistake}", file=sys.stderr)
        return 2
    return 0


def _show(lines: Sequence[str]) -> None:
    if not sys.stdout.isatty():
        print("\n".join(lines))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown("\n".join(lines)))


# ---- the numbers ----


def evaluation(
    file: str, models: Sequence[str], *, subset_column: str | None = None, batch_tokens: int = BATCH_TOKENS
) -> dict[str, Any]:
    """The report as JSON values: rows, each model's measures, and with several models the ensemble's.

    All models are measured on the same rows: those that each of them can print and hold.

    Raises:
        ValueError: a file, a model or a row that cannot be used.
    """
    from ptl.data.reward_ensemble import combined, disagreement, normalised, scale_of
    from ptl.data.scored_rankings import read_rankings

    rows = read_rankings(file, subset_column=subset_column)
    names = labels(models)
    members = {name: _scored(path, rows, batch_tokens) for name, path in zip(names, models)}
    kept = [i for i in range(len(rows.records)) if all(m.rendered.examples[i] is not None for m in members.values())]
    if not kept:
        told = [reason.examples[0] for m in members.values() for reason in m.rendered.left_out.values()]
        raise ValueError(f"{file}: no row can be scored: {'; '.join(told)}")
    subsets = None if rows.subsets is None else [rows.subsets[i] for i in kept]
    entries, scaled = [], []
    for name, member in members.items():
        scores = [member.scores[i] for i in kept]
        examples = [member.rendered.examples[i] for i in kept]
        scale = scale_of(member.facts, scores)
        scaled.append(normalised(scores, scale))
        known = {"name": name, "path": member.path, "scale": vars(scale)}
        entries.append({**known, **by_subset(scores, examples, subsets)})
    first = [next(iter(members.values())).rendered.examples[i] for i in kept]
    ensemble = None
    if len(members) > 1:
        parts = {name: by_subset(scores, first, subsets) for name, scores in combined(scaled).items()}
        ensemble = {**{name: _without_odds(part) for name, part in parts.items()}}
        ensemble["disagreement"] = disagreement(scaled, [example["ranks"] for example in first])  # pyright: ignore
    return {
        "file": file,
        "rows": {"read": rows.read, "scored": len(kept), "left_out": _left_out(rows, members)},
        "models": entries,
        "ensemble": ensemble,
    }


class _Member:
    """One model's scores; the model itself is gone, so that the next one has its memory."""

    def __init__(self, path: str, rendered: RenderedRankings, scores: dict[int, np.ndarray], facts: Any) -> None:
        self.path, self.rendered, self.scores, self.facts = path, rendered, scores, facts


def _scored(path: str, rows: RankingRows, batch_tokens: int) -> _Member:
    from rich.console import Console
    from rich.progress import Progress

    from ptl.data.reward_models import open_reward_model
    from ptl.data.scored_rankings import render_rankings, score_examples

    reward = open_reward_model(path)
    rendered = render_rankings(rows.records, reward.renderer, reward.max_length)
    known = {i: example for i, example in enumerate(rendered.examples) if example is not None}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"scoring with {path}", total=len(known))
        found = score_examples(
            reward.model,
            list(known.values()),
            batch_tokens=batch_tokens,
            progress=lambda count: bar.advance(task, count),
        )
    return _Member(path, rendered, dict(zip(known, found)), reward.facts)


def labels(models: Sequence[str]) -> list[str]:
    """Short names, the last part of each path where these differ.

    Raises:
        ValueError: a model twice.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"--model names {next(m for m in models if models.count(m) > 1)} twice")
    short = [Path(model).name or model for model in models]
    return short if len(set(short)) == len(short) else list(models)


def by_subset(scores: Scores, examples: Sequence[Any], subsets: Sequence[str] | None) -> dict[str, Any]:
    """``overall`` measures, those of each subset, and the plain average of these, in which each subset weighs one."""
    from ptl.data.scored_rankings import measure

    out: dict[str, Any] = {"overall": measure(scores, examples), "subsets": {}, "subset_average": None}
    for subset in sorted(set(subsets or ())):
        here = [i for i, name in enumerate(subsets or ()) if name == subset]
        out["subsets"][subset] = measure([scores[i] for i in here], [examples[i] for i in here])
    if out["subsets"]:
        out["subset_average"] = {key: _mean([own[key] for own in out["subsets"].values()]) for key in AVERAGED}
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _without_odds(part: dict[str, Any]) -> dict[str, Any]:
    """Without calibration: a difference of normalised scores is no log-odds."""
    for measures in (part["overall"], *part["subsets"].values()):
        measures |= {"ece": None, "calibration": None}
    return part


def _left_out(rows: RankingRows, members: Mapping[str, _Member]) -> list[dict[str, Any]]:
    found = [(None, rows.left_out), *((name, member.rendered.left_out) for name, member in members.items())]
    return [
        {"reason": reason, "model": name, "rows": entry.count, "examples": entry.examples}
        for name, reasons in found
        for reason, entry in reasons.items()
    ]


# ---- the pages ----


def page(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of Markdown."""
    from ptl.data.reward_page import METHOD, length_table, table

    rows, ensemble = report["rows"], report["ensemble"]
    lines = [f"# Reward models on {report['file']}", "", f"{rows['scored']:,} of {rows['read']:,} rows scored.", ""]
    for entry in rows["left_out"]:
        who = f", for {entry['model']}" if entry["model"] else ""
        lines.append(f"- {entry['rows']:,} rows left out{who}: {entry['reason']} (first: {entry['examples'][0]})")
    lines += [""] if rows["left_out"] else []
    shown = {entry["name"]: entry for entry in report["models"]}
    if ensemble:
        shown |= {f"{kind} of {len(shown)}": ensemble[kind] for kind in ("mean", "worst")}
    lines += [*table({name: entry["overall"] for name, entry in shown.items()}, "model"), ""]
    lines += _disagreement(ensemble["disagreement"]) if ensemble else []
    for name, entry in shown.items():
        if entry["subsets"]:
            average = {"average of subsets": entry["subset_average"], "all pairs": entry["overall"]}
            lines += [f"## {name} by subset", "", *table({**entry["subsets"], **average}, "subset"), ""]
    lines += ["## Accuracy by length", ""]
    lines += [*length_table({name: entry["overall"] for name, entry in shown.items()}, "model"), ""]
    lines += ["## How it was measured", "", *(f"- {line}" for line in [*METHOD, *_notes(report)]), ""]
    return lines


def _disagreement(found: Mapping[str, Any]) -> list[str]:
    from ptl.data.reward_page import number

    return [
        f"Disagreement (deviation over members, in deviations of a score): {number(found['answers'])} an answer, "
        f"{number(found['right_pairs'])} on pairs that the mean orders right, {number(found['wrong_pairs'])} on those "
        "that it orders wrong.",
        "",
    ]


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = ["Best of K is over prompts with more than two answers: whether the top score is one of the best ranked; a "
             "shared top is split."]  # fmt: skip
    if not report["ensemble"]:
        return notes
    notes.append(
        "In the ensemble each member's scores are in deviations from its mean; `worst` is the least over members. "
        "Differences of these are no log-odds, so there is no ECE."
    )
    for entry in report["models"]:
        mean, std, source = entry["scale"].values()
        notes.append(f"{entry['name']}: mean {mean:.4g}, deviation {std:.4g}, from {source}.")
    return notes


def write(report: Mapping[str, Any], folder: Path) -> None:
    """``report.json``, ``report.md`` and ``report.png``, each whole or not at all."""
    from ptl.data.durable import replacing, write_text
    from ptl.data.reward_page import draw

    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / f"{REPORT}.json", text + "\n")
    write_text(folder / f"{REPORT}.md", "\n".join(page(report)))
    entries = {entry["name"]: entry["overall"] for entry in report["models"]}
    if report["ensemble"]:
        entries |= {kind: report["ensemble"][kind]["overall"] for kind in ("mean", "worst")}
    with replacing(folder / f"{REPORT}.png") as temporary:
        draw(entries, temporary, f"{report['rows']['scored']:,} prompts of {Path(report['file']).name}")
