"""From the strategy's arguments and a user's DeepSpeed config to the one config that the engine is given.

Pure functions over plain dicts, in the order in which facts become known: ``merge`` when the strategy is made,
``resolve_run`` when it is attached to a trainer, ``resolve_model`` when the model exists. Hugging Face style ``"auto"``
values, which DeepSpeed itself does not know at the top level, are gone after the last. Two different answers to one
question are an error that names both places; none wins silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ptl.strategies.zero_keys import by_alias, check_keys, check_types, lookup

Stage = Literal[0, 1, 2, 3]
AUTO = "auto"
FP32_BUFFERS = ("inv_freq", "e_score_correction_bias", "moe_statics")
"""Buffers of Hugging Face models that must keep their fp32 values when ZeRO-3 loads in bf16: rotary frequencies (a
rounding of 2^-9 turns into radians at some thousand positions) and routing biases."""

_SMALL_BUCKET = 10_000_000
"""Elements; a bucket of hidden_size^2 alone would make a small model reduce in dozens of tiny messages."""


@dataclass(frozen=True, kw_only=True)
class ZeROOptions:
    """The strategy's own arguments; see ``ZeROStrategy``."""

    stage: Stage | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    hpz_partition_size: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the trainer says.

    Attributes:
        precision: Lightning's name, such as ``bf16-true``.
        gradient_clip_val: norm to clip to, None or 0 for none.
        accumulate_grad_batches: micro-batches in an optimizer step.
        world_size: number of ranks.
    """

    precision: str
    gradient_clip_val: float | None
    accumulate_grad_batches: int
    world_size: int


def read_config(source: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """A config as a dict of its own, read from a JSON file where a path is given.

    Raises:
        ValueError: the file is missing, is not JSON, or does not hold an object.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return _copy(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"strategy config: no such file {str(path)!r}; expected a DeepSpeed JSON config or a mapping")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"strategy config: {path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise ValueError(f"strategy config: {path} must hold a JSON object, got {type(config).__name__}")
    return config


def merge(source: Mapping[str, Any] | str | Path | None, options: ZeROOptions) -> dict[str, Any]:
    """The user's config with the strategy's arguments and this project's defaults; ``"auto"`` values may remain.

    Raises:
        ValueError: an unknown or unsupported key, an argument that contradicts the config, or options that need
            another stage.
    """
    given = read_config(source)
    check_keys(given)
    zero = by_alias(given.get("zero_optimization") or {})
    _take(zero, "stage", options.stage, "stage", default=2)
    hpz = options.hpz_partition_size if options.hpz_partition_size != 1 else None
    _take(zero, "zero_hpz_partition_size", hpz, "hpz_partition_size")
    _take(zero, "zero_quantized_weights", options.quantized_weights or None, "quantized_weights")
    _take(zero, "zero_quantized_gradients", options.quantized_gradients or None, "quantized_gradients")
    _take_offload(zero, "offload_optimizer", options.offload_optimizer)
    _take_offload(zero, "offload_param", options.offload_parameters)
    _check_stage(zero)
    config = {
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_clipping": AUTO,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **given,
        "zero_optimization": {**_zero_defaults(zero["stage"]), **zero},
    }
    check_types(config)
    return config


