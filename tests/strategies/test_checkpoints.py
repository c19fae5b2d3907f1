"""Checkpoint folders on the file system alone: whole, absent, damaged, foreign."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ptl.strategies import checkpoints
from ptl.strategies.checkpoints import MARKER, CheckpointError, CheckpointRecord


def record(**changes) -> CheckpointRecord:
    plain = {
        "world_size": 2,
        "stage": 3,
        "precision": "bf16-true",
        "global_step": 10,
        "epoch": 1,
        "trainable": {"policy.a": [4, 2], "policy.b": [2]},
        "optimizer_state": ["exp_avg", "exp_avg_sq", "step"],
        "versions": {"torch": "2.13.0"},
    }
    return CheckpointRecord(**{**plain, **changes})


def save(path: Path, text: str = "shard", **changes) -> Path:
    """What the strategy does around DeepSpeed's writing."""
    partial = checkpoints.partial_path(path)
    checkpoints.clear(partial)
    (partial / "checkpoint").mkdir(parents=True)
    (partial / "checkpoint" / "rank0.pt").write_text(text)
    checkpoints.seal(partial, record(**changes))
    checkpoints.publish(partial, path)
    return path


def test_a_saved_folder_reads_back(tmp_path):
    path = save(tmp_path / "runs" / "step=10.ckpt")
    found = checkpoints.read_record(path)
    assert found.files == {"checkpoint/rank0.pt": 5}
    assert found.trainable == record().trainable
    assert [p.name for p in path.parent.iterdir()] == ["step=10.ckpt"]


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    path = save(tmp_path / "last.ckpt", global_step=1)
    save(path, text="longer shard", global_step=2)
    assert checkpoints.read_record(path).global_step == 2
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_saving_over_a_link_leaves_what_it_pointed_to(tmp_path):
    target = save(tmp_path / "step=1.ckpt", global_step=1)
    (tmp_path / "last.ckpt").symlink_to(target.name)
    save(tmp_path / "last.ckpt", global_step=2)
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert checkpoints.read_record(target).global_step == 1


def test_a_killed_save_is_cleared_by_the_next(tmp_path):
    leftover = checkpoints.partial_path(tmp_path / "last.ckpt")
    leftover.mkdir()
    (leftover / "stale.pt").write_text("stale")
    path = save(tmp_path / "last.ckpt")
    assert "stale.pt" not in checkpoints.read_record(path).files


def test_some_whole_folder_exists_at_every_moment(tmp_path):
    """Killed between the two renames: the old folder has left its name and the new one has not taken it."""
    path = save(tmp_path / "last.ckpt", global_step=1)
    partial = checkpoints.partial_path(path)
    save(partial.with_name("new"), global_step=2).rename(partial)
    path.rename(tmp_path / ".last.ckpt.replaced")
    assert checkpoints.latest_complete(tmp_path) == partial


def _without_marker(path: Path) -> None:
    (path / MARKER).unlink()


def _cut(path: Path) -> None:
    os.truncate(path / "checkpoint" / "rank0.pt", 3)


def _without_shard(path: Path) -> None:
    (path / "checkpoint" / "rank0.pt").unlink()


def _half_a_marker(path: Path) -> None:
    os.truncate(path / MARKER, 20)


def _of_another_format(path: Path) -> None:
    data = json.loads((path / MARKER).read_text())
    (path / MARKER).write_text(json.dumps({**data, "format": 99}))


