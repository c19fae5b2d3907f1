"""What ``ptl`` costs a step: ``ptl fit`` with everything on, itself without callbacks, and a bare PyTorch loop.

    OMP_NUM_THREADS=1 python -m benchmarks.overhead [--steps 84] [--limit 0.03 0.02]

The three take turns step by step in one process, each with a model and an optimizer of its own from the same seed:

* ``full``: the command line's own trainer with all its callbacks (throughput, health, watchdog, stragglers, preemption,
  checkpoint, export, run record), the metrics file and W&B offline;
* ``plain``: the same objective, data module and trainer without callback and logger;
* ``bare``: forward, backward, clipping and step over the batches that ``plain`` has just loaded, nothing else.

All three run the same model code (fused head and loss, packed attention), so that what differs is what is measured. A
step reaches from the end of one to the end of the next: loading, hooks and logs count. A turn's neighbours are paired.
Steps that end a logging interval are paired apart from the others and weigh ``1 / log_every_n_steps``. The checkpoint
and the export at the end are no steps. Exit code 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.plan_check import Case, make_parts, run_config
from benchmarks.turns import Turns

ARMS = ("full", "plain", "bare")
PAIRS = (("full", "bare"), ("full", "plain"), ("plain", "bare"))
Seconds = dict[str, list[float]]


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles around the median."""
    lower, _, upper = statistics.quantiles(values, n=4)
    return lower, upper


def overhead(ours: Sequence[float], theirs: Sequence[float], *, every: int, first: int) -> dict[str, float]:
    """What one loop takes more than another for a step, as a share of the other's median step.

    Arguments:
        ours: seconds of consecutive steps; ``theirs`` those of the step beside each.
        every: steps of a logging interval, whose last one is paired apart.
        first: number of the first of these steps in its run, from 1.

    Returns:
        ``mean`` over a logging interval; ``step`` of a step that logs nothing, with its quartiles ``lower`` and
        ``upper`` and the standard ``error`` of that median; ``log`` of one that ends an interval.
    """
    middle = statistics.median(theirs)
    shares = [(our - their) / middle for our, their in zip(ours, theirs, strict=True)]
    logs = [share for number, share in enumerate(shares, first) if number % every == 0]
    rest = [share for number, share in enumerate(shares, first) if number % every]
    step, log = statistics.median(rest), statistics.median(logs)
    lower, upper = quantiles(rest)
    found = {
        "mean": step + (log - step) / every,
        "step": step,
        "log": log,
        "lower": lower,
        "upper": upper,
        "error": 1.2533 * (upper - lower) / 1.349 / len(rest) ** 0.5,
    }
    return {name: round(value, 5) for name, value in found.items()}


def configuration(case: Case, folder: Path, *, steps: int, every: int, device: str, wandb: bool) -> dict[str, Any]:
    """The run of ``full``, as ``ptl fit -c`` reads it."""
    config = run_config(case, folder)
    config["trainer"] |= {
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "max_steps": steps,
        "log_every_n_steps": every,
        "enable_progress_bar": True,  # as a user has it; in a pipe Lightning prints a line an interval
    }
    config["checkpoint"] = {"save_top_k": 1}
    if wandb:
        arguments = {"project": "overhead", "save_dir": str(folder), "offline": True}
        config["trainer"]["logger"] = {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "init_args": arguments,
        }
    return config


