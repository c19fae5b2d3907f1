"""Rows out of graded questions: decisions, the cap on refusals, what is held out, and general data beside them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ptl.data.records import parse_row
from ptl.data.sources import Source, detect_format
from ptl.rewards.refusals import refuses
from ptl.synth.asking import LeftOut
from ptl.synth.idk import key_of
from ptl.synth.idk_rows import Choice, decide, make_rows, messages_of, mix_count, mixed_rows, own_answer
from ptl.types import Conversation, Origin


def sample(text="It is x.", right=True, **changes: Any) -> dict[str, Any]:
    row = {"text": text, "right": right, "rule": "contained" if right else None, "refused": False, "finished": True}
    return row | {"sample": 0, "tokens": len(text), "logprob": -1.0} | changes


def graded(number: int, k: int, n: int = 3, *, text: str | None = None, source: str = "s", **changes: Any):
    samples = [sample(f"It is {number}.", right=i < k, sample=i) for i in range(n)]
    prompt = [{"role": "user", "content": text or f"What is thing number {number}?"}]
    row = {"prompt": prompt, "answers": [str(number)], "source": source, "k": k, "n": n, "samples": samples}
    row |= {"temperature": 0.7, "top_p": 1.0, "seed": 0, "number": number, "model": "m@0", "origin": f"f:{number + 1}"}
    return row | changes


ALL = Choice(held_out=0.0, max_refusals=1.0)


@pytest.mark.parametrize(
    ("k", "n", "bounds", "decision"),
    [
        (3, 3, {}, "known"),
        (2, 3, {}, "between"),
        (1, 3, {}, "between"),
        (0, 3, {}, "unknown"),
        (2, 3, {"known": 2 / 3}, "known"),
        (2, 3, {"known": 0.67}, "between"),
        (1, 3, {"unknown": 1 / 3}, "unknown"),
        (9, 10, {"known": 0.9, "unknown": 0.3}, "known"),
        (3, 10, {"known": 0.9, "unknown": 0.3}, "unknown"),
        (1, 1, {}, "known"),
        (0, 1, {}, "unknown"),
    ],
)
def test_decide(k, n, bounds, decision):
    assert decide(k, n, Choice(**bounds)) == decision


def test_the_models_own_shortest_finished_right_answer_is_taught():
    samples = [
        sample("wrong", right=False),
        sample("It is surely x, as everybody knows."),
        sample("x", finished=False),
        sample("It is x.", logprob=-2.0, sample=3),
        sample("So is x.", logprob=-1.0, sample=4),
    ]
    assert own_answer(samples) == samples[4]
    assert own_answer(samples[:1]) is None and own_answer(samples[2:3]) is None and own_answer([]) is None


def test_a_row_for_what_is_known_one_for_what_is_not_and_none_between():
    rows = [graded(0, 3), graded(1, 0), graded(2, 2), graded(3, 0, text="Qui est la personne numéro 3 ?")]
    made = make_rows(rows, ALL)
    assert made.train[0]["messages"][-1]["content"] == "It is 0."
    assert [refuses(row["messages"][-1]["content"]) for row in made.train] == [False, True, True]
    assert made.train[0]["meta"] == {
        **{"k": 3, "n": 3, "source": "s", "origin": "f:1", "number": 0, "temperature": 0.7, "top_p": 1.0, "seed": 0},
        **{"model": "m@0", "decision": "known", "answer": "answer", "language": "en"},
    }
    assert [row["meta"]["language"] for row in made.train] == ["en", "en", "fr"]
    assert (
        made.counts == {"s": Counter(known=1, unknown=2, between=1, answer=1, refusal=2, dropped=1)}
        and made.held_out == []
    )
    source = Source(path="x")
    assert detect_format(source, made.train) == "messages"
    for row in made.train:
        record = parse_row(row, "messages", source, Origin("x", 1))
        assert isinstance(record, Conversation) and record.messages[-1].role == "assistant"


def test_between_may_be_hedged_and_the_language_given():
    made = make_rows([graded(0, 2), graded(1, 0)], Choice(held_out=0, max_refusals=1, between="hedge", language="fr"))
    hedged, refused = (row["messages"][-1]["content"] for row in made.train)
    assert hedged.endswith("It is 0.") and len(hedged) > 20 and not refuses(hedged)
    assert made.train[0]["meta"]["answer"] == "hedge" and made.train[1]["meta"]["language"] == "fr"
    assert refuses(refused) and ("je " in refused.lower() or "j'" in refused.lower() or "l'ignore" in refused)


def test_earlier_answers_of_a_chat_are_not_trained_and_tools_stay():
    prompt = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who?"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = make_rows([graded(0, 0, prompt=prompt, tools=tools)], ALL).train[0]
    record = parse_row(row, "messages", Source(path="x"), Origin("x", 1))
    assert isinstance(record, Conversation) and [message.train for message in record.messages] == [
        None,
        0.0,
        None,
        None,
    ]
    assert row["tools"] == tools


@pytest.mark.parametrize(("most", "refusals"), [(0.0, 0), (0.25, 3), (0.5, 10), (0.75, 30), (1.0, 90)])
def test_the_share_of_refusals_is_capped(most, refusals):
    rows = [graded(i, 3 if i < 10 else 0) for i in range(100)]
    made = make_rows(rows, Choice(held_out=0, max_refusals=most))
    kinds = Counter(row["meta"]["answer"] for row in made.train)
    assert kinds["answer"] == 10 and kinds["refusal"] == refusals
    assert made.counts["s"]["capped"] == 90 - refusals and made.counts["s"]["unknown"] == 90
    numbers = [row["meta"]["number"] for row in made.train]
    assert numbers == sorted(numbers)


def test_which_refusals_stay_depends_on_the_questions_and_not_on_their_order():
    rows = [graded(i, 3 if i < 10 else 0) for i in range(100)]
    choice = Choice(held_out=0, max_refusals=0.5)
    there, back = ({row["meta"]["number"] for row in make_rows(order, choice).train} for order in (rows, rows[::-1]))
    assert there == back


def test_a_known_question_without_a_finished_answer_is_counted():
    row = graded(0, 3)
    for each in row["samples"]:
        each["finished"] = False
    made = make_rows([row], ALL)
    assert made.train == [] and made.counts["s"] == Counter(known=1, no_finished_answer=1)


def test_law_8_every_question_is_in_one_count():
    rows = [graded(i, i % 4, source=f"s{i % 3}") for i in range(600)]
    made = make_rows(rows, Choice(held_out=0.3, max_refusals=0.4))
    for count in made.counts.values():
        assert count["known"] + count["between"] + count["unknown"] == 200
        ends = ("held_out", "answer", "refusal", "hedge", "dropped", "capped", "no_finished_answer")
        assert sum(count[name] for name in ends) == 200
    assert len(made.train) == sum(count["answer"] + count["refusal"] for count in made.counts.values())


def test_the_same_question_written_otherwise_is_held_out_too():
    ways = ("Who wrote the Iliad {}?", "who wrote iliad {}", "WHO WROTE THE  ILIAD, {}!", "Who wrote an Iliad {}?")
    for number in range(60):
        sides = [len(make_rows([graded(0, 0, text=way.format(number))], Choice()).held_out) for way in ways]
        assert len(set(sides)) == 1
    held = sum(len(make_rows([graded(i, 0)], Choice(held_out=0.25)).held_out) for i in range(1000))
    assert 200 < held < 300


def test_held_out_rows_keep_their_grading_and_stay_where_they_are_when_rows_are_added():
    rows = [graded(i, i % 4) for i in range(100)]
    few, many = make_rows(rows[:50], Choice()), make_rows(rows, Choice(max_refusals=1.0))
    assert few.held_out == [row for row in many.held_out if row["number"] < 50]
    assert few.held_out[0].items() >= rows[few.held_out[0]["number"]].items()
    assert all(row["decision"] == decide(row["k"], row["n"], Choice()) for row in many.held_out)
    train = {key_of(messages_of({"prompt": row["messages"][:-1]})) for row in many.train}
    assert not train & {key_of(messages_of(row)) for row in many.held_out}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"known": 1.2}, "--known"),
        ({"unknown": -0.1}, "--unknown"),
        ({"known": 0.5, "unknown": 0.5}, "--known"),
        ({"max_refusals": 1.1}, "--max-refusals"),
        ({"held_out": 1.0}, "--held-out"),
        ({"mix_share": 1.0}, "--mix-share"),
        ({"mix_share": float("nan")}, "--mix-share"),
    ],
)
def test_a_bound_out_of_its_range_is_refused_by_its_option(settings, told):
    with pytest.raises(ValueError, match=told):
        Choice(**settings)


def chat(question: str, answer: str = "Yes.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_general_rows_are_mixed_in_without_those_that_are_asked(tmp_path: Path):
    held = [graded(0, 0, text="Who are you?")]
    rows: list[Any] = [chat(f"Tell me about {i}") for i in range(50)] + [chat("who are you"), {"messages": 3}]
    rows.append(chat("tell me about 7!", "yes"))
    rows.append({"messages": [*chat("Hello")["messages"], *chat("Who are you?!")["messages"]]})
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources, left_out = [Source(path=str(tmp_path / "mix.jsonl"))], LeftOut()
    made = mixed_rows(sources, 20, held, left_out)
    assert len(made) == 20 and left_out.counts == {"asked": 2, "wrong_type": 1, "duplicate": 1}
    assert {row["meta"]["answer"] for row in made} == {"mix"}
    assert len({row["messages"][0]["content"] for row in made}) == 20
    del rows[52]  # of two that are the same the first stays
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    again = mixed_rows(sources, 20, held, LeftOut())
    assert [row["messages"] for row in again] == [row["messages"] for row in made]
    assert len(mixed_rows(sources, 99, held, LeftOut())) == 50


def test_general_rows_must_be_conversations(tmp_path: Path):
    (tmp_path / "mix.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match="mix.jsonl"):
        mixed_rows([Source(path=str(tmp_path / "mix.jsonl"))], 1, [], LeftOut())


def test_mix_count():
    assert [mix_count(70, share) for share in (0.0, 0.3, 0.5)] == [0, 30, 70]
