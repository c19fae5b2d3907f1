"""Reward modelling from rankings: ``ptl`` beside TRL's RewardTrainer.

Both sides load the same folder, a scalar head on the model, and take the same prompts in the same order,
``batch_rows`` prompts an optimizer step. ``ptl`` is given K ranked answers a prompt; TRL, which knows pairs, is given
the K (K - 1) / 2 pairs of them. Both minimise the mean of ``-log sigmoid(r_better - r_worse)`` over the step's pairs,
so the losses must agree. The work of a step is counted in what the pairs hold: *useful tokens* are those of both
documents of every pair and *trained tokens* the number of pairs, whatever a side computes for them. ``ratio`` is
therefore one of pair-equivalents a second.

The answers are the rows' own, and K - 1 worse ones made of it by changing more and more of its numbers and words.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_tools import chat
from benchmarks.peer_tools.compare import Measured

PEER = "RewardTrainer"
PEER_PACKAGE = "trl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", choices=("none", "lora"), default="none", help="lora: rank 16, every linear layer")
    parser.add_argument("--answers", type=int, default=2, help="ranked answers of each prompt")
    parser.add_argument("--whole", action="store_true", help="ptl computes each prompt once an answer, not once")
    chat.add_arguments(parser)


def make_spec(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides are told; model and rows are written to ``folder``.

    Raises:
        ValueError: settings that do not go together, or too few rows of the wanted length.
    """
    if args.answers < 2:
        raise ValueError(f"--answers must be 2 or more, got {args.answers}")
    pairs = args.batch_rows * args.answers * (args.answers - 1) // 2
    micro = args.trl_micro
    args.trl_micro = None
    spec = chat.make_spec(args, folder, lr=2e-4 if args.adapter == "lora" else 1e-5)
    chosen = micro or max(size for size in range(1, 9) if pairs % size == 0)
    if pairs % chosen:
        raise ValueError(f"--trl-micro {chosen} does not divide the {pairs} pairs of a step")
    conversations = [json.loads(line) for line in Path(spec["rows"]).read_text(encoding="utf-8").splitlines()]
    rankings, expanded = folder / "rankings.jsonl", folder / "pairs.jsonl"
    write_rankings(conversations, args.answers, args.seed, rankings, expanded)
    return {
        **spec,
        "rows": str(rankings),
        "format": "ranking",
        "pair_rows": str(expanded),
        "trl_micro": chosen,
        "step_pairs": pairs,
        "answers": args.answers,
        "adapter": args.adapter,
        "share_prompt": not args.whole,
        "scored": str(with_scalar_head(args.model, folder / "scored", args.seed)),
    }


def write_rankings(rows: list[Any], answers: int, seed: int, rankings: Path, pairs: Path) -> None:
    """The prompts with their answers, best first, and the same as pairs."""
    rng = random.Random(seed)
    with rankings.open("w", encoding="utf-8") as ranked, pairs.open("w", encoding="utf-8") as paired:
        for row in rows:
            *prompt, last = row["messages"]
            texts = [last["content"]]
            while len(texts) < answers:
                texts.append(worse(texts[-1], rng))
            completions = [[{"role": "assistant", "content": text}] for text in texts]
            ranks = list(range(1, answers + 1))
            ranked.write(json.dumps({"prompt": prompt, "completions": completions, "ranks": ranks}) + "\n")
            for better, other in itertools.combinations(completions, 2):
                paired.write(json.dumps({"prompt": prompt, "chosen": better, "rejected": other}) + "\n")


def worse(text: str, rng: random.Random) -> str:
    """The text with one number changed, or two words swapped where it has none."""
    numbers = list(re.finditer(r"\d+", text))
    if numbers:
        match = rng.choice(numbers)
        return f"{text[: match.start()]}{int(match[0]) + rng.randint(1, 9)}{text[match.end() :]}"
    words = text.split(" ")
    at = rng.randrange(max(1, len(words) - 1))
    words[at : at + 2] = words[at : at + 2][::-1]
    return " ".join(words) + " again"


def with_scalar_head(model: Path, folder: Path, seed: int) -> Path:
    """The model with a fresh scalar head and a padding token that ends no text, which the peer's pooling goes by."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = next(t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token)
    torch.manual_seed(seed)
    scored = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    scored.config.pad_token_id = tokenizer.pad_token_id
    scored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_ptl(spec: Mapping[str, Any]) -> Measured:
    """One run of ``ptl``."""
    from benchmarks.peer_stages.reward.ptl_side import run

    return run(spec)


def run_peer(spec: Mapping[str, Any]) -> Measured:
    """One run of TRL."""
    from benchmarks.peer_stages.reward.trl_side import run

    return run(spec)
