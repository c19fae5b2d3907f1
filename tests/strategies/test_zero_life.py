"""Precision, clipping, skipped steps, evaluation, generation and offload under ZeRO on two real gloo ranks."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.strategies import life as ranked
from tests.strategies import scenarios

CLIP = 0.5
BF16 = [f"{name}-{stage}" for name, stage in ranked.BF16]


@pytest.fixture(scope="module")
def life(tmp_path_factory, model_folder):
    out = tmp_path_factory.mktemp("life")
    args = {"folder": str(model_folder), "out": str(out), "limit": CLIP}
    return out, run_ranks("tests.strategies.life:life", 2, args, timeout=280)


# ---- precision ----


@pytest.mark.parametrize("name", BF16)
def test_bf16_trains_near_fp32(life, model_folder, name):
    out, results = life
    folder = str(model_folder)
    model, losses, norms = scenarios.reference(folder, micro_steps=8, accumulate=4, epochs=1)
    result = results[0]["precision"][name]
    assert result["dtypes"][1] == "torch.bfloat16"
    assert result["losses"] == pytest.approx(losses, rel=5e-3)
    assert result["norms"] == pytest.approx(norms, rel=2e-2)
    got = torch.load(out / "precision" / f"{name}.pt")
    # What is saved is the bf16 copy of the fp32 master weights, whose last bits are not there.
    for key, tensor in model.state_dict().items():
        assert got[key].sub(tensor).abs().max() <= tensor.abs().max() * 2**-7, key


@pytest.mark.parametrize("stage", [2, 3])
def test_autocast_over_fp32_weights_is_a_config_away(life, model_folder, stage):
    _, losses, norms = scenarios.reference(str(model_folder), micro_steps=8, accumulate=4, epochs=1)
    result = life[1][0]["precision"][f"autocast-{stage}"]
    assert result["dtypes"][1] == "torch.float32"
    assert result["losses"] == pytest.approx(losses, rel=5e-3) and result["losses"] != pytest.approx(losses, rel=1e-7)
    assert result["norms"] == pytest.approx(norms, rel=2e-2)


@pytest.mark.parametrize("name", BF16)
def test_trap_scale_0_9_floats_of_a_batch_are_not_cast(life, name):
    """The stock plugin rounds every floating tensor of a batch to bf16: log-probabilities, rewards, loss weights."""
    result = life[1][0]["precision"][name]
    assert result["dtypes"][0] == "torch.float32"
    assert result["plugin"] == "ZeROPrecision"
    assert result["precision"] == name.rpartition("-")[0]


@pytest.mark.parametrize("name", BF16)
def test_rotary_frequencies_keep_their_fp32_values(life, model_folder, name):
    """Lightning's ``module.to(bf16)`` and ``deepspeed.zero.Init`` both round them, and positions multiply the error."""
    expected = {key: buffer for key, buffer in scenarios.build(str(model_folder)).named_buffers() if "inv_freq" in key}
    got = torch.load(life[0] / "precision" / f"{name}-buffers.pt")
    assert set(got) == set(expected) and len(got) == 2
    for key, buffer in expected.items():
        assert got[key].dtype == torch.float32
        assert got[key].equal(buffer)


@pytest.mark.parametrize("stage", ["1", "3"])
def test_skipped_steps_are_counted_and_stop_a_run_when_they_go_on(life, stage):
    """bf16 checks gradients by default and skips a step that is not finite, in silence."""
    result = life[1][0]["precision"]["skipped"][stage]
    assert (result["skipped"], result["steps"], result["finite"]) == (2, 4, True)
    assert "2 optimizer steps in a row were skipped" in result["stopped"]


@pytest.mark.parametrize(("source", "stage"), ranked.CLIPPED)
def test_clipping_with_accumulation_is_that_of_one_process(life, model_folder, stage, source):
    """Stock, the norm was too small by the number of accumulated micro-batches, and clipping too loose by it."""
    out, results = life
    folder = str(model_folder)
    model, _, norms = scenarios.reference(folder, micro_steps=4, accumulate=2, epochs=1, clip=CLIP)
    assert min(norms) > CLIP
    got = torch.load(out / "clipping" / f"{source}-{stage}.pt")
    assert scenarios.relative_error(got, model, scenarios.build(folder)) < 1e-5
    assert results[0]["clipping"][f"{source}-{stage}"]["norms"] == pytest.approx(norms, rel=1e-4)


