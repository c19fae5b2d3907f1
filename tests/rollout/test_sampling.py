"""Several answers to a prompt: drawn as one forward a token draws them, scored as a plain forward scores them."""

from __future__ import annotations

import itertools

import pytest
import torch

from ptl.rollout.sampling import generate, nucleus, sample, uniforms
from tests import tiny

VOCAB = 300
"""Fewer than the model's table has rows."""
PROMPTS = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35], [8, 9]]
NUMBERS = [11, 4, 7, 90]
HOW = {"vocab": VOCAB, "temperature": 0.8, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return tiny.make_model(410, tie=False, seed=3, initializer_range=0.3).eval()


def log_probabilities(model, ids, vocab=VOCAB):
    """Of what follows ``ids``, float32 [vocab], by a forward of its own without a cache."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1, :vocab].float(), -1)


def likeliest(p, top_p):
    """The probabilities with all but the likeliest ids at 0, id after id until the bound is reached."""
    total, kept = 0.0, [0.0] * len(p)
    for index in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if total >= top_p:
            break
        kept[index], total = p[index], total + p[index]
    return kept


def drawn_slowly(model, prompt, number, place, *, stop, limit, vocab, temperature, top_p, seed):
    """One answer and its log-probabilities, token by token: no batch, no cache, no tensor in the draw."""
    ids, logprobs = list(prompt), []
    for u in uniforms(seed, number, limit, 1, place)[:, 0].tolist():
        plain = log_probabilities(model, ids, vocab)
        p = torch.log_softmax(plain / temperature, -1).double().exp().tolist()
        kept = likeliest(p, top_p)
        chosen = next(i for i, below in enumerate(itertools.accumulate(kept)) if below > u * sum(kept))
        ids.append(chosen)
        logprobs.append(float(plain[chosen]))
        if chosen in stop:
            break
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9), (1.5, 0.3)])
def test_answers_and_their_scores_are_those_of_one_forward_a_token(model, temperature, top_p):
    how = {**HOW, "temperature": temperature, "top_p": top_p}
    limits, common = [7, 3, 9, 1], range(0, VOCAB, 9)  # ends that come at every step, and limits before them
    got = sample(model, PROMPTS, NUMBERS, samples=3, stop=common, limits=limits, **how)
    lengths = set()
    for prompt, number, limit, answers in zip(PROMPTS, NUMBERS, limits, got, strict=True):
        assert len(answers) == 3
        for place, answer in enumerate(answers):
            ids, logprobs = drawn_slowly(model, prompt, number, place, stop=common, limit=limit, **how)
            assert answer.ids == ids
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
            lengths.add(len(ids))
    assert len(lengths) > 3


def test_the_likeliest_id_has_scores_too(model):
    got = sample(model, PROMPTS, NUMBERS, samples=2, stop=[0], limits=[5] * 4, **{**HOW, "temperature": 0.0})
    for prompt, (one, other) in zip(PROMPTS, got):
        assert one == other and one.ids[0] == int(log_probabilities(model, prompt).argmax())
        assert one.logprobs[0] == pytest.approx(float(log_probabilities(model, prompt).max()), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_answer_is_what_generate_gives(model, temperature):
    how = {"stop": range(0, VOCAB, 9), "limits": [8] * 4, "vocab": VOCAB, "temperature": temperature, "seed": 3}
    alone = generate(model, PROMPTS, NUMBERS, **how)
    for samples in (1, 4):
        got = sample(model, PROMPTS, NUMBERS, samples=samples, top_p=1.0, **how)
        assert [answers[0].ids for answers in got] == alone


def test_draws_depend_on_seed_number_and_place_alone(model):
    how = {"stop": [0], "limits": [8]}
    together = sample(model, PROMPTS, NUMBERS, samples=4, stop=[0], limits=[8] * 4, **HOW)
    for prompt, number, answers in zip(PROMPTS, NUMBERS, together):
        alone = sample(model, [prompt], [number], samples=2, **how, **HOW)[0]
        assert [answer.ids for answer in alone] == [answer.ids for answer in answers[:2]]
    ids = [tuple(answer.ids) for answer in together[0]]
    assert len(set(ids)) == 4
    for changed in ({"seed": 4}, {"number": 12}):
        number = changed.pop("number", NUMBERS[0])
        other = sample(model, PROMPTS[:1], [number], samples=4, **how, **{**HOW, **changed})[0]
        assert not set(ids) & {tuple(answer.ids) for answer in other}


def test_a_prompt_is_read_once_whatever_the_number_of_answers(model):
    shapes = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    got = sample(model, PROMPTS, NUMBERS, samples=5, stop=range(0, VOCAB, 9), limits=[6] * 4, **HOW)
    hook.remove()
    lengths = [len(answer.ids) for answers in got for answer in answers]
    assert len(lengths) == 20 and min(lengths) < max(lengths)
    assert shapes[0] == (4, 6)
    assert shapes[1:] == [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_answers_follow_the_enumerated_distribution(model, temperature, top_p):
    """All answers of at most two ids out of five, the last of which ends: 21 of them."""
    vocab, n, prompt = 5, 6000, [5, 6, 7]

    def shares(ids):
        return likeliest(torch.softmax(log_probabilities(model, ids, vocab).double() / temperature, -1).tolist(), top_p)

    expected = {}
    for first, second in itertools.product(range(vocab), repeat=2):
        p, q = shares(prompt), shares([*prompt, first])
        if first == vocab - 1:
            expected[(first,)] = p[first] / sum(p)
        else:
            expected[first, second] = p[first] / sum(p) * q[second] / sum(q)
    how = {"vocab": vocab, "temperature": temperature, "top_p": top_p, "seed": 0}
    got = sample(model, [prompt], [1], samples=n, stop=[vocab - 1], limits=[2], **how)[0]
    counts = {answer: sum(tuple(each.ids) == answer for each in got) for answer in expected}
    assert sum(counts.values()) == n and sum(expected.values()) == pytest.approx(1)
    assert sum(p > 0.01 for p in expected.values()) > 3
    for answer, p in expected.items():
        assert abs(counts[answer] / n - p) <= 4.5 * (p * (1 - p) / n) ** 0.5
        assert p > 0 or counts[answer] == 0


@pytest.mark.parametrize("top_p", [0.1, 0.24, 0.26, 0.49, 0.51, 0.74, 0.76, 0.999, 1.0])
def test_the_nucleus_is_the_smallest_set_that_reaches_the_bound(top_p):
    p = torch.tensor([[0.25, 0.5, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    got = nucleus(p.log(), top_p).exp()
    assert got.tolist() == [likeliest(row, top_p) for row in p.tolist()]
    assert nucleus(p.log(), 1e-9).exp().gt(0).sum(-1).tolist() == [1, 1, 1]


def test_streams_are_apart_and_the_first_is_the_one_without_a_name():
    assert torch.equal(uniforms(1, 5, 3, 4), uniforms(1, 5, 3, 4, 0))
    drawn = torch.stack(
        [uniforms(seed, row, 50, 1, stream)[:, 0] for seed in (0, 1) for row in (0, 1) for stream in range(3)]
    )
    assert len(drawn.flatten().unique()) == drawn.numel()


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_of_a_damaged_model_ids_come_that_exist_and_scores_that_are_no_numbers(temperature):
    broken = tiny.make_model(410, tie=False).eval()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    how = {**HOW, "temperature": temperature, "top_p": 1.0}
    for answers in sample(broken, PROMPTS, NUMBERS, samples=2, stop=[], limits=[3] * 4, **how):
        for answer in answers:
            assert all(0 <= token < VOCAB for token in answer.ids)
            assert all(score != score for score in answer.logprobs)
