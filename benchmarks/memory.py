"""Peak memory and time of the fused head and loss against the plain one, which makes all logits.

``python -m benchmarks.memory`` measures every size, dtype and head, each side in a process of its own, and appends one
line for each pair to ``benchmarks/results/memory.json``. What is measured is the increase over what the process held
with its inputs made: forward and backward of the loss on ``--tokens`` hidden states, the gradients among it. That of a
head that trains has the same size on both sides, whatever the tokens. Seconds are processor seconds on the CPU;
``OMP_NUM_THREADS=1`` makes them mean the most on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import record

TOKENS = 2048
SIZES = ((32_000, 1024), (49_152, 576), (151_936, 896), (151_936, 1536))
"""Vocabulary and hidden size: a Llama-2 vocabulary, SmolLM2-135M, Qwen2.5-0.5B, Qwen2.5-1.5B."""
SIDES = ("plain", "fused")
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One loss to measure. ``adapter`` is ``full`` where the head trains and ``lora`` where it is frozen."""

    vocab: int
    hidden: int
    dtype: str
    adapter: str
    device: str
    tokens: int = TOKENS


def measure(case: Case, side: str) -> dict[str, float]:
    """Peak increase in MiB and seconds of one forward and backward, in this process."""
    import torch

    from ptl.functional.cross_entropy import fused_linear_cross_entropy

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]

    def inputs(tokens: int, vocab: int) -> tuple[torch.Tensor, ...]:
        make = {"dtype": dtype, "device": case.device}
        hidden = torch.empty(tokens, case.hidden, **make).normal_().requires_grad_()
        weight = torch.empty(vocab, case.hidden, **make).normal_(std=0.02).requires_grad_(case.adapter == "full")
        targets = torch.randint(0, vocab, (tokens,), device=case.device)
        return hidden, weight, targets, torch.ones(tokens, device=case.device)

    def step(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        if side == "fused":
            total = fused_linear_cross_entropy(hidden, weight, targets, weights).total
        else:
            # The leanest plain loss: nothing holds the logits once the loss is made. A loop that keeps the model's
            # output until after backward holds one more tensor of their size.
            logits = torch.nn.functional.linear(hidden, weight).float()
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            del logits
            total = (losses * weights).sum()
        total.backward()

    step(*inputs(64, 1024))  # loads the libraries
    return increase(step, inputs(case.tokens, case.vocab), case.device)


def increase(step: Callable[..., None], given: Sequence[Any], device: str) -> dict[str, float]:
    """``peak_mib``: the most that ``step(*given)`` held beyond what was held before it; and its ``seconds``."""
    before = _reset_peak(device)
    # On the CPU the process's own time, in which other work on the machine does not count.
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    step(*given)
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return {"seconds": clock() - start, "peak_mib": (_peak(device) - before) / MIB}


def _reset_peak(device: str) -> int:
    """Forgets the peak so far and returns the bytes held at this moment."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/clear_refs")
    if status.exists():
        status.write_text("5")
        return _status("VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(key: str) -> int:
    """Bytes of a line of this process's status as Linux gives it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def run_one(module: str, case: Any, side: str, timeout: float) -> dict[str, float]:
    """What ``python -m module --one`` measures of one side, in a new process.

    Arguments:
        module: a benchmark whose ``--one`` takes ``{"side", **case}`` as JSON and prints its measurement last.
        case: a dataclass.
        side: which of the two.
        timeout: seconds.

    Raises:
        RuntimeError: it failed, with the end of what it wrote.
        subprocess.TimeoutExpired: it took longer than ``timeout``.
    """
    command = [sys.executable, "-m", module, "--one", json.dumps({"side": side, **asdict(case)})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{side} {case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case, runs: int, timeout: float) -> dict[str, Any]:
    """Both sides, ``runs`` times in turn, each in a new process; medians."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side in SIDES:
            results[side].append(run_one("benchmarks.memory", case, side, timeout))
    medians = {
        side: {key: sorted(r[key] for r in rows)[runs // 2] for key in ("seconds", "peak_mib")}
        for side, rows in results.items()
    }
    return {
        "stage": "sft",
        "variant": f"{case.adapter}-{case.dtype}",
        "vocab": case.vocab,
        "hidden": case.hidden,
        "tokens": case.tokens,
        "peer": "torch: all logits, cross_entropy",
        "pairs": runs,
        **beside(medians["fused"], medians["plain"]),
    }


def beside(fused: Mapping[str, float], plain: Mapping[str, float]) -> dict[str, float]:
    """The measurements of a recorded line."""
    return {
        "peak_mib": round(fused["peak_mib"], 1),
        "peer_peak_mib": round(plain["peak_mib"], 1),
        "memory_ratio": round(fused["peak_mib"] / plain["peak_mib"], 4),
        "seconds": round(fused["seconds"], 3),
        "peer_seconds": round(plain["seconds"], 3),
        "ratio": round(plain["seconds"] / fused["seconds"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="hidden states (default %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--runs", type=int, default=1, help="runs of each side (default 1)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one run (default 300)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        given = json.loads(options.one)
        side = given.pop("side")
        print(json.dumps(measure(Case(**given), side)))
        return
    device = options.device
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in options.dtype:
        for adapter in ("full", "lora"):
            for vocab, hidden in SIZES:
                case = Case(vocab, hidden, dtype, adapter, device, options.tokens)
                line = record.append("memory", compare(case, options.runs, options.timeout), device=device)
                print(
                    f"{line['variant']} V={vocab} H={hidden}: {line['peak_mib']:.0f} MiB against "
                    f"{line['peer_peak_mib']:.0f} ({line['memory_ratio']:.1%}), {line['seconds']:.2f} s against "
                    f"{line['peer_seconds']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
