"""Rankings: every published shape of them as one record, and why a row is refused or left out."""

import json
import math

import pytest
from datasets import Features, Value

from ptl.data.audit import Thresholds
from ptl.data.prepare import audit_sources
from ptl.data.records import parse_row
from ptl.data.render import Renderer
from ptl.data.sources import REASONS, BadRow, LeftOut, Source, detect_format
from ptl.data.views import View
from ptl.types import Origin, Ranking

HERE = Origin("data.jsonl", 7)
NAN = math.nan


def user(text="q"):
    return {"role": "user", "content": text}


def says(text="a"):
    return {"role": "assistant", "content": text}


def read(row, **options):
    source = Source(path="data.jsonl", **options)
    assert detect_format(source, [row]) == "ranking"
    return parse_row(row, "ranking", source, HERE)


def said(messages):
    return [(message.role, message.content) for message in messages]


def answers(record):
    """The text of answers of one turn each, or their list of turns."""
    return [turns[0].content if len(turns) == 1 else said(turns) for turns in record.completions]


def equal(got, expected):
    return (got is None and expected is None) or got == pytest.approx(expected, nan_ok=True)


SYSTEM = {"role": "system", "content": "s"}
S, U = ("system", "s"), ("user", "q")
DIALOGUE = [user("q"), says("hi"), user("more")]
DIALOGUE_SAID = [("user", "q"), ("assistant", "hi"), ("user", "more")]
HH = "\n\nHuman: q\n\nAssistant: hi\n\nHuman: more\n\nAssistant: "
UF = {"prompt": "q", "prompt_id": "1", "messages": [user(), says("good")], "score_chosen": 8.5, "score_rejected": 4}
ITEMS = [
    {"messages": [says("a")], "rank": 2, "meta": {"logprob": -1.5}},
    {"messages": [says("b")], "rank": 1, "meta": {}},
    {"messages": [says("a")], "rank": 2, "meta": {}},
    {"messages": [says("d")], "rank": None, "meta": {}},
]

