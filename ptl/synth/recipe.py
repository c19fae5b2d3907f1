"""What a distillation recipe says of its teacher, read without building the objective that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptl.config_errors import explain
from ptl.models.spec import ModelSpec


@dataclass(frozen=True)
class Recipe:
    """The teacher of a run's configuration.

    Attributes:
        teacher: the model.
        temperature: of the divergence; 1 where the configuration sets none.
        cache: the folder of the teacher's cache, where it names one.
    """

    teacher: ModelSpec
    temperature: float
    cache: str | None


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """The teacher of a merged configuration.

    Raises:
        ValueError: it names no teacher, or one that is no model, with the key.
    """
    objective = _arguments(config.get("model"))
    teacher = _arguments(objective.get("teacher"))
    if not teacher.get("model"):
        raise ValueError("the configuration has no model.init_args.teacher.model: give a distillation recipe")
    temperature = _arguments(objective.get("divergence")).get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise ValueError(f"model.init_args.divergence.temperature is {temperature!r}; expected a number")
    return Recipe(_spec(_arguments(teacher["model"])), float(temperature), teacher.get("cache"))


def _arguments(section: Any) -> dict[str, Any]:
    """The arguments of a section, written plainly or beside a ``class_path``."""
    if not isinstance(section, dict):
        return {}
    return section.get("init_args") or {} if "class_path" in section else section


def _spec(values: dict[str, Any]) -> ModelSpec:
    import json

    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ModelSpec, "teacher")
    try:
        return parser.instantiate(parser.parse_args(["--config", json.dumps({"teacher": values})])).teacher
    except ArgumentError as error:
        raise ValueError(f"model.init_args.teacher.model: {explain(str(error))}") from error
