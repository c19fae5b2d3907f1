"""What came of each stage, read out of what it left behind: numbers before and after, pictures, answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptl.synth.idk_files import read_rows

Row = dict[str, Any]
Curve = Sequence[tuple[float, float]]
NOTHING = "(nothing)"
"""Shown of an answer that ended at once."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines over optimizer steps.

    Attributes:
        name: of the file, without its ending.
        label: of the upright axis.
        lines: what a line is -> its points.
        share: the upright axis goes from 0 to 1.
    """

    name: str
    label: str
    lines: Mapping[str, Curve]
    share: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Shares, side by side.

    Attributes:
        name: of the file, without its ending.
        groups: what is measured -> of which model -> its share, None where there is none.
    """

    name: str
    groups: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What a stage gained.

    Attributes:
        numbers: what was measured, before, after; as text.
        drawings: pictures to draw.
        pictures: pictures that the stage drew itself.
        columns, answers: a table of questions and what was said.
        text: what was printed.
    """

    numbers: Sequence[tuple[str, str, str]] = ()
    drawings: Sequence[Curves | Bars] = ()
    pictures: Sequence[Path] = ()
    columns: Sequence[str] = ()
    answers: Sequence[Sequence[str]] = field(default_factory=list)
    text: str = ""


def gains(name: str, work: Path) -> Gains:
    """Of the stage of a name, whose files lie in ``work``."""
    read = READERS.get(name)
    return read(work) if read else Gains()


# ---- what all trainings leave ----


def curve(run: Path, metric: str) -> list[tuple[float, float]]:
    """Step, from 1, and value; a value from before the first step stands at 0."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if isinstance(row.get(metric), int | float)]
    points = [(row["step"] + 1, row[metric]) for row in rows]
    if metric.startswith("val/") and points and points[0][0] == 1:
        points[0] = (0, points[0][1])  # the first validation is that of the model before training
    return points


def _ends(points: Curve, form: str = "{:.2f}") -> tuple[str, str]:
    if not points:
        return "–", "–"
    return form.format(points[0][1]), form.format(points[-1][1])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _losses(run: Path, name: str) -> Curves:
    return Curves(
        name=f"{name}-loss",
        label="loss, nats a token",
        lines={"trained": curve(run, "train/loss"), "held out": curve(run, "val/loss")},
    )


# ---- stages ----


def pretrain(work: Path) -> Gains:
    run = work / "pretrain"
    losses = _losses(run, "pretrain")
    return Gains(numbers=[("held-out loss, nats a token", *_ends(losses.lines["held out"]))], drawings=[losses])


def sft(work: Path) -> Gains:
    run = work / "sft"
    losses = _losses(run, "sft")
    said: dict[str, list[str]] = {}
    ended: list[bool] = []
    for row in read_rows(run / "samples.jsonl"):
        said.setdefault(row["prompt"], []).append(row["answer"].strip())
        ended.append(row["ended"])
    half = len(said)
    return Gains(
        numbers=[
            ("held-out loss, nats a token", *_ends(losses.lines["held out"])),
            (
                "answers below that end by themselves",
                f"{sum(ended[:half])} of {half}",
                f"{sum(ended[-half:])} of {half}",
            ),
        ],
        drawings=[losses],
        columns=("question", "before", "after"),
        answers=[(question, texts[0] or NOTHING, texts[-1] or NOTHING) for question, texts in said.items()],
    )


def idk(work: Path) -> Gains:
    report = _json(work / "idk_report/report.json")
    before, after = (model["all"] for model in report["models"])
    names = {
        "right_refusals": "says it does not know, on what it does not know",
        "wrong_refusals": "says it does not know, on what it knows",
        "right_when_answered": "right, of what it answers",
    }
    shares = {told: {"before": before[key]["share"], "after": after[key]["share"]} for key, told in names.items()}
    return Gains(
        numbers=[
            (f"{told} ({before[key]['of']} questions)", _percent(pair["before"]), _percent(pair["after"]))
            for (key, told), pair in zip(names.items(), shares.values())
        ],
        drawings=[Bars(name="idk", groups=shares)],
        columns=("question", "accepted", "before", "after"),
        answers=_idk_answers(work, report),
    )


def _idk_answers(work: Path, report: Row) -> list[list[str]]:
    """Some held-out questions: of those known, and of those not."""
    digests = [model["model"].rpartition("@")[2] for model in report["models"]]
    by_model = [
        {
            _asked(row): row["samples"][0]["text"].strip()
            for row in read_rows(work / f"idk_report/answers-{digest}.jsonl")
        }
        for digest in digests
    ]
    out, seen = list[list[str]](), dict[str, int]()
    for row in read_rows(work / "idk.held_out.jsonl"):
        kind = row.get("decision", "")
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 3 and all(_asked(row) in said for said in by_model):
            question = _asked(row)
            out.append([question, ", ".join(row["answers"][:2]), *(said[question] for said in by_model)])
    return out


