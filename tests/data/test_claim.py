"""One process makes a folder and the others wait: whole or absent, whoever dies."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from ptl.data import claim as claims
from ptl.data.claim import Claim, PreparationFailed, claim_file, made_once, read_claim

SPAWN = multiprocessing.get_context("spawn")
# The owner of a process id that no process has.
NOBODY = {**claims._identity(), "pid": 2**22 + 1, "token": "nobody", "beat": 1}


def fill(folder, claim):
    (folder / "data").write_text("whole")


def make_slowly(target, log, seconds, fail=False):
    def make(folder, claim):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        (folder / "half").write_text("half")
        claim.progress = "half way"
        time.sleep(seconds)
        if fail:
            raise RuntimeError("line 3 is broken")
        (folder / "data").write_text("whole")

    try:
        made_once(Path(target), make)
    except PreparationFailed as error:
        Path(f"{log}.{os.getpid()}").write_text(str(error))
    except RuntimeError:
        pass


def left_behind(target):
    return sorted(path.name for path in target.parent.iterdir() if path.name != target.name and "log" not in path.name)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_the_folder_appears_whole_and_is_made_once(tmp_path):
    target, calls = tmp_path / "deep" / "key", []

    def make(folder, claim):
        calls.append(folder)
        assert folder.parent == target.parent and not target.exists()
        fill(folder, claim)

    made_once(target, make)
    made_once(target, make)
    assert len(calls) == 1 and (target / "data").read_text() == "whole" and left_behind(target) == []


def test_a_failure_leaves_nothing_but_its_message(tmp_path):
    target = tmp_path / "key"

    def make(folder, claim):
        (folder / "half").write_text("half")
        raise KeyError("broken")

    with pytest.raises(KeyError):
        made_once(target, make)
    assert not target.exists() and [name.split("-")[0] for name in left_behind(target)] == ["key.failed"]
    made_once(target, fill)  # a later start tries again
    assert target.exists()


def test_several_processes_make_it_once(tmp_path):
    target, log = tmp_path / "key", tmp_path / "log"
    workers = [SPAWN.Process(target=make_slowly, args=(str(target), str(log), 1.0)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(log.read_text().split()) == 1
    assert (target / "data").read_text() == "whole" and left_behind(target) == []


def test_those_who_wait_are_told_why_the_owner_failed(tmp_path):
    target, log = tmp_path / "key", tmp_path / "log"
    owner = SPAWN.Process(target=make_slowly, args=(str(target), str(log), 3.0, True))
    owner.start()
    until(log.exists)
    said = []
    with pytest.raises(PreparationFailed, match="line 3 is broken") as caught:
        made_once(target, lambda folder, claim: pytest.fail("it was made"), say=said.append)
    owner.join(60)
    assert f"process {owner.pid}" in str(caught.value) and not target.exists()


@pytest.mark.timeout(60)
def test_a_killed_owner_of_this_machine_is_noticed_at_once(tmp_path):
    target, log = tmp_path / "key", tmp_path / "log"
    owner = SPAWN.Process(target=make_slowly, args=(str(target), str(log), 300.0))
    owner.start()
    until(lambda: any(path.name.startswith("key.tmp-") for path in tmp_path.iterdir()) and log.exists())
    os.kill(owner.pid, signal.SIGKILL)  # and not joined: until then it is a zombie
    assert not target.exists() and claim_file(target).exists()
    said, began = [], time.monotonic()
    made_once(target, fill, patience=3600, say=said.append)
    assert time.monotonic() - began < 10 and any("no sign of life" in text for text in said)
    assert (target / "data").exists() and left_behind(target) == []
    owner.join(30)


def test_a_silent_owner_of_another_machine_is_taken_over_after_patience(tmp_path):
    target = tmp_path / "key"
    claim_file(target).write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "t", "beat": 9}))
    began = time.monotonic()
    made_once(target, fill, patience=0.8)
    assert 0.8 <= time.monotonic() - began < 10 and target.exists() and left_behind(target) == []


def test_an_owner_that_still_beats_is_waited_for(tmp_path, monkeypatch):
    """Signs of life come oftener than patience runs out, so a long preparation is not taken over."""
    monkeypatch.setattr(claims, "BEAT", 0.1)
    target = tmp_path / "key"
    owner = Claim.take(target)
    seen = read_claim(target)
    until(lambda: read_claim(target)[0] != seen[0])
    assert Claim.take(target) is None
    with owner:
        began = time.monotonic()
        monkeypatch.setattr(claims, "POLL", (0.05, 0.05))
        stop = time.monotonic() + 2.0

        def say(text):
            if time.monotonic() > stop:
                raise InterruptedError(text)

        monkeypatch.setattr(claims, "SAY_AFTER", 0.0)
        monkeypatch.setattr(claims, "SAY_EVERY", 0.0)
        with pytest.raises(InterruptedError, match="waiting for"):
            made_once(target, fill, patience=0.8, say=say)
        assert time.monotonic() - began >= 2.0 and not target.exists()


def test_those_who_wait_hear_of_the_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "SAY_AFTER", 0.0)
    target = tmp_path / "key"
    facts = {"host": "elsewhere", "pid": 12, "token": "t", "beat": 9, "progress": "1,000 rows"}
    claim_file(target).write_text(json.dumps(facts))
    said = []
    made_once(target, fill, patience=0.3, say=said.append)
    assert "waiting for elsewhere, process 12 to prepare the data (1,000 rows)" in said


def test_taking_over_never_removes_a_claim_made_in_the_meantime(tmp_path):
    target = tmp_path / "key"
    with Claim.take(target) as fresh:
        claims._take_away(target, NOBODY)
        assert read_claim(target)[1]["token"] == fresh.token
    assert not claim_file(target).exists()


def test_the_second_of_two_owners_keeps_the_first_ones_folder(tmp_path):
    """A wrongly taken claim costs time, never a half or mixed folder."""
    target = tmp_path / "key"

    def make(folder, claim):
        fill(folder, claim)
        target.mkdir()
        (target / "data").write_text("made by the other")

    made_once(target, make)
    assert (target / "data").read_text() == "made by the other" and left_behind(target) == []


def test_a_broken_claim_file_is_no_deadlock(tmp_path):
    target = tmp_path / "key"
    claim_file(target).write_bytes(b"\x00not json")
    made_once(target, fill, patience=0.3)
    assert target.exists()
