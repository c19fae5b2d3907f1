"""Preparation: each row trained or counted, one result from any number of processes, a cache that can be trusted."""

import gzip
import json
import os
import random
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ptl.data.audit import AuditError, Thresholds
from ptl.data.batches import mask_of
from ptl.data.cache_key import AFTER, cache_inputs, cache_key, code_version
from ptl.data.files import resolve
from ptl.data.prepare import audit_sources, prepare
from ptl.data.render import Renderer, RenderPolicy
from ptl.data.sources import Source
from ptl.data.views import ChatView
from tests import forks, tiny

WORDS = ["hello", "world", "the", "quick", "brown", "fox", "lazy", "dog", "What is 2+2?", "4", "Où est", "Shanghai"]


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def turns(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def chats(count, seed=0, words=(1, 12), most_turns=3):
    draw = random.Random(seed)

    def say():
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(*words)))

    return [turns(*(say() for _ in range(2 * draw.randint(1, most_turns)))) for _ in range(count)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(sources, renderer, cache, **options):
    settings = {"max_length": 512, "truncation": "drop", "num_proc": 1, "quiet": True, "view": ChatView(), **options}
    sources = [Source(path=str(source)) if isinstance(source, Path) else source for source in sources]
    return prepare(sources, renderer=renderer, cache_dir=cache, **settings)


def texts(prepared, tokenizer):
    return [tokenizer.decode(row["ids"]) for row in prepared.rows]


def balanced(prepared):
    """Law 8: each row is kept, refused or dropped, and the documents are those on disk."""
    for index, entry in enumerate(prepared.audit.sources):
        assert entry.rows == entry.kept + entry.refused_rows + entry.dropped_rows
        rows = prepared.rows.filter(lambda row, index=index: row["source"] == index)
        assert entry.documents == len(rows) == int((prepared.source_ids == index).sum())
        assert entry.tokens == sum(rows["length"]) == sum(len(ids) for ids in rows["ids"])
        assert entry.trained_tokens == sum(
            int((mask_of(row["length"], row["spans"], row["span_weights"]) > 0).sum()) for row in rows
        )
        assert entry.truncated == sum(rows["truncated"]) and entry.lost_end == sum(rows["lost_end"])
        assert entry.kept == len(set(zip(rows["line"], [index] * len(rows)))) or len(rows) > entry.kept
    assert prepared.lengths.tolist() == prepared.rows["length"][:]
    assert prepared.weights.tolist() == prepared.rows["weight"][:]
    assert prepared.source_ids.tolist() == prepared.rows["source"][:]
    return prepared


# ---- law 8 ----

GOOD = turns("hello", "world")
BROKEN = {  # file name, content, reason; every file has two good rows beside the broken one, on line or row 2
    "broken json": ("a.jsonl", b'{"messages": [\n', "broken_json"),
    "cut line": ("a.jsonl", json.dumps(GOOD)[:-5].encode() + b"\n", "broken_json"),
    "two values on a line": ("a.jsonl", json.dumps(GOOD).encode() * 2 + b"\n", "broken_json"),
    "a list on a line": ("a.jsonl", json.dumps(GOOD["messages"]).encode() + b"\n", "not_an_object"),
    "latin-1": ("a.jsonl", json.dumps(turns("é", "è"), ensure_ascii=False).encode("latin-1") + b"\n", "wrong_encoding"),
    "half a surrogate": ("a.jsonl", json.dumps(turns("a", "b\ud83d")).encode() + b"\n", "wrong_encoding"),
    "missing key": ("a.jsonl", b'{"message": []}\n', "missing_key"),
    "no role": ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', "missing_key"),
    "unknown role": ("a.jsonl", b'{"messages": [{"role": "narrator", "content": "x"}]}\n', "unknown_role"),
    "null content": ("a.jsonl", json.dumps(turns("a", None)).encode() + b"\n", "null_content"),
    "blank answer": ("a.jsonl", json.dumps(turns("a", " ")).encode() + b"\n", "empty_content"),
    "empty conversation": ("a.jsonl", b'{"messages": []}\n', "empty_conversation"),
    "no assistant": ("a.jsonl", json.dumps(turns("a")).encode() + b"\n", "no_assistant"),
    "number for text": ("a.jsonl", json.dumps(turns("a", 3)).encode() + b"\n", "wrong_type"),
    "an image": ("a.jsonl", json.dumps(turns([{"type": "image"}], "b")).encode() + b"\n", "not_text"),
    "bad weight": ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "x", "train": "no"}]}\n', "bad_weight"),
    "bad call": ("a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": [{}]}]}\n', "bad_tool_call"),
    "bad tools": ("a.jsonl", json.dumps({**GOOD, "tools": "{"}).encode() + b"\n", "bad_tools"),
    "ignored tools": ("a.jsonl", json.dumps({**GOOD, "tools": [{"name": "f"}]}).encode() + b"\n", "tools_unsupported"),
    "a short CSV row": ("a.csv", b"only one cell\n", "wrong_columns"),
    "a CSV quote": ("a.csv", b'"a"b,c\n', "broken_csv"),
    "a blank CSV cell": ("a.csv", b"question,\n", "empty_content"),
    "latin-1 CSV": ("a.csv", b"\xe9,b\n", "wrong_encoding"),
    "an item of an array": ("a.json", b"3", "not_an_object"),
}  # fmt: skip


