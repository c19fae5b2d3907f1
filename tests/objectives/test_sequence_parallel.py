"""Rows that ranks share: the update, the order of the data, resuming and what is counted are as on one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ptl.data.progress import Position
from ptl.models.spec import ModelSpec
from ptl.objectives.lora import LoRASFT
from ptl.objectives.sft import SFT
from tests.objectives import law, long_rows
from tests.objectives.test_law_1 import error
from tests.ranks import run_ranks

SHARED = [
    {"name": f"{strategy}-{k}", "strategy": strategy, "world_size": 2, "accumulate": k, "micro": 8 // k, "shared": 2}
    for strategy, k in (("ddp", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 1), ("zero3", 2))
]
SHARED += [
    {**SHARED[1], "name": "recompute", "recompute": True},
    {**SHARED[5], "name": "zero3-recompute", "recompute": True},
]
LORA = [
    {"name": f"lora-{s}", "strategy": s, "world_size": 2, "accumulate": 2, "micro": 4, "shared": 2, "lora": True}
    for s in ("ddp", "zero2", "zero3")
]
ALONE = {"name": "lora-alone", "strategy": "auto", "world_size": 1, "accumulate": 1, "micro": 8, "lora": True}
FOUR = [
    {"name": f"four-{strategy}", "strategy": strategy, "world_size": 4, "accumulate": 2, "micro": 2, "shared": 2}
    for strategy in ("ddp", "zero3")
]
"""Two groups of two ranks: each group reads its own half of a step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return law.make_folder(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def update(folder) -> tuple[np.ndarray, np.ndarray]:
    """Weights at the start, and what the obvious loop adds to them."""
    objective, _ = law.build(str(folder))
    objective.configure_model()
    state = objective.policy.state_dict(keep_vars=True).items()
    start = law.flat({name: tensor.detach() for name, tensor in state if tensor.requires_grad})
    return start, law.obvious(folder) - start


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("weights")
    args = {"folder": str(folder), "out": str(out), "cases": SHARED + LORA, "resume": True}
    return out, run_ranks("tests.objectives.long_rows:run", 2, args, timeout=280)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [case["name"] for case in SHARED])
def test_law_1_the_update_of_shared_rows_equals_the_obvious_loop(name, two, update):
    start, expected = update
    assert error(np.load(two[0] / f"{name}.npy") - start, expected) < 1e-5


@pytest.mark.timeout(900)
def test_law_1_the_update_of_an_adapter_is_the_same(two, folder):
    law.run(str(folder), str(two[0]), [ALONE])
    one = np.load(two[0] / "lora-alone.npy")
    for case in LORA:
        assert error(np.load(two[0] / f"{case['name']}.npy"), one) < 1e-5, case["name"]


@pytest.mark.timeout(900)
def test_law_6_a_run_goes_on_where_it_was_with_shared_rows_and_without(two, folder, update):
    """The position counts each row once, so that one process takes up what two that share have begun."""
    out, results = two
    start, expected = update
    assert all(result["begun"]["units"] == 8 for result in results)
    alone = long_rows.go_on(str(folder), str(out), "alone", world_size=1, shared=1)
    for name in ("shared", "alone"):
        assert error(np.load(out / f"{name}.npy") - start, expected) < 1e-5, name
    for result in results:
        assert result["rest"]["position"] == alone["position"]
        assert result["rest"]["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.timeout(900)
def test_tokens_of_a_shared_row_are_counted_once(two):
    for result in two[1]:
        assert result["rest"]["tokens"] == result["rest"]["all_tokens"]


@pytest.mark.timeout(900)
def test_law_1_two_groups_of_two_ranks_share_the_work_of_two(folder, tmp_path, update):
    start, expected = update
    args = {"folder": str(folder), "out": str(tmp_path), "cases": FOUR}
    run_ranks("tests.objectives.long_rows:run", 4, args, timeout=280)
    for case in FOUR:
        assert error(np.load(tmp_path / f"{case['name']}.npy") - start, expected) < 1e-5, case["name"]


def test_ranks_of_a_group_read_the_same_and_groups_what_as_many_ranks_would(folder):
    read = []
    for shared, ranks in ((2, 4), (1, 2)):
        for rank in range(ranks):
            _, data = law.build(str(folder), micro=2, shared=shared)
            data.trainer = SimpleNamespace(world_size=ranks, accumulate_grad_batches=2, global_rank=rank)  # pyright: ignore
            data.prepare()
            plan = data._train_plan(Position())
            read.append([plan.deal(step, data._rank).units.tolist() for step in range(plan.steps)])
    assert read[0] == read[1] == read[4] and read[2] == read[3] == read[5] and read[0] != read[2]


def test_what_cannot_share_rows_is_refused_with_the_key_to_change(folder):
    spec = ModelSpec(name="x")
    with pytest.raises(ValueError, match="sequence_parallel must be 1 or more, got 0"):
        SFT(spec, sequence_parallel=0)
    with pytest.raises(ValueError, match="sequence_parallel 2 needs policy.attention packed, got sdpa"):
        LoRASFT(ModelSpec(name="x", attention="sdpa"), sequence_parallel=2)
    with pytest.raises(ValueError, match=r"sequence_parallel 2 shares packed rows: set data\.layout to packed"):
        law.build(str(folder), layout="padded", shared=2)
    assert LoRASFT(spec, sequence_parallel=4).view.ranks == 4


@pytest.mark.parametrize("name", ["distillation", "dpo", "reward", "grpo", "ppo"])
def test_an_objective_that_cannot_share_rows_says_so(name, capsys):
    from ptl.trainer_cli import PTLCLI

    path = Path(__file__).resolve().parents[2] / f"configs/objective/{name}.yaml"
    with pytest.raises(SystemExit):
        PTLCLI(["fit", "-c", str(path), "--model.sequence_parallel", "2"])
    told = capsys.readouterr().err
    assert "sequence_parallel" in told and "Traceback" not in told