def arms(config: Path, turns: Turns, *, steps: int, clip: float, device: str) -> dict[str, Callable[[], None]]:
    """The three loops."""
    import lightning as L
    import torch

    from ptl.models.heads import lm_loss
    from ptl.trainer_cli import PTLCLI

    class Turn(L.Callback):
        """Ends a turn with each optimizer step."""

        def __init__(self, name: str) -> None:
            self.name, self.batch = name, None

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            turns.give(self.name)
            turns.take(self.name)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, idx: int) -> None:
            self.batch = batch
            turns.give(self.name)
            turns.take(self.name)

    class Alternating(PTLCLI):
        """The command line with a turn as the last of its callbacks, or as the only one."""

        def before_fit(self) -> None:
            super().before_fit()
            if mark is plain:
                self.trainer.callbacks, self.trainer.loggers = [], []  # pyright: ignore[reportAttributeAccessIssue]
            self.trainer.callbacks.append(mark)  # pyright: ignore[reportAttributeAccessIssue]

    full, plain = Turn("full"), Turn("plain")
    mark = full

    def run(chosen: Turn) -> Callable[[], None]:
        def loop() -> None:
            nonlocal mark
            mark = chosen
            Alternating(["fit", "-c", str(config), *(["--run.dir", f"{config.parent}/plain"] if mark is plain else [])])

        return loop

    def bare() -> None:
        torch.manual_seed(0)
        module = PTLCLI(["-c", str(config), "--run.dir", f"{config.parent}/bare"], run=False).model
        module.configure_model()
        policy = module.policy.train()
        policy.to(device)
        optimizer = module.optimizer_spec.build(policy)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        turns.give("bare")
        for _ in range(steps):
            turns.take("bare")
            batch: Any = plain.batch
            fused = lm_loss(policy, batch).fused
            (fused.total / batch.window_weight).backward()
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
            turns.give("bare")
        turns.take("bare")

    return {"full": run(full), "plain": run(plain), "bare": bare}


def measure(
    case: Case, *, steps: int, warmup: int, every: int, device: str = "cpu", wandb: bool = True
) -> tuple[Seconds, Seconds]:
    """Wall seconds of every step after ``warmup`` by arm, and those of this process's threads on the processor."""
    import yaml

    def settle() -> None:
        if device == "cuda":
            import torch

            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        make_parts(folder, case, rows=steps + 8)
        config = folder / "run.yaml"
        settings = configuration(case, folder, steps=steps, every=every, device=device, wandb=wandb)
        config.write_text(yaml.safe_dump(settings))
        turns = Turns(ARMS, settle)
        clip = settings["trainer"]["gradient_clip_val"]
        turns.run(arms(config, turns, steps=steps, clip=clip, device=device))
        kept = slice(1 + warmup, 1 + steps)  # the first turn is the start-up
        wall, processor = turns.seconds, turns.cpu_seconds
        return {name: wall[name][kept] for name in ARMS}, {name: processor[name][kept] for name in ARMS}


def result(wall: Seconds, processor: Seconds, *, every: int, warmup: int) -> dict[str, Any]:
    """What the steps say, without the common keys."""
    settings = {"every": every, "first": warmup + 1}
    found: dict[str, Any] = {"stage": "overhead", "steps": len(wall["bare"]), "warmup": warmup}
    found["log_every_n_steps"] = every
    for name, seconds in (("wall", wall), ("processor", processor)):
        found[f"{name}_seconds_median"] = {arm: round(statistics.median(seconds[arm]), 4) for arm in ARMS}
        for ours, theirs in PAIRS:
            found[f"{name}_{ours}_over_{theirs}"] = overhead(seconds[ours], seconds[theirs], **settings)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=84, help="of each loop (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="first steps left out (default %(default)s)")
    parser.add_argument("--every", type=int, default=10, help="log_every_n_steps (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default %(default)s)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a packed row (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", type=float, nargs=2, default=(0.03, 0.02), metavar=("BARE", "PLAIN"))
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if options.steps - options.warmup < 2 * options.every:
        parser.error(f"--steps {options.steps} holds fewer than two logging intervals after --warmup {options.warmup}")
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_SILENT": "true"})
    case = Case(name="overhead", layers=options.layers, sequence=options.sequence)
    settings = {"every": options.every, "warmup": options.warmup}
    seconds = measure(case, steps=options.steps, device=options.device, **settings)
    found = result(*seconds, **settings)
    found |= {"variant": "full-fp32", "layers": case.layers, "hidden": case.hidden, "sequence": case.sequence}
    found["load_average"] = round(os.getloadavg()[0], 2)
    record.append("overhead", found, device=options.device, folder=options.results)
    for clock in ("wall", "processor"):
        print(f"{clock} seconds of a step, median: {found[f'{clock}_seconds_median']}")
        for ours, theirs in PAIRS:
            each = found[f"{clock}_{ours}_over_{theirs}"]
            print(
                f"  {ours} over {theirs}: {each['mean']:+.2%} (a step {each['step']:+.2%} with error "
                f"{each['error']:.2%}, one that logs {each['log']:+.2%})"
            )
    over_bare, over_plain = options.limit
    missed = found["wall_full_over_bare"]["mean"] > over_bare or found["wall_full_over_plain"]["mean"] > over_plain
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
