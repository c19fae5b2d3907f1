"""Low-rank adapters: wrapping, training, saving and loading them. The only place that knows peft.

peft is imported where an adapter is made or loaded: with bitsandbytes behind it, its import takes a sixth of the time
that a command needs to start, and a model without adapters never needs it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ptl.models.merge import ADAPTER, MergedLayer, merge
from ptl.models.spec import CHANGES_BASE, LoRA
from ptl.models.zero3 import zero3_hidden

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from typing_extensions import TypeIs

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_INIT = {"default": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "orthogonal": "orthogonal"}


# ---- wrapping ----


def add_lora(model: nn.Module, lora: LoRA, *, token_ids: Sequence[int] = (), quantized: bool = False) -> PeftModel:
    """Freezes ``model`` and puts adapters beside its targeted layers.

    Arguments:
        model: a Hugging Face model, whole or sharded by ZeRO-3 while it was loaded.
        lora: the adapter.
        token_ids: rows of the embedding and the head to train (``lora.train_tokens`` as ids).
        quantized: the base holds bitsandbytes codes.

    Raises:
        ValueError: a target or module that the model does not have, or that cannot be adapted.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora)
    rows = _trained_rows(model, token_ids)
    save_modules, ensure_tying = _saved_modules(model, lora)
    both = [row for row in rows if any(_is_called(row, module) for module in save_modules)]
    if both:
        raise ValueError(f"adapter.train_tokens and adapter.save_modules both train {both[0]}: keep one of the two")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  peft accepts a float
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        exclude_modules=list(lora.exclude) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=_INIT[lora.init],  # pyright: ignore[reportArgumentType]
        trainable_token_indices=rows or None,
        modules_to_save=save_modules or None,
        ensure_weight_tying=ensure_tying,
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        bias="none",
    )
    fp32 = lora.dtype == "fp32" or (lora.dtype == "auto" and quantized)
    if second_step := bool(rows) and is_deepspeed_zero3_enabled():
        config.trainable_token_indices = None
    wrapped: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=fp32)  # pyright: ignore
    if second_step:
        _train_rows_under_zero3(wrapped, config, rows)
    for name, parameter in wrapped.named_parameters():
        # A magnitude is about 1 and moves by steps that bf16 would round away.
        if "lora_magnitude_vector" in name or (fp32 and "trainable_tokens_delta" in name):
            parameter.data = parameter.data.float()
    if lora.init in CHANGES_BASE:
        wrapped.initial_adapter = _copy_of_ab(wrapped)  # pyright: ignore[reportArgumentType]
    return wrapped


def _train_rows_under_zero3(wrapped: PeftModel, config: LoraConfig, rows: Any) -> None:
    """Has rows trained of matrices that ZeRO-3 may have sharded: they are whole while peft copies the rows."""
    from peft import LoraConfig
    from peft.utils import set_additional_trainable_modules

    base: Any = wrapped.get_base_model()
    only_rows = LoraConfig(trainable_token_indices=rows)
    matrices = [p for name in rows for p in base.get_submodule(name).parameters()]
    with gathered(matrices), zero3_hidden(wrapped):
        set_additional_trainable_modules(base, only_rows, base.config.to_dict(), ADAPTER)
    config.trainable_token_indices = rows


def _copy_of_ab(model: nn.Module) -> dict[str, Tensor]:
    """A and B as they were taken out of the base, which a saved adapter must put back; on the CPU."""
    named = model.named_parameters()
    return {name: p.detach().cpu().clone() for name, p in named if ".lora_A." in name or ".lora_B." in name}


def is_adapted(model: nn.Module) -> TypeIs[PeftModel]:
    """Whether ``add_lora`` or ``load_adapter`` made this model."""
    peft = sys.modules.get("peft")  # imported by whatever has made an adapted model
    return peft is not None and isinstance(model, peft.PeftModel)


