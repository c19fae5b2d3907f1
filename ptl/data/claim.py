"""One process makes a folder, every other one waits for it: no process group, no clock in common, any file system.

The claim is a file that only one process can create (``O_EXCL``). Its owner rewrites it every few seconds. A waiter
looks whether the file still changes, by its own clock; when it has not for ``patience`` seconds, or when its owner was
a process of this machine that is gone, the waiter takes the claim over. Should two processes ever work at once, both
write to folders of their own and the first rename wins, so a wrong guess costs time and never correctness.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 120.0
"""Seconds without a sign of life after which a claim is taken over; above the attribute caches of NFS (60 s)."""
BEAT = 5.0
POLL = (0.1, 2.0)
SAY_AFTER, SAY_EVERY = 5.0, 60.0


class PreparationFailed(ValueError):  # noqa: N818  (what the waiting process has to tell)
    """The process that this one waited for failed; the message is that process's own."""


class Claim:
    """The right to make ``target``, held while the context lasts; obtained by ``take``.

    Arguments:
        target: the folder to make.
        descriptor: of the claim file, open.
        token: names this claim.
    """

    def __init__(self, target: Path, descriptor: int, token: str) -> None:
        self.target, self.descriptor, self.token = target, descriptor, token
        self.progress = ""
        self._beats = 0
        self._stop = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="ptl-claim", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, target: Path) -> Claim | None:
        """The claim on ``target``, or None where another process holds it."""
        try:
            descriptor = os.open(claim_file(target), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o664)
        except FileExistsError:
            return None
        return cls(target, descriptor, uuid.uuid4().hex)

    @property
    def partial(self) -> Path:
        """Where the owner builds the folder."""
        return self.target.with_name(f"{self.target.name}.tmp-{os.getpid()}-{self.token[:8]}")

    def _write(self) -> None:
        self._beats += 1
        facts = {**_identity(), "token": self.token, "beat": self._beats, "progress": self.progress}
        os.pwrite(self.descriptor, json.dumps(facts).ljust(1024).encode(), 0)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                self._write()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if error is not None:
            _failure(self.target, self.token).write_text(str(error) or type(error).__name__, encoding="utf-8")
        shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self.descriptor)
        owner = read_claim(self.target)
        if owner is not None and owner[1].get("token") == self.token:
            claim_file(self.target).unlink(missing_ok=True)


def claim_file(target: Path) -> Path:
    """The claim's file beside the folder."""
    return target.with_name(target.name + ".lock")


def _failure(target: Path, token: str) -> Path:
    return target.with_name(f"{target.name}.failed-{token}")


def read_claim(target: Path) -> tuple[bytes, dict[str, Any]] | None:
    """The claim file's bytes and what they say; None where nobody holds the claim."""
    try:
        raw = claim_file(target).read_bytes()
    except FileNotFoundError:
        return None
    try:
        facts = json.loads(raw)
    except ValueError:
        facts = {}
    return raw, facts if isinstance(facts, dict) else {}


def made_once(
    target: Path,
    make: Callable[[Path, Claim], None],
    *,
    patience: float = PATIENCE,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Makes the folder ``target`` unless it exists; on return it does, whole, whoever made it.

    Args:
        target: the folder; it appears by a rename, after everything in it is on disk.
        make: fills the folder it is given; may set ``Claim.progress`` for those who wait.
        patience: seconds without a sign of life after which another process's claim is taken over.
        say: told whom this process waits for, about once a minute.

    Raises:
        PreparationFailed: another process was making it and failed.
        Exception: whatever ``make`` raises; ``target`` is absent then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    while not target.exists():
        claim = Claim.take(target)
        if claim is None:
            _wait(target, patience, say)
            continue
        with claim:
            if target.exists():
                return
            _clear(target)
            claim.partial.mkdir()
            make(claim.partial, claim)
            _commit(claim.partial, target)


def _commit(partial: Path, target: Path) -> None:
    for path in [*partial.rglob("*"), partial]:
        _to_disk(path)
    try:
        partial.rename(target)
    except OSError:
        if not target.exists():  # else another process was faster, and made the same
            raise
    _to_disk(target.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(target: Path) -> None:
    """Removes what owners that died left behind. Called by the owner of the claim."""
    for path in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in target.parent.glob(f"{target.name}.failed-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def _wait(target: Path, patience: float, say: Callable[[str], None]) -> None:
    """Returns when the claim is free or ``target`` is there."""
    seen, owner = b"", {}
    changed = began = time.monotonic()
    say_at, pause = began + SAY_AFTER, POLL[0]
    while not target.exists():
        claim = read_claim(target)
        if claim is None:
            failure = _failure(target, str(owner.get("token")))
            if owner and failure.exists() and not target.exists():
                raise PreparationFailed(
                    f"the process that prepared the data ({_name(owner)}) failed: {failure.read_text(encoding='utf-8')}"
                )
            return
        time_now = time.monotonic()
        if claim[0] != seen:
            seen, owner, changed = claim[0], claim[1] or owner, time_now
        if time_now - changed > patience or _is_dead(owner):
            say(f"taking over the preparation of the data: {_name(owner)} gives no sign of life")
            _take_away(target, owner)
            return
        if time_now >= say_at:
            say(f"waiting for {_name(owner)} to prepare the data ({owner.get('progress') or 'starting'})")
            say_at = time_now + SAY_EVERY
        time.sleep(pause)
        pause = min(POLL[1], pause * 1.5)


def _take_away(target: Path, owner: dict[str, Any]) -> None:
    """Removes a dead owner's claim, and nobody else's: a claim made in the meantime is put back."""
    aside = target.with_name(f"{target.name}.stale-{uuid.uuid4().hex}")
    try:
        claim_file(target).rename(aside)
    except FileNotFoundError:
        return
    try:
        token = json.loads(aside.read_bytes()).get("token")
    except ValueError:
        token = owner.get("token")
    if token != owner.get("token"):
        with contextlib.suppress(OSError):
            os.link(aside, claim_file(target))
    aside.unlink(missing_ok=True)


def _identity() -> dict[str, Any]:
    """This process: its host, its process id and the name space the id belongs to."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return {"host": socket.gethostname(), "space": space, "pid": os.getpid()}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and is gone; False where that cannot be known."""
    here = _identity()
    if owner.get("host") != here["host"] or owner.get("space") != here["space"] or not here["space"]:
        return False
    try:
        os.kill(int(owner["pid"]), 0)
        state = Path(f"/proc/{int(owner['pid'])}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError, IndexError):
        return False
    return state in ("Z", "X")  # ended, and its parent has not asked how


def _name(owner: dict[str, Any]) -> str:
    return f"{owner.get('host', 'unknown host')}, process {owner.get('pid', '?')}"
