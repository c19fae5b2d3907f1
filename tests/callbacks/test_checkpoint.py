"""Checkpoints: whole or absent, the newest found, only what is trained, clear words when the disk is full."""

import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.record import RunRecord
from ptl.callbacks.saved import latest_checkpoint
from ptl.callbacks.single_file import AtomicCheckpointIO
from ptl.data.durable import append_line, replacing, write_text
from ptl.strategies.checkpoints import MARKER, CheckpointError
from tests import forks
from tests.callbacks.parts import Toy, loader, packed, trainer

ROOT = Path(__file__).resolve().parents[2]
BATCHES = [packed([8, 8], trained=4, seed=i) for i in range(6)]


def start_saving(path: Path, *arguments: object) -> forks.Program:
    return forks.begin(["-m", "tests.callbacks.killed_save", path, *map(str, arguments)], cwd=ROOT)


def partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


# ---- killed is not lost ----


def test_law_6_a_save_that_is_killed_leaves_the_former_checkpoint(tmp_path):
    """SIGKILL in the middle of a save over the same name, several times, at several places of the file."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    megabytes = 128
    kills = 0
    for share in (0.1, 0.8):
        process = start_saving(path, megabytes)
        try:
            deadline = time.monotonic() + 60
            while "saved 2" not in process.said():
                assert process.poll() is None and time.monotonic() < deadline, process.complained()
                time.sleep(0.01)
            while time.monotonic() < deadline:
                try:
                    if partial(path).stat().st_size > share * megabytes * 2**20:
                        break
                except FileNotFoundError:
                    pass
        finally:
            process.kill()
            process.wait(timeout=30)
        kills += partial(path).exists()
        assert latest_checkpoint(tmp_path) == path
        loaded = AtomicCheckpointIO().load_checkpoint(path)
        # Whole means of one save: every tensor is of the step that the checkpoint says it is of.
        assert loaded["global_step"] >= 2
        assert all((t == loaded["global_step"]).all() for t in loaded["state_dict"].values())
    assert kills >= 1  # else nothing was interrupted, and the test shows nothing


def test_leftovers_of_a_killed_save_go_at_the_next_start(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    leftover = folder / ".last.ckpt.partial"
    leftover.write_bytes(b"x" * 100)
    other = folder / ".notes.txt"
    other.write_text("kept")
    trainer(tmp_path, [Checkpoint()], max_steps=1).fit(Toy(), loader(BATCHES))
    assert not leftover.exists() and other.exists()


def test_a_full_disk_is_told_and_the_former_checkpoint_stays(tmp_path):
    """The system refuses to let the file grow, as a full disk or a quota does."""
    path = tmp_path / "checkpoints" / "step=00000004.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 4, "state_dict": {"w": torch.ones(5)}}, path)
    process = start_saving(path.with_name("step=00000008.ckpt"), 8, 3 * 2**20)
    done = process.finish(timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == 3, output
    line = next(line for line in output.splitlines() if line.startswith("REFUSED"))
    assert "step=00000008.ckpt" in line and "File too large" in line and "Traceback" not in output
    assert f"the newest whole checkpoint is {path}" in line and "Free space" in line
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    assert latest_checkpoint(tmp_path) == path


def test_too_little_room_is_seen_before_anything_is_touched(tmp_path, monkeypatch):
    checkpoint = Checkpoint(every_n_train_steps=2)
    usage = shutil.disk_usage(tmp_path)

    class Fill(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))

    with pytest.raises(
        CheckpointError, match=r"at least 0\.00 GB and 0\.00 GB are free.*newest whole checkpoint is .*2\.ckpt"
    ):
        trainer(tmp_path, [Fill(), checkpoint]).fit(Toy(), loader(BATCHES))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=00000002.ckpt"]


def test_replacing_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "rows"
    append_line(path, "one")
    with open(path, "a") as file:
        file.write('{"torn')
    append_line(path, "two")
    assert path.read_text() == 'one\n{"torn\ntwo\n'


# ---- resuming ----


def fit(folder: Path, steps: int, *, resume: bool = False, lr: float = 0.01) -> Toy:
    torch.manual_seed(1)
    module = Toy(lr=lr)
    runner = trainer(folder, [Checkpoint(every_n_train_steps=2)], max_steps=steps)
    batches = BATCHES[runner.global_step :]
    path = latest_checkpoint(folder) if resume else None
    if path:
        batches = BATCHES[torch.load(path)["global_step"] :]
    runner.fit(module, loader(batches), ckpt_path=path)
    assert runner.global_step == steps
    return module


def test_law_6_a_resumed_run_ends_with_the_same_weights(tmp_path):
    straight = fit(tmp_path / "straight", 6)
    fit(tmp_path / "cut", 3)
    resumed = fit(tmp_path / "cut", 6, resume=True)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_law_6_a_resumed_run_saves_nothing_within_an_accumulation_window(tmp_path):
    """Lightning would write the step of the resume again, in the place of what it came from: a kill loses both."""
    saved: list[tuple[int, int]] = []

    class Look(Checkpoint):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    for steps, path in ((2, None), (3, tmp_path / "checkpoints/step=00000002.ckpt")):
        runner = trainer(tmp_path, [Look(every_n_train_steps=1)], max_steps=steps, accumulate_grad_batches=2)
        runner.fit(Toy(), loader(BATCHES), ckpt_path=path)
    assert saved == [(1, 2), (2, 4), (3, 6)]


def test_law_6_what_a_run_resumed_from_stays_until_a_newer_one_is_there(tmp_path):
    """A save that is killed between its two renames leaves the whole checkpoint under another name than it holds."""
    fit(tmp_path, 2)
    old = (tmp_path / "checkpoints/step=00000002.ckpt").rename(tmp_path / "checkpoints/.left.ckpt")

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert old.exists() or trainer.global_step > 3

    checkpoint = Checkpoint(every_n_train_steps=2)
    trainer(tmp_path, [checkpoint, Look()], max_steps=6).fit(Toy(), loader(BATCHES), ckpt_path=str(old))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=00000006.ckpt"]


def test_the_last_step_is_saved_and_only_the_newest_kept(tmp_path):
    fit(tmp_path, 5)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=00000005.ckpt"]
    fit(tmp_path, 6, resume=True)
    # Lightning alone would keep the one that was resumed from for ever.
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=00000006.ckpt"]


def test_the_last_epoch_is_saved(tmp_path):
    runner = trainer(tmp_path, [Checkpoint(every_n_train_steps=4)], max_steps=-1, max_epochs=1)
    runner.fit(Toy(), loader(BATCHES))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=00000006.ckpt"]


def test_the_newest_is_saved_though_validation_comes_later(tmp_path):
    """One Lightning callback with ``monitor`` saves nothing before the first validation, so a killed run is lost."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(latest_checkpoint(tmp_path))

    newest, best = Checkpoint(every_n_train_steps=2), Checkpoint(monitor="val/loss")
    runner = trainer(tmp_path, [newest, best, Look()], val_check_interval=5)
    runner.fit(Toy(), loader(BATCHES), loader(BATCHES[:1]))
    assert seen[2] is not None and seen[2].name == "step=00000002.ckpt"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best-step=00000005.ckpt",
        "step=00000006.ckpt",
    ]
    assert best.best_model_score is not None


