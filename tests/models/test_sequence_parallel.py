"""Rows that ranks share: attention, loss and gradients equal one process's, on real gloo ranks."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from ptl.models.attention import packed_inputs
from ptl.models.heads import hidden_states
from ptl.models.sequence_parallel import SequenceGroup, check_shareable, filled_row, join_group
from tests.models import sharing, zoo
from tests.ranks import run_ranks

MODELS = ["llama_tied", "qwen2_half_sliding", "gemma2_softcaps_sliding", "gpt_neox", "gpt2", "phi_head_bias"]
NAMES = [f"{name}-{size}" for name in MODELS for size in (2, 4)]
ATTENTION = [f"attention-{name}-{size}" for name in sharing.ATTENTION for size in (2, 4)]
ALONE = SequenceGroup(None, 2, 0)


@pytest.fixture(scope="module")
def results():
    return run_ranks("tests.models.sharing:run", 4, {"models": MODELS}, timeout=150)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_over_slices_is_attention_over_the_row(results, name):
    assert all(result[name] < 1e-12 for result in results), [result[name] for result in results]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*NAMES, "recompute"])
def test_law_1_the_loss_and_gradient_of_a_shared_row_are_the_rows(results, name):
    for result in results:
        assert result[name]["sums"] < 1e-5 and result[name]["gradient"] < 1e-5, result[name]


@pytest.mark.timeout(600)
def test_law_7_ranks_without_a_trained_token_take_part(results):
    assert [result["nothing_trained"] for result in results] == [0.0] * 4


@pytest.mark.timeout(600)
def test_groups_are_ranks_that_follow_each_other_and_must_divide_all(results):
    assert [result["place"] for result in results] == [[0, 0, 0], [1, 1, 1], [0, 2, 2], [1, 3, 3]]
    assert all("sequence_parallel 3 must divide the number of ranks, got 4" in result["refused"] for result in results)


@pytest.mark.timeout(600)
def test_a_row_is_filled_with_a_document_of_its_own_and_no_weight(results):
    length = sum(zoo.LENGTHS)
    bounds = torch.tensor([0, *zoo.LENGTHS]).cumsum(0).tolist()
    assert results[0]["filled"] == [28, [*bounds, 28], 0.0] and length == 25
    row = filled_row(zoo.packed(zoo.documents()), 5)
    assert row.input_ids.shape[1] == 25 and len(row.sources) == len(zoo.LENGTHS)


@pytest.mark.timeout(600)
def test_ranks_that_share_a_collated_row_read_nothing_of_it(results):
    for result in results:
        assert result["known"][0] == result["known"][1] and result["waits"] == {}


def test_one_process_cannot_share():
    with pytest.raises(
        ValueError, match=r"sequence_parallel 2 must divide the number of ranks, got 1.*trainer\.devices"
    ):
        join_group(2)


def test_a_model_that_cannot_share_is_refused():
    config = LlamaConfig(num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    check_shareable(config, 3)
    with pytest.raises(ValueError, match=r"sequence_parallel 4 must divide the model's 6 .* one of 1, 2, 3, 6"):
        check_shareable(config, 4)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="'dynamic' depend on the length of the row"):
        check_shareable(config, 2)
    config.rope_parameters = {
        "full_attention": {"rope_type": "longrope"},
        "sliding_attention": {"rope_type": "default"},
    }
    with pytest.raises(ValueError, match="'longrope'"):
        check_shareable(config, 2)


def test_what_cannot_be_shared_is_named():
    with pytest.raises(ValueError, match=r"'sdpa' cannot share a row .* policy\.attention to packed"):
        packed_inputs("sdpa", torch.tensor([0, 4], dtype=torch.int32), sequence=ALONE)
    with pytest.raises(ValueError, match=r"data\.layout to packed"):
        hidden_states(zoo.make("llama_tied"), zoo.padded(zoo.documents()), sequence=ALONE)
