"""The file to rank: which rows are taken, how each refusal reads, the shuffle, and what is written back."""

import json
from collections import Counter

import pytest

from ptl.apps.ranking.prompts import read_items
from tests.apps.rank_parts import row, write_rows


def one(tmp_path, value):
    (item,) = read_items(write_rows(tmp_path / "c.jsonl", [value]))
    return item


def test_every_way_to_write_an_answer_is_read_and_written_as_messages(tmp_path):
    turn = {"role": "assistant", "content": "same"}
    forms = ["same", [turn], turn, {"messages": [turn], "meta": {"seed": 3}, "rank": 7}]
    item = one(tmp_path, {"prompt": [{"role": "user", "content": "why"}], "completions": forms, "source": "mine"})
    assert [[m.content for m in answer] for answer in item.answers] == [["same"]] * 4
    out = item.ranked([1, None, 2, 2])
    assert [answer["messages"] for answer in out["completions"]] == [[turn]] * 4
    assert [answer["rank"] for answer in out["completions"]] == [1, None, 2, 2]
    assert out["completions"][3]["meta"] == {"seed": 3} and out["source"] == "mine"


def test_an_order_that_somebody_else_gave_is_not_written_beside_ours(tmp_path):
    out = one(tmp_path, row(1, answers=2, scores=[3.0, 1.0], ranks=[1, 2])).ranked([2, 1])
    assert "scores" not in out and "ranks" not in out


def test_an_id_comes_from_the_row_or_from_what_is_judged(tmp_path):
    plain = row(1)
    del plain["id"]
    digest = one(tmp_path, plain).id
    changed_meta = json.loads(json.dumps(plain))
    changed_meta["completions"][0]["meta"]["seed"] = 99
    assert one(tmp_path, changed_meta).id == digest
    changed_answer = json.loads(json.dumps(plain))
    changed_answer["completions"][0]["messages"][0]["content"] += "!"
    assert one(tmp_path, changed_answer).id != digest
    assert one(tmp_path, {**plain, "id": 12}).id == "12"


BAD = {
    "broken_json": '{"prompt": ',
    "not_an_object": "[1]",
    "missing_key: the row has no prompt": '{"completions": ["a", "b"]}',
    "missing_key: the row has no completions": '{"prompt": "q"}',
    "empty_content": '{"prompt": " ", "completions": ["a", "b"]}',
    "expected a list of two answers": '{"prompt": "q", "completions": ["a"]}',
    "completions[1] is a number": '{"prompt": "q", "completions": ["a", 3]}',
    "completions[0] has no messages": '{"prompt": "q", "completions": [{"text": "a"}, "b"]}',
    "does not end with an assistant": '{"prompt": "q", "completions": ["a", [{"role": "user", "content": "b"}]]}',
    "id is a boolean": '{"prompt": "q", "completions": ["a", "b"], "id": true}',
    "wrong_encoding": '{"prompt": "q", "completions": ["a", "b"], "meta": "\\ud800"}',
    "same id 'q1' as line 1": json.dumps(row(1)),
}


@pytest.mark.parametrize("told", BAD)
def test_a_bad_line_is_named_with_its_file_line_and_reason(told, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row(1)) + "\n\n" + BAD[told] + "\n")
    with pytest.raises(ValueError) as error:
        read_items(path)
    assert str(error.value).startswith(f"{path}:3: ") and told in str(error.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row to rank"):
        read_items(write_rows(tmp_path / "c.jsonl", []))


def test_the_shuffle_is_fixed_for_a_seed_a_name_and_a_prompt_and_fair(tmp_path):
    items = read_items(write_rows(tmp_path / "c.jsonl", [row(i, answers=3) for i in range(600)]))
    shown = [item.order(0, "ada") for item in items]
    assert shown == [item.order(0, "ada") for item in items]
    assert shown != [item.order(1, "ada") for item in items] and shown != [item.order(0, "bo") for item in items]
    # Each of the 6 orders is expected 100 times; the standard deviation is 9.
    assert len(counts := Counter(shown)) == 6 and all(50 < count < 150 for count in counts.values())
    assert read_items(write_rows(tmp_path / "c.jsonl", [row(7, answers=5)]))[0].order(0, "ada") == (2, 4, 3, 1, 0)
