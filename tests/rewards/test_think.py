"""The think format, and what passes for it elsewhere."""

from __future__ import annotations

import pytest

from ptl.rewards.think import ThinkFormat
from tests.rewards.parts import completion

PREFILLED = "<|im_start|>assistant\n<think>\n"
GOOD = ["<think>2 and 2 are 4</think>4", "<think>\nWell.\n</think>\n\nThe answer is 4.", " \n<think>x</think> y"]
BAD = [
    "",
    "4",
    "<think></think>",
    "<think></think>4",
    "<think> \n </think>4",
    "<think>...</think>4",
    "<think>2 and 2</think>",
    "<think>2 and 2</think>  \n",
    "<think>2 and 2",
    "2 and 2</think>4",
    "So: <think>2 and 2</think>4",
    "<think>a</think>b</think>4",
    "<think>a</think><think>b</think>4",
    "<think><think>a</think>4",
    "<think>a</think>4</think>",
    "<think>a</think>4<think>",
    "<THINK>a</THINK>4",
    "<think>a< /think>4",
]


def score(text, **where):
    return ThinkFormat().score([completion(text, **where)])[0]


@pytest.mark.parametrize("text", GOOD)
def test_one_block_and_then_text(text):
    assert score(text) == 1.0


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_not_the_form(text):
    """TRL's think_format_reward gives ``<think></think>`` and a second ``</think>`` a full reward."""
    assert score(text) == 0.0


@pytest.mark.parametrize("text", GOOD)
def test_trap_grpo_14_a_block_that_the_template_opened_counts(text):
    assert score(text.lstrip().removeprefix("<think>"), prompt_text=PREFILLED) == 1.0


@pytest.mark.parametrize("text", [*GOOD, "</think>4", " </think>4", "thought", "a</think>", "a</think>b</think>c", ""])
def test_trap_grpo_14_and_a_second_one_or_none_at_all_does_not(text):
    assert score(text, prompt_text=PREFILLED) == 0.0


def test_the_prompt_opens_a_block_only_at_its_end():
    asked = "<|im_start|>user\nWhat does <think> mean?<|im_end|>\n<|im_start|>assistant\n"
    assert score("a</think>b", prompt_text=asked) == 0.0 and score("<think>a</think>b", prompt_text=asked) == 1.0


def test_a_long_answer_takes_no_time():
    assert score("<think>" + "<" * 200_000 + "a</think>b" + "</" * 200_000) == 1.0
