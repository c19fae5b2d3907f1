"""A student out of its teacher: layers, neurons, heads and channels kept as they were trained.

Works for decoders of transformers whose backbone has ``layers``; narrower MLPs and fewer heads for those whose layers
are made of ``q_proj, k_proj, v_proj, o_proj`` and ``gate_proj, up_proj, down_proj`` (Llama, Qwen2, Qwen3, Gemma, ...);
a narrower residual stream for those that ``channels`` knows.
Under ZeRO-3 layers are dropped without a look at their shapes; what is narrowed is made whole on every rank, and is
sharded again by the engine, as adapters are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptl.models.adapters import gathered
from ptl.models.channels import check_channels, choose_channels, cut_channels
from ptl.models.cuts import cut, double, highest
from ptl.models.importance import activity, decoder_layers
from ptl.models.quantize import is_quantized
from ptl.models.spec import Shrink
from ptl.models.zero3 import zero3_hidden
from ptl.types import TokenBatch

PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta")
"""Configuration keys that hold a list with one value a layer."""
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_NOT_SHAPE = {"training", "gradient_checkpointing"}


# ---- which layers ----


def kept_layers(shrink: Shrink, depth: int) -> list[int]:
    """The layers that ``shrink`` keeps of a model of ``depth`` layers, counted from 0, in ascending order.

    Raises:
        ValueError: more layers than there are, or one that does not exist.
    """
    asked = shrink.layers
    if asked is None:
        return list(range(depth))
    if isinstance(asked, list):
        if asked[-1] >= depth:
            raise ValueError(f"policy.shrink.layers holds {asked[-1]}, but the model's layers are 0 to {depth - 1}")
        return list(asked)
    if asked > depth:
        raise ValueError(f"policy.shrink.layers is {asked}, but the model has {depth} layers: give 1 to {depth}")
    if shrink.keep == "first":
        return list(range(asked))
    if shrink.keep == "last":
        return list(range(depth - asked, depth))
    if shrink.keep == "ends":
        front = (asked + 1) // 2
        return [*range(front), *range(depth - asked + front, depth)]
    gaps = max(asked - 1, 1)
    return [(2 * i * (depth - 1) + gaps) // (2 * gaps) for i in range(asked)]


# ---- the student ----


@torch.no_grad()
def make_student(
    model: PreTrainedModel, shrink: Shrink, *, batches: Iterable[TokenBatch] | None = None
) -> PreTrainedModel:
    """Takes away from ``model`` what ``shrink`` does not keep; what is kept is bit for bit as it was trained.

    Layers are renumbered, for the key-value cache and the sliding windows, and the configuration says what the student
    is, so that ``save_pretrained`` and ``from_pretrained`` give it back. Tied matrices stay tied.

    Neurons are kept by ``|gate row| * |up row| * |down column|``, which does not change when a factor is moved from one
    matrix to the next, and key-value groups by the Frobenius norm of each head's ``W_o W_v``. With ``batches`` both
    are kept by what they add to the residual stream on real tokens: the root mean square of each activation times the
    norm of the column it meets (Minitron, arXiv:2407.14679, section 2.2, with the column of Wanda, arXiv:2306.11695).
    Channels are chosen by ``choose_channels``, and what a norm divides by then changes: its weight makes up for it,
    as ``cut_channels`` says, and is all that is not as it was trained.

    Layers by measured importance: ``Shrink(layers=choose_layers(layer_importance(model, batches), count))``.

    Arguments:
        model: the teacher, without an adapter. It is changed: load it again where the teacher itself is needed.
        shrink: what to keep.
        batches: tokens to measure activations on, by the whole teacher; None goes by the weights.

    Returns:
        ``model``.

    Raises:
        ValueError: an architecture, a quantised base or a size that cannot be cut so, or a model sharded by ZeRO-3
            together with ``batches``. ``model`` is of no more use then.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a student is made of a plain model, got {type(model).__name__}: merge its adapter first")
    layers = decoder_layers(model)
    config: Any = model.config.get_text_config()
    depth = len(layers)
    kept = kept_layers(shrink, depth)
    chosen: list[Any] = [layers[i] for i in kept]
    if shrink.narrows:
        _check_narrow(model, chosen[0], shrink, config)
        read = None if batches is None else list(batches)
        channels = None
        if shrink.hidden_size is not None:
            channels = choose_channels(model, chosen, shrink.hidden_size, read)
        measured = activity(model, chosen, read) if read is not None and shrink.within_layers else {}
        for layer in chosen:
            with gathered(layer.parameters()):
                if shrink.intermediate_size is not None:
                    _narrow_mlp(layer.mlp, shrink.intermediate_size, measured)
                if shrink.heads is not None:
                    _narrow_attention(layer.self_attn, shrink.heads, config, measured)
        if channels is not None:
            cut_channels(model, chosen, channels)
    decoder: Any = model.get_decoder()
    decoder.layers = nn.ModuleList(chosen)
    for index, layer in enumerate(chosen):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = index
    for key in PER_LAYER:
        values = getattr(config, key, None)
        if isinstance(values, (list, tuple)) and len(values) == depth:
            setattr(config, key, [values[i] for i in kept])
    config.num_hidden_layers = len(kept)
    if shrink.intermediate_size is not None:
        config.intermediate_size = shrink.intermediate_size
    if shrink.heads is not None or shrink.hidden_size is not None:
        # Left out, it would be hidden_size over the number of heads.
        config.head_dim = chosen[0].self_attn.head_dim
    if shrink.hidden_size is not None:
        config.hidden_size = shrink.hidden_size
    if shrink.heads is not None:
        group = config.num_attention_heads // config.num_key_value_heads
        config.num_attention_heads, config.num_key_value_heads = shrink.heads, shrink.heads // group
    _check_reload(model)
    return model