def broken_file(folder, name, raw):
    path = folder / name
    if name.endswith(".csv"):
        path.write_bytes(b"prompt,completion\nhello,world\n" + raw + b"fox,dog\n")
    elif name.endswith(".json"):
        path.write_bytes(
            b"[" + b",".join([json.dumps(GOOD).encode(), raw, json.dumps(turns("fox", "dog")).encode()]) + b"]"
        )
    else:
        path.write_bytes(json.dumps(GOOD).encode() + b"\n" + raw + json.dumps(turns("fox", "dog")).encode() + b"\n")
    return path


@pytest.mark.parametrize("kind", BROKEN)
def test_law_8_a_broken_row_is_counted_and_stops_the_run(tmp_path, renderer, tokenizer, kind):
    name, raw, reason = BROKEN[kind]
    path = broken_file(tmp_path, name, raw)
    with pytest.raises(AuditError) as caught:
        run([path], renderer, tmp_path / "cache")
    line = 3 if name.endswith(".csv") else 2
    for told in (f"{path}:{line}: {reason}: ", "1 of 3 rows", "ptl data audit", "data.thresholds.max_bad_fraction"):
        assert told in str(caught.value)
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
    prepared = balanced(run([path], renderer, tmp_path / "cache", max_bad_fraction=0.34))
    (entry,) = prepared.audit.sources
    assert {key: value.count for key, value in entry.refused.items()} == {reason: 1} and entry.kept == 2
    assert prepared.rows["line"][:] == [line - 1, line + 1] and "fox" in texts(prepared, tokenizer)[1]


