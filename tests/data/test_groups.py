"""Rankings as documents and batches: nothing lost, nothing seen that should not be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptl.data.groups import RankingView, shared_prefix
from ptl.data.render import Renderer, RenderError, RenderPolicy
from ptl.types import Message, Origin, Ranking

ORIGIN = Origin("rows.jsonl", 1)
QWEN3_LIKE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def message(role, text, **more):
    return Message(role=role, content=text, **more)


def ranking(prompt, *answers, ranks=None, scores=None, **more):
    return Ranking(
        prompt=tuple(prompt),
        completions=tuple((message("assistant", a),) if isinstance(a, str) else tuple(a) for a in answers),
        ranks=tuple(ranks or range(1, len(answers) + 1)),
        scores=scores,
        origin=ORIGIN,
        **more,
    )


QUESTION = [message("user", "What is 2+2?")]
RECORDS = [
    ranking(QUESTION, "The answer is 4.", "The lazy dog", "4"),
    ranking(
        [message("system", "hello"), *QUESTION, message("assistant", "4"), message("user", "dog?")], "fox", "fox a"
    ),
    ranking(
        [message("user", "Où est Shanghai ?")],
        "En Chine.",
        "hello",
        "quick brown",
        "I do not know.",
        ranks=[1, 3, 2, 2],
    ),
]


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def encoded(renderer, records=None, view=None, max_length=256, truncation="error"):
    made = (view or RankingView()).encode(records or RECORDS, renderer, max_length, truncation)
    return [one if isinstance(one, RenderError) else {**one[0], "source": 0, "row": i} for i, one in enumerate(made)]


def documents(tokenizer, record):
    """Each answer with its prompt as the template itself prints and tokenises them."""
    prompt = [m.as_dict() for m in record.prompt]
    return [
        tokenizer.apply_chat_template([*prompt, *(m.as_dict() for m in answer)], tokenize=True, return_dict=False)
        for answer in record.completions
    ]


def test_law_2_each_answer_is_stored_as_the_template_prints_it(renderer, tokenizer):
    for record, example in zip(RECORDS, encoded(renderer)):
        prefix, at, rebuilt = example["prefix"], example["prefix"], []
        for suffix in example["suffixes"]:
            rebuilt.append([*example["ids"][:prefix], *example["ids"][at : at + suffix]])
            at += suffix
        assert rebuilt == documents(tokenizer, record)
        assert prefix > 0 and at == len(example["ids"])
        assert example["length"] == sum(map(len, rebuilt)) and example["weight"] == 1.0


@pytest.mark.parametrize("layout, share", [("packed", True), ("packed", False), ("padded", True)])
def test_law_2_trained_tokens_are_the_answers_words_and_end(renderer, tokenizer, layout, share):
    batch = RankingView(share_prompt=share).collate(encoded(renderer), layout=layout, pad_id=0, window_weight=3.0)
    ids = batch.tokens.input_ids.flatten()
    answers = [answer[0].content for record in RECORDS for answer in record.completions]
    for number, answer in enumerate(answers):
        own = batch.owners == number
        assert tokenizer.decode(batch.targets[own]) == answer + "<|im_end|>"
        before, after = batch.predicted_from[own], batch.targets[own]
        # The state that predicts the first word is the prompt's last token; each other one is the word before.
        assert tokenizer.decode(ids[before[:1]]) == "\n"
        assert ids[before[1:]].tolist() == after[:-1].tolist()
    assert batch.lengths.tolist() == [n for example in encoded(renderer) for n in example["suffixes"].tolist()]
    assert float(batch.window_weight) == 3.0


@pytest.mark.parametrize("layout, share", [("packed", True), ("packed", False), ("padded", True)])
def test_trap_rm_kd_1_the_last_token_is_found_by_length_not_by_padding_id(renderer, tokenizer, layout, share):
    view = RankingView(share_prompt=share)
    newline = documents(tokenizer, RECORDS[0])[0][-1]
    for pad in (0, tokenizer.eos_token_id, newline):
        batch = view.collate(encoded(renderer), layout=layout, pad_id=pad, window_weight=3.0)
        assert batch.tokens.input_ids.flatten()[batch.last].tolist() == [newline] * 9
        positions = batch.tokens.position_ids.flatten()[batch.last].tolist()
        assert positions == [len(ids) - 1 for record in RECORDS for ids in documents(tokenizer, record)]


def test_a_shared_prompt_is_computed_once(renderer, tokenizer):
    examples = encoded(renderer)
    shared = RankingView().collate(examples, layout="packed", pad_id=0, window_weight=1.0)
    whole = RankingView(share_prompt=False).collate(examples, layout="packed", pad_id=0, window_weight=1.0)
    saved = sum(example["prefix"] * (len(example["suffixes"]) - 1) for example in examples)
    assert whole.tokens.input_ids.numel() - shared.tokens.input_ids.numel() == saved > 0
    assert whole.parents is None and shared.parents.tolist() == [-1, 0, 0, 0, -1, 4, 4, -1, 7, 7, 7, 7]
    assert shared.groups.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_the_shared_prefix_stops_before_the_first_trained_word(renderer):
    example = encoded(renderer, [ranking(QUESTION, "The answer is 4.", "The answer is 5.")])[0]
    prompt = renderer.prompt(QUESTION)
    assert example["prefix"] == len(prompt)
    batch = RankingView().collate([example], layout="packed", pad_id=0, window_weight=1.0)
    # All but the line feed after the end of the turn is trained.
    assert batch.owners.bincount().tolist() == [n - 1 for n in example["suffixes"].tolist()]


def test_answers_that_share_nothing_are_whole_documents(renderer):
    first, second = (renderer.render_batch([c])[0][0] for c in _whole(RECORDS[0])[:2])
    other = type(second)(np.concatenate([[7], second.ids]).astype(np.int32), np.concatenate([[0], second.loss_mask]))
    assert shared_prefix([first, other]) == 0


def _whole(record):
    from ptl.data.groups import _conversations

    return _conversations(record)


def test_a_place_holder_has_no_weight_and_no_target(renderer):
    view = RankingView()
    rows = encoded(renderer)
    rows[1] = {**view.without_weight(rows[1]), "source": 0, "row": 1}
    batch = view.collate(rows, layout="packed", pad_id=0, window_weight=2.0)
    assert batch.prompt_weights.tolist() == [1.0, 0.0, 1.0]
    assert not ((batch.owners == 3) | (batch.owners == 4)).any()


def test_partial_ranks_and_scores_are_kept(renderer):
    nan = float("nan")
    record = ranking(QUESTION, "a", "b", "c", ranks=[2, nan, 1], scores=(0.5, nan, 2.0))
    batch = RankingView().collate(encoded(renderer, [record]), layout="packed", pad_id=0, window_weight=1.0)
    assert batch.pairs.tolist() == [[2], [0]] and batch.pair_shares.tolist() == [1.0]
    assert torch.equal(batch.scores.nan_to_num(-1), torch.tensor([0.5, -1.0, 2.0]))


def test_margin_needs_scores(renderer):
    refused = encoded(renderer, view=RankingView(need_scores=True))[0]
    assert isinstance(refused, RenderError) and refused.reason == "no_scores"


def test_a_cut_answer_gets_no_end_that_it_did_not_have(renderer, tokenizer):
    """OpenRLHF writes an end into the last place of a cut text, which teaches that it is finished."""
    record = ranking(QUESTION, "the quick brown fox jumps over the lazy dog " * 4, "4")
    length = len(documents(tokenizer, record)[0])
    example = encoded(renderer, [record], max_length=length - 6, truncation="keep_start")[0]
    first = example["ids"][: example["prefix"] + example["suffixes"][0]]
    assert first.tolist() == documents(tokenizer, record)[0][: length - 6]
    assert tokenizer.eos_token_id not in first[example["prefix"] :]
    assert example["truncated"] and example["lost_end"]
    for truncation in ("drop", "error"):
        refused = encoded(renderer, [record], max_length=length - 6, truncation=truncation)[0]
        assert isinstance(refused, RenderError) and refused.reason == "too_long"


def test_oldest_turns_are_dropped_for_all_answers_alike(renderer, tokenizer):
    long = [message("user", "the quick brown fox " * 8), message("assistant", "hello"), *QUESTION]
    record = ranking([message("system", "hello"), *long], "4", "The answer is 4.")
    example = encoded(renderer, [record], max_length=60, truncation="drop_oldest_turns")[0]
    kept = ranking([message("system", "hello"), *QUESTION], "4", "The answer is 4.")
    assert example["ids"].tolist() == encoded(renderer, [kept])[0]["ids"].tolist() and example["truncated"]


def test_answers_of_several_turns_and_a_template_that_rewrites_them(tokenizer):
    turns = [
        message("assistant", "<think>dog</think>fox"), message("user", "hello"), message("assistant", "quick brown"),
    ]  # fmt: skip
    record = ranking(QUESTION, turns, "fox")
    rewriting = Renderer(tokenizer, QWEN3_LIKE)
    refused = RankingView().encode([record], rewriting, 256, "error")[0]
    assert isinstance(refused, RenderError) and refused.reason == "rewritten_history"
    single = Renderer(tokenizer, QWEN3_LIKE, RenderPolicy(history="single_pass"))
    assert not isinstance(RankingView().encode([record], single, 256, "error")[0], RenderError)
