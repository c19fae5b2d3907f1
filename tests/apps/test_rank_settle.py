"""What was ranked twice counts once: in the file, for the reader, and after the page has stopped."""

from __future__ import annotations

import pytest

from ptl.apps.rank import main
from ptl.apps.ranking.prompts import read_items
from ptl.apps.ranking.settle import settle
from ptl.apps.ranking.store import Store
from ptl.data.records import parse_row
from ptl.data.sources import BadRow, Source
from ptl.types import Origin
from tests.apps.rank_parts import read_rows, row, served, write_rows
from tests.apps.test_rank_store import add

SOURCE = Source(path="out.jsonl", format="ranking")


@pytest.fixture
def items(tmp_path):
    return read_items(write_rows(tmp_path / "c.jsonl", [row(i) for i in range(3)]))


@pytest.fixture
def out(items, tmp_path):
    """Ada ranks two prompts, and the first one twice more; Bob skips what he had ranked."""
    store = Store(tmp_path / "out.jsonl", items)
    add(store, items[0], "k1", given=(1, 2, 3, 4))
    add(store, items[1], "k2")
    add(store, items[0], "k3", given=(2, 1, 3, 4))
    add(store, items[0], "k1", annotator="bob")
    add(store, items[0], "k4", given=(4, 3, 2, 1))
    add(store, items[0], "k2", annotator="bob", status="skipped", given=(None,) * 4)
    store.close()
    return tmp_path / "out.jsonl"


def verdicts(path):
    """What a reader makes of each row: the ranks, or the reason why it has none."""
    found = []
    for number, line in enumerate(read_rows(path), 1):
        try:
            found.append(parse_row(line, "ranking", SOURCE, Origin("out.jsonl", number)).ranks)
        except BadRow as bad:
            found.append(bad.reason)
    return found


def test_an_unsettled_file_is_refused_where_it_was_revised(out):
    assert verdicts(out) == [(1, 2, 3, 4), (1, 2, 3, 4), "revised", (1, 2, 3, 4), "revised", "not_ranked"]


def test_after_settling_the_last_verdict_of_each_person_counts(out):
    before = read_rows(out)
    assert settle(out) == 3
    expected = ["superseded", (1, 2, 3, 4), "superseded", "superseded", (4, 3, 2, 1), "not_ranked"]
    assert verdicts(out) == expected
    unmarked = [{k: v for k, v in line.items() if k not in ("status", "settled")} for line in read_rows(out)]
    assert unmarked == [{k: v for k, v in line.items() if k != "status"} for line in before]
    assert settle(out) == 3 and verdicts(out) == expected


def test_a_settled_file_is_added_to_and_settled_again(out, items):
    settle(out)
    store = Store(out, items)
    assert store.last("ada", items[0].id).ranks == (4, 3, 2, 1)
    assert add(store, items[0], "k9", given=(1, 1, 1, 2)).revision == 4
    store.close(settled=True)
    assert verdicts(out)[4:] == ["superseded", "not_ranked", (1, 1, 1, 2)]


def test_a_page_that_is_stopped_leaves_a_settled_file(out, tmp_path):
    with served(tmp_path / "c.jsonl", "--out", out) as page:
        assert page.stop()[0] == 0
    assert "revised" not in verdicts(out)


def test_the_command_says_what_it_did_and_refuses_other_files(out, tmp_path, capsys):
    assert main(["settle", str(out)]) == 0
    assert "3 verdicts were revised later" in capsys.readouterr().out
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "hello"}])
    assert main(["settle", str(other)]) == 2
    assert "other.jsonl:1" in capsys.readouterr().err
