"""Checkpoints through a disk of the node: training goes on, what appears is whole, and a kill loses no more."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.saved import latest_checkpoint
from ptl.callbacks.single_file import AtomicCheckpointIO
from ptl.strategies.checkpoints import CheckpointError, read_record
from ptl.strategies.staging import Staging, node_folder
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.ranks import free_port, run_ranks

HERE = "tests.callbacks.staged"
BATCHES = [packed([8, 8], trained=4, seed=i) for i in range(6)]
KILLS = 4


@pytest.fixture
def slow(monkeypatch):
    """Each copy takes a while."""
    real = shutil.copyfile

    def copyfile(source, target, **how):
        time.sleep(0.3)
        return real(source, target, **how)

    monkeypatch.setattr(shutil, "copyfile", copyfile)


def same(one: Path, other: Path) -> bool:
    a, b = torch.load(one), torch.load(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- one process ----


def test_training_goes_on_while_a_checkpoint_is_copied(tmp_path, slow):
    at_step_3 = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                at_step_3.append(
                    (latest_checkpoint(tmp_path), any(t.name == "checkpoint copy" for t in threading.enumerate()))
                )

    saver = Checkpoint(every_n_train_steps=3, local_dir=str(tmp_path / "node"))
    trainer(tmp_path, [Look(), saver]).fit(Toy(), loader(BATCHES))
    assert at_step_3 == [(None, True)]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=00000006.ckpt"]
    assert list((tmp_path / "node").iterdir()) == []
    loaded = torch.load(tmp_path / "checkpoints/step=00000006.ckpt", weights_only=True)
    assert loaded["global_step"] == 6


def test_the_former_checkpoint_stays_until_the_next_is_in_its_place(tmp_path, slow):
    """Every step is saved and one kept: at no moment is there none, and the best are kept beside."""
    folder, seen = tmp_path / "checkpoints", []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(sorted(p.name for p in folder.glob("step=*")))

    parts = [
        Look(),
        Checkpoint(every_n_train_steps=1, local_dir=str(tmp_path / "node")),
        Checkpoint(monitor="val/loss", save_top_k=2),
    ]
    trainer(tmp_path, parts, val_check_interval=2).fit(Toy(), loader(BATCHES), loader(BATCHES[:1]))
    # Lightning would take a validation behind a save for done, so that a save before one waits for it.
    assert all(len(names) in (1, 2) for names in seen[2:]), seen
    assert sorted(p.name for p in folder.glob("step=*")) == ["step=00000006.ckpt"]
    assert len(list(folder.glob("best-*"))) == 2


@pytest.mark.parametrize("mistake", ["full", "vanished"])
def test_a_copy_that_fails_ends_the_run_soon_and_leaves_the_last_good_one(tmp_path, monkeypatch, mistake):
    real = shutil.copyfile

    def copyfile(source, target, **how):
        if "step=00000004" not in str(target):
            return real(source, target, **how)
        if mistake == "vanished":
            shutil.rmtree(tmp_path / "checkpoints")
            return real(source, target, **how)
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    saver = Checkpoint(every_n_train_steps=2, local_dir=str(tmp_path / "node"))
    runner = trainer(tmp_path, [saver], max_steps=40)
    with pytest.raises(
        CheckpointError, match=r"step=00000004\.ckpt: .*(No space left|No such file).*dirpath, then resume"
    ) as told:
        runner.fit(Toy(pause=0.05), loader(BATCHES * 7))
    assert runner.global_step in (4, 5, 6)
    assert list((tmp_path / "node").iterdir()) == []
    if mistake == "full":
        good = tmp_path / "checkpoints/step=00000002.ckpt"
        assert f"the newest whole checkpoint is {good}" in str(told.value)
        assert list((tmp_path / "checkpoints").iterdir()) == [good]


def test_a_load_waits_for_what_is_being_copied(tmp_path, slow):
    io = AtomicCheckpointIO()
    io.staging = Staging(tmp_path / "node/rank0")
    io.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()
    assert io.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 1


def test_what_stands_behind_a_copy_is_done_when_it_has_succeeded_and_never_where_it_failed(tmp_path):
    staging, done, go = Staging(tmp_path / "rank0"), [], threading.Event()

    def waits() -> None:
        assert go.wait(10)

    staging.behind(lambda: done.append("at once"))
    staging.start(waits, tmp_path / "a")
    staging.behind(lambda: done.append("behind"))
    assert done == ["at once"]
    go.set()
    staging.wait()
    assert done == ["at once", "behind"]

    def fails() -> None:
        raise CheckpointError("full")

    staging.start(fails, tmp_path / "b")
    staging.behind(lambda: done.append("never"))
    with pytest.raises(CheckpointError, match="full"):
        staging.wait()
    assert done == ["at once", "behind"]
    staging.wait()  # said once


def test_leftovers_of_a_killed_run_go_and_those_of_another_stay(tmp_path):
    own = node_folder(str(tmp_path / "node"), tmp_path / "checkpoints", 0)
    other = node_folder(str(tmp_path / "node"), tmp_path / "another/checkpoints", 0)
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "step=00000009.ckpt").write_bytes(b"left")
    trainer(tmp_path, [Checkpoint(local_dir=str(tmp_path / "node"))], max_steps=1).fit(Toy(), loader(BATCHES))
    assert not own.exists() and (other / "step=00000009.ckpt").exists()


def test_settings_that_cannot_work_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"save_last link would point .* remove checkpoint\.local_dir"):
        Checkpoint(local_dir="/x", save_last="link")
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    with pytest.raises(ValueError, match=r"\$NO_SUCH_DISK.* not set on this node"):
        trainer(tmp_path, [Checkpoint(local_dir="$NO_SUCH_DISK")]).fit(Toy(), loader(BATCHES))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to on rank 0"):
        trainer(tmp_path, [Checkpoint(local_dir=str(tmp_path / "file"))]).fit(Toy(), loader(BATCHES))
    two = [Checkpoint(local_dir=str(tmp_path / "a")), Checkpoint(monitor="val/loss", local_dir=str(tmp_path / "b"))]
    with pytest.raises(ValueError, match="set it once"):
        trainer(tmp_path, two).fit(Toy(), loader(BATCHES))


def test_lightnings_own_callback_is_waited_for_too(tmp_path, slow):
    beside = ModelCheckpoint(dirpath=tmp_path / "theirs", filename="{step}", every_n_train_steps=6)
    saver = Checkpoint(every_n_train_steps=3, local_dir=str(tmp_path / "node"))
    trainer(tmp_path, [saver, beside]).fit(Toy(), loader(BATCHES))
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["step=6.ckpt"]


def test_a_save_may_take_a_write_and_two_copies(tmp_path, slow):
    saver = Checkpoint(every_n_train_steps=3, local_dir=str(tmp_path / "node"))
    known = []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            saver.settle(trainer)
            known.append(saver.slowest_save)

    trainer(tmp_path, [Look(), saver]).fit(Toy(), loader(BATCHES))
    assert known[0] >= 0.6


# ---- ranks ----


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    args = {"folder": str(folder), "local": str(folder / "node"), "stage": 2}
    return folder, run_ranks(f"{HERE}:zero", 2, args, timeout=120)


@pytest.mark.timeout(400)
def test_law_6_a_zero_checkpoint_appears_whole_and_training_ends_the_same(zero):
    folder, results = zero
    assert same(folder / "plain.pt", folder / "staged.pt")
    newest = folder / "staged/checkpoints/step=00000008.ckpt"
    assert latest_checkpoint(folder / "staged") == newest
    plain = read_record(folder / "plain/checkpoints/step=00000008.ckpt")
    assert read_record(newest).files.keys() == plain.files.keys()
    seen = results[0]["seen"]
    assert seen[0] == [] and seen[-1], seen
    # A copy was under way when the next step began, and never two.
    assert [result["copies"] for result in results] == [1, 1]
    assert all(not result["left"] for result in results)


@pytest.mark.timeout(400)
def test_law_7_ranks_that_are_asked_to_leave_wait_for_the_copy_together(zero):
    folder, results = zero
    for result in results:
        step, told, found = result["asked"]
        assert step in (4, 5) and told == found == str(folder / f"asked/checkpoints/step={step:08d}.ckpt")


@pytest.mark.timeout(400)
def test_law_7_a_copy_that_fails_on_one_rank_ends_all_with_its_reason(tmp_path):
    args = {"folder": str(tmp_path), "local": str(tmp_path / "node")}
    results = run_ranks(f"{HERE}:failing", 2, args, timeout=100)
    good = tmp_path / "checkpoints/step=00000002.ckpt"
    for result in results:
        assert "step=00000003.ckpt" in result["error"] and "rank 1: [Errno 28] No space left" in result["error"]
        assert f"the newest whole checkpoint is {good}" in result["error"] and result["newest"] == str(good)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


@pytest.mark.timeout(600)
def test_law_6_a_rank_killed_while_copying_goes_on_from_the_last_whole_one(zero, tmp_path):
    """SIGKILL of one rank or the other at several moments of a copy; each run then ends as one that was not killed."""
    folders, local = [str(tmp_path / f"run{number}") for number in range(KILLS)], tmp_path / "node"
    ports = [free_port() for _ in folders]
    args = {"folders": folders, "local": str(local)}
    results = run_ranks(f"{HERE}:killed", 2, {**args, "ports": ports}, timeout=120)
    assert all(-9 in {result["ends"][number] for result in results} for number in range(KILLS)), results
    for folder in folders:
        newest = latest_checkpoint(folder)
        assert newest is not None and read_record(newest).global_step >= 2
    assert any(list(Path(folder).glob("checkpoints/.*.partial")) for folder in folders)
    assert os.listdir(local)
    result = run_ranks(f"{HERE}:resumed", 2, {**args, "out": str(tmp_path)}, timeout=120)[0]
    assert all(same(zero[0] / "plain.pt", tmp_path / f"{number}.pt") for number in range(KILLS))
    assert result["left"] == [["step=00000008.ckpt"]] * KILLS and not result["local"]