def _check_reload(model: Any) -> None:
    """Refuses a student that its own configuration does not describe: another one would come back from its folder."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    try:
        described = type(model.config).from_dict(values)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"policy.shrink: {type(model.config).__name__} refuses the sizes of this student ({reason}): give another "
            "hidden_size or number of heads"
        ) from error
    with zero3_hidden(model), torch.device("meta"):
        twin: Any = type(model)(described)
    wrong = _differing_shape(model, twin) or _differing_value(model.get_decoder().layers, twin.get_decoder().layers)
    if wrong:
        raise ValueError(
            f"policy.shrink: the configuration of {type(model).__name__} cannot describe this student ({wrong}), so it "
            "would not load again: keep other layers, or leave the width as it is"
        )


def _differing_shape(model: nn.Module, twin: nn.Module) -> str | None:
    def shapes(module: nn.Module) -> dict[str, Any]:
        named = module.named_parameters(remove_duplicate=False)
        return {name: (p.dtype.is_floating_point, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named}

    ours, theirs = shapes(model), shapes(twin)
    if ours.keys() != theirs.keys():
        return f"{sorted(ours.keys() ^ theirs.keys())[0]} is in one of the two"
    # Codes have shapes of their own, and their layers are cut nowhere.
    return next((name for name, (floats, shape) in ours.items() if floats and shape != theirs[name][1]), None)


def _differing_value(layers: nn.Module, twin: nn.Module) -> str | None:
    """The first plain attribute of a layer, such as its window or its rotary switch, that differs from the twin's."""
    modules = dict(layers.named_modules())
    for name, module in twin.named_modules():
        own = vars(modules[name])
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            if plain and not key.startswith("_") and key not in _NOT_SHAPE and own.get(key, value) != value:
                return f"{name}.{key} is {own[key]}, would be {value}"
    return None


# ---- width ----


def _check_narrow(model: nn.Module, layer: Any, shrink: Shrink, config: Any) -> None:
    if is_quantized(model):
        raise ValueError("policy.shrink: a quantised model keeps codes, which cannot be cut: shrink layers alone")
    mlp, attention = getattr(layer, "mlp", None), getattr(layer, "self_attn", None)
    for key, module, names in (("intermediate_size", mlp, MLP), ("heads", attention, ATTENTION)):
        lacking = [name for name in names if not isinstance(getattr(module, name, None), nn.Linear)]
        if getattr(shrink, key) is not None and lacking:
            raise ValueError(
                f"policy.shrink.{key}: the layers of {type(model).__name__} have no {lacking[0]}; expected "
                f"{', '.join(names)} as in Llama. Shrink layers alone"
            )
    if shrink.intermediate_size is not None and shrink.intermediate_size > config.intermediate_size:
        raise ValueError(
            f"policy.shrink.intermediate_size is {shrink.intermediate_size}, but the model has "
            f"{config.intermediate_size}: give 1 to {config.intermediate_size}"
        )
    if shrink.hidden_size is not None:
        check_channels(model, shrink.hidden_size, config.hidden_size)
    if shrink.heads is None:
        return
    heads, group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    if shrink.heads > heads or shrink.heads % group:
        raise ValueError(
            f"policy.shrink.heads is {shrink.heads}, but the model has {heads} heads in key-value groups of {group}, "
            f"which stay whole: give a multiple of {group} up to {heads}"
        )


def _narrow_mlp(mlp: Any, width: int, measured: dict[nn.Module, Tensor]) -> None:
    gate, up, down = (getattr(mlp, name) for name in MLP)
    scores = _norm(down.weight, 0)
    if down in measured:
        scores = measured[down].sqrt() * scores
    else:
        scores = _norm(gate.weight, 1) * _norm(up.weight, 1) * scores
    kept = highest(scores, width)
    cut(gate, rows=kept)
    cut(up, rows=kept)
    cut(down, columns=kept)
    if "intermediate_size" in vars(mlp):
        mlp.intermediate_size = width


def _narrow_attention(attention: Any, heads: int, config: Any, measured: dict[nn.Module, Tensor]) -> None:
    dim, groups = attention.head_dim, config.num_key_value_heads
    group = config.num_attention_heads // groups
    out: Any = attention.o_proj
    if out in measured:
        squares = (measured[out] * _norm(out.weight, 0).square()).view(groups, -1).sum(1)
    else:
        # |W_o W_v|^2 = trace(W_o' W_o W_v W_v') of each head, from matrices of [dim, dim].
        value = double(attention.v_proj.weight).view(groups, dim, -1)
        back = double(out.weight).view(-1, groups * group, dim).transpose(0, 1)
        inner = (value @ value.mT).repeat_interleave(group, 0)
        squares = ((back.mT @ back) * inner).sum((1, 2)).view(groups, group).sum(1)
    kept = highest(squares.clamp_min(0).sqrt(), heads // group)
    keys = (kept[:, None] * dim + torch.arange(dim)).flatten()
    queries = (kept[:, None] * group * dim + torch.arange(group * dim)).flatten()
    cut(attention.q_proj, rows=queries)
    cut(attention.k_proj, rows=keys)
    cut(attention.v_proj, rows=keys)
    cut(out, columns=queries)
    for key, value in (("num_heads", heads), ("num_key_value_heads", heads // group)):
        if key in vars(attention):
            setattr(attention, key, value)


def _norm(weight: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(double(weight), dim=dim)
