"""A judge: what it is asked, which tokens answer, and that its neighbours in a batch change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from ptl.data.render import Renderer
from ptl.synth.judge import MOST, Case, Judge
from ptl.types import Message
from tests import tiny


@pytest.fixture(scope="module")
def renderer():
    return Renderer(tiny.make_tokenizer())


@pytest.fixture(scope="module")
def judge(renderer):
    return Judge(tiny.make_model(seed=3, initializer_range=0.5).eval(), renderer)


CASES = [Case("Who?", ("Ann", "Ann B."), "It was " + "very " * (i % 7) + f"{i}.") for i in range(MOST + 5)]


def test_the_margin_is_that_of_the_next_token_after_the_prompt(judge, renderer):
    case = CASES[3]
    text = (
        "Question: Who?\nAccepted answers: Ann; Ann B.\nGiven answer: It was very very very 3.\n\n"
        "Does the given answer say the same as one of the accepted answers? Answer with one word, yes or no."
    )
    ids = renderer.prompt([Message(role="user", content=text)])
    with torch.no_grad():
        p = judge.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    wanted = math.log(p[judge.yes].sum()) - math.log(p[judge.no].sum())
    assert judge.margins([case]) == pytest.approx([wanted], abs=1e-4)


def test_yes_and_no_have_tokens_of_their_own(judge, renderer):
    first = {word: renderer.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no", "Yes", "No")}
    assert {first["yes"], first["Yes"]} <= set(judge.yes) and {first["no"], first["No"]} <= set(judge.no)
    assert not set(judge.yes) & set(judge.no)


def test_the_batch_of_a_case_does_not_matter(judge):
    together = judge.margins(CASES)
    assert together == pytest.approx([judge.margins([case])[0] for case in CASES], abs=1e-4)
    assert len({round(margin, 3) for margin in together}) > 3
    assert judge.margins([]) == []


def test_braces_in_what_is_judged_are_text(judge):
    assert math.isfinite(judge.margins([Case("{question} {0}", ("{",), "}{")])[0])


def test_a_damaged_judge_is_refused(renderer):
    model = tiny.make_model().eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="--judge: .* not finite"):
        Judge(model, renderer).margins(CASES[:1])


def test_a_tokenizer_that_cannot_tell_yes_from_no_is_refused(renderer, monkeypatch):
    monkeypatch.setattr("ptl.synth.judge.NO", ("Yes", "yes"))
    monkeypatch.setattr("ptl.synth.judge.YES", ("Yes",))
    with pytest.raises(ValueError, match="tells yes from no"):
        Judge(tiny.make_model().eval(), renderer)