READ = {
    # name: (row, prompt, answers, ranks, scores)
    "ranked by a person, ties and partly": (
        {"id": "1", "prompt": [user()], "completions": ITEMS, "annotator": "ann"},
        [U], ["a", "b", "a", "d"], [2, 1, 2, NAN], None,
    ),
    "scored objects": (
        {"prompt": "q", "completions": [{"messages": "a", "score": 0.5}, {"messages": "b", "score": 2}]},
        [U], ["a", "b"], [2, 1], [0.5, 2],
    ),
    "ranks before scores; no score where there is no rank": (
        {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 2, None], "scores": [5, 5, 9]},
        [U], ["a", "b", "c"], [1, 2, NAN], [5, 5, NAN],
    ),
    "ranks": (
        {"prompt": "q", "completions": ["a", "b", [says("c")]], "ranks": [2, 1, 2]},
        [U], ["a", "b", "c"], [2, 1, 2], None,
    ),
    "scores with a tie": (
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 9, 0.5]},
        [U], ["a", "b", "c"], [2, 1, 2], [0.5, 9, 0.5],
    ),
    "scores, one of them null": (
        {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, None, 3]},
        [U], ["a", "b", "c"], [2, NAN, 1], [1, NAN, 3],
    ),
    "all tied": ({"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1]}, [U], ["a", "b"], [1, 1], None),
    "UltraFeedback": (
        {"instruction": "q", "models": ["m"], "completions": [
            {"response": "a", "overall_score": 6.0, "fine-grained_score": 4.0, "annotations": {}},
            {"response": "b", "overall_score": 8.0, "fine-grained_score": 1.0},
            {"response": "c", "overall_score": None, "fine-grained_score": 3.0},
        ]},
        [U], ["a", "b", "c"], [2, 1, NAN], [6, 8, NAN],
    ),
    "UltraFeedback, fine-grained alone": (
        {"instruction": "q", "completions": [
            {"response": "a", "fine-grained_score": 4}, {"response": "b", "fine-grained_score": 5},
        ]},
        [U], ["a", "b"], [2, 1], [4, 5],
    ),
    "a pair with its prompt": (
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        [U], ["good", "bad"], [1, 2], None,
    ),
    "a pair of messages": (
        {"prompt": [user()], "chosen": [says("x")], "rejected": says("y")},
        [U], ["x", "y"], [1, 2], None,
    ),
    "a pair of whole dialogues": (
        {"chosen": [*DIALOGUE, says("x")], "rejected": [*DIALOGUE, says("y")]},
        DIALOGUE_SAID, ["x", "y"], [1, 2], None,
    ),
    "dialogues that part early": (
        {"chosen": [user(), says("x")], "rejected": [user(), says("y"), user("no"), says("z")]},
        [U], ["x", [("assistant", "y"), ("user", "no"), ("assistant", "z")]], [1, 2], None,
    ),
    "equal dialogues": (
        {"chosen": [user(), says("x")], "rejected": [user(), says("x")]},
        [U], ["x", "x"], [1, 2], None,
    ),
    "UltraFeedback binarized repeats its prompt": (
        {**UF, "chosen": [user(" q\n"), says("good")], "rejected": [user(" q\n"), says("bad")]},
        [("user", " q\n")], ["good", "bad"], [1, 2], [8.5, 4],
    ),
    "the dialogues have a system turn that the prompt has not": (
        {"prompt": "q", "chosen": [SYSTEM, user(), says("x")], "rejected": [SYSTEM, user(), says("y")]},
        [S, U], ["x", "y"], [1, 2], None,
    ),
    "the prompt has a system turn that the dialogues have not": (
        {"prompt": [SYSTEM, user()], "chosen": [user(), says("x")], "rejected": [user(), says("y")]},
        [S, U], ["x", "y"], [1, 2], None,
    ),
    "the prompt is the first of several questions": (
        {"prompt": "q", "chosen": [*DIALOGUE, says("x")], "rejected": [*DIALOGUE, says("y")]},
        DIALOGUE_SAID, ["x", "y"], [1, 2], None,
    ),
    "margin": ({"prompt": "q", "chosen": "x", "rejected": "y", "margin": 1.5}, [U], ["x", "y"], [1, 2], [1.5, 0]),
    "margin of a CSV file": (
        {"prompt": "q", "chosen": "x", "rejected": "y", "margin": "1.5"},
        [U], ["x", "y"], [1, 2], [1.5, 0],
    ),
    "no margin": ({"prompt": "q", "chosen": "x", "rejected": "y", "margin": None}, [U], ["x", "y"], [1, 2], None),
    "equal scores do not undo a choice": (
        {"prompt": "q", "chosen": "x", "rejected": "y", "score_chosen": 3, "score_rejected": 3},
        [U], ["x", "y"], [1, 2], [3, 3],
    ),
    "HH-RLHF": (
        {"chosen": HH + "yes", "rejected": HH + "no\n\nreally"},
        DIALOGUE_SAID, ["yes", "no\n\nreally"], [1, 2], None,
    ),
    "HH-RLHF, stripped": (
        {"chosen": (HH + "yes").strip(), "rejected": (HH + "no").strip()},
        DIALOGUE_SAID, ["yes", "no"], [1, 2], None,
    ),
    "a transcript as prompt": (
        {"prompt": HH, "chosen": "yes", "rejected": "no"},
        DIALOGUE_SAID, ["yes", "no"], [1, 2], None,
    ),
    "a transcript as prompt, repeated": (
        {"prompt": HH, "chosen": HH + "yes", "rejected": HH + "no"},
        DIALOGUE_SAID, ["yes", "no"], [1, 2], None,
    ),
    "an answer that is no transcript": (
        {"prompt": "q", "chosen": "Human: is a word", "rejected": "no"},
        [U], ["Human: is a word", "no"], [1, 2], None,
    ),
    "RewardBench": (
        {"prompt": "q", "chosen": "x", "rejected": "y", "subset": "refusals", "id": 3},
        [U], ["x", "y"], [1, 2], None,
    ),
    "RewardBench 2": (
        {"id": "1", "prompt": "q", "chosen": ["w", "x"], "rejected": ["x", "y", "z"], "num_correct": 2},
        [U], ["w", "x", "x", "y", "z"], [1, 1, 2, 2, 2], None,
    ),
    "lists of answers in messages": (
        {"prompt": "q", "chosen": [[says("x")]], "rejected": [[says("y")], "z"], "margin": 2},
        [U], ["x", "y", "z"], [1, 2, 2], [2, 0, 0],
    ),
    "a verdict that is the last of several": (
        {"prompt": "q", "completions": ["a", "b"], "ranks": [2, 1], "status": "ranked", "revision": 3, "settled": True},
        [U], ["a", "b"], [2, 1], None,
    ),
    "a revision that is none of ours": (
        {"prompt": "q", "chosen": "x", "rejected": "y", "revision": "main"},
        [U], ["x", "y"], [1, 2], None,
    ),
    "a system column": (
        {"prompt": "q", "chosen": "x", "rejected": "y", "system": "s"},
        [S, U], ["x", "y"], [1, 2], None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_shape_is_one_record(name):
    row, prompt, texts, ranks, scores = READ[name]
    record = read(json.loads(json.dumps(row)))
    assert said(record.prompt) == prompt
    assert answers(record) == texts
    assert equal(record.ranks, ranks) and equal(record.scores, scores)
    assert record.origin == HERE and record.annotator == row.get("annotator") and record.tools == ()


def test_tools_and_calls():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    calling = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        says("x"),
    ]
    record = read({"prompt": "q", "chosen": calling, "rejected": "y", "tools": [{"name": "f", "parameters": {}}]})
    assert [message.role for message in record.completions[0]] == ["assistant", "tool", "assistant"]
    assert record.completions[0][0].tool_calls == (call,) and record.tools[0]["function"]["name"] == "f"


def test_columns_and_roles_of_the_user():
    columns = {"completions": "answers", "prompt": "question"}
    row = {
        "question": [{"role": "Chef", "content": "q"}],
        "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}],
    }
    record = read(row, columns=columns, roles={"Chef": "user"})
    assert (said(record.prompt), answers(record), record.ranks) == ([U], ["a", "b"], (2.0, 1.0))


def pair(chosen="x", rejected="y", **more):
    return {"prompt": "q", "chosen": chosen, "rejected": rejected, **more}


def listed(*texts, **more):
    return {"prompt": "q", "completions": list(texts), **more}


REFUSED = [
    ("bad_ranking", listed("a", "b", ranks=[1])),
    ("bad_ranking", listed("a", "b", ranks=[1, 2, 3])),
    ("bad_ranking", listed("a", ranks=[1])),
    ("bad_ranking", listed(scores=[])),
    ("bad_ranking", listed("a", "b", scores=[1, math.inf])),
    ("bad_ranking", listed("a", "b", "c", scores=[1, 2, NAN])),
    ("bad_ranking", listed("a", "b", ranks=[True, False])),
    ("bad_ranking", listed("a", "b", ranks=["first", "second"])),
    ("bad_ranking", listed("a", "b", ranks={"a": 1, "b": 2})),
    ("bad_ranking", listed("a", "b", ranks=[1, None])),
    ("bad_ranking", listed("a", "b", ranks=[None, None])),
    ("bad_ranking", listed("a", "b", ranks=[1, 2], scores=[1, 2])),
    ("bad_ranking", listed("a", "b", "c", ranks=[1, 2, 3], scores=[3, 2, None])),
    ("bad_ranking", {"prompt": [user()], "completions": [{**item, "rank": None} for item in ITEMS]}),
    ("bad_ranking", pair([user()], "b")),
    ("bad_ranking", pair([user()], [user()])),
    ("bad_ranking", pair([user("other"), says()], [user("other"), says()])),
    ("bad_ranking", pair([says(), user()], "b")),
    ("bad_ranking", {"chosen": [user(), says(), user("1"), says()], "rejected": [user(), says(), user("2"), says()]}),
    ("bad_ranking", pair(["a"], [])),
    ("bad_ranking", pair(margin=-1.0)),
    ("bad_ranking", pair(margin=NAN)),
    ("bad_ranking", pair(margin="high")),
    ("bad_ranking", pair(score_chosen=1.0, score_rejected=2.0)),
    ("bad_ranking", pair(score_chosen=1.0)),
    ("missing_key", pair() | {"prompt": None}),
    ("missing_key", {"chosen": [user("1"), says()], "rejected": [user("2"), says()]}),
    ("missing_key", listed({"text": "a"}, {"text": "b"}, ranks=[1, 2])),
    ("wrong_type", {"prompt": "q", "completions": "a", "ranks": [1]}),
    ("wrong_type", listed(1, 2, ranks=[1, 2])),
    ("wrong_type", pair(annotator=7)),
    ("null_content", listed("a", None, ranks=[1, 2])),
    ("empty_content", listed("a", " ", ranks=[1, 2])),
    ("empty_content", pair(["a", ""], ["b"])),
    ("empty_content", {"chosen": HH + "yes", "rejected": HH}),
    ("missing_key", {"chosen": HH + "yes", "rejected": "no"}),
    ("bad_transcript", {"chosen": "\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
    ("bad_transcript", {"chosen": HH + "a\n\nAssistant: b", "rejected": HH + "c"}),
    ("bad_ranking", {"chosen": HH + "a\n\nHuman: b", "rejected": HH + "c\n\nHuman: d"}),
    ("bad_tools", pair(tools="{")),
    ("not_ranked", listed(*ITEMS, status="skipped")),
    ("not_ranked", listed("a", "b", ranks=[1, 2], status="flagged")),
    ("superseded", listed("a", "b", ranks=[1, 2], status="superseded")),
    ("revised", listed("a", "b", ranks=[1, 2], status="ranked", revision=2)),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), REFUSED)
def test_law_8_a_bad_row_is_refused_under_a_stable_reason(reason, row):
    with pytest.raises(BadRow) as caught:
        parse_row(row, "ranking", Source(path="data.jsonl"), HERE)
    assert caught.value.reason == reason and reason in REASONS
    assert isinstance(caught.value, LeftOut) == (reason in ("not_ranked", "superseded"))


@pytest.mark.parametrize(("reason", "row"), REFUSED)
def test_no_refusal_quotes_the_row(reason, row):
    secret = json.loads(json.dumps(row).replace('"q"', '"sesame"').replace("yes", "sesame"))
    with pytest.raises(BadRow) as caught:
        parse_row(secret, "ranking", Source(path="data.jsonl"), HERE)
    assert "sesame" not in str(caught.value)


def test_what_a_missing_rejected_is_called():
    with pytest.raises(BadRow, match="rejected"):
        parse_row({"prompt": "q", "chosen": "a"}, "ranking", Source(path="data.jsonl"), HERE)


class Counting(View):
    """Keeps how many answers a ranking has."""

    record = Ranking
    features = Features(
        {"length": Value("int32"), "weight": Value("float32"), "truncated": Value("bool"), "lost_end": Value("bool")}
    )

    def encode(self, records, renderer, max_length, truncation):
        flags = {"truncated": False, "lost_end": False}
        return [[{"length": len(record.completions), "weight": 1.0, **flags}] for record in records]

    def collate(self, rows, *, layout, pad_id, window_weight):
        raise NotImplementedError

    def without_weight(self, row):
        raise NotImplementedError


def test_law_8_rows_that_were_not_ranked_are_counted_as_dropped_and_stop_nothing(tmp_path, tokenizer):
    rows = [
        listed(*ITEMS),
        listed(*ITEMS, status="skipped"),
        listed(*ITEMS, status="flagged"),
        listed(*ITEMS, status="superseded"),
        listed(*ITEMS, status="ranked"),
    ]
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"max_length": 10, "truncation": "error", "num_proc": 1, "quiet": True}
    audit = audit_sources([Source(path=str(path))], view=Counting(), renderer=Renderer(tokenizer), **how)
    entry = audit.sources[0]
    assert (entry.rows, entry.kept, entry.refused) == (5, 2, {})
    assert {name: reason.count for name, reason in entry.dropped.items()} == {"not_ranked": 2, "superseded": 1}
    assert entry.dropped["not_ranked"].examples[0].startswith(f"{path}:2: not_ranked: ")
    audit.check(Thresholds(max_bad_fraction=0.0))
