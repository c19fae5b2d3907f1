"""Which keys a DeepSpeed config may have, and which of them this project refuses, with the reason.

DeepSpeed rejects an unknown key inside ``zero_optimization`` and ignores one at the top level or in the sections that
it reads by hand, so a misspelt ``gradient_cliping`` trains without clipping. Every level is checked here. The keys of
the sections that DeepSpeed describes by pydantic models are read from those models and follow its version; the others
are listed below as of DeepSpeed 0.19.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Keys = dict[str, "Keys | None"]
"""Allowed keys of one level; None stands for any value."""


def _plain(*names: str) -> Keys:
    return dict.fromkeys(names)


TOP: Keys = _plain(
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "prescale_gradients",
    "managed_gradient_accumulation",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "vocabulary_size",
    "disable_allgather",
    "disable_python_gc",
    "dataloader_drop_last",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "weight_quantization",
    "datastates_ckpt",
)
SECTIONS: Keys = {
    "torch_autocast": _plain("enabled", "dtype", "lower_precision_safe_modules"),
    "activation_checkpointing": _plain(
        "partition_activations",
        "number_checkpoints",
        "contiguous_memory_optimization",
        "synchronize_checkpoint_boundary",
        "profile",
        "cpu_checkpointing",
    ),
    "aio": _plain(
        "block_size",
        "queue_depth",
        "intra_op_parallelism",
        "thread_count",
        "single_submit",
        "overlap_events",
        "use_gds",
    ),
    "flops_profiler": _plain(
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"
    ),
    "data_types": _plain("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "checkpoint": {
        **_plain("tag_validation", "load_universal", "use_node_local_storage", "checkpoint_serialization"),
        "parallel_write": _plain("pipeline_stage"),
        "writer": _plain(
            "type",
            "decoupled",
            "io_buffer_size",
            "io_buffer_double",
            "io_multiplier",
            "show_statistics",
            "data_parallel",
        ),
    },
}

UNSUPPORTED: dict[str, str] = {
    "optimizer": "the objective makes the optimizer: set model.optimizer and remove this section",
    "scheduler": "the objective makes the schedule: set model.schedule and remove this section",
    "tensor_parallel": "ranks of one tensor-parallel group would need the same batch",
    "expert_parallel": "expert parallelism is not wired to the trainer",
    "sequence_parallel_size": "sequence parallelism needs a process mesh that Lightning does not pass on",
    "pipeline": "pipeline parallelism needs a PipelineModule",
    "hybrid_engine": "the hybrid engine replaces the trainer's steps",
    "autotuning": "the tuner starts its own jobs; `ptl plan` estimates memory",
    "data_efficiency": "the data module decides the order of the data",
    "bfloat16": "its name is bf16",
    **dict.fromkeys(
        ("amp", "curriculum_learning", "elasticity", "compression_training", "sparse_gradients", "sparse_attention"),
        "DeepSpeed 0.19 has removed it",
    ),
}
"""Top-level keys that are refused, with the reason."""

_REFUSED_VALUES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("managed_gradient_accumulation", lambda v: v is False, "Lightning decides when an accumulation ends"),
    ("gradient_allreduce_op", lambda v: str(v).lower() == "sum", "gradients are averaged over ranks"),
    ("checkpoint.load_universal", bool, "a resume on another number of ranks converts by itself: remove the key"),
    ("checkpoint.use_node_local_storage", bool, "a checkpoint is one folder that every rank can read"),
    ("checkpoint.writer.decoupled", bool, "a checkpoint is whole when saving returns"),
    ("datastates_ckpt", bool, "a checkpoint is whole when saving returns"),
    ("zero_optimization.zenflow", bool, "ZenFlow decides itself when an accumulation ends"),
    ("zero_optimization.legacy_stage1", bool, "DeepSpeed has removed it"),
    ("zero_optimization.elastic_checkpoint", bool, "a resume on another number of ranks converts by itself"),
    ("compile.deepcompile", bool, "DeepCompile needs engine.compile(), which Lightning does not call"),
)


def known_keys() -> Keys:
    """Every key that DeepSpeed reads, by level."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        **TOP,
        **SECTIONS,
        "zero_optimization": _model_keys(DeepSpeedZeroConfig),
        "bf16": _model_keys(DeepSpeedBF16Config),
        "fp16": _model_keys(DeepSpeedFP16Config),
        "comms_logger": _model_keys(CommsLoggerConfig),
        "compile": _model_keys(CompileConfig),
        "timers": {"throughput": _model_keys(DeepSpeedThroughputTimerConfig)},
        "tensorboard": _model_keys(TensorBoardConfig),
        "wandb": _model_keys(WandbConfig),
        "csv_monitor": _model_keys(CSVConfig),
        "comet": _model_keys(CometConfig),
    }


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuses keys that DeepSpeed would ignore and keys or values that this project cannot honour.

    Raises:
        ValueError: names the key by its path, what to do, and the nearest known name of a misspelt key.
    """
    for key, reason in UNSUPPORTED.items():
        if key in config:
            raise ValueError(f"strategy config: {key!r} is not supported: {reason}")
    _check_level(config, known_keys(), "")
    for path, refused, reason in _REFUSED_VALUES:
        value = lookup(config, path)
        if value is not None and refused(value):
            raise ValueError(f"strategy config: {path}: {value!r} is not supported: {reason}")


def check_types(config: Mapping[str, Any]) -> None:
    """Lets DeepSpeed's own models refuse values of the wrong type before a model is loaded.

    Raises:
        ValueError: names the key by its path, the value and what was expected.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, model in models.items():
        try:
            model(**(config.get(section) or {}))
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join([section, *map(str, first["loc"])])
            raise ValueError(f"strategy config: {path}: got {first['input']!r}: {first['msg']}") from None
        except (AssertionError, ValueError) as error:
            raise ValueError(f"strategy config: {section}: {error}") from None


def by_alias(zero: Mapping[str, Any]) -> dict[str, Any]:
    """The section under the documented names (``stage3_...``), so that defaults and given keys meet."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    aliases = {name: field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    return {aliases.get(key, key): value for key, value in zero.items()}


def lookup(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _check_level(config: Mapping[str, Any], keys: Keys, path: str) -> None:
    for key, value in config.items():
        name = f"{path}{key}"
        if key not in keys:
            raise ValueError(f"strategy config: unknown key {name!r}{_hint(key, path, keys)}")
        below = keys[key]
        if below is None or value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(
                f"strategy config: {name} must hold keys, as in {{{next(iter(below))!r}: ...}}, got {value!r}"
            )
        _check_level(value, below, f"{name}.")


def _hint(key: str, path: str, siblings: Keys) -> str:
    """Where the key was perhaps meant: a near name on the same level, else the same or a near name elsewhere."""
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {path}{near[0]}?"
    everywhere = {name.rpartition(".")[2]: name for name in _paths(known_keys())}
    near = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; known here: {', '.join(sorted(siblings))}" if len(siblings) < 16 else ""


def _paths(keys: Keys, path: str = "") -> Iterator[str]:
    for key, below in keys.items():
        yield f"{path}{key}"
        if below:
            yield from _paths(below, f"{path}{key}.")


def _model_keys(model: type[Any]) -> Keys:
    """Keys of a pydantic model, by field name and alias, with those of nested models."""
    keys: Keys = {}
    for name, field in model.model_fields.items():
        below = next((_model_keys(part) for part in _parts(field.annotation) if hasattr(part, "model_fields")), None)
        for key in filter(None, (field.alias, name)):
            keys[key] = below
    return keys


def _parts(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) or (annotation,)