def test_checkpoints_lie_in_the_run_folder(tmp_path):
    runner = trainer(tmp_path / "elsewhere", [RunRecord(tmp_path / "run"), Checkpoint()], max_steps=1)
    runner.fit(Toy(), loader(BATCHES))
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step=00000001.ckpt"


# ---- finding the newest ----


def save(path: Path, step: int) -> Path:
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "state_dict": {"w": torch.ones(1000)}}, path)
    return path


def test_latest_is_by_steps_and_passes_over_what_is_not_whole(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "absent") is None
    folder = tmp_path / "checkpoints"
    newest = save(folder / "a.ckpt", 30)
    save(folder / "b.ckpt", 20)  # written later
    cut = save(folder / "c.ckpt", 40)
    os.truncate(cut, cut.stat().st_size // 2)
    save(folder / ".d.ckpt.partial", 50)
    (folder / "e.ckpt").write_text("not a checkpoint")
    unfinished = folder / "f.ckpt"  # a ZeRO folder without its COMPLETE file
    (unfinished / "checkpoint").mkdir(parents=True)
    assert not (unfinished / MARKER).exists()
    assert latest_checkpoint(tmp_path) == latest_checkpoint(folder) == newest


def test_latest_takes_the_one_written_last_of_equal_steps(tmp_path):
    first, second = save(tmp_path / "z.ckpt", 7), save(tmp_path / "a.ckpt", 7)
    os.utime(first, (1, 1))
    assert latest_checkpoint(tmp_path) == second


def test_a_cut_file_is_named_when_loaded(tmp_path):
    whole, cut = save(tmp_path / "step=1.ckpt", 1), save(tmp_path / "step=2.ckpt", 2)
    os.truncate(cut, cut.stat().st_size - 50)
    with pytest.raises(CheckpointError, match=r"step=2\.ckpt is not whole.*newest whole checkpoint is .*step=1\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(cut)
    assert latest_checkpoint(tmp_path) == whole


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_pickled_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step=3.ckpt"
    torch.save({"global_step": 3, "x": Evil()}, path)
    with pytest.raises(CheckpointError, match="can run any code"):
        AtomicCheckpointIO().load_checkpoint(path)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "raw.ckpt")
    assert latest_checkpoint(tmp_path) == path  # whole, and not loaded
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_every_callback_loads_without_pickled_objects(tmp_path):
    from ptl.callbacks.health import Health
    from ptl.callbacks.throughput import Throughput

    callbacks = [RunRecord(tmp_path), Throughput(warmup=0), Health(), Checkpoint(), Checkpoint(monitor="val/loss")]
    trainer(tmp_path, callbacks, max_steps=2).fit(Toy(), loader(BATCHES), loader(BATCHES[:1]))
    path = latest_checkpoint(tmp_path)
    assert path is not None
    assert torch.load(path, weights_only=True)["throughput"] == [32, 8]
