"""Decoding token by token gives what one forward pass gives, memory taken ahead and the head's product made here."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ptl.rollout.decoding import PIECE, NextLogits, RoomyLayer, few_rows_product, make_room
from ptl.rollout.sampling import BLOCK, draw, draw_one
from tests import tiny


def test_a_head_under_autocast_keeps_its_own_product():
    """The logits of 16 bits are not those of the product in float32, which is then not put in their place."""
    model = tiny.make_model(410, seed=3, initializer_range=0.3).eval()
    forward, ids = NextLogits(model), torch.tensor([[5, 6, 7]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits[:, -1]
        got = forward(input_ids=ids, past_key_values=None)[0]
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def decoded(model, ids, steps):
    """Logits of the last ``steps`` tokens of ids [N, T], one call a token."""
    forward, first, found = NextLogits(model), ids.shape[1] - steps, []
    with torch.no_grad():
        _, cache = forward(input_ids=ids[:, :first], past_key_values=None)
        make_room(cache, 2)  # less than is needed: it grows
        for at in range(first, ids.shape[1]):
            logits, cache = forward(input_ids=ids[:, at : at + 1], past_key_values=cache)
            found.append(logits)
    return torch.stack(found, 1), forward, cache


@pytest.mark.parametrize("attention", ["sdpa", "ptl_packed"])
def test_logits_are_those_of_one_pass(attention):
    import ptl.models.attention  # noqa: F401  registers the implementation

    model = tiny.make_model(410, seed=3, attn_implementation=attention, initializer_range=0.3).eval()
    ids = torch.randint(400, (3, 12), generator=torch.Generator().manual_seed(0))
    found, forward, cache = decoded(model, ids, 7)
    assert forward.weight is model.lm_head.weight and type(cache.layers[0]) is RoomyLayer
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=ids).logits[:, -7:], rtol=1e-4, atol=1e-4)


def test_a_head_with_more_than_a_product_is_left_to_the_model():
    from transformers import CohereConfig, CohereForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(vocab_size=100, logit_scale=0.25, pad_token_id=0, **sizes)).eval()
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    found, forward, _ = decoded(model, ids, 4)
    assert forward.weight is None
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=ids).logits[:, -4:], rtol=1e-4, atol=1e-5)


def test_rows_leave_the_memory():
    cache = DynamicCache()
    keys = torch.arange(24.0).reshape(3, 1, 4, 2)
    cache.update(keys, -keys, 0)
    make_room(cache, 3)
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    one = torch.full((3, 1, 1, 2), 9.0)
    got, values = cache.update(one, -one, 0)
    torch.testing.assert_close(got, torch.cat([keys[[2, 0, 0]], one], 2))
    assert torch.equal(values, -got) and cache.get_seq_length() == 5


def test_the_product_in_pieces():
    hidden, weight = torch.randn(3, 8), torch.randn(PIECE + 5, 8)
    torch.testing.assert_close(few_rows_product(hidden, weight), hidden @ weight.T)


@pytest.mark.parametrize("vocab", [5, BLOCK, 3 * BLOCK + 17])
def test_a_draw_in_two_steps_is_the_draw_in_one(vocab):
    g = torch.Generator().manual_seed(0)
    p = torch.rand(64, vocab, generator=g, dtype=torch.float64).pow(4)
    p[:, ::3] = 0.0
    p[0] = torch.zeros(vocab).index_fill(0, torch.tensor([vocab - 1]), 1.0)
    u = torch.rand(64, generator=g, dtype=torch.float64)
    u[1], u[2], u[3] = 0.0, 1 - 2**-53, 0.5
    drawn = draw_one(p, u)
    assert torch.equal(drawn, draw(p.log(), u[:, None])[:, 0])
    assert (p.gather(1, drawn[:, None]) > 0).all() and int(drawn[0]) == vocab - 1