# ---- evaluation and generation ----


@pytest.mark.parametrize("stage", ["2", "3"])
def test_trap_scale_1_2_fit_validate_test_fit_with_hooks_kept(life, model_folder, stage):
    """The stock strategy removes every hook of every module before evaluating (Lightning #15247)."""
    out, results = life
    result = results[0]["evaluation"][stage]
    folder = str(model_folder)
    half, _, _ = scenarios.reference(folder, micro_steps=2, accumulate=1, epochs=1)
    whole, losses, _ = scenarios.reference(folder, micro_steps=2, accumulate=1, epochs=2)
    assert result["val"] == pytest.approx(scenarios.evaluate(half), rel=1e-5)
    assert result["test"] == result["val"]
    assert result["fresh"] == pytest.approx(scenarios.evaluate(scenarios.build(folder)), rel=1e-5)
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    got = torch.load(out / "evaluation" / f"fit-{stage}.pt")
    assert scenarios.relative_error(got, whole, scenarios.build(folder)) < 1e-5
    assert (result["calls_in_evaluation"], result["calls"]) == (4, 6)


def test_trap_scale_0_3_embeddings_can_grow_under_zero_3(life, model_folder):
    """The stock context crashes in ``resize_token_embeddings``."""
    got = torch.load(life[0] / "resized.pt")
    base = scenarios.build(str(model_folder)).state_dict()
    assert got["model.embed_tokens.weight"].shape == (ranked.ROWS, 32)
    assert got["model.embed_tokens.weight"][:366].equal(base["model.embed_tokens.weight"])
    assert got["lm_head.weight"].equal(got["model.embed_tokens.weight"])
    assert len(life[1][0]["resized"]["losses"]) == 1


@pytest.mark.parametrize("stage", ["2", "3"])
def test_generating_between_steps_changes_nothing(life, model_folder, stage):
    """Each rank runs its own number of forward passes, which must not wait for the other's."""
    _, losses, _ = scenarios.reference(str(model_folder), micro_steps=4, accumulate=1, epochs=2)
    first, second = (result["generation"] for result in life[1])
    assert first[stage]["losses"] == pytest.approx(losses, rel=1e-5)
    assert len(second[stage]["tokens"]) > len(first[stage]["tokens"]) > 0
    assert second["3"]["tokens"] == second["2"]["tokens"]
    assert (first["3"]["size_after"], first["2"]["size_after"] > 0) == (0, True)


def test_training_goes_on_after_a_generation_that_failed(life, model_folder):
    _, losses, _ = scenarios.reference(str(model_folder), micro_steps=4, accumulate=1, epochs=1)
    assert life[1][0]["generation"]["failing"] == pytest.approx(losses, rel=1e-5)


# ---- offload ----


@pytest.mark.parametrize("name", ranked.OFFLOAD)
def test_offload_steps_as_plain_adamw(life, model_folder, name):
    out, results = life
    folder = str(model_folder)
    model, losses = ranked.reference_adamw(folder)
    for kind in ("best", "torch"):
        if name == "3-hpz" and kind == "best":
            continue
        result = results[0]["offload"][f"{name}-{kind}"]
        assert result["optimizer"] == ("DeepSpeedCPUAdam" if kind == "best" else "AdamW")
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        got = torch.load(out / "offload" / f"{name}-{kind}.pt")
        # AdamW's first steps are signs of gradients, so rounding shows where a gradient is almost 0.
        assert scenarios.relative_error(got, model, scenarios.build(folder)) < 5e-3


def test_hpz_keeps_a_second_copy_of_the_shards(life):
    results = life[1][0]["offload"]
    assert results["3-hpz-torch"]["second_copy"]
    assert not results["3-torch"]["second_copy"]
