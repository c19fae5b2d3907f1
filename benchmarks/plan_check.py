"""Peak memory that `ptl plan` predicts against what `ptl fit` is seen to take.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_check [--device cuda] [--case NAME ...] [--limit 0.15]

Each case is a real run of the real command in processes of its own: a Llama of 25 to 135 million random weights, made
in process from its config, a few optimizer steps on plain text, and the highest resident set (Linux ``VmHWM``) of
every rank. The plan sees the same ``config.json`` and options, never the measurement. One line a case is appended to
``benchmarks/results/plan_memory.json``; exit code 1 where a case is off by more than ``--limit``.

The libraries (interpreter, torch, Lightning, DeepSpeed) are a large share of a small run and would flatter the
comparison; hence the ``net`` columns, which leave that part out of both sides.

On a GPU the models are of 135 million and 1.5 billion weights, rows have 4,096 tokens, and what is compared is what
PyTorch's allocator reserved, as the run's own ``peak_memory_gib`` says, with the plan without the driver's share.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import record
from ptl.functional.memory_plan import LIBRARIES, memory_plan
from ptl.functional.model_size import model_size
from ptl.functional.plan_job import STRATEGIES, Job, Strategy
from ptl.functional.plan_rates import rates_of

MIB = 1 << 20
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
}
"""Of the runs. The last makes glibc give freed tensors back instead of keeping holes of up to 32 MiB in its heap, whose
size depends on the order of frees and not on the run that is planned; ``docs/plan.md`` says what they come to."""
STRATEGIES_BY_NAME = {strategy.name: strategy for strategy in (*STRATEGIES, Strategy("single"))}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run to measure, in the words of ``ptl plan``. ``strategy`` is ``single``, ``ddp``, ``zero1``, ...

    The second step has old gradients and states in memory, which makes it the highest; DDP makes its buckets anew in
    that one and has touched all of them in the third.
    """

    name: str
    strategy: str = "single"
    ranks: int = 1
    adapter: str = "full"
    layers: int = 12
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocab: int = 16384
    tie: bool = True
    sequence: int = 256
    micro_batch: int = 1
    accumulate: int = 1
    checkpointing: bool = False
    steps: int = 2
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


_SMALL: dict[str, Any] = {"layers": 30, "vocab": 49152, "sequence": 4096}
_LARGE: dict[str, Any] = {
    "layers": 28,
    "hidden": 1536,
    "intermediate": 8960,
    "heads": 12,
    "kv_heads": 2,
    "vocab": 151936,
    "sequence": 4096,
    "precision": "bf16-mixed",
}
GPU_CASES = (
    Case(name="gpu-full-fp32", **_SMALL),
    Case(name="gpu-full", **_SMALL, micro_batch=4, precision="bf16-mixed"),
    Case(name="gpu-lora", **_SMALL, adapter="lora:16", micro_batch=4, precision="bf16-mixed"),
    Case(name="gpu-zero2", **_SMALL, strategy="zero2", micro_batch=4, precision="bf16-mixed"),
    Case(name="gpu-zero3", **_SMALL, strategy="zero3", micro_batch=4, precision="bf16-mixed"),
    Case(name="gpu-large", **_LARGE),
    Case(name="gpu-large-checkpointing", **_LARGE, micro_batch=4, checkpointing=True),
    Case(name="gpu-large-lora", **_LARGE, adapter="lora:16", micro_batch=2),
)
CASES = (
    Case(name="full", layers=30, vocab=49152, sequence=256),
    Case(name="full-long", layers=8, sequence=1024),
    Case(name="full-checkpointing", layers=16, sequence=512, micro_batch=2, checkpointing=True),
    Case(name="lora", adapter="lora:16", layers=30, vocab=49152, sequence=256, micro_batch=2),
    Case(name="ddp", strategy="ddp", ranks=2, layers=24, sequence=128, steps=3),
    Case(name="zero1", strategy="zero1", ranks=2, layers=24, sequence=128),
    Case(name="zero2", strategy="zero2", ranks=2, layers=24, sequence=128),
    Case(name="zero3", strategy="zero3", ranks=2, layers=24, sequence=128),
    Case(name="zero2-offload", strategy="zero2-offload", layers=24, sequence=128),
)


