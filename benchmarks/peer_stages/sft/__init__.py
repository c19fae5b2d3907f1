"""Supervised fine-tuning, whole or LoRA: ``ptl`` beside TRL's SFTTrainer.

Both sides load the same folder, take the same rows in the same order, ``batch_rows`` an optimizer step, train on the
assistant's words and end of turn alone, and divide each step's loss by its count of trained tokens. Each renders the
conversations itself; the harness refuses to compare runs whose counts of tokens differ at any step.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_tools import chat
from benchmarks.peer_tools.compare import Measured

PEER = "SFTTrainer"
PEER_PACKAGE = "trl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", choices=("none", "lora"), default="none", help="lora: rank 16, every linear layer")
    parser.add_argument("--lora-dtype", choices=("auto", "base", "fp32"), default="auto", help="ptl's adapter weights")
    parser.add_argument(
        "--trl-bf16",
        choices=("autocast", "weights"),
        default="weights",
        help="with --dtype bf16: fp32 weights under autocast, or weights in bf16",
    )
    chat.add_arguments(parser)


def make_spec(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides are told.

    Raises:
        ValueError: settings that do not go together, or too few rows of the wanted length.
    """
    return {
        **chat.make_spec(args, folder, lr=2e-4 if args.adapter == "lora" else 2e-5),
        "adapter": args.adapter,
        "lora_dtype": args.lora_dtype,
        "trl_bf16": args.trl_bf16,
    }


def run_ptl(spec: Mapping[str, Any]) -> Measured:
    """One run of ``ptl``."""
    from benchmarks.peer_stages.sft.ptl_side import run

    return run(spec)


def run_peer(spec: Mapping[str, Any]) -> Measured:
    """One run of TRL."""
    from benchmarks.peer_stages.sft.trl_side import run

    return run(spec)
