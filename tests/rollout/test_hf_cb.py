"""Continuous batching draws from the policy of now, at the temperature asked, and leaves nothing changed behind."""

from __future__ import annotations

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from ptl.models.adapters import add_lora
from ptl.models.heads import causal_lm
from ptl.models.spec import LoRA
from ptl.rollout.engine import Asked, Draws
from ptl.rollout.hf_cb import HFContinuous
from tests import tiny
from tests.ranks import run_ranks

VOCAB = 24
PROMPTS = [[5, 6, 7], [9], list(range(4, 23)) * 4, [8, 9]]
PLAIN = Draws(samples=3, temperature=1.0, top_p=1.0, stop=(0, 1), seed=3)


class OneProcess:
    """What a session asks of a strategy: its module, which nothing has partitioned."""

    def __init__(self, model):
        self.model = model


def make(**kwargs):
    model = tiny.make_model(VOCAB, tie=False, seed=3, initializer_range=0.3, **kwargs)
    model.set_attn_implementation("ptl_packed")
    return model.train()


def asked(prompts=PROMPTS, limits=(6, 9, 3, 12)):
    return [Asked(ids, number, limit) for number, (ids, limit) in enumerate(zip(prompts, limits))]


def drawn(engine, model, questions, draws, version=0):
    with engine.session(model, OneProcess(model), version) as draw:
        return draw(questions, draws)


def plain_logprobs(model, prompt, ids, temperature):
    """Of each id of an answer, by a forward of its own."""
    lm = causal_lm(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([list(prompt) + list(ids)])).logits[0].float() / temperature
    for module, mode in training.items():
        module.training = mode
    logp = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logp.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


def check_logprobs(model, questions, answers, temperature):
    for question, group in zip(questions, answers, strict=True):
        for answer in group:
            assert answer.logprobs == pytest.approx(
                plain_logprobs(model, question.ids, answer.ids, temperature), abs=1e-5
            )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7, 0.0])
def test_trap_grpo_3_logprobs_are_at_the_temperature(temperature):
    model, questions = make(), asked()
    answers = drawn(HFContinuous(), model, questions, PLAIN._replace(temperature=temperature))
    assert [len(group) for group in answers] == [3] * 4
    check_logprobs(model, questions, answers, temperature or 1.0)


def test_answers_end_at_a_stop_id_or_at_their_own_limit_and_groups_stay_together():
    model, questions = make(), asked()
    answers = drawn(HFContinuous(), model, questions, PLAIN._replace(samples=16, stop=(0, 1, 2)))
    ended = set()
    for question, group in zip(questions, answers, strict=True):
        assert len(group) == 16
        for answer in group:
            assert len(answer.ids) == len(answer.logprobs) <= question.limit
            assert not {0, 1, 2} & set(answer.ids[:-1])
            ended.add(answer.ids[-1] in (0, 1, 2))
            assert len(answer.ids) == question.limit or answer.ids[-1] in (0, 1, 2)
    assert ended == {True, False}
    check_logprobs(model, questions, answers, 1.0)


def test_without_a_stop_id_the_models_own_end_ends_nothing():
    model = make(eos_token_id=5)
    model.generation_config.eos_token_id = 5
    answers = drawn(HFContinuous(), model, asked(), PLAIN._replace(stop=(), samples=8))
    assert all(len(a.ids) == q.limit for q, group in zip(asked(), answers) for a in group)
    assert any(5 in a.ids[:-1] for group in answers for a in group)


