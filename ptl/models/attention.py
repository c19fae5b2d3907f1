"""Attention over documents that share a row, without padding and without a dense mask: ``ptl_packed``.

Importing this module registers the implementation with transformers, through the two doors made for that. A forward
pass that carries ``cu_seq_lens_q`` (see ``packed_inputs``) then attends within each document alone, causally, at the
cost of the sum of the squares of the documents' lengths instead of the square of the row's. Any other forward pass of
the same model is ordinary scaled dot-product attention: padded batches, and generation with a cache. Soft-capped scores
(Gemma 2) and attention sinks (GPT-OSS), which transformers' ``sdpa`` leaves out without a word, are computed in both.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptl.models.sequence_parallel import SequenceGroup, all_tokens, own_tokens

_TELLS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

NAME = "ptl_packed"
"""The value of ``attn_implementation``."""
LONG = 2048
"""Mean tokens of a document from which on a GPU attends to each in a call of its own."""


def packed_inputs(
    implementation: str | None,
    cu_seqlens: Tensor,
    parents: np.ndarray | None = None,
    sequence: SequenceGroup | None = None,
    lengths: np.ndarray | None = None,
) -> dict[str, Any]:
    """Keyword arguments that make a backbone keep the documents of one packed row apart.

    Besides them it needs ``position_ids`` that restart at each document and ``use_cache=False``.

    Args:
        implementation: the model's ``config._attn_implementation``.
        cu_seqlens: int32 [D + 1], bounds of the documents.
        parents: int64 [documents], of each document the one that it goes on from, whose tokens it sees before its own,
            or -1; None where none does. A document that others go on from goes on from none.
        sequence: the ranks that share the row; ``cu_seqlens`` bounds the documents of the whole.
        lengths: int64 [D], lengths of the documents. None reads them from ``cu_seqlens``, for which the host waits
            until a GPU has done what was queued: once, here, and not in the layers.

    Raises:
        ValueError: the implementation cannot keep documents apart, not let them share a beginning, or not share a row.
    """
    if sequence is not None and implementation != NAME:
        raise ValueError(
            f"attention {implementation!r} cannot share a row among ranks: set policy.attention to packed, or "
            "model.sequence_parallel to 1"
        )
    if parents is not None and implementation != NAME:
        raise ValueError(
            f"attention {implementation!r} cannot let documents share their beginning: set policy.attention to packed, "
            "or model.share_prompt to false"
        )
    if implementation in ("sdpa", "eager"):
        # transformers builds a block-diagonal mask from positions that restart, provided that it is given no mask (not
        # even one of ones) and no cache.
        return {"attention_mask": None}
    known = tuple((cu_seqlens.diff() if lengths is None else lengths).tolist())
    bounds = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(known),
        "max_length_k": max(known),
    }
    if implementation == NAME:
        # A mask of four dimensions is handed to the layers as it is, so that no [T, T] mask is made. It has no
        # elements: whatever would use it fails for its shape instead of mixing documents.
        nothing = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=cu_seqlens.device)
        documents = Documents(known, None if parents is None else tuple(parents.tolist()))
        shared = {} if sequence is None else {"sequence": sequence}
        return {**bounds, "documents": documents, "attention_mask": nothing, **shared}
    if implementation is not None and implementation.startswith("flash_attention"):
        return {**bounds, "attention_mask": None}
    raise ValueError(
        f"attention {implementation!r} cannot keep packed documents apart: set policy.attention to packed, sdpa, eager "
        "or flash_attention_2, or data.layout to padded"
    )


class Documents:
    """What the host knows of the documents of a packed row.

    A compiled layer takes an object of a class of its own as it is; of a tuple it would check the length, and so be
    compiled again for each number of documents.

    Attributes:
        lengths: of the documents; they sum to T.
        parents: as ``parents`` of ``packed_inputs``; None where no document goes on from another.
    """

    __slots__ = ("lengths", "parents")

    def __init__(self, lengths: Sequence[int], parents: Sequence[int] | None = None) -> None:
        self.lengths, self.parents = lengths, parents


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    documents: Documents | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sequence: SequenceGroup | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the layer; read for ``is_causal``.
        query: [B, Hq, T, D]; B is 1 where documents are packed.
        key: [B, Hk, S, D], Hq a multiple of Hk.
        value: [B, Hk, S, Dv].
        attention_mask: None or [B, 1, T, S], true where a query sees a key; not read where documents are packed.
        scaling: factor on the scores; None is D ** -0.5.
        dropout: probability of dropping a weight.
        is_causal: None takes the layer's own.
        sliding_window: keys that a query sees, itself included; None is all before it. Where documents are not packed
            the mask already says so.
        softcap: c of ``c * tanh(score / c)`` (Gemma 2, arXiv:2408.00118); None is none.
        s_aux: [Hq], attention sinks: one more score a head in the softmax's denominator (GPT-OSS); None is none.
        position_bias: added to the scores by some encoders; taken only where documents are not packed.
        documents: the packed documents; None reads their lengths from ``cu_seq_lens_q`` where they are needed.
        cu_seq_lens_q: int32 [documents + 1], the same as bounds; its presence is what says that documents are packed.
        max_length_q: the longest of them.
        sequence: the ranks that share the row, whose T is then this rank's part of the sum of the lengths.

    Returns:
        [B, T, Hq, Dv], and None in place of the weights.

    Raises:
        ValueError: packed documents together with a batch of several rows, a cache, a position bias, or attention that
            is not causal; or the bounds did not come through the model.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if cu_seq_lens_q is None and documents is None:
        if attention_mask is not None and not attention_mask.numel():
            raise ValueError(
                f"{type(module).__name__} is not told where packed documents end, since its model keeps keyword "
                "arguments from it: set policy.attention to sdpa or eager instead of packed"
            )
        if softcap is None and s_aux is None:
            one = query.shape[2] == 1 and query.shape[1] != key.shape[1] and position_bias is None
            if one and (attention_mask is None or attention_mask.shape[1] == 1):
                return _one_query(query, key, value, attention_mask, scale, dropout), None
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scale, is_causal, position_bias, **kwargs
            )
        if attention_mask is None and causal and query.shape[2] > 1:
            # No mask means plain causal, where a cache may have room for more keys than there are yet.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            attention_mask = _window_mask(query.shape[2], None, query.device)
        out = _explicit(query, key, value, attention_mask, scale, dropout, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or position_bias is not None or not causal:
        raise ValueError(
            f"packed documents need one row, no cache, no position bias and causal attention; got queries of shape "
            f"{tuple(query.shape)}, keys of shape {tuple(key.shape)}, causal={causal}: set data.layout to padded"
        )
    if torch.is_autocast_enabled(query.device.type):
        # As scaled_dot_product_attention does: rotations have made queries and keys float32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if sequence is not None:
        query, key, value = all_tokens(query, key, value, sequence)
        s_aux = None if s_aux is None else sequence.own(s_aux, 0)
    plain = softcap is None and s_aux is None and (documents is None or documents.parents is None)
    # The kernels that torch has for one sequence are faster than the one for many, where launching them costs little.
    long = cu_seq_lens_q is not None and query.shape[2] >= LONG * (cu_seq_lens_q.shape[0] - 1) and documents is not None
    plain = plain and not (long and sliding_window is None)
    if plain and cu_seq_lens_q is not None and max_length_q is not None and _has_kernel(query, key, value, dropout):
        out = _kernel(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window)
    else:
        if documents is None:
            documents = Documents(cu_seq_lens_q.diff().tolist() if cu_seq_lens_q is not None else ())
        out = _one_by_one(query, key, value, documents, scale, dropout, sliding_window, softcap, s_aux)
    return (out if sequence is None else own_tokens(out, sequence)), None


@torch.compiler.disable()
def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[1, T, Hq, Dv]: each document in a call of its own."""
    # split, not slices: the gradient of a slice is a whole row of zeros around it.
    queries, keys, values = (t.split(list(documents.lengths), dim=2) for t in (query, key, value))
    plain, out = softcap is None and sinks is None, []
    for number, (q, k, v) in enumerate(zip(queries, keys, values)):
        parent = -1 if documents.parents is None else documents.parents[number]
        if parent >= 0:
            k, v = torch.cat([keys[parent], k], 2), torch.cat([values[parent], v], 2)
        seen = k.shape[2]
        beyond = window is not None and seen > window
        if plain:
            masked = beyond or parent >= 0
            mask = _window_mask(q.shape[2], window if beyond else None, q.device, seen) if masked else None
            groups = q.shape[1] // k.shape[1]
            if groups > 1 and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
                # No kernel of a GPU shares keys among heads there, and without one torch makes all scores.
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            attended = scaled_dot_product_attention(
                q, k, v, mask, dropout, mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            mask = _window_mask(q.shape[2], window if beyond else None, q.device, seen)
            attended = _explicit(q, k, v, mask, scale, dropout, softcap, sinks)
        out.append(attended.transpose(1, 2))
    return torch.cat(out, 1)


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """[B, 1, Hq, Dv] of one query a row: those of the heads that share keys take the place of a sequence, so that keys
    and values are not copied for each of them."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    out = scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scale)
    return out.reshape(batch, 1, heads, -1)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, Hq, T, Dv] from explicit scores; the softmax is float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * scale).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]].to(value.dtype)
    return drop(weights, dropout) @ value


def _window_mask(length: int, window: int | None, device: torch.device, keys: int | None = None) -> Tensor:
    """bool [length, keys]: a query sees itself and what is before it, at most ``window`` keys; the last see all."""
    keys = keys or length
    key = torch.arange(keys, device=device)
    behind = key[keys - length :, None] - key[None, :]
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's own variable-length flash kernel takes these: 16 bits, Ampere or later, equal widths."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not dropout
        and _has_flash()
    )


@torch.compiler.assume_constant_result
def _has_flash() -> bool:
    """Whether the current device is Ampere or later."""
    return torch.cuda.get_device_capability() >= (8, 0)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """[1, T, Hq, D]: all documents in one call."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    seen = (-1, 0) if window is None else (window - 1, 0)
    # The kernel of torch 2.11 shares keys among heads without being told; later ones want to be told.
    shared: dict[str, Any] = {"enable_gqa": True} if _TELLS_GQA and q.shape[1] != k.shape[1] else {}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=seen, **shared)
    return out[None] if isinstance(out, Tensor) else out[0][None]


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
