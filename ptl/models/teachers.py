"""Teachers: frozen models that say what a student should. They are outside of everything that trains or saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from ptl.functional.model_size import model_size
from ptl.models.build import load_base
from ptl.models.heads import causal_lm
from ptl.models.spec import ModelSpec

Placement = Literal["replica", "sharded"]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Where the teacher's distribution comes from.

    Attributes:
        model: the teacher, as ``policy`` names a student; ``quantize: nf4|int8`` keeps it in codes. With ``cache`` it
            may be left out where nothing but the cache is wanted.
        placement: ``replica`` is a whole copy on every rank; ``sharded`` cuts it over the ranks by ZeRO-3, beside a
            student under any strategy that has a process group.
        device: where a replica lives, as torch names it (``cpu``, ``cuda:1``); None is the student's device. Its hidden
            states travel to the student, its head stays with the student.
        cache: folder that ``ptl synth teacher`` wrote: no teacher is loaded and its kept distribution is read.

    Raises:
        ValueError: nothing to take the distribution from, or settings that exclude each other.
    """

    model: ModelSpec | None = None
    placement: Placement = "replica"
    device: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.model is None and self.cache is None:
            raise ValueError("teacher names nothing: set teacher.model.name, or teacher.cache to a folder")
        if self.placement not in ("replica", "sharded"):
            raise ValueError(f"teacher.placement must be replica or sharded, got {self.placement!r}")
        if self.model is not None and self.model.adapter is not None:
            raise ValueError("teacher.model.adapter is set, and a teacher trains nothing: merge it with `ptl export`")
        if self.model is not None and self.model.head != "lm":
            raise ValueError(f"teacher.model.head must be lm, got {self.model.head}: it gives next-token distributions")
        if self.placement == "sharded" and self.device is not None:
            raise ValueError("teacher.device needs teacher.placement replica: a sharded teacher is on every device")
        if self.placement == "sharded" and self.model is not None and self.model.quantize is not None:
            raise ValueError(
                "teacher.placement sharded needs a teacher in floats: remove teacher.model.quantize, or keep a "
                "quantised replica"
            )
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(
                    f"teacher.device {self.device!r} is no device: expected cpu, cuda or cuda:N"
                ) from error


def build_teacher(spec: ModelSpec) -> nn.Module:
    """The frozen model in eval mode: no parameter asks for a gradient, nothing drops out.

    Raises:
        ValueError: as ``ptl.models.build.build``.
    """
    model = load_base(spec)
    for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        part.use_cache = False  # a cache would switch off the masks between packed documents
    return freeze(model)


def check_room(teacher: Teacher, *, ranks: int, device_bytes: int) -> None:
    """Refuses a teacher whose weights alone are larger than the memory that is to hold them, before any is loaded.

    Arguments:
        teacher: which model, and how it is placed.
        ranks: ranks that share a sharded one.
        device_bytes: memory of the device where it runs.

    Raises:
        ValueError: with both sizes and what helps.
    """
    spec = teacher.model
    if spec is None or spec.random_init:
        return
    try:
        raw, _ = PreTrainedConfig.get_config_dict(spec.name, revision=spec.revision)
        parameters = model_size({**raw, **spec.config_overrides}).parameters
    except (OSError, ValueError, KeyError):
        return  # loading it says better what is wrong, and not every kind of model has its sizes known
    width = {"nf4": 0.5, "int8": 1.0}.get(str(spec.quantize)) or {"fp32": 4.0}.get(spec.dtype, 2.0)
    share = ranks if teacher.placement == "sharded" else 1
    needed = width * parameters / share
    if needed > device_bytes:
        raise ValueError(
            f"the teacher {spec.name} has {parameters / 1e9:.1f}B parameters, which take {needed / 2**30:.1f} GiB on "
            f"each of {ranks} ranks, and a device here has {device_bytes / 2**30:.1f} GiB: set teacher.placement "
            "sharded on more devices, teacher.model.quantize nf4, or keep its answers with `ptl synth teacher`; "
            f"`ptl plan -c RUN --teacher {spec.name} --gpus N` says what fits"
        )


def freeze(model: nn.Module) -> nn.Module:
    """The same model in eval mode without gradients."""
    return model.eval().requires_grad_(False)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters; codes of a quantised one count as they are stored."""
    return sum(p.numel() * p.element_size() for p in causal_lm(model).parameters())
