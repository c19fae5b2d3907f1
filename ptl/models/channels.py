"""A narrower residual stream: what reads it, what writes it, which channels matter, and all of it cut alike.

Works for decoders made as Llama is (Llama, SmolLM2, Mistral, Qwen2, Qwen3, ...): an embedding, layers of two norms
``w * x / rms(x)`` with attention and a gated MLP behind them, a norm, a head. Whatever else has a parameter is refused
by its name. Norms of queries and keys are over a head, not over the stream, and stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptl.models.adapters import gathered
from ptl.models.cuts import cut, double, highest, kept_of
from ptl.models.importance import stream_activity
from ptl.types import TokenBatch

NORMS = ("input_layernorm", "post_attention_layernorm")
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""The matrices of a layer whose columns are channels."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""The matrices of a layer whose rows, and biases, are channels."""
WITHIN = ("self_attn.q_norm", "self_attn.k_norm")
"""What a layer may have that no channel passes."""


class Channels(NamedTuple):
    """Which channels stay.

    Attributes:
        kept: int64 [N], ascending.
        shares: of each norm, layer by layer and the last one, how much of the squared length of what enters it the
            kept channels hold, in [0, 1].
    """

    kept: Tensor
    shares: list[float]


# ---- what can be cut ----


def check_channels(model: Any, size: int, hidden_size: int) -> None:
    """Refuses a model whose residual stream cannot be cut.

    Arguments:
        model: a decoder with its head, whole or sharded by ZeRO-3.
        size: channels to keep.
        hidden_size: the channels it has.

    Raises:
        ValueError: more channels than there are, a module whose sides are not known, or a norm of another kind.
    """
    if size > hidden_size:
        raise ValueError(
            f"policy.shrink.hidden_size is {size}, but the model has {hidden_size}: give 1 to {hidden_size}"
        )
    modules, decoder = dict(model.named_modules()), model.get_decoder()
    names = {id(module): name for name, module in modules.items()}
    prefix = names[id(decoder)]
    layers = [f"{prefix}.layers.{i}" for i in range(len(decoder.layers))]
    embedding, head = f"{prefix}.embed_tokens", names.get(id(_head(model)), "lm_head")
    norms = [*(f"{layer}.{name}" for layer in layers for name in NORMS), f"{prefix}.norm"]
    matrices = [head, *(f"{layer}.{name}" for layer in layers for name in (*READERS, *WRITERS))]
    known = {embedding, *norms, *matrices, *(f"{layer}.{name}" for layer in layers for name in WITHIN)}
    for name, module in modules.items():
        if name not in known and any(True for _ in module.parameters(recurse=False)):
            raise _unknown(model, f"has {name}, whose sides are not known")
    # A subclass of the embedding may scale by a factor of the width.
    plain = {embedding: type(modules.get(embedding)) is nn.Embedding}
    plain |= {name: isinstance(modules.get(name), nn.Linear) for name in matrices}
    if not all(plain.values()):
        raise _unknown(model, f"has no plain {next(name for name, good in plain.items() if not good)}")
    for name in norms:
        if not _is_rms(modules.get(name)):
            raise _unknown(model, f"computes something else than w * x / rms(x) in {name}")


def _unknown(model: nn.Module, what: str) -> ValueError:
    return ValueError(
        f"policy.shrink.hidden_size: {type(model).__name__} {what}; expected a decoder made as Llama or Qwen3 is. "
        "Remove hidden_size, and shrink layers, intermediate_size or heads"
    )


def _is_rms(norm: Any) -> bool:
    """Whether a norm multiplies by its weight and neither centres nor adds 1 to it, as some classes of that name do."""
    if not isinstance(getattr(norm, "weight", None), Tensor) or "normalized_shape" in vars(norm):
        return False
    with gathered([norm.weight]):
        weight = norm.weight.float()
        values = torch.linspace(-1, 3, len(weight), device=weight.device)
        expected = weight * values / values.square().mean().sqrt()
        found = norm(values.to(norm.weight.dtype)[None]).float()[0]
        return torch.allclose(found, expected, rtol=0.01, atol=0.01 * float(weight.abs().max()))


def _head(model: Any) -> Any:
    """The output head, or the scalar head in its place."""
    head = model.get_output_embeddings()
    return getattr(model, "score", None) if head is None else head


def _norms(model: Any, layers: Sequence[Any]) -> list[Any]:
    return [*(layer.get_submodule(name) for layer in layers for name in NORMS), model.get_decoder().norm]


# ---- which channels ----


def choose_channels(
    model: Any, layers: Sequence[Any], size: int, batches: Iterable[TokenBatch] | None = None
) -> Channels:
    """The channels that matter most to ``layers`` and to the head behind them.

    With ``batches``, those of the largest mean absolute output of the norms, over tokens and norms (Minitron,
    arXiv:2407.14679, section 2.2). Without, those of the largest mean square in the embedding, a worse guide: a channel
    that layers alone write to looks as if it were empty.

    Arguments:
        model: as ``check_channels`` lets pass, uncut.
        layers: those of its layers that stay.
        size: how many channels, 1 to all.
        batches: as in ``layer_importance``, or None.

    Raises:
        ValueError: no tokens, or a model sharded by ZeRO-3 together with ``batches``.
    """
    norms = _norms(model, layers)
    if batches is not None:
        measured = stream_activity(model, norms, batches)
        kept = highest(torch.stack([one.outputs for one in measured]).sum(0), size)
        return Channels(kept, [float(one.shares[kept].sum() / one.shares.sum()) for one in measured])
    embedding = model.get_decoder().embed_tokens
    with gathered(embedding.parameters()):
        squares = double(embedding.weight).square().mean(0)
    kept = highest(squares, size)
    return Channels(kept, [float(squares[kept].sum() / squares.sum())] * len(norms))


# ---- the cut ----


def cut_channels(model: Any, layers: Sequence[Any], channels: Channels) -> None:
    """Keeps ``channels`` in every matrix, bias and norm on the stream of ``model`` with ``layers``; ties stay tied.

    A norm divides by the root mean square over the channels that it sees. Of the old H channels N stay, with a share s
    of the squared length, so ``x / rms(x)`` of each grows by ``sqrt(N / (H s))``: the norm's weight is multiplied by
    ``sqrt(H s / N)``, and what is read from the kept channels is what it was, but for the norm's epsilon, which stays.

    Arguments:
        model: as ``check_channels`` lets pass; changed in place.
        layers: those of its layers that stay.
        channels: as ``choose_channels`` gives them for the same layers.
    """
    kept, decoder, head = channels.kept, model.get_decoder(), _head(model)
    embedding = decoder.embed_tokens
    tied = head.weight is embedding.weight
    with gathered([*embedding.parameters(), *head.parameters()]):
        width = embedding.weight.shape[1]
        embedding.weight = kept_of(embedding.weight, kept, 1)
        embedding.embedding_dim = len(kept)
        cut(head, columns=kept)
        if tied:
            head.weight = embedding.weight
    for norm, share in zip(_norms(model, layers), channels.shares, strict=True):
        with gathered([norm.weight]):
            weight = kept_of(norm.weight, kept, 0)
        factor = math.sqrt(width * share / len(kept))
        norm.weight = nn.Parameter((weight.detach().double() * factor).to(weight.dtype), weight.requires_grad)
    for layer in layers:
        with gathered(layer.parameters()):
            for name in READERS:
                cut(layer.get_submodule(name), columns=kept)
            for name in WRITERS:
                cut(layer.get_submodule(name), rows=kept)
        for module in layer.modules():
            if vars(module).get("hidden_size") == width:
                module.hidden_size = len(kept)