@pytest.mark.parametrize("adapted", [False, True])
def test_trap_grpo_5_a_session_after_an_update_has_the_weights_of_now(adapted):
    model = make()
    if adapted:
        model = add_lora(model, LoRA(rank=4, dropout=0.3)).train()
    engine, questions = HFContinuous(), asked()
    check_logprobs(model, questions, drawn(engine, model, questions, PLAIN), 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    check_logprobs(model, questions, drawn(engine, model, questions, PLAIN, version=1), 1.0)


@pytest.mark.parametrize("fails", [False, True])
def test_trap_grpo_7_modes_attention_and_generators_are_as_before(fails):
    model = add_lora(make(), LoRA(rank=2, dropout=0.3)).train()
    frozen = causal_lm(model).model.layers[0]
    frozen.eval()
    modes = [module.training for module in model.modules()]
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    expected = pytest.raises(KeyError) if fails else nullcontext()
    with expected, HFContinuous().session(model, OneProcess(model), 0) as draw:
        draw(asked(), PLAIN)
        assert not any(module.training for module in model.modules())
        if fails:
            raise KeyError("in the body")
    assert [module.training for module in model.modules()] == modes
    assert causal_lm(model).config._attn_implementation == "ptl_packed"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_trap_grpo_15_another_seed_or_prompt_number_draws_other_answers():
    model, engine, questions = make(), HFContinuous(), asked([[5, 6, 7]] * 4, [12] * 4)
    first = drawn(engine, model, questions, PLAIN)
    flat = [tuple(answer.ids) for group in first for answer in group]
    assert len(set(flat)) > 8
    assert drawn(engine, model, questions, PLAIN._replace(seed=4)) != first
    assert drawn(engine, model, [q._replace(number=q.number + 4) for q in questions], PLAIN) != first


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6)])
def test_trap_grpo_2_no_setting_of_the_model_changes_what_is_drawn(temperature, top_p):
    model, many = make(), 1500
    poison = dict(do_sample=True, top_k=1, repetition_penalty=5.0, min_p=0.9, no_repeat_ngram_size=1, temperature=0.01)
    for name, value in {**poison, "suppress_tokens": [3, 4, 5], "bad_words_ids": [[6]], "max_new_tokens": 1}.items():
        setattr(model.generation_config, name, value)
    draws = PLAIN._replace(samples=many, temperature=temperature, top_p=top_p, stop=())
    (answers,) = drawn(HFContinuous(), model, asked([[5, 6, 7]], [1]), draws)
    model.eval()
    with torch.no_grad():
        p = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double() / temperature, -1)
    ranked, order = p.sort(descending=True)
    p[order[ranked.cumsum(0) - ranked >= top_p]] = 0
    p = p / p.sum()
    counts = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=VOCAB).double()
    assert not counts[p == 0].any()
    seen = p > 0
    chi_squared = ((counts - many * p).square()[seen] / (many * p)[seen]).sum().item()
    assert seen.sum() > 2 and chi_squared < 60  # 23 degrees of freedom: beyond it once in 20,000
    assert all(bool(a.logprobs) == (top_p == 1) for a in answers)


def test_no_prompt_is_no_answer_and_too_small_a_cache_is_an_error():
    model = make()
    assert drawn(HFContinuous(), model, [], PLAIN) == []
    with pytest.raises(RuntimeError, match=r"cache_tokens"):
        drawn(HFContinuous(cache_tokens=32), model, asked([[5] * 60], [40]), PLAIN)
    assert causal_lm(model).config._attn_implementation == "ptl_packed" and model.training


def test_many_more_answers_than_the_cache_holds_come_one_after_another():
    model, questions = make(), asked([[5, 6, 7, 8]] * 6, [40] * 6)
    answers = drawn(HFContinuous(cache_tokens=320, batch_tokens=16), model, questions, PLAIN._replace(stop=()))
    assert [[len(a.ids) for a in group] for group in answers] == [[40] * 3] * 6
    check_logprobs(model, questions, answers, 1.0)


def test_attention_scores_that_sdpa_would_not_cap_are_refused():
    model = make()
    model.config.attn_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"model\.engine to ptl\.rollout\.hf\.HF"):
        drawn(HFContinuous(), model, asked(), PLAIN)
    with pytest.raises(ValueError, match=r"model\.engine\.cache_tokens must be 1 or more, got 0"):
        HFContinuous(cache_tokens=0)


def test_law_7_under_zero_3_ranks_draw_as_often_as_they_like_and_files_hold_the_whole_weights(tmp_path):
    folder = tiny.save_folder(tmp_path / "model", tiny.make_tokenizer())
    args = {"folder": str(folder), "out": str(tmp_path / "out")}
    results = run_ranks("tests.rollout.zero3:engines", world_size=2, args=args, timeout=240)
    for result in results:
        for case in result.values():
            assert case["cut"] > 0, "nothing was in shards"
            assert case["losses"] == pytest.approx(case["alone"], rel=1e-6) and len(case["losses"]) == 3
            assert 0 < case["worst"] < 1e-5
