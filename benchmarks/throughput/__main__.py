"""Throughput of the real command: ``python -m benchmarks.throughput run|report|check|scaling``.

    python -m benchmarks.throughput run --strategy ddp zero2 zero3 --ranks 2 --adapter full lora:16
    python -m benchmarks.throughput run -c configs/recipes/sft_full.yaml --objective config --accelerator gpu \\
        --sequence 4096 16384 --micro-batch 1 2 --precision bf16-mixed
    python -m benchmarks.throughput report --plot docs/images/throughput.png
    python -m benchmarks.throughput check
    python -m benchmarks.throughput scaling --nodes 1 2 4 --ranks 8 --kind weak --cluster configs/cluster/gpu8.yaml

``run`` measures every combination of the axes, each as ``ptl fit`` in processes of its own, and adds one line a cell
to ``benchmarks/results/throughput.json``; a cell without memory, time or success is a line too. Without ``-c`` the
model has random weights, and without ``--rows`` the rows are words from a seed that fill every pack. Step times are of
the slowest rank in each step, after the warm-up; ``share_of_matmul`` is the arithmetic that a rank's steps need, done
in their time, over the rate of a plain matrix product in this process just before and after.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.throughput import baseline, report, scaling
from benchmarks.throughput.cells import CONFIG, OBJECTIVES, STRATEGIES, Cell, Setting, grid
from benchmarks.throughput.parts import make_model, write_rows
from benchmarks.throughput.run import run_cell

NAME = "throughput"
SMALL = {"layers": 6, "hidden": 384, "steps": 10, "warmup": 3}
"""Of the baseline's cells: a few seconds each."""
BASELINE_CELLS = (
    Cell(sequence=256),
    Cell(sequence=256, adapter="lora:16"),
    Cell(sequence=256, strategy="ddp", ranks=2),
    Cell(sequence=256, strategy="zero2", ranks=2),
    Cell(sequence=256, strategy="zero3", ranks=2),
)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a grid", allow_abbrev=False)
    run.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=["single"])
    run.add_argument("--ranks", nargs="+", type=int, default=[1])
    run.add_argument("--adapter", nargs="+", default=["full"], metavar="full|lora:R|qlora:R")
    run.add_argument("--sequence", nargs="+", type=int, default=[512])
    run.add_argument("--micro-batch", nargs="+", type=int, default=[1])
    run.add_argument("--objective", nargs="+", choices=[*OBJECTIVES, CONFIG], default=["sft"])
    grow = commands.add_parser("scaling", help="measure on growing numbers of nodes, by SLURM", allow_abbrev=False)
    grow.add_argument("--nodes", nargs="+", type=int, default=[1, 2])
    grow.add_argument("--ranks", type=int, default=1, help="of a node")
    grow.add_argument("--kind", choices=("weak", "strong"), default="weak")
    grow.add_argument("--cluster", help="a cluster's profile, as for slurm/train.sbatch")
    grow.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch; may be repeated")
    grow.add_argument("--folder", type=Path, default=Path("runs/scaling"), help="seen by all nodes")
    grow.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    grow.add_argument("--adapter", default="full")
    grow.add_argument("--sequence", type=int, default=512)
    grow.add_argument("--micro-batch", type=int, default=1)
    grow.add_argument("--objective", choices=[*OBJECTIVES, CONFIG], default="sft")
    for each in (run, grow):
        each.add_argument("-c", "--config", action="append", default=[], help="layers below each cell's own")
        each.add_argument("--model", help="folder or hub name (default: the layers', or random weights)")
        each.add_argument("--rows", type=Path, help="rows of your own (default: the layers', or full rows of words)")
        each.add_argument("--layers", type=int, default=8, help="of the random model")
        each.add_argument("--hidden", type=int, default=512, help="width of the random model, a multiple of 64")
        each.add_argument("--accumulate", type=int, default=1)
        each.add_argument("--precision", default="32-true")
        each.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
        each.add_argument("--steps", type=int, default=40, help="optimizer steps, warm-up included")
        each.add_argument("--warmup", type=int, default=10)
        each.add_argument("--timeout", type=float, default=1800.0, help="seconds for a cell")
    show = commands.add_parser("report", help="recorded cells as a table", allow_abbrev=False)
    show.add_argument("--plot", type=Path, metavar="PNG")
    check = commands.add_parser(
        "check", help="measure the baseline's cells; 1 where they are worse", allow_abbrev=False
    )
    check.add_argument("--baseline", type=Path, default=baseline.FOLDER / "throughput_cpu.json")
    check.add_argument("--update", action="store_true", help="make it anew from this machine")
    check.add_argument("--timeout", type=float, default=300.0)
    return top


def setting_of(options: argparse.Namespace, folder: Path, sequence: int) -> tuple[Setting, dict[str, Any]]:
    """What a cell of this sequence runs with, and how results name its model."""
    model, named = options.model, {"model": options.model and Path(options.model).name}
    if model is None and not options.config:
        path = folder / "model"
        named = {"model": f"llama-random-{options.layers}x{options.hidden}"}
        if not (path / "config.json").exists():
            make_model(path, layers=options.layers, hidden=options.hidden)
        model = str(path)
    rows: dict[str, str] | None = None
    if options.rows is not None:
        rows = {name: str(options.rows.resolve()) for name in (*OBJECTIVES, CONFIG)}
    elif model is not None:
        # A gradient step for each row or more, whatever the batch: epochs repeat them.
        rows = write_rows(folder / f"rows-{sequence}", model, sequence=sequence, count=128)
    text = "text" if options.rows is None else None
    layers, accelerator = tuple(options.config), options.accelerator
    setting = Setting(
        layers=layers, model=model, rows=rows, row_format=text, accelerator=accelerator, steps=options.steps,
        warmup=options.warmup,
    )  # fmt: skip
    return setting, named