def base_model(model: nn.Module) -> Any:
    """The Hugging Face model inside, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are whole on every rank, to be read; others are left as they are."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from peft.utils.integrations import gather_params_ctx

    with gather_params_ctx(list(parameters), modifier_rank=None):
        yield


def _embedding_names(model: Any) -> tuple[str, str | None]:
    """Full names of the input embedding and of the output head (None where there is none)."""
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    return names[id(model.get_input_embeddings())], names[id(head)] if head is not None else None


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _is_called(full: str, last: str) -> bool:
    return full == last or full.endswith(f".{last}")


def _trained_rows(model: Any, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """Which rows of which modules train: both matrices where they are apart, else the one (peft follows the tie)."""
    if not token_ids:
        return {}
    ids = sorted(set(token_ids))
    size = model.config.get_text_config().vocab_size
    if ids[-1] >= size:
        raise ValueError(
            f"adapter.train_tokens holds id {ids[-1]}, but the embedding has {size} rows: rows are trained, never "
            "added; add the token to the base model first (ptl tokens add)"
        )
    embedding, head = _embedding_names(model)
    return {embedding: ids} if head is None or _is_tied(model) else {embedding: ids, head: ids}


def _saved_modules(model: Any, lora: LoRA) -> tuple[list[str], bool]:
    """``lora.save_modules`` and whether peft must keep a tie.

    One matrix under two names, if both are named, would be trained as two copies and untied when merged.
    """
    wanted = list(lora.save_modules)
    if not wanted or not _is_tied(model):
        return wanted, False
    embedding, head = _embedding_names(model)
    shared = [module for module in wanted if any(_is_called(name, module) for name in (embedding, head) if name)]
    return [m for m in wanted if m not in shared] + [embedding] * bool(shared), bool(shared)


def _check_targets(model: Any, lora: LoRA) -> None:
    modules = dict(model.named_modules())
    for key, wanted in (("targets", lora.targets), ("exclude", lora.exclude), ("save_modules", lora.save_modules)):
        for target in () if isinstance(wanted, str) else wanted:
            if not any(_is_called(name, target) for name in modules):
                known = sorted({n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)})
                raise ValueError(f"adapter.{key}: no module is called {target!r}; linear layers are {', '.join(known)}")
    if isinstance(lora.targets, str):
        targeted = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
    else:
        targeted = {n: m for n, m in modules.items() if any(_is_called(n, t) for t in lora.targets)}
        shared = [name for name in _embedding_names(model) if name in targeted] if _is_tied(model) else []
        if shared:
            raise ValueError(
                f"adapter.targets takes in {shared[0]}, but embedding and head share one matrix in this model: use "
                "train_tokens or save_modules"
            )
    if lora.init in CHANGES_BASE:
        sizes = [(min(m.in_features, m.out_features), n) for n, m in targeted.items() if isinstance(m, nn.Linear)]
        size, name = min(sizes, default=(lora.rank, ""))
        if lora.rank > size:
            raise ValueError(f"adapter.init {lora.init} needs adapter.rank of at most {size}, the size of {name}")


# ---- the base under the adapter ----


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as its base did before training: the reference of a policy, without a second copy.

    Raises:
        ValueError: there is no adapter, or its initialisation changed the base.
    """
    if not is_adapted(model):
        raise ValueError("a model without an adapter cannot be its own reference: set policy.adapter")
    init = model.peft_config[ADAPTER].init_lora_weights  # pyright: ignore[reportAttributeAccessIssue]
    if init in CHANGES_BASE:
        raise ValueError(f"adapter.init {init} changes the base, so it is no reference: use default or gaussian")
    with model.disable_adapter():
        yield


# ---- merging ----


def merged_state(
    model: nn.Module, state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights of a plain model that computes what the adapted one does (``ptl.models.merge.merge``).

    ``model`` is not changed and tells only the layout, so it may be sharded, quantised or in training.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    layers: dict[str, MergedLayer] = {}
    rows: dict[str, list[int]] = {}
    for name, module in base_model(model).named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling:
            layers[name] = MergedLayer(
                scale=float(module.scaling[ADAPTER]),
                transposed=bool(getattr(module, "fan_in_fan_out", False)),
                embedding=ADAPTER in module.lora_embedding_A,
            )
        elif isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None:
            rows[name] = [int(row) for row in module.token_adapter.token_indices[ADAPTER]]
    return merge(state, layers=layers, rows=rows, base=base)


# ---- saving and loading ----


def adapter_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's weights in the names that peft saves, as an adapter of the *unchanged* base.

    PiSSA and OLoRA took ``s B0 A0`` out of the base. Their adapter is given twice the rank, ``[B, -B0] [A; A0]``, so
    that it loads on the base as it was published (``adapter_config`` says so too).

    Arguments:
        model: an adapted model.
        state: its state dict gathered from all ranks; trainable entries are enough. ``model``'s own by default.
    """
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(
        model, state_dict=None if state is None else dict(state), adapter_name=ADAPTER, save_embedding_layers=False
    )
    initial: dict[str, Tensor] = getattr(model, "initial_adapter", {})
    for key, start in initial.items():
        name = key.replace(f".{ADAPTER}.", ".")
        now = saved[name]
        start = start.to(now)
        saved[name] = torch.cat([now, start], dim=0) if ".lora_A." in name else torch.cat([now, -start], dim=1)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in saved.items()}


def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """What ``adapter_config.json`` holds for the weights that ``adapter_state`` gives.

    Arguments:
        model: an adapted model.
        base: name or folder of the base that the adapter is loaded on.
    """
    assert is_adapted(model)
    config = model.peft_config[ADAPTER].to_dict()
    config.update(base_model_name_or_path=base, inference_mode=True)
    if config["init_lora_weights"] in CHANGES_BASE:
        growth = math.sqrt(2) if config["use_rslora"] else 2
        config.update(init_lora_weights=True, r=2 * config["r"], lora_alpha=config["lora_alpha"] * growth)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def save_adapter(model: nn.Module, folder: Path, base: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` as peft reads them."""
    from safetensors.torch import save_file

    config = json.dumps(adapter_config(model, base), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    save_file(adapter_state(model, state), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """``model`` with a saved adapter on it, frozen, for inference and export.

    Raises:
        ValueError: no safetensors weights there, or an adapter of other shapes.
    """
    from peft import PeftModel

    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}; pickled adapters (adapter_model.bin) are refused")
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=False)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the adapter in {folder} does not fit its base model: {reason}") from error


def read_adapter_base(folder: Path) -> str:
    """The base model that an adapter folder names.

    Raises:
        ValueError: it names none.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / CONFIG_FILE} names no base model: set its base_model_name_or_path")
    return str(base)
