"""``ptl fit`` on a GPU records the losses of the same command on the CPU, whatever strategy carries it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu_parts import fit_by_command, on_gpu
from tests.objectives import law

STEPS = 5
FP32, BF16 = ("--trainer.precision", "32-true"), ("--trainer.precision", "bf16-mixed")
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], float]] = {
    "fp32": (("-c", "configs/trainer/gpu.yaml"), FP32, 1e-4),
    "bf16-mixed": (("-c", "configs/trainer/gpu.yaml"), BF16, 2e-2),
    "zero2": (("-c", "configs/trainer/zero2.yaml"), FP32, 1e-4),
    "zero3": (("-c", "configs/trainer/zero3.yaml"), FP32, 1e-4),
}
"""Layer of the trainer, precision, and how far a loss may be from the CPU's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return law.make_folder(tmp_path_factory.mktemp("gpu-fits"))


def fit(folder: Path, run: Path, accelerator: str, layer: tuple[str, ...], precision: tuple[str, ...]) -> list[float]:
    """Losses of five steps of AdamW, clipped, four packs a step."""
    rows = json.dumps([{"path": f"{folder}/rows.jsonl"}])
    arguments = [
        *("-c", "configs/base.yaml", "-c", "configs/objective/sft.yaml", *layer, *precision),
        *("--model.policy.name", f"{folder}/model", "--data.train", rows, "--data.max_length", "256"),
        *("--model.optimizer.lr", "1e-2", "--trainer.accumulate_grad_batches", "4", "--trainer.max_steps", str(STEPS)),
    ]
    return fit_by_command(run, accelerator, arguments)


@pytest.fixture(scope="module")
def alone(folder) -> list[float]:
    losses = fit(folder, folder / "cpu", "cpu", ("-c", "configs/trainer/cpu.yaml"), FP32)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1  # the weights do change
    return losses


def check_losses(folder: Path, run: Path, accelerator: str, case: str, alone: list[float]) -> None:
    layer, precision, tolerance = CASES[case]
    assert fit(folder, run, accelerator, layer, precision) == pytest.approx(alone, abs=tolerance)


@on_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_a_fit_on_a_gpu_has_the_losses_of_the_cpu(folder, alone, tmp_path, case):
    """ZeRO's ranks meet over NCCL; its float32 is float32, as nothing here turns TF32 on."""
    check_losses(folder, tmp_path / "run", "gpu", case, alone)
