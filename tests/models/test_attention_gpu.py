"""Packed attention on a GPU in bf16 is attention of each document by itself in fp32, forward and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptl.models.attention import NAME as PACKED
from ptl.models.attention import packed_attention, packed_inputs
from ptl.models.heads import hidden_states
from tests.gpu_parts import error, exact_products, on_gpu
from tests.models import zoo

LENGTHS = (37, 90, 1, 300, 64, 128)
PARENTS = (-1, 0, 0, -1, 3, 3)
"""Two prompts; two documents go on from each, one of a single token among them."""
WINDOW = 48


def obvious(query: Tensor, key: Tensor, value: Tensor, parents: tuple[int, ...], window: int | None) -> Tensor:
    """[1, T, Hq, D] in the dtype of the inputs: a whole matrix of scores for each document."""
    many = query.shape[1] // key.shape[1]
    queries, keys, values = (t.split(LENGTHS, 2) for t in (query, key, value))
    out = []
    for number, parent in enumerate(parents):
        q, k, v = queries[number], keys[number], values[number]
        if parent >= 0:
            k, v = torch.cat([keys[parent], k], 2), torch.cat([values[parent], v], 2)
        k, v = k.repeat_interleave(many, 1), v.repeat_interleave(many, 1)
        here = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=k.device)[:, None]
        there = torch.arange(k.shape[2], device=k.device)[None]
        hidden = (there > here) | (there <= here - (window or k.shape[2]))
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
        out.append((scores.softmax(-1) @ v).transpose(1, 2))
    return torch.cat(out, 1)


def check_attention(device: str, shared: bool, window: int | None) -> None:
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(1, *shape, 64, generator=g).to(device, torch.bfloat16)

    total = sum(LENGTHS)
    leaves = [make(heads, total).requires_grad_() for heads in (8, 2, 2)]
    query, key, value = leaves
    weights = make(total, 8)
    bounds = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    how: dict[str, Any] = packed_inputs(PACKED, bounds, np.array(PARENTS) if shared else None)
    mask = how.pop("attention_mask")
    layer = torch.nn.Identity()
    got, _ = packed_attention(layer, query, key, value, mask, is_causal=True, sliding_window=window, **how)
    gradients = torch.autograd.grad((got * weights).sum(), leaves)
    exact = [t.detach().float().requires_grad_() for t in leaves]
    query, key, value = exact
    with exact_products():
        expected = obvious(query, key, value, PARENTS if shared else (-1,) * len(LENGTHS), window)
        wanted = torch.autograd.grad((expected * weights.float()).sum(), exact)
    assert got.dtype == torch.bfloat16
    assert error(got, expected) < 1e-2
    for name, a, b in zip(("query", "key", "value"), gradients, wanted):
        assert error(a, b) < 1e-2, name
    begins = [0, *np.cumsum(LENGTHS)]
    for begin, end in pairwise(begins):  # no document is wrong and hidden behind the others
        assert error(got[:, begin:end], expected[:, begin:end]) < 2e-2, (begin, end)


def check_model(device: str, name: str) -> None:
    """Prompts computed once for two answers each, against each answer after its prompt in a row of its own."""
    lengths, parents = (9, 30, 5, 40, 3, 17), (-1, 0, 0, -1, 3, 3)
    docs = zoo.documents(lengths)
    batch = zoo.packed(docs)
    begins = [0 if parent < 0 else lengths[parent] for parent in parents]
    positions = torch.cat([torch.arange(begin, begin + n) for begin, n in zip(begins, lengths)])[None]
    batch = batch._replace(position_ids=positions)
    batch = batch._replace(**{k: v.to(device) for k, v in batch._asdict().items() if isinstance(v, Tensor)})
    model, exact = zoo.make(name).to(device, torch.bfloat16), zoo.make(name)
    exact.load_state_dict({key: value.float().cpu() for key, value in model.state_dict().items()})
    got = hidden_states(model, batch, parents=np.array(parents))
    expected = []
    for number, parent in enumerate(parents):
        ids = torch.cat([docs[i][0] for i in (parent, number) if i >= 0])
        expected.append(hidden_states(exact, zoo.padded([(ids, torch.zeros(len(ids)))]))[:, -lengths[number] :])
    plain = torch.cat(expected, 1)
    assert error(got, plain) < 0.05
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    (got.float() * weights.to(device)).sum().backward()
    (plain * weights).sum().backward()
    for (key, a), b in zip(model.named_parameters(), exact.parameters()):
        if b.grad is not None and a.grad is not None:
            assert error(a.grad, b.grad) < 0.15, key


@on_gpu
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_packed_attention_on_a_gpu_equals_fp32_document_by_document(shared, window):
    check_attention("cuda", shared, window)


@on_gpu
@pytest.mark.parametrize("name", ["llama_tied", "mistral_sliding", "gemma2_softcaps_sliding"])
def test_a_shared_prompt_on_a_gpu_equals_each_answer_after_its_prompt(name):
    check_model("cuda", name)
