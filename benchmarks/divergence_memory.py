"""Peak memory and time of the fused divergence against the naive one, which makes all logits of teacher and student.

``python -m benchmarks.divergence_memory`` measures a batch of 4 x 2,048 trained tokens at V = 151,936 between the heads
of a 1,536-wide teacher and an 896-wide student, each side in a process of its own, and appends one line for each kind
of divergence to ``benchmarks/results/divergence_memory.json``. What is measured is the increase over what the process
held with its inputs made: forward and backward of the loss, the student's gradients among it.

One tensor of all logits has 5 GB in fp32 and the naive side holds five of them. Where the machine has no room for
that, the naive side is measured at an eighth and at a quarter of the tokens, and its peak (and its time) at all of
them is the straight line through both; ``naive_tokens`` in the recorded line names what was measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks import record
from benchmarks.memory import beside, increase, run_one
from ptl.functional.divergence import Divergence, Kind

MODULE = "benchmarks.divergence_memory"
NAIVE_TENSORS = 6
"""Tensors of the size of the logits that there must be room for: the five that are held and one to spare."""


@dataclass(frozen=True)
class Case:
    """One divergence to measure. The student's head trains where ``adapter`` is ``full`` and is frozen for ``lora``."""

    kind: Kind = "forward_kl"
    tokens: int = 8192
    vocab: int = 151_936
    hidden: int = 896
    teacher_hidden: int = 1536
    dtype: str = "fp32"
    adapter: str = "full"
    device: str = "cpu"


def naive_loss(student: Any, teacher: Any, kind: Kind) -> Any:
    """The divergence summed over tokens, from logits [N, V], by the definition; the leanest that autograd allows.

    The logits are let go of once their log-softmax is made. ``jsd`` has beta 1/2, the skew divergences their default.
    """
    import torch.nn.functional as F

    chosen = Divergence(kind=kind)
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    del student, teacher
    if kind == "forward_kl":
        return F.kl_div(q, p, reduction="sum", log_target=True)
    if kind == "reverse_kl":
        return F.kl_div(p, q, reduction="sum", log_target=True)
    if kind == "total_variation":
        return (p.exp() - q.exp()).abs().sum() / 2
    if kind == "jsd":
        middle = ((p.exp() + q.exp()) / 2).log()
        both = [F.kl_div(middle, side, reduction="sum", log_target=True) for side in (p, q)]
        return (both[0] + both[1]) / 2 / (chosen.beta * (1 - chosen.beta))
    own, other = (p, q) if kind == "skew_kl" else (q, p)
    mixture = (chosen.skew * own.exp() + (1 - chosen.skew) * other.exp()).log()
    return F.kl_div(mixture, own, reduction="sum", log_target=True)


def measure(case: Case, side: str) -> dict[str, float]:
    """Peak increase in MiB and seconds of one forward and backward, in this process."""
    import torch
    from torch import Tensor
    from torch.nn.functional import linear

    from ptl.functional.fused_divergence import Side, fused_divergence

    make = {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype], "device": case.device}

    def inputs(tokens: int, vocab: int) -> list[Tensor]:
        given = []
        for width in (case.hidden, case.teacher_hidden):
            given += [torch.empty(tokens, width, **make).normal_(), torch.empty(vocab, width, **make).normal_(std=0.02)]
        given[0].requires_grad_()
        given[1].requires_grad_(case.adapter == "full")
        return [*given, torch.randint(0, vocab, (tokens,), device=case.device)]

    def step(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, targets: Tensor) -> None:
        if side == "fused":
            ours, theirs = Side(hidden, weight), Side(teacher_hidden, teacher_weight)
            ones = torch.ones(len(targets), device=case.device)
            total = fused_divergence(ours, theirs, targets, ones, divergence=Divergence(kind=case.kind)).total
        else:
            # The logits have no name here, so that ``naive_loss`` can let go of them.
            total = naive_loss(
                linear(hidden, weight).float(), linear(teacher_hidden, teacher_weight).float(), case.kind
            )
        total.backward()

    step(*inputs(64, 1024))  # loads the libraries
    return increase(step, inputs(case.tokens, case.vocab), case.device)


def free_bytes(device: str) -> int:
    """Memory of the device that nothing holds."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def naive(case: Case, timeout: float) -> tuple[dict[str, float], list[int]]:
    """The naive side's peak and time at the tokens of ``case``, and the counts of tokens they were measured at."""
    if NAIVE_TENSORS * 4 * case.tokens * case.vocab <= free_bytes(case.device):
        return run_one(MODULE, case, "naive", timeout), [case.tokens]
    counts = [case.tokens // 8, case.tokens // 4]
    runs = [run_one(MODULE, replace(case, tokens=count), "naive", timeout) for count in counts]
    return line_through(counts, runs, case.tokens), counts


def line_through(counts: list[int], runs: list[dict[str, float]], at: int) -> dict[str, float]:
    """Each measurement at ``at`` tokens, on the straight line through those at two ``counts``."""
    (low, high), (first, second) = counts, runs
    return {key: first[key] + (second[key] - first[key]) * (at - low) / (high - low) for key in first}


def compare(case: Case, timeout: float) -> dict[str, Any]:
    """Both sides, each in a new process; the line that is recorded, but for the common keys."""
    plain, counts = naive(case, timeout)
    fused = run_one(MODULE, case, "fused", timeout)
    return {
        "stage": "distill",
        "variant": f"{case.adapter}-{case.dtype}",
        "divergence": case.kind,
        "vocab": case.vocab,
        "hidden": case.hidden,
        "teacher_hidden": case.teacher_hidden,
        "tokens": case.tokens,
        "naive_tokens": counts,
        "peer": "torch: all logits of both sides, log_softmax, kl_div",
        "pairs": 1,
        **beside(fused, plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--adapter", choices=("full", "lora"), default="full", help="lora: the student's head is frozen"
    )
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=["forward_kl"])
    parser.add_argument("--tokens", type=int, default=Case.tokens, help="a multiple of 8; default %(default)s")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run (default 1200)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        given = json.loads(options.one)
        side = given.pop("side")
        print(json.dumps(measure(Case(**given), side)))
        return
    if options.tokens < 8 or options.tokens % 8:
        parser.error(f"--tokens must be a multiple of 8, got {options.tokens}")
    for kind in options.kinds:
        case = Case(kind, options.tokens, dtype=options.dtype, adapter=options.adapter, device=options.device)
        result = compare(case, options.timeout)
        line = record.append("divergence_memory", result, device=options.device, folder=options.results)
        print(
            f"{line['variant']} {kind}: {line['peak_mib']:.0f} MiB against {line['peer_peak_mib']:.0f} "
            f"({line['memory_ratio']:.1%}; naive measured at {line['naive_tokens']} tokens), "
            f"{line['seconds']:.2f} s against {line['peer_seconds']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
