"""A run that hangs leaves every rank's stacks and ends with a code of its own; a run that is only slow goes on."""

import pickle
import re
import threading

import lightning as L
import pytest

from ptl.callbacks.exit_codes import HUNG
from ptl.callbacks.jsonl import read_rows
from ptl.callbacks.throughput import excluded
from ptl.callbacks.watchdog import Limits, Progress, Watchdog, attempt_of
from tests.callbacks import hanging
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.ranks import ROOT, RanksFailedError, run_ranks

BATCHES = [packed([8, 8], trained=4, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def hung(tmp_path_factory):
    """A run of two ranks of which one hangs: its folder, and what the ranks said at the end."""
    folder = tmp_path_factory.mktemp("hung")
    with pytest.raises(RanksFailedError) as failed:
        run_ranks("tests.callbacks.hanging:hang", 2, {"folder": str(folder)}, timeout=90)
    return folder, str(failed.value)


def test_a_hang_ends_every_rank_with_its_own_code(hung):
    _, said = hung
    assert re.findall(r"rank (\d) \(exit code (\d+)\)", said) == [("0", str(HUNG)), ("1", str(HUNG))]
    lines = re.findall(r"^ptl: hang: rank (\d) of 2 on \S+, process \d+: nothing finished for (\d+) s .*", said, re.M)
    assert sorted(index for index, _ in lines) == ["0", "1"]
    assert all(hanging.SECONDS / 2 <= int(seconds) < 30 for _, seconds in lines)


def test_the_stacks_of_both_ranks_are_there_and_name_the_line_that_hangs(hung):
    folder, _ = hung
    stacks = {path.name: path.read_text() for path in (folder / "stacks" / "attempt-1").glob("rank*.txt")}
    assert set(stacks) == {"rank0.txt", "rank1.txt"}
    lines = (ROOT / "tests/callbacks/hanging.py").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "here it hangs" in line)
    assert re.search(rf'hanging\.py", line {number} in training_step', stacks["rank1.txt"])
    assert "hanging.py" in stacks["rank0.txt"] and f"line {number} in" not in stacks["rank0.txt"]
    assert "the loading of a batch" in stacks["rank1.txt"].splitlines()[0]


def test_the_record_says_that_the_attempt_hung(hung):
    rows = read_rows(hung[0] / "attempts.jsonl")
    assert [row["event"] for row in rows] == ["start", "end"] and rows[1]["status"] == "hung"


def test_the_last_collectives_of_both_ranks_tell_who_is_behind(hung):
    folder = hung[0] / "stacks" / "attempt-1"
    entries = [pickle.loads((folder / f"rank_{index}").read_bytes())["entries"] for index in (0, 1)]
    names = [[entry["profiling_name"] for entry in found] for found in entries]
    assert names[0][: len(names[1])] == names[1] and len(names[0]) > len(names[1])
    assert entries[0][-1]["state"] != "completed"
    lines = [(folder / f"collectives{index}.txt").read_text().splitlines() for index in (0, 1)]
    assert [len(found) for found in lines] == [len(found) for found in entries]
    assert re.fullmatch(r"\d+ gloo:\w+ \[\[.*\]\] (completed|scheduled|started) \S+:\d+ in \S+", lines[0][-2])


def test_a_long_validation_is_not_a_hang(hung):
    """It takes more than twice the limit; what gets finished in it is a sign of life."""
    assert (hung[0] / "patient" / "steps").read_text() == "2"
    assert not (hung[0] / "patient" / "stacks").exists()


def test_one_thread_while_fitting_and_none_after(tmp_path):
    names = []

    class Look(L.Callback):
        def on_train_batch_end(self, *_):
            names.append([thread.name for thread in threading.enumerate()].count("ptl-watchdog"))

    fit = trainer(tmp_path, [Watchdog(), Look()], max_steps=2)
    fit.fit(Toy(), loader(BATCHES))
    assert names == [1, 1]
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, [Watchdog(), Breaks()], max_steps=2).fit(Toy(), loader(BATCHES))
    trainer(tmp_path, [Watchdog(minutes=0, slow_minutes=0), Look()], max_steps=2).fit(Toy(), loader(BATCHES))
    assert names == [1, 1, 0, 0]


class Breaks(L.Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("broken")


def test_the_limit_follows_the_phase_and_the_median_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ptl.callbacks.watchdog.time.monotonic", lambda: now[0])
    progress = Progress(Limits(step=10, slow=50, times_median=10))
    assert progress.limit == 50  # before the first step
    for seconds in (40, 3, 2, 4):
        now[0] += seconds
        progress.step()
    progress.mark("a training batch")
    assert progress.limit == 30  # the first step is not one of the median
    now[0] += 7
    assert progress.silent == 7
    progress.mark("training, before a checkpoint", slow=True)
    assert (progress.silent, progress.limit) == (0, 50)
    for _ in range(200):
        now[0] += 0.5
        progress.step()
    progress.mark("a training batch")
    assert progress.limit == 10


def test_what_is_excluded_from_the_throughput_has_the_slow_limit(tmp_path):
    limits = []

    class Asks(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            with excluded(trainer), excluded(trainer):
                limits.append(watchdog._progress.limit)
            limits.append(watchdog._progress.limit)

    watchdog = Watchdog(minutes=1, slow_minutes=7)
    trainer(tmp_path, [watchdog, Asks()], max_steps=1).fit(Toy(), loader(BATCHES))
    assert limits == [420, 60]


def test_attempts_are_told_apart_with_and_without_a_record(tmp_path):
    assert attempt_of(tmp_path) == 1
    (tmp_path / "stacks" / "attempt-2").mkdir(parents=True)
    assert attempt_of(tmp_path) == 3
    (tmp_path / "attempts.jsonl").write_text('{"event": "start"}\n{"event": "end"}\n{"event": "start"}\n')
    assert attempt_of(tmp_path) == 2


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"minutes": -1}, "watchdog.minutes"),
        ({"minutes": 20, "slow_minutes": 10}, "watchdog.slow_minutes"),
        ({"times_median": 0.5}, "watchdog.times_median"),
    ],
)
def test_bad_arguments(options, key):
    with pytest.raises(ValueError, match=key):
        Watchdog(**options)
