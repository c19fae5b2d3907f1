"""Off-policy distillation of a teacher's whole distribution: ``ptl`` beside TRL's GKDTrainer.

Both sides load the same two folders, the teacher and a student cut from it, take the same rows in the same order,
``batch_rows`` an optimizer step, and train on the assistant's words and end of turn alone. The loss of a step is the
forward KL ``sum_t sum_v p(v) (log p(v) - log q(v))`` in nats, p the teacher and q the student at temperature 1, over
the count of trained tokens t; nothing else is added to it. Each side renders the conversations itself; the harness
refuses to compare runs whose counts of tokens differ at any step.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_tools import chat
from benchmarks.peer_tools.compare import Measured

PEER = "experimental.gkd GKDTrainer"
PEER_PACKAGE = "trl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", type=Path, help="folder of a student; default the teacher (--model) cut short")
    parser.add_argument("--student-layers", type=int, default=7, help="layers of the teacher that the cut one keeps")
    chat.add_arguments(parser)


def make_spec(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides are told; the cut student is written to ``folder``.

    Raises:
        ValueError: settings that do not go together, too few rows of the wanted length, or more layers than there are.
    """
    spec = chat.make_spec(args, folder, lr=2e-5)
    spec["teacher"] = str(args.model)
    if args.student is not None:
        return {**spec, "student": str(args.student)}
    student = cut_student(args.model, folder / "student", layers=args.student_layers)
    return {**spec, "student": str(student), "student_layers": args.student_layers}


def cut_student(teacher: Path, folder: Path, *, layers: int) -> Path:
    """Saves the teacher with some of its layers, spread evenly from the first to the last, and its tokenizer.

    Raises:
        ValueError: ``layers`` is not between 1 and the teacher's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ptl.models.spec import Shrink
    from ptl.models.students import make_student

    try:
        make_student(model := AutoModelForCausalLM.from_pretrained(teacher), Shrink(layers=layers))
    except ValueError as error:
        raise ValueError(f"--student-layers {layers}: {error}") from error
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder


def run_ptl(spec: Mapping[str, Any]) -> Measured:
    """One run of ``ptl``."""
    from benchmarks.peer_stages.distill.ptl_side import run

    return run(spec)


def run_peer(spec: Mapping[str, Any]) -> Measured:
    """One run of TRL."""
    from benchmarks.peer_stages.distill.trl_side import run

    return run(spec)
