"""From a batch to a loss without logits: the backbone's hidden states, the head, and the two joined.

The objectives never call the language model's own forward, which makes logits for every position. They take the hidden
states of the positions that predict a trained token and fuse the head with the loss. Adapters of peft are known by
their attributes, so that this works without importing it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ptl.functional.cross_entropy import FusedLoss, fused_linear_cross_entropy
from ptl.functional.fused_divergence import Side
from ptl.functional.neftune import neftune_noise
from ptl.models.attention import NAME as PACKED
from ptl.models.attention import packed_inputs
from ptl.models.compiled import is_compiled
from ptl.models.sequence_parallel import SequenceGroup, filled_row
from ptl.types import TokenBatch

LAYERS_THAT_PACK = {"full_attention", "sliding_attention", "chunked_attention"}
"""Values of ``config.layer_types`` whose layers see a token's past only through an attention mask."""
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Configuration keys of factors on the logits (Cohere, Falcon-H1, ...)."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Configuration keys of c in ``c * tanh(logits / c)`` (Gemma, RecurrentGemma, xLSTM)."""


class Head(NamedTuple):
    """The output projection of a language model, and what comes after it.

    Attributes:
        weight: [V, H], with its graph where it is made of several parameters.
        bias: [V] or None.
        low_rank: a LoRA branch as (function from hidden states [N, H] to [N, R], up [V, R]), or None.
        softcap: c of ``c * tanh(z / c)``, or None.
        logit_scale: factor on the logits, before the soft cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    low_rank: tuple[Callable[[Tensor], Tensor], Tensor] | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class TokenLoss(NamedTuple):
    """The fused loss, and of each of its N tokens the document, int64 [N], and the weight, float32 [N]."""

    fused: FusedLoss
    documents: Tensor
    weights: Tensor


# ---- hidden states ----


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside an adapter's wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def hidden_states(
    model: nn.Module,
    batch: TokenBatch,
    *,
    parents: np.ndarray | None = None,
    neftune_alpha: float | None = None,
    sequence: SequenceGroup | None = None,
) -> Tensor:
    """Last hidden states [B, T, H] of the backbone, after its final norm.

    Packed documents do not see each other, whatever the attention implementation.

    Args:
        model: a causal language model of transformers, with or without a peft adapter.
        batch: packed or padded.
        parents: of packed documents, the one that each goes on from; see ``attention.packed_inputs``.
        neftune_alpha: noise on the embeddings while the model is in training mode; None or 0 for none.
        sequence: the ranks that share the row, whose number divides T; [1, T / N, H] are this rank's states then.

    Raises:
        ValueError: a packed batch for a model, or an attention, that cannot keep documents apart; a padded one that
            is to be shared.
    """
    lm = causal_lm(model)
    backbone = lm.get_decoder()
    inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if batch.cu_seqlens is not None:
        _check_packs(lm, backbone)
        packed = packed_inputs(lm.config._attn_implementation, batch.cu_seqlens, parents, sequence, batch.host_lengths)
        inputs = {"position_ids": batch.position_ids, **packed}
    elif sequence is not None:
        raise ValueError("a padded batch cannot be shared among ranks: set data.layout to packed")
    inputs["input_ids"] = batch.input_ids
    alpha = neftune_alpha if neftune_alpha and model.training else 0.0
    lengths = document_lengths(batch) if alpha else batch.position_ids
    if sequence is not None:
        for name in ("input_ids", "position_ids"):
            inputs[name] = sequence.own(inputs[name], 1)
        lengths = sequence.own(lengths, 1)
    with _noisy(lm.get_input_embeddings(), lengths, alpha):
        # A cache makes transformers forget that documents are packed, and its default is the configuration's.
        return backbone(use_cache=False, **inputs)[0]


@contextmanager
def block_outputs(model: nn.Module, blocks: list[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the outputs [B, T, H] of some blocks, counted from 1, of the backbone's next forward pass.

    Raises:
        ValueError: the backbone has no list of blocks, or not so many.
    """
    seen: dict[int, Tensor] = {}
    if not blocks:
        yield seen
        return
    layers = getattr(causal_lm(model).get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not 1 <= min(blocks) <= max(blocks) <= len(layers):
        depth = len(layers) if isinstance(layers, nn.ModuleList) else "no"
        raise ValueError(
            f"hidden.layers asks for blocks {blocks}; {type(causal_lm(model)).__name__} has {depth} blocks"
        )

    def keep(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[block] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[block - 1].register_forward_hook(keep(block)) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_packs(lm: Any, backbone: nn.Module) -> None:
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYERS_THAT_PACK
    recurrent = sorted(kinds) or (["recurrent state"] if getattr(lm, "_is_stateful", False) else [])
    positions = "position_ids" in inspect.signature(backbone.forward).parameters
    if recurrent or not positions:
        why = f"has layers of {recurrent[0]}" if recurrent else "takes no position_ids"
        raise ValueError(
            f"{type(lm).__name__} {why}, so packed documents would mix: set data.layout to padded instead of packed"
        )
    if lm.config._attn_implementation == PACKED and not lm._can_set_attn_implementation():
        raise ValueError(
            f"{type(lm).__name__} brings its own attention and takes no other: set policy.attention to sdpa or eager "
            "instead of packed"
        )


@contextmanager
def _noisy(embedding: nn.Module, lengths: Tensor, alpha: float) -> Iterator[None]:
    """NEFTune inside; a hook rather than ``inputs_embeds``, since some models also need the ids."""
    if not alpha:
        yield
        return

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + neftune_noise(output, lengths, alpha)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def document_lengths(batch: TokenBatch) -> Tensor:
    """int64 [B, T], the length of each token's document; 0 on padding."""
    ids = batch.document_ids
    real = (ids >= 0).to(torch.int64)
    owner = ids.clamp_min(0)
    lengths = real.new_zeros(len(batch.sources)).scatter_add_(0, owner.flatten(), real.flatten())
    return lengths[owner] * real


# ---- the head ----


def lm_head(model: nn.Module) -> Head:
    """The output head as it acts: tied, adapted, copied for training, trained in some rows, or plain.

    Raises:
        ValueError: there is no output embedding, its weights are quantised, or its adapter is of a kind whose effect is
            not computed here.
    """
    lm = causal_lm(model)
    module: Any = lm.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(lm).__name__} has no output embedding: model.policy.name must be a language model")
    config = lm.config.get_text_config()
    scale = 1.0
    for key in SCALES:
        scale *= float(_number(config, key) or 1.0)
    divisor = float(_number(config, "logits_scaling") or 1.0)
    # One family multiplies by the key that all others divide by.
    scale = scale * divisor if config.model_type.startswith("hyperclovax") else scale / divisor
    softcap = next((float(c) for key in SOFTCAPS if (c := _number(config, key))), None)
    adapted = hasattr(module, "lora_A")
    weight, bias, low_rank = _with_lora(module) if adapted else (module.weight, getattr(module, "bias", None), None)
    if not weight.is_floating_point():
        raise ValueError(f"the output head holds {weight.dtype} codes: it must not be quantised")
    return Head(weight, bias, low_rank, softcap, scale)


def _number(config: Any, key: str) -> float | None:
    value = getattr(config, key, None)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _with_lora(layer: Any) -> tuple[Tensor, Tensor | None, tuple[Callable[[Tensor], Tensor], Tensor] | None]:
    """Weight, bias and low-rank branch of a linear layer that peft has wrapped."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return weight, bias, None
    for name in names:
        if layer.lora_bias.get(name, False):
            extra = layer.lora_B[name].bias * layer.scaling[name]
            bias = extra if bias is None else bias + extra
    if any(name in layer.lora_variant for name in names):
        return _dora_weight(layer, names, weight), bias, None

    def reduce(hidden: Tensor) -> Tensor:
        branches = []
        for name in names:
            down = layer.lora_A[name]
            branches.append(down(layer.lora_dropout[name](hidden.to(down.weight.dtype))) * layer.scaling[name])
        return torch.cat(branches, -1)

    return weight, bias, (reduce, torch.cat([layer.lora_B[name].weight for name in names], 1))


def _dora_weight(layer: Any, names: list[str], weight: Tensor) -> Tensor:
    """``m * (W + sBA) / ||W + sBA||`` by rows, the norm held constant (DoRA, arXiv:2402.09353, section 4.3)."""
    name = names[0]
    if len(names) > 1 or name not in layer.lora_magnitude_vector:
        raise ValueError(
            f"the output head has adapters {names} of a kind whose effect on it is unknown: leave the head out of "
            "policy.adapter.targets, or use plain LoRA or DoRA"
        )
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0):
        raise ValueError("DoRA on the output head cannot have dropout: set policy.adapter.dropout to 0")
    direction = weight + layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
    magnitude = layer.lora_magnitude_vector[name].weight
    return (magnitude / torch.linalg.vector_norm(direction.detach(), dim=1))[:, None] * direction


def head_side(model: nn.Module, hidden: Tensor) -> Side:
    """The head as it acts, with the hidden states [N, H] that it is applied to."""
    head = lm_head(model)
    low_rank = None if head.low_rank is None else (head.low_rank[0](hidden), head.low_rank[1])
    return Side(hidden, head.weight, head.bias, low_rank, head.softcap, head.logit_scale)


def chosen(states: Tensor, positions: Tensor) -> Tensor:
    """States [B, T, H] at flat positions int64 [N] of [B * T]."""
    return states.flatten(0, 1).index_select(0, positions)


# ---- the loss ----


def shifted_targets(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Which hidden states predict a trained token.

    Returns:
        Flat positions int64 [N] into [B * T], targets int64 [N] and weights float32 [N] of the N tokens whose loss
        weight is not 0. A position is the one before its token, in the same document: the first token of a document is
        no target, whatever its weight. A batch that does not say which its trained tokens are is asked, for which the
        host waits until its device has done what was queued: how many there are is a shape.
    """
    trained = batch.trained
    if trained is None:
        trained = (batch.loss_mask * (batch.position_ids > 0)).flatten().nonzero()[:, 0]
    return trained - 1, batch.input_ids.flatten()[trained], batch.loss_mask.flatten()[trained]


class HeadLoss(nn.Module):
    """Head and loss as a module of its own, with the head's parameters read in its forward and nowhere else.

    Under ZeRO-3 the parameters of the head are shards until something gathers them; declared as external to this small
    module, they are whole for the loss alone and not for the whole step.

    Args:
        model: the causal language model; it stays the owner of its parameters, this module has none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, or it would be registered as a submodule

    def forward(self, hidden: Tensor, targets: Tensor, weights: Tensor, options: dict[str, Any]) -> FusedLoss:
        """Loss of hidden states [N, H]; ``options`` are keyword arguments of ``fused_linear_cross_entropy``."""
        side = head_side(self._model[0], hidden)
        return fused_linear_cross_entropy(
            hidden,
            side.weight,
            targets,
            weights,
            bias=side.bias,
            low_rank=side.low_rank,
            softcap=side.softcap,
            logit_scale=side.logit_scale,
            compiled=is_compiled(self._model[0]),
            **options,
        )


def lm_loss(
    model: nn.Module,
    batch: TokenBatch,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    neftune_alpha: float | None = None,
    metrics: bool = False,
    head_loss: HeadLoss | None = None,
    sequence: SequenceGroup | None = None,
) -> TokenLoss:
    """Next-token loss over the trained tokens of a batch; a sum, never a mean.

    A batch without any trained token gives 0 with a graph through the backbone and, where it trains, the head: every
    rank takes part in every collective.

    Args:
        model: a causal language model.
        batch: packed or padded.
        label_smoothing: as in ``fused_linear_cross_entropy``.
        z_loss: as in ``fused_linear_cross_entropy``.
        neftune_alpha: as in ``hidden_states``.
        metrics: also the entropy.
        head_loss: the module that runs the loss, where its parameters must be gathered around it; None makes one here.
        sequence: the ranks that share a packed row, all of which call this with the same batch: the loss is then of the
            tokens that this rank's slice predicts, and the ranks' losses add up to the row's.
    """
    batch = batch if sequence is None else filled_row(batch, sequence.size)
    positions, targets, weights = shifted_targets(batch)
    documents = batch.document_ids.flatten()[positions]
    if sequence is not None:
        # Targets are those of the whole row, so that the first token of a slice is predicted by the last of the former.
        share = batch.input_ids.shape[1] // sequence.size
        known = positions.cpu().numpy() if batch.host_trained is None else batch.host_trained - 1
        mine = slice(*np.searchsorted(known, [share * sequence.rank, share * (sequence.rank + 1)]).tolist())
        positions, targets = positions[mine] - share * sequence.rank, targets[mine]
        weights, documents = weights[mine], documents[mine]
    hidden = hidden_states(model, batch, neftune_alpha=neftune_alpha, sequence=sequence)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "metrics": metrics}
    fused = (head_loss or HeadLoss(model))(chosen(hidden, positions), targets, weights, options)
    return TokenLoss(fused, documents, weights)
