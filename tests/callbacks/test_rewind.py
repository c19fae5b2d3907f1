"""A run that diverges goes back to a checkpoint from before, and past the data it diverged on."""

import json
import os

import pytest
import torch

from ptl import cli
from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.exit_codes import REWIND
from ptl.callbacks.health import DivergedError, Health, RewindError
from ptl.callbacks.jsonl import read_metrics, read_rows
from ptl.callbacks.record import RunRecord
from ptl.callbacks.rewind import read_rewind
from ptl.callbacks.saved import latest_checkpoint
from ptl.data.module import ChatDataModule
from ptl.data.parts import Preparation
from ptl.data.sources import Source
from tests.callbacks.guard_parts import Poison, Rows
from tests.callbacks.parts import trainer
from tests.callbacks.real import make_inputs, sft

EPOCH = 12
"""Rows, one a step."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def attempt(inputs, run, *, poison=(), epochs=2, resume=True, every=2, keep=-1, health=None):
    """One attempt of the run: the rows of each step, and the trainer."""
    model, rows = inputs
    data = ChatDataModule(
        [Source(path=str(rows))],
        tokenizer=str(model),
        preparation=Preparation(cache_dir=str(rows.parent / "cache"), num_proc=1),
    )
    data.bind(view=sft(model).view, tokenizer=None)
    seen = Rows()
    saves = {"every_n_train_steps": every} if every else {}
    callbacks = [
        Poison(list(poison)),
        seen,
        health or Health(max_skipped_in_a_row=2),
        Checkpoint(save_top_k=keep, **saves),
        RunRecord(run),
    ]
    fit = trainer(run, callbacks, max_steps=-1, max_epochs=epochs)
    error = None
    try:
        fit.fit(sft(model), data, ckpt_path=latest_checkpoint(run) if resume else None)
    except DivergedError as found:
        error = found
    return seen.seen, fit, error


@pytest.fixture(scope="module")
def order(inputs, tmp_path_factory):
    """The row of each step of a run in which nothing goes wrong."""
    seen, _, error = attempt(inputs, tmp_path_factory.mktemp("order"), epochs=2)
    assert error is None and len(seen) == 2 * EPOCH
    return [seen[step] for step in sorted(seen)]


def test_a_rewind_goes_on_from_before_with_the_data_from_behind(inputs, tmp_path, order):
    """Steps 6 and 7 break; the checkpoint of step 6, which is of weights that have seen both, is set aside."""
    _, fit, error = attempt(inputs, tmp_path, poison=(6, 7))
    assert isinstance(error, RewindError) and "--run.resume auto" in str(error) and fit.global_step == 7
    assert latest_checkpoint(tmp_path).name == "step=00000004.ckpt"
    assert [path.name for path in (tmp_path / "set-aside").iterdir()] == ["step=00000006.ckpt"]
    noted = read_rewind(tmp_path)
    assert (noted.step, noted.stopped, noted.number) == (4, 7, 1)

    seen, fit, error = attempt(inputs, tmp_path, epochs=1)
    assert error is None
    # Five steps are left of the epoch.
    assert seen == {5 + i: rows for i, rows in enumerate(order[7:EPOCH])}
    assert (fit.global_step, fit.current_epoch) == (9, 1)
    assert [row["step"] for row in read_rows(tmp_path / "skipped.jsonl")] == [6, 7]

    # A run that goes on from a later checkpoint has the rewind behind it.
    seen, fit, _ = attempt(inputs, tmp_path, epochs=2)
    assert seen == {10 + i: rows for i, rows in enumerate(order[EPOCH:])}
    assert (fit.global_step, fit.current_epoch) == (21, 2)


def test_an_attempt_that_is_killed_before_it_saves_rewinds_again(inputs, tmp_path, order):
    attempt(inputs, tmp_path, poison=(6, 7))
    for _ in range(2):
        seen, _, error = attempt(inputs, tmp_path, poison=(5, 6))  # at once, before another checkpoint
        assert seen[5] != order[4]
    assert seen[5] == order[9]  # two of the data are gone with each
    assert read_rewind(tmp_path).number == 2 and not isinstance(error, RewindError)


@pytest.mark.parametrize(("poison", "every", "from_step"), [((14, 15), None, 12), ((12, 13), 5, 10)])
def test_the_data_may_go_on_in_a_later_epoch(inputs, tmp_path, order, poison, every, from_step):
    """From a checkpoint at the end of the first epoch into the second, and from within the first into the second."""
    _, _, error = attempt(inputs, tmp_path, poison=poison, every=every, keep=1)
    assert isinstance(error, RewindError) and read_rewind(tmp_path).step == from_step
    seen, fit, _ = attempt(inputs, tmp_path, every=every, keep=1)
    assert seen == {from_step + 1 + i: rows for i, rows in enumerate(order[poison[1] :])}
    assert (fit.global_step, fit.current_epoch) == (from_step + len(seen), 2)


def test_where_only_later_checkpoints_are_left_the_newest_is_taken(inputs, tmp_path, order):
    _, _, error = attempt(inputs, tmp_path, poison=(6, 7), every=1, keep=1)
    assert isinstance(error, RewindError) and read_rewind(tmp_path).step == 6
    seen, _, _ = attempt(inputs, tmp_path, every=1, keep=1, epochs=1)
    assert seen == {7 + i: rows for i, rows in enumerate(order[7:EPOCH])}


def test_without_a_checkpoint_or_a_rewind_left_the_run_ends(inputs, tmp_path):
    _, _, error = attempt(inputs, tmp_path / "a", poison=(1, 2), every=5)
    assert type(error) is DivergedError and "no checkpoint" in str(error)
    health = Health(max_skipped_in_a_row=2, max_rewinds=0)
    _, _, error = attempt(inputs, tmp_path / "b", poison=(6, 7), health=health)
    assert type(error) is DivergedError and not (tmp_path / "b" / "set-aside").exists()
    assert latest_checkpoint(tmp_path / "b").name == "step=00000006.ckpt"


def test_the_command_ends_with_the_code_for_a_rewind_and_goes_on(inputs, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)  # libraries keep the stream of an earlier test
    model, rows = inputs
    poison = {"class_path": "tests.callbacks.guard_parts.Poison", "init_args": {"steps": [4, 5]}}
    arguments = [
        "fit", "--model.class_path", "ptl.objectives.sft.SFT", "--model.policy.name", str(model),
        "--data.train", f"[{{path: {rows}}}]", "--data.preparation.cache_dir", str(rows.parent / "cache"),
        "--data.preparation.num_proc", "1", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1",
        "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
        "--run.dir", str(tmp_path / "run"), "--checkpoint.every_n_train_steps", "3",
        "--health.max_skipped_in_a_row", "2", "--run.resume", "auto",
    ]  # fmt: skip
    assert cli.main([*arguments, "--trainer.callbacks", json.dumps([poison])]) == REWIND
    said = capfd.readouterr().err
    assert "ptl: rewind: " in said and "since optimizer step 4" in said and "Traceback" not in said
    assert cli.main(arguments) == 0
    assert "rewind 1 of at most 2: going on from optimizer step 3" in capfd.readouterr().err
    rows_logged = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows_logged] == list(range(EPOCH - 2))
    assert all(torch.tensor(float(row["train/loss"])).isfinite() for row in rows_logged)
    assert "PTL_RUN_DIR" not in os.environ