def model_config(case: Case) -> dict[str, Any]:
    """The ``config.json`` of a case's model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "vocab_size": case.vocab,
        "tie_word_embeddings": case.tie,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def make_parts(folder: Path, case: Case, rows: int = 64) -> None:
    """Model folder (config and a byte-level tokenizer, no weights) and rows of ``sequence`` tokens each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(model_config(case)))
    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(model)
    with (folder / "text.jsonl").open("w") as file:
        for row in range(rows):
            words = f"row {row} of plain text "
            file.write(json.dumps({"text": (words * (case.sequence // len(words) + 2))[: case.sequence + 8]}) + "\n")


def run_config(case: Case, folder: Path, accelerator: str = "cpu") -> dict[str, Any]:
    """The whole configuration of a run, as ``ptl fit -c`` reads it."""
    policy: dict[str, Any] = {
        "name": str(folder / "model"),
        "random_init": True,
        "gradient_checkpointing": case.checkpointing,
    }
    if case.adapter != "full":
        policy["adapter"] = {"rank": int(case.adapter.split(":")[1])}
    trainer: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": case.ranks,
        "precision": case.precision,
        "max_steps": case.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": case.accumulate,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    if case.strategy == "ddp":
        trainer["strategy"] = "ddp"
    elif case.strategy.startswith("zero"):
        stage, _, offload = case.strategy.removeprefix("zero").partition("-")
        arguments: dict[str, Any] = {"stage": int(stage)}
        if offload:
            arguments |= {"offload_optimizer": True, "offload_parameters": int(stage) == 3}
        trainer["strategy"] = {"class_path": "ptl.strategies.deepspeed.ZeROStrategy", "init_args": arguments}
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "ptl.objectives.sft.SFT",
            "init_args": {"policy": policy, "optimizer": {"lr": 1e-4}},
        },
        "data": {
            "train": [{"path": str(folder / "text.jsonl"), "format": "text"}],
            "max_length": case.sequence,
            "truncation": "keep_start",
            "pack_to": case.sequence,
            "micro_batch_size": case.micro_batch,
            "preparation": {"deduplicate": False},
        },
        "checkpoint": {"save_top_k": 0},
        "export": {"merged": False, "adapter": False},
        "run": {"dir": str(folder / "run")},
        "throughput": {"warmup": 0},
        "trainer": trainer,
    }


def peaks(
    command: Sequence[str], log: Path, timeout: float, given: Mapping[str, str] = ENVIRONMENT
) -> tuple[int, dict[int, int]]:
    """Exit code of a command, and the most bytes that were resident in each of its processes, by process id."""
    env = {**given, **os.environ}
    seen: dict[int, int] = {}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
        end = time.monotonic() + timeout
        while process.poll() is None:
            for pid in _group(process.pid):
                seen[pid] = max(seen.get(pid, 0), _high_water(pid))
            if time.monotonic() > end:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.1)
    return process.returncode, seen


def _group(leader: int) -> list[int]:
    """The Python processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and b"ptl.cli" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _high_water(pid: int) -> int:
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    except OSError:
        return 0


def measure(case: Case, *, timeout: float = 600.0, device: str = "cpu") -> int:
    """Peak bytes of the fullest rank of a real run: resident, or reserved on a GPU.

    Raises:
        RuntimeError: the run failed, with the end of what it wrote.
    """
    import yaml

    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name)
        make_parts(folder, case)
        on_gpu = device == "cuda"
        settings = run_config(case, folder, "gpu" if on_gpu else "cpu")
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "ptl.cli", "fit", "-c", str(folder / "run.yaml")]
        given = {k: v for k, v in ENVIRONMENT.items() if not on_gpu or k != "DS_ACCELERATOR"}
        code, seen = peaks(command, folder / "log", timeout, given)
        if code:
            raise RuntimeError(f"case {case.name} failed:\n{(folder / 'log').read_text()[-3000:]}")
        if on_gpu:
            rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
            return int(max(row.get("throughput/peak_memory_gib", 0.0) for row in rows) * 2**30)
        return max(seen.values())


def predict(case: Case, device: str = "cpu") -> dict[str, float]:
    """Bytes by part, as ``ptl plan`` counts them from the case's config; on a GPU without what the driver takes."""
    on_gpu = device == "cuda"
    job = Job(
        model=model_size(model_config(case)),
        sequence=case.sequence,
        micro_batch=case.micro_batch,
        accumulate=case.accumulate,
        rank=None if case.adapter == "full" else int(case.adapter.split(":")[1]),
        weights="fp32",
        precision="bf16-mixed" if case.precision == "bf16-mixed" else "fp32",
        world=case.ranks,
        per_node=case.ranks,
        cuda=on_gpu,
        checkpointing="full" if case.checkpointing else "none",
    )
    rates = rates_of("h100" if on_gpu else "cpu")
    parts = memory_plan(job, STRATEGIES_BY_NAME[case.strategy], rates).device
    return {name: value for name, value in parts.items() if name != "driver and libraries"}


def compared(case: Case, measured: int, device: str = "cpu") -> dict[str, Any]:
    """The line of a case that is kept: MiB measured and planned, with and without the libraries."""
    parts = predict(case, device)
    planned = sum(parts.values())
    libraries = LIBRARIES if device == "cpu" else 0
    return {
        "stage": "plan",
        "variant": f"{case.adapter}-{'fp32' if case.precision == '32-true' else case.precision}",
        **asdict(case),
        "parameters": model_size(model_config(case)).parameters,
        "measured_mib": round(measured / MIB, 1),
        "planned_mib": round(planned / MIB, 1),
        "error": round(planned / measured - 1, 4),
        "net_error": round((planned - libraries) / (measured - libraries) - 1, 4),
        "parts_mib": {name: round(value / MIB, 1) for name, value in parts.items()},
    }


def main() -> int:
    names = [case.name for case in (*CASES, *GPU_CASES)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_check", description=__doc__)
    parser.add_argument("--case", action="append", choices=names, help="of these alone (default: all)")
    parser.add_argument("--limit", type=float, default=0.15, help="largest relative error (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    options = parser.parse_args()
    device, wrong = options.device, 0
    for case in CASES if device == "cpu" else GPU_CASES:
        if options.case and case.name not in options.case:
            continue
        found = compared(case, measure(case, timeout=options.timeout, device=device), device)
        line = record.append("plan_memory", found, device=device, folder=options.results)
        wrong += abs(line["error"]) > options.limit
        print(
            f"{case.name:<20} {line['parameters'] / 1e6:6.1f}M  measured {line['measured_mib']:6.0f} MiB  planned "
            f"{line['planned_mib']:6.0f}  error {line['error']:+.1%}  net {line['net_error']:+.1%}",
            flush=True,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
