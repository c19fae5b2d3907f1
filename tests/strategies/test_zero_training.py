"""ZeRO on two real gloo ranks against plain training of one process."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.strategies import scenarios
from tests.strategies import training as ranked

CASES = [(stage, accumulate) for stage in (0, 1, 2, 3) for accumulate in (2, 4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, model_folder):
    untied = tiny.save_folder(tmp_path_factory.mktemp("untied"), tokenizer, tie=False)
    return {"tied": str(model_folder), "untied": str(untied)}


@pytest.fixture(scope="module")
def training(tmp_path_factory, folders):
    out = tmp_path_factory.mktemp("training")
    args = {"folders": folders, "out": str(out), "micro_steps": 5, "epochs": 2}
    return out, run_ranks("tests.strategies.training:training", 2, args, timeout=280)[0]


@pytest.mark.parametrize(("stage", "accumulate"), CASES)
def test_trap_scale_0_1_accumulation_is_divided_once(training, folders, stage, accumulate):
    """Lightning and the engine each divided by the number of accumulated micro-batches (Lightning #6170)."""
    out, results = training
    model, losses, norms = scenarios.reference(folders["tied"], micro_steps=5, accumulate=accumulate, epochs=2)
    result = results["parity"][f"{stage}-{accumulate}"]
    got = torch.load(out / f"{stage}-{accumulate}.pt")
    assert scenarios.relative_error(got, model, scenarios.build(folders["tied"])) < 1e-5
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    assert result["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize(("stage", "accumulate"), CASES)
def test_trap_scale_1_2_epochs_that_do_not_divide_do_not_drift(training, stage, accumulate):
    """Five micro-batches an epoch: the short last window is a step, and the engine counts as the trainer does."""
    steps = 2 * -(-5 // accumulate)
    result = training[1]["parity"][f"{stage}-{accumulate}"]
    assert (result["steps"], result["engine_steps"]) == (steps, steps)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_trap_scale_1_2_a_loader_without_batch_size_is_left_alone(training, stage):
    """The stock strategy reads ``loader.batch_sampler.batch_size``, and the loaders here have no batch sampler."""
    config = training[1]["parity"][f"{stage}-2"]["config"]
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.0
    assert "auto" not in str(config)


@pytest.mark.parametrize("name", ranked.HEADS)
def test_zero_3_trains_a_head_that_is_read_outside_its_module(training, folders, name):
    out, results = training
    options = ranked.model_options(name)
    folder = folders[ranked.HEADS[name]["folder"]]
    model, losses, norms = scenarios.reference(folder, micro_steps=4, accumulate=2, epochs=2, **options)
    got = torch.load(out / f"{name}.pt")
    assert scenarios.relative_error(got, model, scenarios.build(folder, **options)) < 1e-5
    assert results["heads"][name]["losses"] == pytest.approx(losses, rel=1e-5)
    assert results["heads"][name]["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name", ranked.HEADS)
def test_zero_3_holds_the_head_in_the_step_and_releases_it_after(training, name):
    result = training[1]["heads"][name]
    assert result["sizes_before"] == 0
    assert all(seen == {"head": 0, "largest": 0} for seen in result["seen"])
    if name.endswith("small"):  # held around the loss alone
        assert (result["held_before_loss"], result["head_inside"]) == (0, 0)
    else:
        assert result["head_inside"] == result["head_size"]


@pytest.mark.parametrize("name", [name for name in ranked.HEADS if "lora" in name])
def test_trap_scale_0_3_lora_starts_from_zero_under_zero_3(training, folders, name):
    """The stock context cut the new matrices before PEFT filled B with zeros, and the model started off its base."""
    folder = folders[ranked.HEADS[name]["folder"]]
    # A quantised base alone has nothing to train: there the reference is the adapted model of one process.
    options = {**ranked.model_options(name), "lora": "nf4" in name}
    base = scenarios.reference(folder, micro_steps=4, accumulate=2, epochs=1, **options)[1][0]
    assert training[1]["heads"][name]["lora_b_is_zero"]
    assert training[1]["heads"][name]["losses"][0] == pytest.approx(base, rel=1e-6)


@pytest.mark.parametrize("name", ["tied", "untied-lora"])
def test_a_consolidated_state_dict_has_the_names_shapes_and_ties_of_the_model(training, folders, name):
    out, results = training
    options = ranked.model_options(name)
    model = scenarios.build(folders[ranked.HEADS[name]["folder"]], **options)
    got = torch.load(out / f"{name}.pt")
    assert {key: tensor.shape for key, tensor in got.items()} == {k: t.shape for k, t in model.state_dict().items()}
    trained = [key for key, p in model.state_dict(keep_vars=True).items() if p.requires_grad]
    assert results["heads"][name]["trainable_names"] == sorted(trained)
    if name == "tied":
        assert got["lm_head.weight"].equal(got["model.embed_tokens.weight"])