def test_law_8_more_bad_rows_than_allowed_are_listed_by_file_and_line(tmp_path, renderer):
    rows = [json.dumps(GOOD) if i % 10 else "{broken" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(AuditError) as caught:
        run([tmp_path / "a.jsonl"], renderer, tmp_path / "cache", max_bad_fraction=0.09)
    assert "10 of 100 rows" in str(caught.value) and f"{tmp_path}/a.jsonl:1: broken_json" in str(caught.value)
    assert "set data.thresholds.max_bad_fraction to at least 0.1" in str(caught.value)
    prepared = balanced(run([tmp_path / "a.jsonl"], renderer, tmp_path / "cache", max_bad_fraction=0.1))
    assert prepared.audit.sources[0].refused["broken_json"].count == 10


def test_law_8_everything_at_once_adds_up(tmp_path, renderer):
    """Bad lines, long rows, repeated rows, masked rows, blank lines and a limit, in three kinds of files."""
    long, masked = turns("fox " * 300, "dog"), turns("a", "b")
    masked["messages"][1]["train"] = 0
    rows = [*chats(40), long, GOOD, GOOD, masked, {"messages": []}, {"x": 1}]
    lines = [json.dumps(row) for row in rows] + ["", "{", "  "] + [json.dumps(row) for row in chats(20, 9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    pq.write_table(pa.Table.from_pylist([*chats(30, 1), GOOD]), tmp_path / "c.parquet")
    sources = [
        Source(path=str(tmp_path / "a.jsonl"), name="a"),
        Source(path=str(tmp_path / "b.jsonl.gz"), name="b", limit=50),
        Source(path=str(tmp_path / "c.parquet"), name="c"),
    ]
    options = {"max_bad_fraction": 1.0, "max_length": 256}
    prepared = balanced(run(sources, renderer, tmp_path / "cache", deduplicate=True, **options))
    a, b, c = prepared.audit.sources
    assert (a.rows, a.refused_rows, a.dropped_by("too_long"), a.dropped_by("fully_masked")) == (67, 3, 1, 1)
    assert (a.dropped_by("duplicate"), a.duplicates) == (1, 1)
    assert (b.rows, b.beyond_limit, b.dropped_by("duplicate")) == (50, 17, 45) and b.kept == 0
    assert (c.rows, c.dropped_by("duplicate"), c.kept) == (31, 1, 30)
    kept = balanced(run(sources, renderer, tmp_path / "cache", deduplicate=False, **options))
    assert [entry.dropped_by("duplicate") for entry in kept.audit.sources] == [0, 0, 0]
    assert [entry.duplicates for entry in kept.audit.sources] == [1, 45, 1]
    counted = audit_sources(
        sources, view=ChatView(), renderer=renderer, max_length=256, truncation="drop", num_proc=1, quiet=True
    )
    assert counted == kept.audit  # the audit command says what the run will say


@pytest.mark.parametrize("truncation", ["drop", "keep_start", "drop_oldest_turns"])
def test_trap_sft_8_truncation_is_counted_for_every_source(tmp_path, renderer, tokenizer, truncation):
    """Around max_length: one token less, exactly it, one more; a long prompt, a long answer, a long history."""
    whole = len(renderer.render(_conversation(GOOD))[0].ids)
    longer = turns("hello", "world hello hello")
    over = len(renderer.render(_conversation(longer))[0].ids)
    assert over > whole + 1
    rows = [
        GOOD,
        longer,
        turns("hello " * 50, "x"),
        turns("hello", "world " * 50),
        turns("hello", "world", "hello", "world"),
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    fine = jsonl(tmp_path / "fine.jsonl", [GOOD])
    options = {"truncation": truncation, "max_length": whole}
    prepared = balanced(run([path, fine], renderer, tmp_path / "cache", **options))
    entry, other = prepared.audit.sources
    assert other.truncated == other.dropped_rows == other.truncated_rows == 0
    lines = [line for line, source in zip(prepared.rows["line"], prepared.rows["source"]) if source == 0]
    if truncation == "drop":
        assert lines == [1] and entry.dropped_by("too_long") == 4 and entry.truncated == 0
    elif truncation == "keep_start":
        assert lines == [1, 2, 4, 5] and entry.dropped_by("nothing_left") == 1
        assert entry.truncated == 3 and entry.lost_end == 2  # the last row is cut between two turns
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        for row in prepared.rows.select([1, 2]):
            mask = mask_of(row["length"], row["spans"], row["span_weights"])
            assert row["length"] == whole and row["lost_end"] and end not in np.asarray(row["ids"])[mask > 0]
    else:
        assert lines == [1, 5] and entry.dropped_by("too_long") == 3 and entry.truncated == 1 and entry.lost_end == 0
    with pytest.raises(AuditError, match="max_truncated"):
        prepared.audit.check(Thresholds(max_truncated=0.5, max_fully_masked=1.0))


def test_trap_sft_8_a_row_too_long_under_error_stops_with_its_line(tmp_path, renderer):
    path = jsonl(tmp_path / "a.jsonl", [GOOD, turns("hello " * 50, "x")])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*data\.truncation is error"):
        run([path], renderer, tmp_path / "cache", max_length=30, truncation="error")


def _conversation(row):
    from ptl.data.records import parse_row
    from ptl.types import Origin

    return parse_row(row, "messages", Source(path="x"), Origin("x", 1))


def test_nothing_to_train_is_an_error_and_keeps_no_cache(tmp_path, renderer):
    path = jsonl(tmp_path / "a.jsonl", [turns("hello " * 50, "x")])
    with pytest.raises(AuditError, match="trained tokens"):
        run([path], renderer, tmp_path / "cache", max_length=30)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(AuditError, match="no rows"):
        run([Source(path=str(tmp_path / "blank.jsonl"), format="messages")], renderer, tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_a_bos_at_the_start_is_counted(tmp_path):
    special = ("<|im_start|>", "<|im_end|>", "<s>")
    path = jsonl(tmp_path / "a.jsonl", [GOOD, turns("fox", "dog")])
    for prefix, counts in (("", [2, 0, 0]), ("{{ bos_token }}", [0, 2, 0]), ("<s>{{ bos_token }}", [0, 0, 2])):
        tokenizer = tiny.make_tokenizer(special, template=prefix + tiny.CHATML)
        tokenizer.bos_token = "<s>"
        prepared = run([path], Renderer(tokenizer), tmp_path / "cache")
        assert prepared.audit.sources[0].bos == counts


# ---- the result ----


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, renderer, monkeypatch):
    """More blocks than are done before processes start, from a plain, a compressed and a table file."""
    monkeypatch.setattr("ptl.data.readers.ROWS", 50)
    rows = chats(1000)
    rows[700]["messages"][0]["role"] = "narrator"
    jsonl(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text()[:50_000].rsplit("\n", 1)[0])
    pq.write_table(pa.Table.from_pylist(rows[:120]), tmp_path / "c.parquet")
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"]
    results = [
        run(sources, renderer, tmp_path / f"cache{n}", num_proc=n, max_bad_fraction=0.01, deduplicate=True)
        for n in (1, 2)
    ]
    one, two = results
    assert one.path.name == two.path.name and one.audit == two.audit
    names = sorted(path.name for path in one.path.iterdir())
    assert names == sorted(path.name for path in two.path.iterdir()) and "rows-00000.arrow" in names
    for name in names:
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes(), name
    assert one.rows["line"][:5] == [1, 2, 3, 4, 5] and np.all(np.diff(one.source_ids) >= 0)


def test_rows_are_memory_mapped_and_in_shards(tmp_path, renderer, monkeypatch):
    monkeypatch.setattr("ptl.data.store.SHARD", 20_000)
    monkeypatch.setattr("ptl.data.store.BATCH", 64)
    monkeypatch.setattr("ptl.data.readers.ROWS", 64)
    path = jsonl(tmp_path / "a.jsonl", chats(500))
    prepared = balanced(run([path], renderer, tmp_path / "cache"))
    files = [entry["filename"] for entry in prepared.rows.cache_files]
    assert len(files) > 3 and all(Path(file).parent == prepared.path for file in files)
    assert pa.total_allocated_bytes() < sum(Path(file).stat().st_size for file in files)
    assert all(isinstance(column, np.memmap) for column in (prepared.lengths, prepared.weights, prepared.source_ids))
    expected = [renderer.render(_conversation(row))[0] for row in chats(500)]
    for row, tokens in zip(prepared.rows, expected):
        assert row["ids"] == tokens.ids.tolist()
        assert mask_of(row["length"], row["spans"], row["span_weights"]).tolist() == tokens.loss_mask.tolist()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "zip"])
def test_trap_sft_15_disjoint_tool_arguments_render_the_same_from_any_file(tmp_path, tokenizer, suffix):
    """A unified schema would print ``"b": null`` as if the model had said it."""
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"b": "two", "c": {"d": [3]}}}]
    rows = [
        {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in calls
    ]
    path = tmp_path / f"a.{suffix}"
    source = Source(path=str(path))
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        jsonl(path, rows)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/rows.jsonl", "\n".join(json.dumps(row) for row in rows))
        source = Source(path=f"zip://x/rows.jsonl::{path}")
    prepared = run([source], Renderer(tokenizer, template="chatml"), tmp_path / "cache")
    said = texts(prepared, tokenizer)
    assert '{"a": 1}' in said[0] and '{"b": "two", "c": {"d": [3]}}' in said[1]
    assert not any("null" in text for text in said)


# ---- the key ----


def key(sources, renderer, **options):
    settings = {"view": ChatView(), "max_length": 512, "truncation": "drop", "deduplicate": False, **options}
    return cache_key(cache_inputs(sources, [resolve(source) for source in sources], renderer=renderer, **settings))


SAME_KEY = """
import sys
from tests import tiny
from ptl.data.cache_key import cache_inputs, cache_key
from ptl.data.files import resolve
from ptl.data.render import Renderer
from ptl.data.sources import Source
from ptl.data.views import ChatView
source = Source(path=sys.argv[1])
inputs = cache_inputs([source], [resolve(source)], view=ChatView(), renderer=Renderer(tiny.make_tokenizer()),
                      max_length=512, truncation="drop", deduplicate=False)
print(cache_key(inputs))
"""


def test_trap_sft_15_another_process_finds_the_same_key(tmp_path, renderer):
    path = jsonl(tmp_path / "a.jsonl", chats(5))
    out = forks.run(["-c", SAME_KEY, path], check=True)
    assert out.stdout.split()[-1] == key([Source(path=str(path))], renderer)


def test_trap_sft_15_whatever_changes_the_tokens_changes_the_key(tmp_path, renderer, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", chats(5))
    source = Source(path=str(path))
    base = key([source], renderer)
    assert base == key([source], Renderer(tiny.make_tokenizer()))
    assert base == key([Source(path=str(path), weight=3.0, name="chats")], renderer)  # these change no token
    changed = [
        key([source], Renderer(tokenizer, template=tiny.CHATML + " ")),
        key([source], Renderer(tiny.make_tokenizer(("<|im_end|>", "<|im_start|>")))),
        key([source], Renderer(tokenizer, policy=RenderPolicy(last_turn_only=True))),
        key([source], renderer, max_length=511),
        key([source], renderer, truncation="keep_start"),
        key([source], renderer, deduplicate=True),
        key([Source(path=str(path), limit=4)], renderer),
        key([Source(path=str(path), format="messages")], renderer),
        key([Source(path=str(path), roles={"x": "user"})], renderer),
        key([source, source], renderer),
    ]
    jsonl(path, chats(5, seed=1))
    changed.append(key([source], renderer))
    assert len({base, *changed}) == len(changed) + 1


def test_the_code_is_in_the_key(tmp_path):
    folder = tmp_path / "code"
    here = Path(sys.modules["ptl.data.cache_key"].__file__).parent
    shutil.copytree(here, folder)
    assert all((here / name).exists() for name in AFTER)
    before = code_version(ChatView(), folder)
    (folder / "order.py").write_text("# deals, makes no token")
    assert code_version(ChatView(), folder) == before
    (folder / "records.py").write_text("# makes tokens")
    assert code_version(ChatView(), folder) != before


# ---- the cache ----


def test_a_second_start_reads_the_cache(tmp_path, renderer, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", chats(50))
    first = run([path], renderer, tmp_path / "cache")
    monkeypatch.setattr("ptl.data.prepare.encoder_of", lambda *a, **k: pytest.fail("it was prepared again"))
    second = run([Source(path=str(path), name="new name", weight=2.0)], renderer, tmp_path / "cache", num_proc=2)
    assert second.path == first.path and second.rows[:] == first.rows[:]
    assert second.sources == ("new name",) == (second.audit.sources[0].name,)


def test_bad_rows_that_one_run_allowed_stop_the_next(tmp_path, renderer):
    path = jsonl(tmp_path / "a.jsonl", [*chats(3), {"messages": []}])
    run([path], renderer, tmp_path / "cache", max_bad_fraction=0.5)
    with pytest.raises(AuditError, match=r"a\.jsonl:4: empty_conversation"):
        run([path], renderer, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest"])
def test_a_damaged_cache_is_one_clear_error(tmp_path, renderer, damage):
    path = jsonl(tmp_path / "a.jsonl", chats(20))
    folder = run([path], renderer, tmp_path / "cache").path
    if damage == "cut":
        os.truncate(folder / "lengths.npy", 150)
    else:
        (folder / {"gone": "rows-00000.arrow", "manifest": "manifest.json"}[damage]).unlink()
    with pytest.raises(ValueError, match=r"damaged.*delete the folder") as caught:
        run([path], renderer, tmp_path / "cache")
    assert str(folder) in str(caught.value)


KILLED = """
import sys, time
from tests import tiny
from ptl.data.prepare import prepare
from ptl.data.render import Renderer
from ptl.data.sources import Source
from ptl.data.views import ChatView
prepare([Source(path=sys.argv[1])], view=ChatView(), renderer=Renderer(tiny.make_tokenizer()), max_length=512,
        truncation="drop", cache_dir=sys.argv[2], num_proc=1, quiet=True)
"""


def test_law_6_a_killed_preparation_leaves_no_cache_and_is_made_anew(tmp_path, renderer):
    rows = chats(6_000, words=(1, 2), most_turns=1)
    path, cache = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "cache"
    process = forks.begin(["-c", KILLED, path, cache])
    end = time.monotonic() + 60
    while not any(part.stat().st_size > 0 for part in cache.glob("*.tmp-*/lengths.npy")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait(30)
    assert [entry.suffix for entry in cache.iterdir() if ".tmp-" not in entry.name] == [".lock"]
    jsonl(path, chats(20))
    run([path], renderer, cache)  # other data, another key: nothing in the way
    jsonl(path, rows)
    prepared = run([path], renderer, cache)
    assert prepared.audit.sources[0].rows == len(prepared.rows) == 6_000
    assert sorted(entry.suffix for entry in cache.iterdir()) == ["", ""]


def test_progress_is_told_in_a_log(tmp_path, renderer, monkeypatch, capsys):
    monkeypatch.setattr("ptl.data.report.LINE_EVERY", -1.0)
    path = jsonl(tmp_path / "a.jsonl", chats(30))
    run([path], renderer, tmp_path / "cache", quiet=False)
    assert "ptl: preparing data: 30 rows, " in (told := capsys.readouterr().err) and "about 100%" in told
    run([path], renderer, tmp_path / "other")
    assert "preparing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [({"num_proc": 0}, "num_proc"), ({"max_bad_fraction": 1.5}, "max_bad_fraction")],
)
def test_wrong_options_are_refused(tmp_path, renderer, options, told):
    path = jsonl(tmp_path / "a.jsonl", chats(2))
    with pytest.raises(ValueError, match=told):
        run([path], renderer, tmp_path / "cache", **options)
    with pytest.raises(ValueError, match="at least one"):
        run([], renderer, tmp_path / "cache")
