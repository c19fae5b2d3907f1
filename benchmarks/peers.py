"""``ptl`` beside the library that most people would take instead, on the same model, rows and count of tokens.

``python -m benchmarks.peers --stage sft --adapter none --dtype fp32`` runs both sides in turn, each in a fresh process,
and adds one line to ``benchmarks/results/peers_<stage>.json``. Run it on a machine that does nothing else.
``python -m benchmarks.peers table`` prints what was recorded of all stages.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import peer_stages, record, report
from benchmarks.peer_tools.compare import Measured, Pair, check_same_work, compare, run_side
from ptl.functional.flops import peak_flops

STAGES = tuple(sorted(module.name for module in pkgutil.iter_modules(peer_stages.__path__)))


def stage_module(name: str) -> ModuleType:
    """The module of a stage, one of ``STAGES``."""
    return importlib.import_module(f"benchmarks.peer_stages.{name}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; the options of a stage are its module's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=STAGES, default="sft")
    stage = first.parse_known_args(argv)[0].stage
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", choices=STAGES, default="sft")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "bf16-mixed"), default="fp32", help="of the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", type=Path, default=Path("assets/smollm2-135m-instruct"), help="folder of `make demo`"
    )
    parser.add_argument(
        "--rows", type=Path, nargs="+", help="JSONL files of conversations; default assets/demo/*.jsonl"
    )
    parser.add_argument("--columns", nargs=2, metavar=("USER", "ASSISTANT"), help="of rows that have no `messages`")
    parser.add_argument("--tokens", type=int, nargs=2, default=(64, 512), help="shortest and longest row")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run, warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first steps of a run that are not timed")
    parser.add_argument("--batch-rows", type=int, default=8, help="rows of an optimizer step")
    parser.add_argument("--lr", type=float, help="default 2e-5, with LoRA 2e-4; constant")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0 for no clipping")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=record.core_count())
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one run may take")
    parser.add_argument("--only", choices=("ptl", "peer"), help="run one side once and print it; nothing is recorded")
    parser.add_argument("--profile", action="store_true", help="run ptl once under the profiler and print the shares")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    stage_module(stage).add_arguments(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.warmup < args.steps:
        parser.error(f"--warmup {args.warmup} leaves none of --steps {args.steps}")
    if args.pairs < 1:
        parser.error(f"--pairs must be 1 or more, got {args.pairs}")
    if args.profile and args.warmup < 1:
        parser.error("--profile starts after the warm-up: give --warmup 1 or more")
    if args.profile:
        args.only = "ptl"
    args.rows = args.rows or sorted(Path("assets/demo").glob("*.jsonl"))
    for path in (args.model / "config.json", *args.rows):
        if not path.exists():
            parser.error(f"{path} is not there: run `make demo`, which makes assets/, or give --model and --rows")
    if not args.rows:
        parser.error("no rows: run `make demo`, which makes assets/demo, or give --rows")
    return args


def show(side: str, run: Measured, warmup: int) -> None:
    seconds, cpu_seconds = run.seconds[warmup:], run.cpu_seconds[warmup:]
    words = (
        f"{side:<5} {sum(seconds) / len(seconds):8.3f} s/step",
        f"({sum(cpu_seconds) / len(seconds):.1f} CPU s)",
        f"{sum(run.useful_tokens[warmup:]) / sum(seconds):8.1f} useful tokens/s",
        f"{run.peak_bytes / 1e9:6.2f} GB ({run.start_bytes / 1e9:.2f} at the start)",
        "matmul " + ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in run.matmul_rates.items()) + " GFLOP/s",
        f"losses {[round(loss, 5) for loss in run.losses[:5]]}",
        f"first step {run.seconds[0]:.1f} s, process {run.process_seconds:.0f} s",
    )
    print(" ".join(words), flush=True)


def peer_name(stage: str) -> str:
    """The peer with its version.

    Raises:
        ValueError: it is not installed.
    """
    module = stage_module(stage)
    try:
        version = metadata.version(module.PEER_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"the peer is not installed: pip install -c constraints.txt {module.PEER_PACKAGE}") from error
    return f"{module.PEER_PACKAGE} {version} {module.PEER}"


def result(args: argparse.Namespace, spec: dict[str, Any], pairs: Sequence[Pair], peer: str) -> dict[str, Any]:
    """The line that is recorded, but for the common keys."""
    dtype = "fp32" if args.dtype == "fp32" else "bf16"
    adapter = {"none": "full"}.get(spec.get("adapter", "none"), spec.get("adapter"))
    engine = "" if spec.get("engine", "hf") == "hf" else spec["engine"]
    return {
        "stage": args.stage,
        "variant": "-".join(part for part in (adapter, args.dtype, engine) if part),
        "peer": peer,
        **compare(pairs, warmup=args.warmup, dtype=dtype, peak=peak_flops(record.device_name(args.device), dtype)),
        "model": args.model.name,
        "threads": args.threads,
        "batch_rows": args.batch_rows,
        **{
            key: spec[key]
            for key in ("rows_sha256", "mean_tokens", "student_layers", "answers", "share_prompt")
            if key in spec
        },
    }


def peer_specs(args: argparse.Namespace, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of the peer's sides is told; there are two where TRL runs with and without Liger."""
    both = getattr(args, "trl_liger", "off") == "both"
    return [{**spec, "trl_liger": liger} for liger in (False, True)] if both else [spec]


def keep(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Records a line and prints what it comes to."""
    line = record.append(f"peers_{args.stage}", found, device=args.device, folder=args.results)
    print(
        f"{line['peer']}: ratio {line['ratio']} memory_ratio {line['memory_ratio']} "
        f"largest difference of losses {line['losses']['largest_difference']}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["table"]:
        print(report.peers())
        return 0
    args = parse(words)
    stage = stage_module(args.stage)
    peer = peer_name(args.stage) if args.only != "ptl" else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = stage.make_spec(args, folder)
        settings: dict[str, Any] = {"threads": args.threads, "device": args.device, "timeout": args.timeout}
        if args.only:
            for told in peer_specs(args, spec) if args.only == "peer" else [spec]:
                run = run_side(args.stage, args.only, told, folder, **settings)
                show(args.only, run, args.warmup)
                for name, values in run.settings.get("profile", {}).items():
                    print(f"{name}: " + ", ".join(f"{key} {value:.1%}" for key, value in values.items()))
            return 0
        theirs = peer_specs(args, spec)
        pairs: list[list[Pair]] = [[] for _ in theirs]
        for left in reversed(range(args.pairs)):
            ours = run_side(args.stage, "ptl", spec, folder, **settings)
            show("ptl", ours, args.warmup)
            for told, found in zip(theirs, pairs):
                run = run_side(args.stage, "peer", told, folder, **settings)
                show("peer", run, args.warmup)
                found.append(Pair(ptl=ours, peer=run))
                check_same_work(found[-1])
                if not left:
                    name = peer + (" with Liger" if told.get("trl_liger") else "")
                    keep(args, result(args, spec, found, name))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as mistake:
        sys.exit(f"benchmarks.peers: error: {mistake}")