def resolve_run(config: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """The config with what the trainer decides: batch, accumulation, clipping and precision.

    ``gradient_accumulation_steps`` and ``train_batch_size`` are checked and left out: Lightning and DeepSpeed set them.

    Raises:
        ValueError: the config contradicts the trainer.
    """
    config = _copy(config)
    micro = config.get("train_micro_batch_size_per_gpu") or AUTO
    config["train_micro_batch_size_per_gpu"] = 1 if micro == AUTO else int(micro)
    accumulation = config.pop("gradient_accumulation_steps", None)
    if accumulation not in (None, AUTO, facts.accumulate_grad_batches):
        raise _conflict(
            "gradient_accumulation_steps",
            accumulation,
            "trainer.accumulate_grad_batches",
            facts.accumulate_grad_batches,
        )
    total = config["train_micro_batch_size_per_gpu"] * facts.accumulate_grad_batches * facts.world_size
    batch = config.pop("train_batch_size", None)
    if batch not in (None, AUTO) and (micro == AUTO or batch != total):
        raise ValueError(
            f"strategy config: train_batch_size={batch} is not decided here: the data module makes the batches; "
            "remove the key"
        )
    clip = facts.gradient_clip_val or None
    if config.get("gradient_clipping", AUTO) in (AUTO, None):
        config["gradient_clipping"] = float(clip or 0.0)
    elif clip is not None and float(config["gradient_clipping"]) != float(clip):
        raise _conflict("gradient_clipping", config["gradient_clipping"], "trainer.gradient_clip_val", clip)
    _resolve_precision(config, facts)
    _drop_autos(config)
    return config


def resolve_model(config: Mapping[str, Any], hidden_size: int | None) -> dict[str, Any]:
    """The config with bucket sizes that follow the model's width, or DeepSpeed's own where the width is unknown.

    The sizes are those of transformers' DeepSpeed integration (hidden^2, 0.9 hidden^2, 10 hidden), with a floor for
    small models.
    """
    config = _copy(config)
    zero = config["zero_optimization"]
    for key, size in _model_sizes(hidden_size).items():
        if zero.get(key) == AUTO:
            if size is None:
                del zero[key]
            else:
                zero[key] = size
    return config


def for_loading(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under which transformers loads a sharded model: nothing unresolved, fp32 buffers kept.

    transformers enters ``deepspeed.zero.Init``, which casts every floating tensor made inside to the training dtype,
    rotary frequencies included.
    """
    config = resolve_model(config, None)
    types = dict(config.get("data_types") or {})
    if types.get("keep_in_fp32_modules", AUTO) == AUTO:
        types["keep_in_fp32_modules"] = list(FP32_BUFFERS)
    return {**config, "data_types": types}


def _zero_defaults(stage: int) -> dict[str, Any]:
    if stage == 0:
        return {}
    shared = {
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": AUTO,
        "allgather_bucket_size": 200_000_000,
    }
    if stage < 3:
        return shared
    return {
        **shared,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
    }


def _model_sizes(hidden: int | None) -> dict[str, int | None]:
    if hidden is None:
        return dict.fromkeys(
            ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        )
    bucket = max(hidden * hidden, _SMALL_BUCKET)
    return {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": int(0.9 * bucket),
        "stage3_param_persistence_threshold": 10 * hidden,
    }


def _take(zero: dict[str, Any], key: str, argument: Any, name: str, default: Any = None) -> None:
    """Puts an argument of the strategy (None: not given) into the section, refusing another value there."""
    given = zero.get(key, AUTO)
    if given in (AUTO, None):
        zero.pop(key, None)
        value = argument if argument is not None else default
        if value is not None:
            zero[key] = value
    elif argument is not None and given != argument:
        raise _conflict(f"zero_optimization.{key}", given, f"strategy.{name}", argument)


def _take_offload(zero: dict[str, Any], key: str, asked: bool) -> None:
    section = zero.get(key)
    section = dict(section) if isinstance(section, Mapping) else {}
    device = section.get("device", AUTO)
    name = "offload_parameters" if key == "offload_param" else key
    if device in (AUTO, None):
        section["device"] = "cpu" if asked else "none"
    elif asked and device == "none":
        raise _conflict(f"zero_optimization.{key}.device", device, f"strategy.{name}", True)
    if section["device"] == "none":
        zero.pop(key, None)
    else:
        zero[key] = {k: v for k, v in section.items() if v != AUTO}


def _check_stage(zero: Mapping[str, Any]) -> None:
    stage = zero["stage"]
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"strategy.stage must be 0, 1, 2 or 3, got {stage!r}")
    needs = {
        "offload_param": (3, "offload_parameters"),
        "offload_optimizer": (1, "offload_optimizer"),
        "zero_quantized_weights": (3, "quantized_weights"),
        "zero_quantized_gradients": (3, "quantized_gradients"),
    }
    if zero.get("zero_hpz_partition_size", 1) > 1:
        needs["zero_hpz_partition_size"] = (3, "hpz_partition_size")
    for key, (least, name) in needs.items():
        if zero.get(key) and stage < least:
            raise ValueError(
                f"strategy.{name} needs strategy.stage {least}{' or more' if least < 3 else ''}, got {stage}"
            )


def _resolve_precision(config: dict[str, Any], facts: RunFacts) -> None:
    half = {"bf16": "bf16", "16": "fp16"}.get(facts.precision.split("-")[0])
    for name in ("bf16", "fp16"):
        section = {k: v for k, v in (config.pop(name, None) or {}).items() if v != AUTO}
        enabled = section.pop("enabled", AUTO)
        if enabled not in (AUTO, name == half):
            raise _conflict(f"{name}.enabled", enabled, "trainer.precision", facts.precision)
        if name == half:
            config[name] = {**section, "enabled": True}
    if half and lookup(config, "torch_autocast.enabled") is True:
        raise ValueError(
            f"strategy config: torch_autocast needs trainer.precision 32-true, got {facts.precision!r}: "
            "autocast keeps fp32 weights, the bf16 and fp16 engines do not"
        )
    stage = config["zero_optimization"]["stage"]
    if half and facts.accumulate_grad_batches > 1 and stage >= 2:
        # Sums of many micro-batches lose bits in bf16. Stage 1 would switch to an optimizer that holds whole fp32
        # gradients on every rank, stage 0 has no such choice: both accumulate in the training dtype.
        config["data_types"] = {"grad_accum_dtype": "fp32", **(config.get("data_types") or {})}


def _drop_autos(config: dict[str, Any]) -> None:
    """Removes what is left to DeepSpeed's defaults, and refuses ``"auto"`` where nobody would resolve it."""
    sizes = _model_sizes(None)
    zero = config["zero_optimization"]
    config["zero_optimization"] = {k: v for k, v in zero.items() if v != AUTO or k in sizes}
    for key, value in list(config.items()):
        if value == AUTO:
            if key != "communication_data_type":
                raise ValueError(f'strategy config: {key}: "auto" has no meaning here; give a value or remove the key')
            del config[key]


def _conflict(key: str, value: Any, other: str, other_value: Any) -> ValueError:
    return ValueError(
        f"strategy config: {key}={value!r} contradicts {other}={other_value!r}; "
        f'remove one of them, or set {key.rpartition(".")[2]} to "auto"'
    )


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in config.items()}
