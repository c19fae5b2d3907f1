"""The rankings file: durable before it is acknowledged, whole after a kill, one row a verdict."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from ptl.apps.ranking.prompts import read_items
from ptl.apps.ranking.store import KeyReused, Store
from tests.apps.rank_parts import ranks, read_rows, row, until, write_rows


@pytest.fixture
def items(tmp_path):
    return read_items(write_rows(tmp_path / "c.jsonl", [row(i) for i in range(3)]))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def add(store, item, key, *, annotator="ada", given=(1, 2, 3, 4), **more):
    fields = {"status": "ranked", "order": (0, 1, 2, 3), "seconds": 1.5, **more}
    return store.add(item, annotator=annotator, key=key, ranks=given, **fields)


def test_a_row_holds_what_training_and_people_need(items, out):
    store = Store(out, items)
    add(store, items[1], "key-one", given=(2, None, 1, 2), order=(3, 1, 0, 2), seconds=12.5)
    (line,) = read_rows(out)
    assert line["prompt"] == "question 1" and line["annotator"] == "ada" and line["id"] == "q1"
    assert ranks(line) == [2, None, 1, 2] and line["completions"][3]["meta"]["seed"] == 3
    assert [answer["messages"][0]["content"] for answer in line["completions"]] == [
        f"answer {i} to 1" for i in range(4)
    ]
    assert (line["order"], line["seconds"], line["flag"]) == ([3, 1, 0, 2], 12.5, None)
    assert (line["status"], line["revision"], line["key"]) == ("ranked", 1, "key-one")
    assert line["time"].endswith("+00:00")


def test_a_second_verdict_is_a_new_row_and_the_last_one_counts(items, out):
    store = Store(out, items)
    add(store, items[0], "key-1")
    assert add(store, items[0], "key-2", given=(4, 3, 2, 1)).revision == 2
    add(store, items[0], "key-3", annotator="bo")
    assert [(line["annotator"], line["revision"]) for line in read_rows(out)] == [("ada", 1), ("ada", 2), ("bo", 1)]
    assert store.last("ada", "q0").ranks == (4, 3, 2, 1)
    store.close()
    again = Store(out, items)
    assert again.last("ada", "q0").ranks == (4, 3, 2, 1) and again.last("ada", "q1") is None
    assert add(again, items[0], "key-4", status="skipped", given=(None,) * 4).revision == 3
    assert again.count() == (2, 2)


def test_a_key_that_is_sent_again_writes_nothing_even_after_a_restart(items, out):
    store = Store(out, items)
    first = add(store, items[0], "key-1")
    assert add(store, items[0], "key-1", given=(4, 3, 2, 1)) == first
    store.close()
    again = Store(out, items)
    assert add(again, items[0], "key-1", given=(4, 3, 2, 1)) == first
    with pytest.raises(KeyReused, match="sent for prompt 'q0'"):
        add(again, items[1], "key-1")
    add(again, items[0], "key-1", annotator="bo")  # a key is its annotator's own
    assert [line["annotator"] for line in read_rows(out)] == ["ada", "bo"]


def test_the_same_key_from_two_threads_at_once_is_one_row(items, out):
    store = Store(out, items)
    start = threading.Barrier(8)

    def send():
        start.wait()
        add(store, items[0], "key-1")

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(read_rows(out)) == 1


def test_wherever_a_killed_writer_tore_the_last_line_the_rest_is_kept(items, out, capsys):
    store = Store(out, items)
    for number, item in enumerate(items):
        add(store, item, f"key-{number}")
    store.close()
    whole = out.read_bytes()
    last = whole[whole[:-1].rindex(b"\n") + 1 :]
    before = len(whole) - len(last)
    for kept in [*range(1, len(last), 37), len(last) - 2]:
        out.write_bytes(whole[: before + kept])
        store = Store(out, items)
        assert out.read_bytes() == whole[:before] and "torn" in capsys.readouterr().err
        assert store.last("ada", "q1") is not None and store.last("ada", "q2") is None
        add(store, items[2], "key-2")
        store.close()
        assert len(read_rows(out)) == 3
    out.write_bytes(whole[:-1])  # only the end of the line is missing: nothing is lost
    Store(out, items).close()
    assert out.read_bytes() == whole


def test_a_broken_line_before_the_last_is_an_error_and_changes_nothing(items, out):
    store = Store(out, items)
    add(store, items[0], "key-1")
    store.close()
    broken = b'{"id": "q0", "comp\n' + out.read_bytes()
    out.write_bytes(broken)
    with pytest.raises(ValueError, match=r"out\.jsonl:1: broken_json"):
        Store(out, items)
    assert out.read_bytes() == broken
    out.write_text('{"prompt": "q", "completions": ["a", "b"]}\n')
    with pytest.raises(ValueError, match="was not written by ptl rank serve"):
        Store(out, items)


def test_rankings_of_other_answers_under_the_same_id_are_refused(items, out, tmp_path):
    store = Store(out, items)
    add(store, items[0], "key-1")
    store.close()
    changed = row(0)
    changed["completions"][2]["messages"][0]["content"] = "another answer"
    with pytest.raises(ValueError, match="the answers of id 'q0' are not those of .*give another --out"):
        Store(out, read_items(write_rows(tmp_path / "c.jsonl", [changed])))


def test_rows_about_other_prompts_stay_and_are_counted(items, out):
    store = Store(out, items)
    add(store, items[0], "key-1")
    store.close()
    again = Store(out, items[1:])
    assert again.strangers == 1 and again.count() == (0, 0)
    add(again, items[1], "key-2")
    assert [line["id"] for line in read_rows(out)] == ["q0", "q1"]


def test_one_process_at_a_time_writes_a_file(items, out):
    store = Store(out, items)
    with pytest.raises(ValueError, match="another ptl rank serve"):
        Store(out, items)
    store.close()
    Store(out, items).close()


def test_add_returns_after_the_sync_and_waiting_writers_share_one(items, out, monkeypatch):
    store = Store(out, items)
    sync, gate, syncs, acknowledged = os.fsync, threading.Event(), [], []

    def slow(handle):
        syncs.append(len(read_rows(out)))
        assert gate.wait(20)
        sync(handle)

    monkeypatch.setattr(os, "fsync", slow)

    def send(number):
        add(store, items[0], f"key-{number:02}", annotator=f"a{number}")
        acknowledged.append(number)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(20)]
    threads[0].start()
    until(lambda: syncs)
    for thread in threads[1:]:
        thread.start()
    until(lambda: len(store._queue) == 19)
    assert acknowledged == [] and store.last("a0", "q0") is None  # written, but not synced: nobody was told
    gate.set()
    for thread in threads:
        thread.join(20)
    assert syncs == [1, 20] and len(acknowledged) == 20


@pytest.mark.parametrize("failing", ["write", "sync"])
def test_a_full_disk_is_an_error_leaves_nothing_and_can_be_tried_again(failing, items, out, monkeypatch):
    store = Store(out, items)
    add(store, items[0], "key-1")
    before = out.read_bytes()
    write = os.write
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(handle, data):
        if len(data) < 50:
            raise full
        return write(handle, data[: len(data) // 2])

    def broken(handle):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half) if failing == "write" else patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="not saved"):
            add(store, items[1], "key-2")
    assert out.read_bytes() == before and store.last("ada", "q1") is None
    add(store, items[1], "key-2")
    assert [line["id"] for line in read_rows(out)] == ["q0", "q1"]


WRITER = """
import sys
from pathlib import Path
from ptl.apps.ranking.prompts import read_items
from ptl.apps.ranking.store import Store
items = read_items(Path(sys.argv[1]))
store = Store(Path(sys.argv[2]), items)
for number in range(10**9):
    key = f"{sys.argv[3]}-{number:06}"
    said = {"status": "ranked", "ranks": [1, 2, 3, 4], "order": [0, 1, 2, 3], "seconds": 1}
    store.add(items[number % 3], annotator="ada", key=key, **said)
    print(key, flush=True)
"""


def test_what_was_acknowledged_before_a_sigkill_is_in_the_file_once(items, out, tmp_path):
    told = []
    for life in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "c.jsonl"), str(out), f"life{life}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            told.append(process.stdout.readline().strip())  # it writes by now
            time.sleep(random.Random(life).uniform(0.05, 0.2))
        finally:
            process.kill()
            rest = process.communicate(timeout=20)[0]
        # A last line without its end was not told: the kill came inside the print.
        told += [line for line in rest[: rest.rfind("\n") + 1].splitlines() if line]
    Store(out, items).close()
    keys = [line["key"] for line in read_rows(out)]
    assert len(told) > 20 and set(told) <= set(keys) and len(set(keys)) == len(keys)
    assert [json.loads(line)["revision"] for line in out.read_text().splitlines()][-1] > 5
