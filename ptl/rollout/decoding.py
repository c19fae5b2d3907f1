"""One token after another through a model: where keys and values are kept, and the logits of what comes next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ptl.models.heads import causal_lm

FEW_ROWS = 32
"""Rows up to which a CPU multiplies a large table faster in pieces, see ``few_rows_product``."""
PIECE = 4096


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, written into memory that is taken ahead, instead of copied whole at every token.

    Args:
        keys, values: [N, H, T, D], what there is so far.
        room: tokens that there is memory for besides; when they are used up, as many more are taken.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room = room
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = (
            torch.cat([t, t.new_empty(*t.shape[:2], self.room, t.shape[3])], 2) for t in (keys, values)
        )
        self._show(keys.shape[2])

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.length = length
        self.keys, self.values = shown = self._keys[:, :, :length], self._values[:, :, :length]
        return shown

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, end = self.length, self.length + key_states.shape[2]
        if end > self._keys.shape[2]:
            self._hold(*self._show(begin))
        self._keys[:, :, begin:end], self._values[:, :, begin:end] = key_states, value_states
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        taken = []
        for held in (self._keys, self._values):
            fresh = held.new_empty(len(indices), *held.shape[1:])
            fresh[:, :, : self.length] = held[indices, :, : self.length]
            taken.append(fresh)
        self._keys, self._values = taken
        self._show(self.length)


def make_room(cache: Any, room: int) -> None:
    """Takes memory ahead for the layers of a cache that grow without bound; the others stay as they are."""
    layers = getattr(cache, "layers", [])
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            layers[number] = RoomyLayer(layer.keys, layer.values, max(1, room))


class NextLogits:
    """Logits of the token that comes next, [N, V], and the cache.

    The first call is the model's own. Where a plain product of its last hidden states with its head gave the same
    logits, later calls on a few rows run the backbone alone and make that product here.

    Args:
        model: a causal language model, with or without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lm: Any = causal_lm(model)
        self.weight: Tensor | None = None
        self._asked = False

    def __call__(self, **inputs: Any) -> tuple[Tensor, Any]:
        if self.weight is not None and len(inputs["input_ids"]) <= FEW_ROWS:
            out = self.lm.get_decoder()(**inputs, use_cache=True)
            return few_rows_product(out.last_hidden_state[:, -1], self.weight), out.past_key_values
        hidden: list[Tensor] = []
        watched = None if self._asked else self._watch(hidden)
        try:
            out = self.lm(**inputs, use_cache=True, logits_to_keep=1)
        finally:
            if watched is not None:
                watched.remove()
        logits = out.logits[:, -1]
        if hidden and not self._asked:
            weight = self.lm.get_output_embeddings().weight
            made = (
                few_rows_product(hidden[0], weight) if weight.shape == (logits.shape[1], hidden[0].shape[1]) else None
            )
            if made is not None and torch.allclose(made, logits.to(made.dtype), rtol=1e-4, atol=1e-4):
                self.weight = weight
        self._asked = True
        return logits, out.past_key_values

    def _watch(self, hidden: list[Tensor]) -> Any:
        """Puts the last hidden states of the next pass there, where a head in float32 on a CPU is a linear layer."""
        head, backbone = self.lm.get_output_embeddings(), self.lm.get_decoder()
        if type(head) is not nn.Linear or head.weight.dtype != torch.float32 or head.weight.device.type != "cpu":
            return None

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            last = getattr(output, "last_hidden_state", None)
            if last is not None:
                hidden.append(last[:, -1])

        return None if backbone is self.lm else backbone.register_forward_hook(keep)


def few_rows_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` [N, V] of a few rows [N, H] by a large table [V, H].

    The library's own product of such shapes reaches a third of the speed of this one, whose pieces stay in the cache.
    """
    out = hidden.new_empty(len(hidden), len(weight))
    columns = hidden.t()
    for begin in range(0, len(weight), PIECE):
        out[:, begin : begin + PIECE] = torch.mm(weight[begin : begin + PIECE], columns).t()
    return out
