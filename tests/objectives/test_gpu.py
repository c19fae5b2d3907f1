"""Fits on a GPU: losses of the CPU where nothing is drawn, finite ones where answers are sampled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.gpu_parts import fit_here, on_gpu
from tests.objectives import kd, law, ranking, rl

CPU_TOO: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (law, {}),
    "distillation": (kd, {}),
    "distillation-hidden-ce": (kd, {"kind": "jsd", "temperature": 2.0, "ce": 0.3, "hidden": True}),
    "reward": (ranking, {"objective": "reward"}),
    "reward-whole": (ranking, {"objective": "reward", "share": False}),
    "dpo": (ranking, {"objective": "dpo", "reference": "reference"}),
}
"""Where models and rows come from, and what to train; SGD, because Adam hides scales."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[Any, Path]:
    return {parts: parts.make_folder(tmp_path_factory.mktemp("gpu")) for parts in (law, kd, ranking, rl)}


def losses_of(folder: Path, case: str, accelerator: str) -> list[float]:
    parts, options = CPU_TOO[case]
    L.seed_everything(7, verbose=False)
    objective, data = parts.build(str(folder), micro=2, **options)
    objective.configure_model()  # before the fit, which would draw a projection's weights on the device
    return fit_here(objective, data, folder, accelerator, accumulate=4, precision="32-true")


def check_losses(folders: dict[Any, Path], case: str, accelerator: str) -> None:
    folder = folders[CPU_TOO[case][0]]
    expected = losses_of(folder, case, "cpu")
    assert len(expected) == law.STEPS and len(set(expected)) == law.STEPS
    assert losses_of(folder, case, accelerator) == pytest.approx(expected, abs=1e-4)


def check_sampling(folder: Path, accelerator: str, precision: Any) -> None:
    """Two steps of GRPO, each on answers that the policy has just sampled, held to a reference."""
    L.seed_everything(7, verbose=False)
    objective, data = rl.build(str(folder), micro=2, kl=0.1, reference="reference", lr=1e-3, sgd=False)
    objective.configure_model()
    before = [p.detach().clone().cpu() for p in objective.policy.parameters()]
    losses = fit_here(objective, data, folder, accelerator, accumulate=4, precision=precision, max_steps=2)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    after = [p.detach().cpu() for p in objective.policy.parameters()]
    assert all(bool(p.isfinite().all()) for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after))


@on_gpu
@pytest.mark.parametrize("case", CPU_TOO)
def test_an_objective_on_a_gpu_has_the_losses_of_the_cpu(folders, case):
    check_losses(folders, case, "gpu")


@on_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_grpo_samples_and_trains_on_a_gpu(folders, precision):
    check_sampling(folders[rl], "gpu", precision)
