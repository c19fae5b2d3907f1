"""Saving, resuming, resuming on another number of ranks, and being killed, on real gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptl.strategies.checkpoints import MARKER, UNIVERSAL, latest_complete, read_record
from tests.ranks import RanksFailedError, run_ranks
from tests.strategies import resume, scenarios

HERE = "tests.strategies.resume"
NAMES = list(resume.RUNS)
ALONE = ["0", "2", "3", "3-bf16", "3-lora"]
"""What goes from two ranks to one; each costs a conversion in a process of its own."""
BACK = ["2", "3-lora"]
"""What goes back from one rank to two."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def saved(out, tmp_path_factory, model_folder):
    foreign = tmp_path_factory.mktemp("elsewhere") / "foreign.ckpt"
    args = {"folder": str(model_folder), "out": str(out), "names": NAMES, "foreign": str(foreign)}
    return run_ranks(f"{HERE}:saving", 2, args, timeout=200)[0]


@pytest.fixture(scope="module")
def alone(out, saved, model_folder):
    """One rank goes on from what two have saved, and saves."""
    args = {"folder": str(model_folder), "out": str(out), "names": ALONE, "back": BACK}
    return run_ranks(f"{HERE}:other_ranks", 1, args, timeout=200)[0]


@pytest.fixture(scope="module")
def together(out, alone, model_folder):
    """Two ranks go on from what one has saved."""
    args = {"folder": str(model_folder), "out": str(out / "back"), "names": BACK}
    return run_ranks(f"{HERE}:reshaped", 2, args, timeout=200)[0]


def weights_differ(folder: Path, one: str, other: str) -> float:
    first, second = torch.load(folder / f"{one}.pt"), torch.load(folder / f"{other}.pt")
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_law_6_resuming_on_as_many_ranks_is_exact(out, saved, name):
    result = saved["exact"][name]
    assert result["steps"] == [3, 6]
    assert len(result["whole"]) == 6 and result["resumed"] == result["whole"][3:]
    assert weights_differ(out, f"{name}-whole", f"{name}-resumed") == 0.0


@pytest.mark.parametrize("name", ALONE)
def test_law_6_resuming_two_ranks_work_on_one(out, saved, alone, name):
    exact = 5e-3 if "bf16" in name else 1e-6
    assert alone["reshaped"][name]["losses"] == pytest.approx(saved["exact"][name]["whole"][3:], rel=exact)
    assert (out / f"{name}.ckpt" / UNIVERSAL / MARKER).is_file() == (name != "0")


@pytest.mark.parametrize("name", BACK)
def test_law_6_resuming_one_ranks_work_on_two(saved, together, name):
    assert together[name]["losses"] == pytest.approx(saved["exact"][name]["whole"][3:], rel=1e-6)


@pytest.mark.parametrize("name", ALONE)
def test_a_checkpoint_evaluates_on_any_number_of_ranks(out, saved, alone, model_folder, name):
    """Also where the base of an adapter is not in the checkpoint, which DeepSpeed's own loading at stage 3 needs."""
    options = {"lora": True} if "lora" in name else {}
    model = scenarios.build(str(model_folder), **options)
    model.load_state_dict(torch.load(out / f"{name}-saved.pt"))
    expected = scenarios.evaluate(model)
    assert alone["reshaped"][name]["metric"] == pytest.approx(expected, rel=5e-3 if "bf16" in name else 1e-5)


@pytest.mark.parametrize("name", ["2-lora", "3-lora", "3-qlora"])
def test_trap_scale_1_3_a_frozen_base_is_not_in_a_checkpoint(out, saved, name):
    """Stock it is written at every save, and leaving it out makes the resume fail unless loading is not strict."""
    record = read_record(out / f"{name}.ckpt")
    assert record.trainable and all("lora_" in parameter for parameter in record.trainable)
    files = sorted((out / f"{name}.ckpt").rglob("*model_states.pt"))
    assert files
    for file in files:
        state = torch.load(file, weights_only=False)
        assert all("lora_" in key for key in state["module"])
        assert not state.get("frozen_param_fragments")


def test_a_record_says_what_was_saved(out, saved):
    record = read_record(out / "3.ckpt")
    assert (record.world_size, record.stage, record.precision) == (2, 3, "32-true")
    assert record.global_step == 3
    assert record.optimizer_state == ["exp_avg", "exp_avg_sq", "step"]
    assert record.trainable["policy.model.norm.weight"] == [32]
    assert any(name.endswith("optim_states.pt") for name in record.files)


REFUSALS = {
    "stage": "saved with ZeRO stage 2, this run has stage 1: set trainer.strategy.init_args.stage to 2",
    "precision": "saved with precision 'bf16-true', this run has '32-true': set trainer.precision to 'bf16-true'",
    "adapter": "it was made with another model or adapter (model.policy)",
    "missing": "none.ckpt; the newest whole checkpoint beside it is",
    "foreign": "is outside this run",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, name):
    assert REFUSALS[name] in saved["refusals"][name]


def test_a_foreign_checkpoint_loads_when_vouched_for(saved):
    assert saved["refusals"]["vouched"] == "3"


def test_an_optimizer_that_cannot_be_cut_anew_says_how_many_ranks_it_needs(alone):
    assert "resume with 2" in alone["sgd"]


def test_lightnings_callback_keeps_links_and_removes(out, saved):
    assert saved["callback"] == {"steps": 6, "resumed_losses": 3}
    names = sorted(path.name for path in (out / "kept").iterdir())
    assert names == ["last.ckpt", "step=5.ckpt", "step=6.ckpt"]
    assert (out / "kept" / "last.ckpt").is_symlink()
    assert latest_complete(out / "kept") == out / "kept" / "step=6.ckpt"


def test_law_6_a_rank_killed_while_it_saves_leaves_whole_checkpoints_only(tmp_path, model_folder):
    """Stock, the half-written folder has the final name and passes Lightning's own check."""
    args = {"folder": str(model_folder), "out": str(tmp_path), "stage": 3}
    with pytest.raises(RanksFailedError):
        run_ranks(f"{HERE}:killed", 2, {**args, "after": 3}, timeout=100)
    partial = tmp_path / ".step=3.ckpt.partial"
    assert partial.exists() and not (partial / MARKER).exists()
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]
    newest = latest_complete(tmp_path)
    assert newest == tmp_path / "step=2.ckpt"
    result = run_ranks(f"{HERE}:goes_on", 2, {**args, "ckpt": str(newest)}, timeout=100)[0]
    assert result["steps"] == 6
