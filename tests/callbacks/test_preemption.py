"""Leaving at a step boundary: what is saved, what a resumed run logs, and who takes the signals."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.exit_codes import PreemptedError
from ptl.callbacks.jsonl import METRICS_FILE, JsonlLogger, read_metrics
from ptl.callbacks.preemption import JOB_END, Preemption
from ptl.callbacks.record import RunRecord
from ptl.callbacks.saved import latest_checkpoint
from tests.objectives import law
from tests.objectives.test_sft import fit, objective_of

EPOCHS, STEPS = 2, 6
"""24 rows, 4 a step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return law.make_folder(tmp_path_factory.mktemp("preemption"))


class SignalAt(L.Callback):
    """Signals its own process inside an optimizer step."""

    def __init__(self, step: int, number: int = signal.SIGUSR1) -> None:
        self.step, self.number = step, number

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def attempt(folder, run: Path, *callbacks: Any, **options: Any):
    """A fit into a run folder, from its newest checkpoint where it has one."""
    objective = objective_of(folder)
    parts = [RunRecord(run), *callbacks, Preemption(), Checkpoint(dirpath=str(run / "checkpoints"))]
    settings = {
        "accumulate_grad_batches": 4,
        "max_epochs": EPOCHS,
        "logger": JsonlLogger(run),
        "data_options": {"val_fraction": 0.0, "val": None},
        **options,
    }
    trainer, _ = fit(folder, objective, *parts, ckpt_path=latest_checkpoint(run), **settings)
    return objective, trainer


def rows(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time"} for row in read_metrics(run / METRICS_FILE)]


@pytest.mark.parametrize(("settings", "apart"), [
    ({"log_every_n_steps": 1}, 4),
    ({"log_every_n_steps": 4, "val_check_interval": 8}, 3),
    ({"log_every_n_steps": 3, "val_check_interval": 10, "check_val_every_n_epoch": None}, 2),
], ids=["every-step", "val-in-epoch", "val-across-epochs"])  # fmt: skip
def test_law_6_a_run_that_left_at_any_step_logs_and_learns_what_a_whole_one_does(folder, tmp_path, settings, apart):
    options = {**settings, "data_options": {"val_fraction": 0.2}}
    whole, trainer = attempt(folder, tmp_path / "whole", **options)
    expected, last = rows(tmp_path / "whole"), trainer.global_step
    assert len(expected) >= last // settings["log_every_n_steps"]
    for stop in range(1, last, apart):
        run = tmp_path / f"stop-{stop}"
        with pytest.raises(PreemptedError) as left:
            attempt(folder, run, SignalAt(stop), **options)
        assert left.value.step == stop and left.value.reason == "SIGUSR1"
        assert left.value.checkpoint == str(latest_checkpoint(run))
        rest, resumed = attempt(folder, run, **options)
        assert resumed.global_step == last
        assert rows(run) == expected, stop
        for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
            assert torch.equal(a, b), (stop, name)


def test_the_last_step_ends_the_run_and_not_the_signal(folder, tmp_path):
    _, trainer = attempt(folder, tmp_path, SignalAt(EPOCHS * STEPS))
    assert trainer.global_step == EPOCHS * STEPS


def test_it_leaves_before_the_time_of_the_job_is_up(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(JOB_END, str(time.time() + 60))
    with pytest.raises(PreemptedError, match="time is nearly up") as left:
        attempt(folder, tmp_path)
    assert left.value.step == 1
    monkeypatch.setenv(JOB_END, str(time.time() + 3600))
    _, trainer = attempt(folder, tmp_path)
    assert trainer.global_step == EPOCHS * STEPS


def test_handlers_are_put_back(folder, tmp_path):
    def mine(number, frame) -> None: ...

    former = signal.signal(signal.SIGUSR1, mine)
    try:
        with pytest.raises(PreemptedError):
            attempt(folder, tmp_path, SignalAt(2))
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_a_run_says_that_it_was_preempted(folder, tmp_path):
    with pytest.raises(PreemptedError):
        attempt(folder, tmp_path, SignalAt(3, signal.SIGTERM))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "preempted" and summary["global_step"] == 3


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="preemption.signals: got 'SIGNAL'"):
        Preemption(signals=["SIGNAL"])
    with pytest.raises(ValueError, match="margin_seconds must be 0 or more, got -1"):
        Preemption(margin_seconds=-1)
