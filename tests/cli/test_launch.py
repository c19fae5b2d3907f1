"""``ptl fit`` on several devices of one machine, without srun: Lightning or torchrun starts the ranks."""

from __future__ import annotations

import json
import os

import pytest

from ptl.callbacks.jsonl import METRICS_FILE, read_metrics
from tests import forks
from tests.objectives import law
from tests.ranks import EXTENSIONS, ROOT, compile_extensions

ZERO = ["--trainer.strategy", "ptl.strategies.deepspeed.ZeROStrategy", "--trainer.strategy.stage", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return law.make_folder(tmp_path_factory.mktemp("launch"))


def fit(folder, run, devices, *more, start=("-m", "ptl.cli")):
    """The losses of a run, and what it recorded of itself; the ranks that it starts are processes as any user's."""
    command = [
        *(*start, "fit", "--model", "ptl.objectives.sft.SFT"),
        *("--model.policy.name", f"{folder}/model", "--data.train", json.dumps([{"path": f"{folder}/rows.jsonl"}])),
        *("--data.max_length", "256", "--data.preparation.num_proc", "1", "--run.dir", str(run)),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.devices", str(devices)),
        *("--trainer.accumulate_grad_batches", str(4 // devices), "--trainer.max_steps", "3"),
        *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false", *more),
    ]
    foreign = ("SLURM", "PTL_", "MASTER_", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "RANK", "TORCHELASTIC")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "PTL_CACHE": f"{folder}/cache",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "OMP_NUM_THREADS": "1",
    }
    forks.run(command, environment, cwd=ROOT, timeout=200, check=True)
    rows = [row["train/loss"] for row in read_metrics(run / METRICS_FILE) if "train/loss" in row]
    return rows, json.loads((run / "environment.json").read_text())


@pytest.fixture(scope="module")
def alone(folder):
    losses, environment = fit(folder, folder / "alone", 1)
    assert environment["world_size"] == 1 and len(losses) == 3
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [["--trainer.strategy", "ddp"], ZERO], ids=["ddp", "zero2"])
def test_law_1_ranks_that_lightning_starts_train_as_one_process(folder, alone, tmp_path, strategy):
    """Such a rank must not wait for a meeting that the process which started it does not come to."""
    compile_extensions()
    losses, environment = fit(folder, tmp_path / "run", 2, *strategy)
    assert environment["world_size"] == 2
    assert losses == pytest.approx(alone, rel=1e-5)


def test_law_1_ranks_that_torchrun_starts_train_as_one_process(folder, alone, tmp_path):
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ptl.cli")
    losses, environment = fit(folder, tmp_path / "run", 2, "--trainer.strategy", "ddp", start=start)
    assert environment["world_size"] == 2
    assert losses == pytest.approx(alone, rel=1e-5)