DAMAGE = [
    (_without_marker, "has no COMPLETE file: saving it was interrupted"),
    (_cut, "expected 5 bytes, got 3 bytes: the checkpoint is damaged"),
    (_without_shard, "expected 5 bytes, got no file"),
    (_half_a_marker, "cannot be read"),
    (_of_another_format, "format 99, expected 1"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[case[0].__name__ for case in DAMAGE])
def test_a_folder_that_is_not_whole_is_refused_and_passed_over(tmp_path, damage, message):
    older = save(tmp_path / "step=1.ckpt", global_step=1)
    newer = save(tmp_path / "step=2.ckpt", global_step=2)
    assert checkpoints.latest_complete(tmp_path) == newer
    damage(newer)
    with pytest.raises(CheckpointError) as error:
        checkpoints.read_record(newer)
    assert message in str(error.value)
    assert f"the newest whole checkpoint beside it is {older}" in str(error.value)
    assert checkpoints.latest_complete(tmp_path) == older


def test_what_is_no_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*; there is no whole one beside it"):
        checkpoints.read_record(tmp_path / "none.ckpt")
    (tmp_path / "ddp.ckpt").write_text("a file")
    with pytest.raises(CheckpointError, match="is a single file, made without ZeRO"):
        checkpoints.read_record(tmp_path / "ddp.ckpt")
    assert checkpoints.latest_complete(tmp_path / "nowhere") is None


def test_a_killed_removal_leaves_no_whole_folder(tmp_path):
    path = save(tmp_path / "step=1.ckpt")
    os.chmod(path / "checkpoint", 0o500)
    checkpoints.discard(path)
    assert checkpoints.latest_complete(tmp_path) is None
    if path.exists():  # the superuser removes it whatever its mode
        os.chmod(path / "checkpoint", 0o700)


def test_removing_a_link_leaves_its_target(tmp_path):
    target = save(tmp_path / "step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to(target.name)
    checkpoints.discard(tmp_path / "last.ckpt")
    assert checkpoints.latest_complete(tmp_path) == target


def test_only_the_runs_folders_are_trusted(tmp_path):
    inside, outside = save(tmp_path / "run" / "a.ckpt"), save(tmp_path / "other" / "a.ckpt")
    checkpoints.check_trusted(inside, [tmp_path / "run"], trust=False)
    checkpoints.check_trusted(outside, [tmp_path / "run"], trust=True)
    with pytest.raises(CheckpointError, match="pickles, which can run any code"):
        checkpoints.check_trusted(outside, [tmp_path / "run"], trust=False)
    (tmp_path / "run" / "link.ckpt").symlink_to(outside)
    with pytest.raises(CheckpointError, match="is outside this run"):
        checkpoints.check_trusted(tmp_path / "run" / "link.ckpt", [tmp_path / "run"], trust=False)


MISMATCHES = [
    ({"stage": 2}, "stage 3, this run has stage 2"),
    ({"precision": "32-true"}, "precision 'bf16-true', this run has '32-true'"),
    ({"trainable": {"policy.a": [8, 2], "policy.b": [2]}}, "'policy.a' as a parameter of shape [4, 2], this run as a"),
    ({"trainable": {"policy.a": [4, 2]}}, "'policy.b' as a parameter of shape [2], this run as nothing"),
    ({"trainable": {**record().trainable, "policy.c": [1]}}, "'policy.c' as nothing, this run as a parameter"),
]


@pytest.mark.parametrize(("here", "message"), MISMATCHES, ids=[case[1][:30] for case in MISMATCHES])
def test_another_shape_of_run_is_refused(here, message):
    same = {"stage": 3, "precision": "bf16-true", "trainable": record().trainable}
    checkpoints.check_resumable(record(), **same)
    checkpoints.check_resumable(record(), **{**same, "precision": "bf16-mixed"})  # the same engine
    with pytest.raises(CheckpointError) as error:
        checkpoints.check_resumable(record(), **{**same, **here})
    assert message in str(error.value)


def test_a_conversion_that_fails_shows_why_and_leaves_nothing(tmp_path):
    path = save(tmp_path / "step=1.ckpt")
    with pytest.raises(CheckpointError, match=r"another number of ranks failed:\n(.|\n)*optim"):
        checkpoints.convert_to_universal(path)
    assert not (path / checkpoints.UNIVERSAL).exists()
    assert checkpoints.read_record(path).stage == 3
