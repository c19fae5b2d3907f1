"""What ``ptl plan`` plans: options and configuration layers turned into a job, without building or loading anything."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptl.functional.model_size import ModelSize, model_size
from ptl.functional.plan_job import Job, Strategy
from ptl.functional.plan_rates import Rates, rates_of

OBJECTIVES = {
    "SFT": "sft",
    "LoRASFT": "sft",
    "Distillation": "distillation",
    "RewardModeling": "reward",
    "DPO": "dpo",
    "GRPO": "grpo",
    "PPO": "ppo",
}
_PRECISIONS = {"32-true": "fp32", "32": "fp32", "fp32": "fp32", "bf16-mixed": "bf16-mixed", "bf16-true": "bf16-true"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked.

    Attributes:
        name: of the model, as it was given.
        job: with gradient checkpointing off, and weights as for ZeRO.
        rates: of the device.
        checkpointing: as it was fixed, or None to try both.
        weights: dtype of the weights as it was fixed, or None for what suits each strategy.
        host_memory: bytes of a node's host, None where not told.
        margin: share of the memory to leave free.
    """

    name: str
    job: Job
    rates: Rates
    checkpointing: bool | None
    weights: str | None
    host_memory: float | None
    margin: float

    def job_for(self, strategy: Strategy, checkpointing: bool, **changes: Any) -> Job:
        """The job under a strategy: fp32 weights where no engine keeps fp32 masters and every weight is trained."""
        plain = "fp32" if self.job.rank is None and not strategy.stage and self.job.precision != "bf16-true" else "bf16"
        weights = self.weights or ("fp32" if self.job.precision == "fp32" else plain)
        given = {"checkpointing": "full" if checkpointing else "none", "weights": weights, **changes}
        return replace(self.job, **given)


def request(options: argparse.Namespace) -> Request:
    """What the options ask for, with the layers' values where an option is not given.

    Raises:
        ValueError: a value is wrong or missing; the message says what was got, what is expected and what to change.
    """
    layers = merged(options.config or ())
    policy = _at(layers, "model.init_args.policy") or {}
    trainer, data = layers.get("trainer") or {}, layers.get("data") or {}
    name = options.model or policy.get("name")
    if not name:
        raise ValueError("got no model, expected a hub name, a folder or a config.json, give --model or -c recipe.yaml")
    device = options.gpu or ("cpu" if trainer.get("accelerator") == "cpu" else "h100")
    changes = merged([options.rates]) if options.rates else {}
    if options.memory is not None:
        changes["memory"] = options.memory * 2**30
    rates = rates_of(device, changes)
    gpus = options.gpus or _number(trainer.get("devices"), "trainer.devices", "--gpus")
    nodes = options.nodes or _number(trainer.get("num_nodes"), "trainer.num_nodes", "--nodes")
    rank, quantize = _adapter(options.adapter, policy, str(_at(layers, "model.class_path") or ""))
    precision = options.precision or str(trainer.get("precision") or ("32-true" if device == "cpu" else "bf16-mixed"))
    if precision not in _PRECISIONS:
        raise ValueError(
            f"got precision {precision!r}, expected one of fp32, bf16-mixed, bf16-true, change --precision"
        )
    objective = options.objective or OBJECTIVES.get(str(_at(layers, "model.class_path") or "SFT").split(".")[-1])
    if objective is None:
        raise ValueError(f"got {_at(layers, 'model.class_path')!r}, which is no objective of ptl, change --objective")
    teacher = options.teacher or _teacher(layers, objective)
    dtype = options.weights or (policy.get("dtype") if "dtype" in policy else None)
    sequence = options.sequence or data.get("pack_to") or data.get("max_length") or 4096
    job = Job(
        model=size_of(name, policy.get("config_overrides")),
        sequence=int(sequence),
        micro_batch=options.micro_batch or int(data.get("micro_batch_size") or 1),
        accumulate=options.accumulate or int(trainer.get("accumulate_grad_batches") or 1),
        document=options.document,
        rank=rank,
        quantize=quantize,
        precision=_PRECISIONS[precision],  # pyright: ignore[reportArgumentType]
        world=gpus * nodes,
        per_node=gpus,
        cuda=device != "cpu",
        teacher=size_of(teacher) if teacher else None,
        teacher_sharded=options.teacher_sharded or _at(layers, "model.init_args.teacher.placement") == "sharded",
        objective=objective,  # pyright: ignore[reportArgumentType]
    )
    given = policy.get("gradient_checkpointing") if options.checkpointing is None else options.checkpointing
    host = options.host_memory * 2**30 if options.host_memory else None
    return Request(
        name=str(name),
        job=job,
        rates=rates,
        checkpointing=given,
        weights=dtype if dtype in ("fp32", "bf16") else None,
        host_memory=host,
        margin=options.margin,
    )


