"""Truncation: every policy around ``max_length``, with tool turns and with history that is rewritten."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ptl.data.render import Renderer, RenderError, RenderPolicy, TooLong
from ptl.data.truncation import exchanges
from ptl.types import Conversation
from tests.data.chat_cases import CALL, ORIGIN, TOOLS, chat, make, published, say, talk, trained


@pytest.fixture(scope="module")
def renderer():
    return Renderer(make(None, special=("<|im_start|>", "<|im_sep|>", "<|im_end|>")), "chatml")


def texts(documents, renderer) -> list[list[str]]:
    return [trained(document, renderer.tokenizer) for document in documents]


LONG = chat("hello", "hello world", "fox", "the quick brown fox")


@pytest.mark.parametrize("truncation", ["drop", "error", "keep_start", "drop_oldest_turns"])
def test_trap_sft_8_what_fits_is_left_alone(renderer, truncation):
    (whole,) = renderer.render(LONG)
    for room in (0, 1, 1000):
        (document,) = renderer.fit(LONG, len(whole.ids) + room, truncation)
        assert document.ids.tolist() == whole.ids.tolist()
        assert document.loss_mask.tolist() == whole.loss_mask.tolist()
        assert not document.truncated and not document.lost_end


@pytest.mark.parametrize("truncation", ["drop", "error"])
def test_trap_sft_8_drop_and_error_refuse_one_token_too_many(renderer, truncation):
    (whole,) = renderer.render(LONG)
    with pytest.raises(TooLong) as refusal:
        renderer.fit(LONG, len(whole.ids) - 1, truncation)
    assert refusal.value.reason == "too_long"
    assert f"{len(whole.ids)} tokens, more than max_length {len(whole.ids) - 1}" in refusal.value.detail


def test_trap_sft_8_keep_start_never_trains_the_end_of_a_cut_answer(renderer):
    """At every length: what is kept is a prefix, and the end is trained only where all of the answer is."""
    (whole,) = renderer.render(LONG)
    end = renderer.tokenizer.eos_token_id
    full = [t for t in range(len(whole.ids)) if whole.loss_mask[t] and whole.ids[t] == end]
    assert len(full) == 2
    first = next(t for t in range(len(whole.ids)) if whole.loss_mask[t])
    for length in range(1, len(whole.ids)):
        if length <= first:
            with pytest.raises(TooLong, match=f"nothing_left: no trained token left after truncation to {length}"):
                renderer.fit(LONG, length, "keep_start")
            continue
        (document,) = renderer.fit(LONG, length, "keep_start")
        assert len(document.ids) == length and document.truncated
        assert document.ids.tolist() == whole.ids[:length].tolist()
        assert document.loss_mask.tolist() == whole.loss_mask[:length].tolist()
        ends = [t for t in range(length) if document.loss_mask[t] and document.ids[t] == end]
        assert ends == [t for t in full if t < length]
        inside_second = whole.loss_mask[length - 1] > 0 and length - 1 not in full
        assert document.lost_end == inside_second
    (document,) = renderer.fit(LONG, len(whole.ids) - 1, "keep_start")  # only the line feed after the end is cut
    assert document.truncated and not document.lost_end


def test_trap_sft_8_drop_oldest_turns_keeps_the_system_prompt_and_whole_exchanges(renderer):
    system = say("system", "be kind")
    turns = [say(role, f"{role} {i}") for i in range(5) for role in ("user", "assistant")]
    conversation = talk(system, *turns)
    (whole,) = renderer.render(conversation)
    seen = set()
    for length in range(1, len(whole.ids)):
        try:
            (document,) = renderer.fit(conversation, length, "drop_oldest_turns")
        except TooLong as error:
            assert error.reason == "too_long" and "only the last exchange is kept" in error.detail
            assert length < len(renderer.render(talk(system, *turns[8:]))[0].ids)
            continue
        assert document.truncated and not document.lost_end and len(document.ids) <= length
        kept = len(trained(document, renderer.tokenizer))
        seen.add(kept)
        assert document.ids.tolist() == renderer.render(talk(system, *turns[10 - 2 * kept :]))[0].ids.tolist()
        if kept < 4:  # one exchange more would not fit
            more = renderer.render(talk(system, *turns[10 - 2 * (kept + 1) :]))[0]
            assert len(more.ids) > length
    assert seen == {1, 2, 3, 4}


def test_drop_oldest_turns_keeps_calls_with_their_results(renderer):
    answered = (say("assistant", tool_calls=(CALL,)), say("tool", "sun"), say("assistant", "It is sunny."))
    messages = (
        say("system", "s"),
        say("developer", "d"),
        say("user", "a"),
        *answered,
        say("user", "b"),
        say("user", "c"),
        *answered,
    )
    assert exchanges(messages) == (2, [2, 6])
    assert exchanges((say("assistant", "hi"), say("user", "a"), say("assistant", "b"))) == (0, [0, 1])
    assert exchanges((say("system", "s"),)) == (1, [])
    conversation = talk(*messages, tools=TOOLS)
    (whole,) = renderer.render(conversation)
    (document,) = renderer.fit(conversation, len(whole.ids) - 1, "drop_oldest_turns")
    assert document.ids.tolist() == renderer.render(talk(*messages[:2], *messages[6:], tools=TOOLS))[0].ids.tolist()


def test_drop_oldest_turns_that_leaves_nothing_trained(renderer):
    conversation = talk(say("user", "a"), say("assistant", "world"), say("user", "b"), say("assistant", "dog", train=0))
    (whole,) = renderer.render(conversation)
    with pytest.raises(TooLong, match="nothing_left"):
        renderer.fit(conversation, len(whole.ids) - 1, "drop_oldest_turns")


def test_documents_of_a_rewritten_history_fit_each():
    tokenizer = published("qwen3", bos=None, eos="<|im_end|>")
    renderer = Renderer(tokenizer, policy=RenderPolicy(history="inference"))
    conversation = chat("hello", "world", "fox " * 30, "the quick brown fox")
    one, two = renderer.render(conversation)
    length = len(one.ids)
    assert len(two.ids) > length
    (kept,) = renderer.fit(conversation, length, "keep_start")
    assert kept.ids.tolist() == one.ids.tolist() and kept.truncated and not kept.lost_end
    with pytest.raises(TooLong):
        renderer.fit(conversation, length, "drop")
    (kept,) = renderer.fit(conversation, len(two.ids) - 1, "drop_oldest_turns")
    assert texts([kept], renderer) == [["<think>\n\n</think>\n\nthe quick brown fox<|im_end|>"]]
    assert "world" not in tokenizer.decode(kept.ids) and kept.truncated


def test_plain_text_is_cut_but_has_no_turns_to_drop(renderer):
    text = Conversation(text="hello world the quick brown fox", origin=ORIGIN)
    (whole,) = renderer.render(text)
    (document,) = renderer.fit(text, len(whole.ids) - 1, "keep_start")
    assert document.lost_end and document.truncated and document.loss_mask[1:].all()
    with pytest.raises(TooLong):
        renderer.fit(text, len(whole.ids) - 1, "drop_oldest_turns")


def test_other_refusals_and_bad_lengths_pass_through(renderer):
    with pytest.raises(RenderError, match="nothing_trained"):
        renderer.fit(talk(say("user", "a")), 5, "drop")
    with pytest.raises(ValueError, match="max_length: got 0; expected at least 1"):
        renderer.fit(LONG, 0, "drop")


def test_plain_text_is_split_into_windows_of_which_nothing_is_lost(renderer):
    """Every token but the first is predicted once, in its order, at every length of a window."""
    text = Conversation(text="hello world, the quick brown fox jumps over the lazy dog", origin=ORIGIN)
    (whole,) = renderer.render(text)
    count = len(whole.ids)
    for length in range(2, count + 2):
        windows = renderer.fit(text, length, "split")
        predicted = [int(i) for w in windows for i, weight in zip(w.ids, w.loss_mask) if weight]
        assert predicted == whole.ids[1:].tolist()
        assert all(2 <= len(w.ids) <= length and w.loss_mask[0] == 0 for w in windows)
        assert all(one.ids[-1] == other.ids[0] for one, other in pairwise(windows))
        assert not any(w.truncated or w.lost_end for w in windows)
        assert len(windows) == -(-(count - 1) // (length - 1))
    assert whole.loss_mask.tolist() == [0.0] + [1.0] * (count - 1)


def test_a_conversation_is_not_split(renderer):
    with pytest.raises(TooLong, match="too_long"):
        renderer.fit(LONG, 8, "split")
