"""What rank processes do for the tests of sequence parallelism: a row that ranks share against the row on one."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ptl.data.batches import collate_tokens, spans_of
from ptl.models.attention import Documents, packed_attention
from ptl.models.heads import lm_loss
from ptl.models.sequence_parallel import SequenceGroup, filled_row, join_group
from tests.callbacks.syncs import Waits
from tests.models import zoo
from tests.ranks import rank

ATTENTION: dict[str, dict[str, Any]] = {
    "many": {"heads": (4, 4)},
    "grouped": {"heads": (8, 4)},
    "fewer_keys": {"heads": (8, 2)},
    "one_key": {"heads": (4, 1)},
    "neither_divides": {"heads": (12, 6)},
    "window": {"heads": (8, 2), "sliding_window": 3},
    "softcap_sinks": {"heads": (8, 2), "softcap": 2.0, "sinks": True},
    "narrow_values": {"heads": (4, 2), "width": 6},
}
LENGTHS = (3, 7, 1, 9)
"""20 tokens: slices of 5 and of 10 cut documents in two."""


def start() -> dict[int, SequenceGroup]:
    """Groups of two ranks and of four."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return {size: join_group(size) for size in (2, 4)}


def attention(
    group: SequenceGroup, heads: tuple[int, int], width: int = 8, sinks: bool = False, **options: Any
) -> float:
    """The largest error of output and gradients, relative to the largest element, against one process; fp64."""
    torch.manual_seed(3)
    length, (many, few) = sum(LENGTHS), heads
    whole = [torch.randn(1, h, length, w, dtype=torch.float64) for h, w in ((many, 8), (few, 8), (few, width))]
    if sinks:
        options["s_aux"] = torch.randn(many, dtype=torch.float64).requires_grad_()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    how = {"cu_seq_lens_q": bounds, "documents": Documents(LENGTHS), "max_length_q": max(LENGTHS), **options}
    layer = nn.Identity()
    plain = [t.clone().requires_grad_() for t in whole]
    expected, _ = packed_attention(layer, *plain, None, is_causal=True, **how)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    sink_gradient = options["s_aux"].grad.clone() if sinks else None
    if sinks:
        options["s_aux"].grad = None
    own = [group.own(t, 2).clone().requires_grad_() for t in whole]
    got, _ = packed_attention(layer, *own, None, is_causal=True, sequence=group, **how)
    (got * group.own(weight, 1)).sum().backward()
    pairs = [(got, group.own(expected, 1))]
    pairs += [(mine.grad, group.own(theirs.grad, 2)) for mine, theirs in zip(own, plain)]  # pyright: ignore[reportArgumentType]
    if sink_gradient is not None:
        total = options["s_aux"].grad
        dist.all_reduce(total, group=group.group)
        pairs.append((total, sink_gradient))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def model(name: str, group: SequenceGroup, *, recompute: bool = False) -> dict[str, float]:
    """Errors of loss and gradient, added up over the ranks that share a row, against one process."""
    batch = zoo.packed(zoo.documents())
    plain = zoo.make(name)
    shared = copy.deepcopy(plain)
    if recompute:
        shared.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = lm_loss(plain, batch, metrics=True).fused
    expected.total.backward()
    got = lm_loss(shared, batch, metrics=True, sequence=group).fused
    got.total.backward()
    sums = torch.stack([got.total.detach().double(), got.weight.double(), got.correct.double(), got.nll.double()])
    dist.all_reduce(sums, group=group.group)
    wanted = torch.stack(
        [t.detach().double() for t in (expected.total, expected.weight, expected.correct, expected.nll)]
    )
    a, b = _flat(plain, None), _flat(shared, group)
    return {
        "sums": float(((sums - wanted) / wanted.abs().clamp_min(1)).abs().max()),
        "gradient": float((a - b).norm() / a.norm()),
    }


def _flat(module: nn.Module, group: SequenceGroup | None) -> Tensor:
    grads = torch.cat([p.grad.flatten().double() for p in module.parameters() if p.grad is not None])
    if group is not None:
        dist.all_reduce(grads, group=group.group)
    return grads


def run(models: list[str]) -> dict[str, Any]:
    """All of it on four ranks in one start."""
    groups = start()
    result: dict[str, Any] = {
        f"attention-{name}-{size}": attention(group, **options)
        for name, options in ATTENTION.items()
        for size, group in groups.items()
        if options["heads"][0] % size == 0
    }
    for name in models:
        for size, group in groups.items():
            result[f"{name}-{size}"] = model(name, group)
    result["recompute"] = model(models[0], groups[2], recompute=True)
    empty = zoo.packed(zoo.documents())
    none = empty._replace(loss_mask=torch.zeros_like(empty.loss_mask))
    module = zoo.make(models[0])
    lm_loss(module, none, sequence=groups[4]).fused.total.backward()  # every rank takes part, or this hangs
    result["nothing_trained"] = float(_flat(module, groups[4]).abs().max())
    row = filled_row(empty, 4)
    rows = [
        {"ids": ids.numpy(), "spans": spans, "span_weights": weights, "source": 0}
        for ids, mask in zoo.documents()
        for spans, weights in [spans_of(mask.numpy())]
    ]
    known = collate_tokens(rows, layout="packed", pad_id=0, window_weight=1.0)
    asked = known._replace(trained=None, host_trained=None, host_lengths=None)
    result["known"] = [float(lm_loss(module, b, sequence=groups[4]).fused.total.detach()) for b in (known, asked)]
    with Waits() as waits:
        lm_loss(module, known, sequence=groups[4]).fused.total.backward()
    result["waits"] = waits.of("ptl")
    result["filled"] = [
        row.input_ids.shape[1],
        row.cu_seqlens.tolist(),
        float(row.loss_mask.sum() - empty.loss_mask.sum()),
    ]  # pyright: ignore[reportOptionalMemberAccess]
    result["place"] = [groups[2].rank, groups[4].rank, rank()]
    try:
        join_group(3)
    except ValueError as error:
        result["refused"] = str(error)
    return result