def merged(paths: Sequence[str]) -> dict[str, Any]:
    """Configuration layers as one mapping; later ones win, as for ``ptl fit``."""
    import yaml

    whole: dict[str, Any] = {}
    for path in paths:
        try:
            layer = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"got -c {path}, which cannot be read: {error.strerror}; change -c") from None
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            raise ValueError(f"{path}:{where.line + 1 if where else 1}: got no YAML, expected a recipe") from None
        if layer is not None and not isinstance(layer, dict):
            raise ValueError(f"{path}: got {type(layer).__name__}, expected keys and values as in a recipe")
        whole = _merge(whole, layer or {})
    return whole


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merge(out[key], value) if both else value
    return out


def _at(layers: Mapping[str, Any], path: str) -> Any:
    here: Any = layers
    for key in path.split("."):
        here = here.get(key) if isinstance(here, Mapping) else None
    return here


def _number(value: Any, key: str, option: str) -> int:
    if value is None or value in ("auto", -1, "-1"):
        return 1
    if isinstance(value, list):
        return max(1, len(value))
    try:
        return max(1, int(value))
    except (TypeError, ValueError):
        raise ValueError(f"got {key} {value!r}, expected a number of devices, change it or give {option}") from None


def _adapter(option: str | None, policy: Mapping[str, Any], class_path: str) -> tuple[int | None, bool]:
    """LoRA's rank, or None, and whether the base is quantised."""
    if option is None:
        adapter = policy.get("adapter")
        rank = int((adapter or {}).get("rank", 16)) if adapter or class_path.endswith("LoRASFT") else None
        return rank, policy.get("quantize") == "nf4"
    kind, _, rank = option.partition(":")
    if kind == "full" and not rank:
        return None, False
    if kind in ("lora", "qlora") and (rank or "16").isdigit() and int(rank or 16) > 0:
        return int(rank or 16), kind == "qlora"
    raise ValueError(f"got adapter {option!r}, expected full, lora:RANK or qlora:RANK, change --adapter")


def _teacher(layers: Mapping[str, Any], objective: str) -> str | None:
    if objective == "distillation":
        return _at(layers, "model.init_args.teacher.model.name")
    return _at(layers, "model.init_args.reference.model.name")


# ---- the model ----


def size_of(name: str, overrides: Mapping[str, Any] | None = None) -> ModelSize:
    """The sizes of a hub name, a model or run folder, or a ``config.json``; only the config is read.

    Raises:
        ValueError: nothing of that name, or a config that lacks a size.
    """
    try:
        return model_size({**read_config(name), **(overrides or {})})
    except ValueError as mistake:
        raise ValueError(f"model {name}: {mistake}") from None


def read_config(name: str) -> dict[str, Any]:
    """The ``config.json`` that a name stands for."""
    path = Path(name).expanduser()
    if path.is_dir():
        places = [path / "config.json", path / "export" / "config.json"]
        found = next((place for place in places if place.is_file()), None)
        if found is None and (path / "tokenizer.json").is_file():
            return {"vocab_size": _tokens(path / "tokenizer.json")}  # a model from scratch: a recipe gives its sizes
        if found is None:
            raise ValueError("got a folder without config.json, expected a model folder or a run with export/")
    elif path.is_file():
        found = path
    elif path.is_absolute() or name.startswith(".") or name.endswith(".json") or name.count("/") > 1:
        raise ValueError("got a path that is not there, expected a hub name, a folder or a config.json")
    else:
        found = _from_hub(name)
    try:
        config = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"got {found.name}, which is no JSON, expected a config.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"got a {type(config).__name__} in {found.name}, expected an object")
    return config


def _tokens(file: Path) -> int:
    """Rows of an embedding for a tokenizer, rounded up as ``ptl.models.scratch`` does."""
    state = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))]
    last = max([*ids, *(token["id"] for token in state["added_tokens"])])
    return -(-(last + 1) // 64) * 64


def _from_hub(name: str) -> Path:
    """The config alone, from the hub or from its cache on this machine."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except LocalEntryNotFoundError:
        reason = "its config is not on this machine and the hub cannot be reached"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0][:160]
    raise ValueError(f"{reason}; expected a hub name that can be read, or give --model a folder or a config.json")
