"""Law 1: the update is the same however the window is cut, whatever carries it. SGD, because Adam hides scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.objectives import law
from tests.ranks import run_ranks

ONE = [
    {"name": "1x1x8", "strategy": "auto", "world_size": 1, "accumulate": 1, "micro": 8},
    {"name": "1x4x2", "strategy": "auto", "world_size": 1, "accumulate": 4, "micro": 2},
    {"name": "1x8x1", "strategy": "auto", "world_size": 1, "accumulate": 8, "micro": 1},
    {"name": "padded-1x4x2", "strategy": "auto", "world_size": 1, "accumulate": 4, "micro": 2, "layout": "padded"},
    {"name": "lora-1x1x8", "strategy": "auto", "world_size": 1, "accumulate": 1, "micro": 8, "lora": True},
]
TWO = [
    {"name": f"{strategy}-2x{k}x{m}", "strategy": strategy, "world_size": 2, "accumulate": k, "micro": m}
    for strategy in ("ddp", "zero1", "zero2", "zero3")
    for k, m in ((2, 2), (1, 4))
]
TWO += [
    {"name": f"{s}-padded", "strategy": s, "world_size": 2, "accumulate": 2, "micro": 2, "layout": "padded"}
    for s in ("ddp", "zero3")
]
TWO += [
    {"name": f"lora-{s}", "strategy": s, "world_size": 2, "accumulate": 2, "micro": 2, "lora": True}
    for s in ("ddp", "zero2", "zero3")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return law.make_folder(tmp_path_factory.mktemp("law1"))


@pytest.fixture(scope="module")
def start(folder) -> np.ndarray:
    objective, _ = law.build(str(folder))
    objective.configure_model()
    return law.flat({k: v.detach() for k, v in objective.policy.state_dict(keep_vars=True).items() if v.requires_grad})


@pytest.fixture(scope="module")
def reference(folder) -> np.ndarray:
    return law.obvious(folder)


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("weights")
    run_ranks("tests.objectives.law:run", 1, {"folder": str(folder), "out": str(out), "cases": ONE}, timeout=240)
    run_ranks("tests.objectives.law:run", 2, {"folder": str(folder), "out": str(out), "cases": TWO}, timeout=280)
    return out


def error(update: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(update - expected) / np.linalg.norm(expected))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [c["name"] for c in ONE + TWO if not c.get("lora")])
def test_law_1_the_update_equals_the_obvious_loop(name, results, reference, start):
    assert error(np.load(results / f"{name}.npy") - start, reference - start) < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [c["name"] for c in TWO if c.get("lora")])
def test_law_1_the_update_of_an_adapter_is_the_same(name, results):
    one, other = np.load(results / "lora-1x1x8.npy"), np.load(results / f"{name}.npy")
    assert one.shape == other.shape and error(other, one) < 1e-5


@pytest.mark.timeout(600)
def test_law_1_a_mean_of_means_would_be_another_update(folder, reference, start):
    """The rows are uneven enough that the usual mistake is seen: the control of the tests above."""
    _, data = law.build(str(folder))
    data.prepare()
    weights = [float(batch.loss_mask.sum()) for batch in data.train_dataloader()]
    assert max(weights) > 2 * min(weights)