def _asked(row: Row) -> str:
    return str(row["prompt"][-1]["content"])


def tools(work: Path) -> Gains:
    before, after = _json(work / "tools_report/report.json").values()
    parts = {
        "calls the right tool": [found["all"]["right_tool"] for found in (before, after)],
        "right with tools": [found["all"]["right"] for found in (before, after)],
        "right without tools": [found["all"]["right_without"] for found in (before, after)],
        "ordinary questions with a call": [found["ordinary"]["calls"] for found in (before, after)],
        "ordinary answers that end by themselves": [found["ordinary"]["ended"] for found in (before, after)],
    }
    shares = {told: {"before": old["share"], "after": new["share"]} for told, (old, new) in parts.items()}
    last = list(_json(work / "tools_report/report.json"))[-1]
    rows = [
        row
        for row in read_rows(work / "tools_report/answers.jsonl")
        if row["model"] == last and row["kind"] == "with tools" and row["calls"]
    ]
    shown = {row["tool"]: row for row in reversed(rows)}.values()  # the first of each tool
    return Gains(
        numbers=[
            (f"{told} ({new['count']} questions)", _percent(old["share"]), _percent(new["share"]))
            for told, (old, new) in parts.items()
        ],
        drawings=[Bars(name="tools", groups=shares)],
        columns=("question", "call", "result", "answer"),
        answers=[
            (row["question"], row["results"][0]["call"], row["results"][0]["result"][:160], _after_call(row["text"]))
            for row in shown
            if row["results"]
        ],
    )


def _after_call(text: str) -> str:
    return re.split(r"</[A-Z]+-TOOL>", text)[-1].strip()


def reward(work: Path) -> Gains:
    run = work / "reward"
    accuracy = curve(run, "val/accuracy")
    return Gains(
        numbers=[("held-out pairs in the right order", *_ends([(s, 100 * v) for s, v in accuracy], "{:.0f} %"))],
        drawings=[Curves(name="reward-loss", label="loss", lines={"trained": curve(run, "train/loss")})],
        pictures=[run / "reward_report/reliability.png"],
    )


def student(work: Path) -> Gains:
    report = _json(work / "student/distill_report.json")
    models = {model["name"]: model for model in report["models"]}
    found = [models[name] for name in ("before", "after")]
    before, after = (model["parts"]["special"]["all"] for model in found)
    teacher, shrunk = (models[name]["parameters"] / 1e6 for name in ("teacher", "after"))
    return Gains(
        numbers=[
            ("token KL to the teacher, nats", f"{before['kl']:.2f}", f"{after['kl']:.2f}"),
            ("perplexity", f"{before['perplexity']:,.1f}", f"{after['perplexity']:,.1f}"),
            ("weights, millions: teacher, student", f"{teacher:.0f}", f"{shrunk:.0f}"),
        ],
        pictures=[work / "student/distill_report.png"],
    )


def grpo(work: Path) -> Gains:
    run = work / "grpo"
    solved = curve(run, "val/pass@1")
    lines = {"held-out sums": solved, "sums while training": curve(run, "train/reward")}
    lines = {name: points for name, points in lines.items() if points}
    return Gains(
        numbers=[("held-out sums that are right", *_ends([(s, 100 * v) for s, v in solved], "{:.0f} %"))],
        drawings=[Curves(name="grpo", label="share that is right", lines=lines, share=True)],
    )


def small(work: Path) -> Gains:
    numbers = []
    for name in ("bf16", "nf4"):
        facts = _json(work / name / "format_report.json")
        numbers += [
            (
                f"{name}: megabytes in memory",
                f"{facts['bytes_before'] / 1e6:,.0f}",
                f"{facts['bytes_after'] / 1e6:,.0f}",
            ),
            (f"{name}: perplexity", f"{facts['perplexity_before']:.2f}", f"{facts['perplexity_after']:.2f}"),
            (f"{name}: KL to the original, nats a token", "–", f"{facts['kl']:.4f}"),
            (f"{name}: the same likeliest token", "–", _percent(facts["greedy_agreement"])),
        ]
    return Gains(numbers=numbers)


def chat(work: Path) -> Gains:
    text = (work / "logs/chat.log").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if not re.match(r"Loading weights|\[|/|\s*warn", line)]
    return Gains(text="\n".join(lines).strip())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


READERS: Mapping[str, Callable[[Path], Gains]] = {
    "pretrain": pretrain,
    "sft": sft,
    "idk": idk,
    "tools": tools,
    "reward": reward,
    "student": student,
    "grpo": grpo,
    "small": small,
    "chat": chat,
}
