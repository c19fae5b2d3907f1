"""Checkpoint folders that are whole or absent, and their conversion to another number of ranks.

DeepSpeed writes a folder of shards in place, so a killed save leaves one that looks right. Here a save goes to a hidden
name beside the final one, gets a ``COMPLETE`` file with what was saved and the size of every file, and is renamed: a
folder that lacks the file, or a file of it, was not finished and is refused. The functions touch the file system
only; which rank calls which, and when the ranks wait for each other, is decided in ``ZeROStrategy``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

MARKER = "COMPLETE"
TAG = "checkpoint"
"""Name that Lightning gives DeepSpeed's folder of shards inside a checkpoint."""
UNIVERSAL = "checkpoint_universal"
"""Folder, beside the shards, of the form that any number of ranks can load."""
FORMAT = 1
_ADAM_STATE = {"exp_avg", "exp_avg_sq"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, unfinished, foreign, or of another run's shape; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """What a checkpoint's ``COMPLETE`` file says.

    Attributes:
        world_size: number of ranks whose shards it holds.
        stage: ZeRO stage.
        precision: Lightning's name of the precision.
        global_step: optimizer steps done.
        epoch: epochs done.
        trainable: name and shape of every trained parameter; the others are not in the checkpoint.
        optimizer_state: names of the tensors that the optimizer keeps for a parameter.
        versions: of deepspeed, lightning and torch.
        saved_at: seconds since 1970.
        files: size in bytes of every file, by path inside the folder.
        run: id of the run that saved it, where it has one.
        format: version of this record.
    """

    world_size: int
    stage: int
    precision: str
    global_step: int
    epoch: int
    trainable: dict[str, list[int]]
    optimizer_state: list[str]
    versions: dict[str, str]
    saved_at: float = field(default_factory=time.time)
    files: dict[str, int] = field(default_factory=dict)
    run: str | None = None
    format: int = FORMAT


# ---- writing ----


def partial_path(final: Path) -> Path:
    """The hidden name beside ``final`` under which a checkpoint is written."""
    return final.with_name(f".{final.name}.partial")


def clear(folder: Path) -> None:
    """Removes what a save that was killed has left under a hidden name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)


def seal(folder: Path, record: CheckpointRecord) -> None:
    """Writes the ``COMPLETE`` file with the sizes of all files that are there, and flushes it to the disk."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    text = json.dumps({**asdict(record), "files": files}, indent=1)
    marker = folder / MARKER
    with marker.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def publish(folder: Path, final: Path) -> None:
    """Gives a sealed folder its final name, replacing what has that name; some whole folder exists at every moment."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.is_symlink() or final.is_file():
        final.unlink()
    elif final.exists():
        final.rename(replaced)
    folder.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(folder: Path) -> None:
    """Removes a checkpoint; the ``COMPLETE`` file goes first, so that a killed removal leaves an unfinished folder."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def cannot_copy(final: Path, reason: object) -> str:
    """What to say where a checkpoint did not get from the node's disk to its place."""
    newest = latest_complete(final.parent)
    last_good = f"the newest whole checkpoint is {newest}" if newest else "there is no whole checkpoint beside it"
    return (
        f"cannot copy the checkpoint {final} from the node's disk: {reason}; {last_good}. Free space, keep fewer "
        "checkpoints (save_top_k) or set another dirpath, then resume"
    )


# ---- reading ----


def read_record(path: str | Path) -> CheckpointRecord:
    """The record of a whole checkpoint.

    Raises:
        CheckpointError: there is none at ``path``, it was not finished, a file of it is missing or cut short, or it was
            written by another version.
    """
    folder = Path(path)
    try:
        return _read(folder)
    except CheckpointError as error:
        newest = latest_complete(folder.parent)
        hint = f"the newest whole checkpoint beside it is {newest}" if newest else "there is no whole one beside it"
        raise CheckpointError(f"{error}; {hint}") from None


def latest_complete(folder: str | Path, skip: Callable[[CheckpointRecord], bool] | None = None) -> Path | None:
    """The whole checkpoint of the most steps in a folder, or None; unfinished ones are passed over, and those that
    ``skip`` says.

    Hidden names count too: a save that was killed between its two renames left its whole folder under one.
    """
    found: list[tuple[int, bool, float, Path]] = []
    root = Path(folder)
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            try:
                record = _read(path)
            except CheckpointError:
                continue
            if skip is not None and skip(record):
                continue
            found.append((record.global_step, not path.name.startswith("."), record.saved_at, path))
    return max(found)[3] if found else None


