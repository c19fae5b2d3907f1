"""``ptl plan``: what a run takes of memory and time under every strategy, by arithmetic, and which one to choose."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ptl.apps.plan_inputs import OBJECTIVES, Request, request
from ptl.functional.memory_plan import Memory, fits, largest_micro_batch, memory_plan, strategies
from ptl.functional.plan_job import Job, Strategy
from ptl.functional.plan_rates import DEVICES
from ptl.functional.step_time import StepTime, step_time


@dataclass(frozen=True)
class Option:
    """One strategy, with or without gradient checkpointing: what it takes and how fast it is."""

    strategy: Strategy
    checkpointing: bool
    job: Job
    memory: Memory
    time: StepTime
    fits: bool
    largest: int


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="ptl plan", description=__doc__, allow_abbrev=False)
    top.add_argument(
        "-c", "--config", action="append", help="YAML layers as for ptl fit, whose values are the defaults"
    )
    top.add_argument("--model", help="hub name, model or run folder, or config.json; only the config is read")
    top.add_argument("--sequence", type=_above_zero, help="tokens of a row (data.pack_to; default 4096)")
    top.add_argument("--document", type=_above_zero, help="tokens of a document inside a pack (default: the row)")
    top.add_argument("--micro-batch", type=_above_zero, help="rows of a micro-batch on a device (default 1)")
    top.add_argument("--accumulate", type=_above_zero, help="micro-batches of an optimizer step (default 1)")
    top.add_argument("--adapter", metavar="full|lora:R|qlora:R", help="what is trained (default full)")
    top.add_argument("--gpus", type=_above_zero, help="devices of a node (default 1)")
    top.add_argument("--nodes", type=_above_zero, help="nodes (default 1)")
    top.add_argument("--gpu", metavar="DEVICE", help=f"one of {', '.join(DEVICES)} (default h100)")
    top.add_argument("--precision", help="fp32, bf16-mixed or bf16-true (default bf16-mixed; fp32 on a CPU)")
    top.add_argument("--weights", choices=("fp32", "bf16"), help="policy.dtype (default: what suits the strategy)")
    top.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="gradient checkpointing (default: both)"
    )
    top.add_argument("--objective", choices=sorted(set(OBJECTIVES.values())), help="what is trained for (default sft)")
    top.add_argument("--teacher", help="the frozen model beside it: teacher or reference; named as --model")
    top.add_argument("--teacher-sharded", action="store_true", help="the frozen model is cut over the ranks")
    top.add_argument("--memory", type=_positive, metavar="GIB", help="memory of a device, instead of the table's")
    top.add_argument(
        "--host-memory", type=_positive, metavar="GIB", help="memory of a node's host (default: not checked)"
    )
    top.add_argument(
        "--margin", type=_share, default=0.05, help="share of the memory to leave free (default %(default)s)"
    )
    top.add_argument("--rates", metavar="FILE", help="YAML with rates to replace, as --json prints them")
    top.add_argument(
        "--scale-to", type=_above_zero, metavar="NODES", help="also predict 1, 2, 4, ... up to NODES nodes"
    )
    top.add_argument("--json", action="store_true", help="print everything as JSON")
    return top


def _above_zero(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a share of at least 0 and below 1")
    return value


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns 0, 1 where nothing fits, or 2 after a user's mistake."""
    try:
        options = parser().parse_args(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        asked = request(options)
    except (ValueError, OSError) as mistake:
        if os.environ.get("PTL_TRACEBACK"):
            raise
        print(f"ptl plan: error: {mistake}", file=sys.stderr)
        return 2
    found = plan(asked)
    best = choose(found)
    grown = scaling(asked, best, options.scale_to) if best and options.scale_to else []
    if options.json:
        print(json.dumps(as_dict(asked, found, best, grown), indent=1))
    else:
        from ptl.apps.plan_report import show

        show(asked, found, best, grown)
    return 0 if best else 1


def plan(asked: Request) -> list[Option]:
    """Every strategy, with gradient checkpointing as it was fixed or else both ways."""
    ways = (False, True) if asked.checkpointing is None else (asked.checkpointing,)
    return [_option(asked, strategy, way) for strategy in strategies(asked.job.world) for way in ways]


def _option(asked: Request, strategy: Strategy, checkpointing: bool) -> Option:
    job = asked.job_for(strategy, checkpointing)
    return Option(
        strategy,
        checkpointing,
        job,
        memory_plan(job, strategy, asked.rates),
        step_time(job, strategy, asked.rates),
        fits(job, strategy, asked.rates, host_memory=asked.host_memory, margin=asked.margin),
        largest_micro_batch(job, strategy, asked.rates, margin=asked.margin),
    )


CLOSE = 0.8
"""Speeds within a fifth of each other are within the prediction's error: the simpler strategy is chosen."""


def choose(found: Sequence[Option]) -> Option | None:
    """Of those that fit and are about as fast as the fastest, the one that offloads, recomputes and cuts least."""
    fitting = sorted((option for option in found if option.fits), key=_burden)
    fastest = max((option.time.tokens_per_second for option in fitting), default=0.0)
    return next((option for option in fitting if option.time.tokens_per_second >= CLOSE * fastest), None)


def _burden(option: Option) -> tuple[bool, bool, bool, int]:
    strategy = option.strategy
    return strategy.offload_parameters, strategy.offload_optimizer, option.checkpointing, strategy.stage


def reason(found: Sequence[Option], best: Option | None) -> str:
    """Why that one, in a line."""
    if best is None:
        least = min(found, key=lambda option: option.memory.device_total)
        need = least.memory.device_total / 2**30
        return (
            f"nothing fits: {label(least)} takes the least, {need:.1f} GiB of a device; use more or larger devices, "
            "a shorter --sequence, a smaller --micro-batch, or --adapter lora:16 or qlora:16"
        )
    lighter = [o for o in found if o.strategy.stage < best.strategy.stage and not o.strategy.offload_optimizer]
    if best.strategy.offload_optimizer:
        need = best.memory.host_total / 2**30
        text = f"nothing fits without the host's memory, of which a node needs {need:,.0f} GiB"
    elif not lighter:
        text = "the whole state fits on each device"
    elif not any(option.fits for option in lighter):
        text = "with less cut over the devices it does not fit"
    elif not any(option.fits and option.checkpointing <= best.checkpointing for option in lighter):
        text = "with less cut over the devices it fits only when layers are recomputed"
    else:
        text = "what cuts less over the devices fits, but is slower by a fifth or more"
    free = best.checkpointing and any(not option.checkpointing for option in found)
    recomputes = "; layers are recomputed because their activations do not fit" if free else ""
    return f"{label(best)}: {text}{recomputes}"


def label(option: Option) -> str:
    """Strategy and checkpointing in a word or two."""
    return option.strategy.name + (" + checkpointing" if option.checkpointing else "")


def config_layers(asked: Request, best: Option) -> list[str]:
    """Words to add to ``ptl fit -c RECIPE`` for a choice."""
    strategy, words = best.strategy, []
    if not asked.job.cuda and not strategy.stage and asked.job.world == 1:
        words += ["-c", "configs/trainer/cpu.yaml"]
    else:
        own = {"single": "gpu", "ddp": "ddp", "zero3": "zero3", "zero3-offload": "zero3-offload"}
        words += ["-c", f"configs/trainer/{own.get(strategy.name, 'zero2')}.yaml"]
    if not asked.job.cuda and words[-1] != "configs/trainer/cpu.yaml":
        words += ["--trainer.accelerator", "cpu"]
    words += ["--trainer.devices", str(asked.job.per_node)]
    if asked.job.nodes > 1:
        words += ["--trainer.num_nodes", str(asked.job.nodes)]
    words += ["--trainer.precision", {"fp32": "32-true"}.get(asked.job.precision, asked.job.precision)]
    if strategy.stage == 1:
        words += ["--trainer.strategy.init_args.stage", "1"]
    if strategy.offload_optimizer and strategy.stage < 3:
        words += ["--trainer.strategy.init_args.offload_optimizer", "true"]
    words += ["--model.init_args.policy.dtype", best.job.weights]
    words += ["--model.init_args.policy.gradient_checkpointing", str(best.checkpointing).lower()]
    return words


def scaling(asked: Request, best: Option, most: int) -> list[tuple[int, StepTime]]:
    """The choice on 1, 2, 4, ... nodes with the same batch on each device, and on ``most``."""
    counts = [n for n in (2**power for power in range(20)) if n < most] + [most]
    jobs = [(n, replace(best.job, world=n * asked.job.per_node)) for n in counts]
    return [(n, step_time(job, best.strategy, asked.rates)) for n, job in jobs]


def as_dict(
    asked: Request, found: Sequence[Option], best: Option | None, grown: Sequence[tuple[int, StepTime]]
) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    return {
        "model": asked.name,
        "parameters": asked.job.model.parameters,
        "trained": asked.job.trained(),
        "job": {key: value for key, value in asdict(asked.job).items() if key not in ("model", "teacher")},
        "rates": asdict(asked.rates),
        "strategies": [
            {
                "strategy": option.strategy.name,
                "checkpointing": option.checkpointing,
                "fits": option.fits,
                "device_bytes": dict(option.memory.device),
                "device_total": option.memory.device_total,
                "host_bytes": dict(option.memory.host),
                "largest_micro_batch": option.largest,
                "time": asdict(option.time),
            }
            for option in found
        ],
        "choice": None if best is None else {"strategy": best.strategy.name, "checkpointing": best.checkpointing},
        "reason": reason(found, best),
        "layers": [] if best is None else config_layers(asked, best),
        "scaling": [{"nodes": n, **asdict(time)} for n, time in grown],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
