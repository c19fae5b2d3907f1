"""The objective of ``ptl`` for distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peer_tools import lightning_run
from benchmarks.peer_tools.compare import Measured
from ptl.functional.divergence import Divergence
from ptl.models.spec import ModelSpec
from ptl.models.teachers import Teacher
from ptl.objectives.distillation import Distillation


def objective_of(spec: Mapping[str, Any]) -> Distillation:
    """The objective by its public arguments; the teacher's weights have the student's type, as on the peer's side."""
    how = lightning_run.model_of(spec)
    return Distillation(
        policy=ModelSpec(name=spec["student"], **how),
        teacher=Teacher(model=ModelSpec(name=spec["teacher"], **how)),
        divergence=Divergence(kind="forward_kl"),
        **lightning_run.rates_of(spec),
    )


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""
    return lightning_run.fit(spec, objective_of(spec), settings={"divergence": "forward_kl"}, teacher=spec["teacher"])