def _read(folder: Path) -> CheckpointRecord:
    if not folder.exists():
        raise CheckpointError(f"no checkpoint at {folder}")
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a single file, made without ZeRO; expected a folder saved by ZeROStrategy: resume it with "
            "the strategy it was made with, or export it and start from the exported model"
        )
    marker = folder / MARKER
    if not marker.is_file():
        raise CheckpointError(f"{folder} has no {MARKER} file: saving it was interrupted, or another program made it")
    try:
        data: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{marker}: format {data.get('format')!r}, expected {FORMAT}: another version made it"
            )
        record = CheckpointRecord(**{f.name: data[f.name] for f in fields(CheckpointRecord)})
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{marker} cannot be read ({error})") from None
    for name, size in record.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            got = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
            raise CheckpointError(f"{file}: expected {size} bytes, got {got}: the checkpoint is damaged")
    return record


def check_trusted(path: str | Path, roots: Iterable[str | Path], *, trust: bool) -> None:
    """Refuses a checkpoint from outside the run's folders: DeepSpeed's files are pickles, and loading one runs code.

    Arguments:
        path: the checkpoint.
        roots: folders of this run.
        trust: the user vouches for it.

    Raises:
        CheckpointError: it is outside and not vouched for.
    """
    real = Path(path).resolve()
    allowed = [Path(root).resolve() for root in roots]
    if not trust and not any(real.is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{real} is outside this run ({', '.join(map(str, allowed))}); its files are pickles, which can run any "
            "code when loaded: set trainer.strategy.init_args.trust_checkpoint to true if you know who made it"
        )


def check_resumable(record: CheckpointRecord, *, stage: int, precision: str, trainable: Mapping[str, Any]) -> None:
    """Refuses to go on from a checkpoint of another stage, precision or set of trained parameters.

    Raises:
        CheckpointError: names what differs, and the key to change.
    """
    if record.stage != stage:
        raise CheckpointError(
            f"the checkpoint was saved with ZeRO stage {record.stage}, this run has stage {stage}: set "
            f"trainer.strategy.init_args.stage to {record.stage}, or export the checkpoint and start from the model"
        )
    if _engine_dtype(record.precision) != _engine_dtype(precision):
        raise CheckpointError(
            f"the checkpoint was saved with precision {record.precision!r}, this run has {precision!r}: set "
            f"trainer.precision to {record.precision!r}"
        )
    check_trainable(record, trainable)


def check_trainable(record: CheckpointRecord, trainable: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that lacks a parameter which this run trains, has one more, or one of another shape.

    Raises:
        CheckpointError: names the first difference.
    """
    here = {name: list(shape) for name, shape in trainable.items()}
    for name in sorted(here.keys() | record.trainable.keys()):
        if here.get(name) != record.trainable.get(name):
            raise CheckpointError(
                f"the checkpoint trains {name!r} as {_shape(record.trainable.get(name))}, this run as "
                f"{_shape(here.get(name))}: it was made with another model or adapter (model.policy)"
            )


# ---- another number of ranks ----


def convert_to_universal(path: str | Path) -> None:
    """Writes the form of a checkpoint that any number of ranks loads, unless it is there already.

    The conversion is DeepSpeed's own, in a process of its own; it needs the checkpoint's size once more on the disk.
    Two jobs that ask for it at once do it once.

    Raises:
        CheckpointError: the optimizer is not of the Adam family, or the conversion failed.
    """
    folder = Path(path)
    record = read_record(folder)
    if not set(record.optimizer_state) >= _ADAM_STATE:
        raise CheckpointError(
            f"{folder} was saved by {record.world_size} ranks and its optimizer keeps {record.optimizer_state}: only "
            f"optimizers with {sorted(_ADAM_STATE)} can go on with another number: resume with {record.world_size}"
        )
    with FileLock(folder / f".{UNIVERSAL}.lock"):
        target = folder / UNIVERSAL
        if (target / MARKER).is_file():
            return
        partial = folder / f".{UNIVERSAL}.partial"
        for leftover in (partial, target):
            shutil.rmtree(leftover, ignore_errors=True)
        _run_conversion(folder / TAG, partial)
        (partial / MARKER).touch()
        partial.rename(target)
        (folder / "latest_universal").write_text(UNIVERSAL, encoding="utf-8")


def _run_conversion(shards: Path, output: Path) -> None:
    workers = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(shards), "--output_folder", str(output)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise CheckpointError(f"converting {shards.parent} for another number of ranks failed:\n{tail}")


def _engine_dtype(precision: str) -> str:
    return precision.split("-")[0]


def _shape(shape: list[int] | None) -> str:
    return "nothing" if shape is None else f"a parameter of shape {shape}"
