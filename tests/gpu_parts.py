"""What tests on a GPU share: the mark, exact products, fits in this process, and ``ptl fit`` in one of its own.

All take the device, so that everything but the kernels can be run on a CPU as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import EXTENSIONS, ROOT

SECONDS = 240.0
"""A fit in a process of its own takes at most so long."""


def on_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test as one of a CUDA device, and skips it where there is none."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices are made in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of ``expected``, in float64."""
    exact = expected.detach().double().cpu()
    return float((got.detach().double().cpu() - exact).norm() / exact.norm())


def fit_here(objective: Any, data: Any, folder: Path, accelerator: str, **options: Any) -> list[float]:
    """The loss of each optimizer step of a fit in this process."""
    from tests.objectives import law, rl

    watch = rl.watch("train/loss")
    with exact_products():
        trainer = law.trainer_of(
            str(folder), "auto", 1, options.pop("accumulate", 1), accelerator=accelerator, callbacks=[watch], **options
        )
        trainer.fit(objective, datamodule=data)
    assert trainer.strategy.root_device.type == ("cpu" if accelerator == "cpu" else "cuda")
    assert len(watch.rows) == trainer.global_step > 0
    return [loss for (loss,) in watch.rows]


def fit_by_command(run: Path, accelerator: str, arguments: list[str]) -> list[float]:
    """The losses that ``ptl fit`` has recorded on one device, started as a user starts it."""
    from ptl.callbacks.jsonl import METRICS_FILE, read_metrics

    foreign = ("SLURM", "PTL_", "MASTER_", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "RANK", "TORCHELASTIC")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    # DeepSpeed takes the CPU in tests; what it compiles for a GPU is kept apart from what it compiled for the CPU.
    environment |= {
        "DS_ACCELERATOR": "cuda",
        "TORCH_EXTENSIONS_DIR": tempfile.gettempdir() + f"/ptl-cuda-{os.getuid()}",
    }
    if accelerator == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    environment |= {"PTL_CACHE": str(run.parent / f"{run.name}-cache"), "PTL_TRACEBACK": "1", "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "ptl.cli", "fit", "--run.dir", str(run), *arguments),
        *("--trainer.accelerator", accelerator, "--trainer.devices", "1", "--trainer.log_every_n_steps", "1"),
        *("--trainer.enable_progress_bar", "false", "--data.preparation.num_proc", "1"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["world_size"] == 1
    return [row["train/loss"] for row in read_metrics(run / METRICS_FILE) if "train/loss" in row]