def measured(cell: Cell, setting: Setting, folder: Path, timeout: float) -> dict[str, Any]:
    """A cell's line, with the machine's own rate around it."""
    before = matmul(cell, setting)
    line = run_cell(cell, setting, folder, timeout=timeout)
    rate = statistics.fmean((before, matmul(cell, setting)))
    needed = line.get("flops_per_second_per_device")
    share = None if needed is None else round(needed / rate, 4)
    settings = {"steps": setting.steps, "warmup": setting.warmup}
    load = round(os.getloadavg()[0], 2)
    return {**line, **settings, "matmul_flops": float(f"{rate:.4g}"), "share_of_matmul": share, "load_average": load}


def matmul(cell: Cell, setting: Setting) -> float:
    """FLOP/s of a plain matrix product in the cell's type, by one rank alone."""
    import torch

    from benchmarks.peer_tools.machine import matmul_rate

    dtype = torch.float32 if cell.precision == "32-true" else torch.bfloat16
    return matmul_rate("cuda" if setting.accelerator == "gpu" else "cpu", dtype, size=1024, seconds=0.5)


def run(options: argparse.Namespace) -> int:
    """Measures a grid and records it."""
    data = "synthetic" if options.rows is None else options.rows.name
    cells = grid(
        objective=options.objective, adapter=options.adapter, sequence=options.sequence,
        micro_batch=options.micro_batch, ranks=options.ranks, strategy=options.strategy,
        accumulate=[options.accumulate], precision=[options.precision], data=[data],
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        for number, cell in enumerate(cells):
            setting, named = setting_of(options, Path(name), cell.sequence)
            line = measured(cell, setting, Path(name) / f"cell-{number}", options.timeout)
            save(line | named, options)
    return 0


def save(line: dict[str, Any], options: argparse.Namespace, name: str = NAME) -> dict[str, Any]:
    """Records and prints a line."""
    device = "cuda" if getattr(options, "accelerator", "cpu") == "gpu" else "cpu"
    line = record.append(name, {"stage": line["objective"], **line}, device=device, folder=options.results)
    words = [line["objective"], line["variant"], line["strategy"], f"{line['ranks']}x{line['nodes']}"]
    seen = line.get("error") or f"{line['step_seconds_median']:.3f} s a step, {line['peak_memory_gib']:.2f} GiB"
    print(" ".join([*words, line["outcome"], seen]), flush=True)
    return line


def check(options: argparse.Namespace) -> int:
    """Measures the baseline's cells; 1 where one is worse than is tolerated."""
    held = None if options.update else baseline.read(options.baseline)
    settings = SMALL if held is None else {name: held[name] for name in SMALL}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    lines = []
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        for number, cell in enumerate(BASELINE_CELLS if held is None else held["keys"]):
            setting, named = setting_of(parser().parse_args(["run", *words]), Path(name), cell.sequence)
            line = measured(cell, setting, Path(name) / f"cell-{number}", options.timeout) | named
            common = {"device": record.device_name(), "versions": record.versions(), "date": record.today()}
            lines.append(common | line)
            print(cell.strategy, cell.variant, line["outcome"], line.get("share_of_matmul"), flush=True)
    if held is None:
        import json

        options.baseline.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(baseline.make(lines, settings), indent=1) + "\n"
        options.baseline.write_text(text, encoding="utf-8")
        return 0
    worse = baseline.regressions(held, lines)
    print("\n".join(worse) or "no regression")
    return int(bool(worse))


def scale(options: argparse.Namespace) -> int:
    """Submits the runs one after another, and records them with their efficiencies."""
    base = Cell(
        strategy=options.strategy, ranks=options.ranks, adapter=options.adapter, sequence=options.sequence,
        micro_batch=options.micro_batch, accumulate=options.accumulate, objective=options.objective,
        precision=options.precision, data="synthetic" if options.rows is None else options.rows.name,
    )  # fmt: skip
    top = options.folder.resolve() / record.today().replace(":", "")
    setting, named = setting_of(options, top, options.sequence)
    lines: list[dict[str, Any]] = []
    for cell in scaling.cells(base, options.nodes, options.kind):
        folder = top / f"nodes-{cell.nodes}"
        state = scaling.await_job(
            scaling.submit(cell, setting, folder, options.sbatch, options.cluster), options.timeout
        )
        facts = {name: getattr(cell, name) for name in Cell.__dataclass_fields__}
        lines.append({**facts, "variant": cell.variant, "kind": options.kind, **scaling.result(cell, folder, state)})
    for line, efficiency in zip(lines, scaling.efficiencies(lines)):
        save({**line, **named, "efficiency": efficiency}, options, "scaling")
        print(f"  efficiency {efficiency}")
    return int(any(line["outcome"] != "ok" for line in lines))


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.command in ("run", "scaling") and not 0 <= options.warmup < options.steps:
        parser().error(f"--warmup {options.warmup} leaves none of --steps {options.steps}")
    if options.command == "report":
        lines = record.read(NAME, options.results)
        print(report.rendered(lines))
        if options.plot:
            report.plot(lines, options.plot)
        return 0
    return {"run": run, "check": check, "scaling": scale}[options.command](options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as mistake:
        sys.exit(f"benchmarks.throughput: error: {mistake}")
