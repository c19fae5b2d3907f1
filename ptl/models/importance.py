"""How much each layer, neuron, head and channel of a model matters on real tokens: what a student is chosen by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptl.models.heads import causal_lm, hidden_states
from ptl.types import TokenBatch


def choose_layers(scores: Sequence[float], count: int) -> list[int]:
    """The ``count`` layers of the highest scores, counted from 0, in ascending order: a value for ``Shrink.layers``.

    Of equal scores the earlier layer is kept.

    Arguments:
        scores: one a layer, as ``layer_importance`` gives them.
        count: 1 to the number of scores.

    Raises:
        ValueError: a count out of range, or a score that is not finite.
    """
    if not 1 <= count <= len(scores):
        raise ValueError(f"cannot keep {count} layers of {len(scores)}: give 1 to {len(scores)}")
    bad = [i for i, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise ValueError(f"the score of layer {bad[0]} is {scores[bad[0]]}: layers cannot be ranked by it")
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


@torch.no_grad()
def layer_importance(model: nn.Module, batches: Iterable[TokenBatch]) -> list[float]:
    """How far each layer turns the hidden state: block influence (ShortGPT, arXiv:2403.03853, equation 1).

    The mean of ``1 - cos(hidden state before the layer, after it)`` over all tokens but padding, each counted once,
    however the batches are cut. 0 for a layer that does nothing, at most 2.

    Arguments:
        model: a causal language model, with or without an adapter, whole in this process; evaluated without dropout
            and left in the mode it was in.
        batches: packed or padded, on any device.

    Raises:
        ValueError: no tokens, a model sharded by ZeRO-3, or one without layers to measure.
    """
    layers = decoder_layers(model)
    sums = [0.0] * len(layers)

    def measure(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before[state.real].float(), after[state.real].float(), -1)
            sums[index] += (1 - cosine).clamp_min(0).sum().item()

        return hook

    state = _Read(model)
    handles = [layer.register_forward_hook(measure(i), with_kwargs=True) for i, layer in enumerate(layers)]
    state.run(batches, handles)
    return [total / state.tokens for total in sums]


@torch.no_grad()
def activity(model: nn.Module, layers: Sequence[Any], batches: Iterable[TokenBatch]) -> dict[nn.Module, Tensor]:
    """How large what enters the last matrix of each MLP and attention is.

    Arguments:
        model: as in ``layer_importance``.
        layers: those of its layers to look at.
        batches: as in ``layer_importance``.

    Returns:
        For each ``down_proj`` and ``o_proj``, float64 [inputs] on the CPU: the mean square of each input over all
        tokens but padding.

    Raises:
        ValueError: no tokens, or a model sharded by ZeRO-3.
    """
    read = _Read(model)
    sums: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        square = args[0][read.real].float().square().sum(0).cpu().double()
        sums[module] = sums[module] + square if module in sums else square

    names = ("down_proj", "o_proj")
    parts = [part for layer in layers for name, part in layer.named_modules() if name.rpartition(".")[2] in names]
    read.run(batches, [part.register_forward_pre_hook(hook) for part in parts])
    return {module: total / read.tokens for module, total in sums.items()}


class Passing(NamedTuple):
    """What passes a norm, a number for each channel.

    Attributes:
        outputs: float64 [H] on the CPU: the mean absolute output.
        shares: float64 [H] on the CPU: the mean of an input's part in the squared length of all H; they add up to 1.
    """

    outputs: Tensor
    shares: Tensor


@torch.no_grad()
def stream_activity(model: nn.Module, norms: Sequence[nn.Module], batches: Iterable[TokenBatch]) -> list[Passing]:
    """How large each channel of the residual stream is, over all tokens but padding.

    Each token counts the same, however long its state is: the states of first tokens are longer by orders of magnitude
    than those of others in many models.

    Arguments:
        model: as in ``layer_importance``.
        norms: modules of it that map [B, T, H] to the same.
        batches: as in ``layer_importance``.

    Returns:
        One for each of ``norms``.

    Raises:
        ValueError: no tokens, or a model sharded by ZeRO-3.
    """
    read = _Read(model)
    sums: dict[nn.Module, Passing] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        square = args[0][read.real].float().square()
        shares = square / square.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        now = Passing(*(x.sum(0).cpu().double() for x in (output[read.real].float().abs(), shares)))
        sums[module] = Passing(*map(torch.add, sums[module], now)) if module in sums else now

    read.run(batches, [norm.register_forward_hook(hook) for norm in norms])
    return [Passing(*(total / read.tokens for total in sums[norm])) for norm in norms]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a decoder, first to last, with or without an adapter around it.

    Raises:
        ValueError: an architecture that keeps its layers elsewhere.
    """
    lm = causal_lm(model)
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or getattr(decoder, "config", None) is not lm.config.get_text_config():
        raise ValueError(
            f"policy.shrink: {type(lm).__name__} has no list of layers that can be cut; use a decoder such as Llama, "
            "Qwen2, Qwen3 or Gemma, or remove shrink"
        )
    return layers


class _Read:
    """A pass over batches during which hooks see which positions hold tokens.

    Attributes:
        real: bool [B, T] of the batch that is being read.
        tokens: how many were read.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError(
                "importance is measured on a whole model, and this one is sharded by ZeRO-3: make the student in one "
                "process first and give its folder as policy.name"
            )
        self.model = model
        self.real = torch.empty(0)
        self.tokens = 0

    def run(self, batches: Iterable[TokenBatch], handles: Sequence[Any]) -> None:
        """Reads all batches in eval mode, then removes the hooks."""
        training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()
        try:
            for batch in batches:
                here = batch.on(device)
                self.real = here.document_ids >= 0
                self.tokens += int(self.real.sum())
                hidden_states(self.model, here)
        finally:
            self.model.train(training)
            for handle in handles:
                handle.remove()
        if not self.tokens:
            raise ValueError("there are no tokens to measure importance on: give batches that hold documents")
