"""Where an answer is found."""

from __future__ import annotations

import pytest

from ptl.rewards.answers import final_answer, last_box
from tests.rewards.parts import completion

PREFILLED = "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    "text, found",
    [
        ("4", ("4", "none")),
        (" The sum is 4. ", ("The sum is 4.", "none")),
        (r"So $\boxed{4}$.", ("4", "boxed")),
        (r"\boxed{3}, no: \boxed{ 4 }", ("4", "boxed")),
        (r"\boxed{\frac{1}{2}}", (r"\frac{1}{2}", "boxed")),
        (r"\boxed{\{1, 2\}}", (r"\{1, 2\}", "boxed")),
        (r"\boxed{1 \} 2} }", (r"1 \} 2", "boxed")),
        (r"\boxed{4} and \boxed{5", ("4", "boxed")),
        (r"\boxed{}", None),
        ("Half of 8 is 4\n#### 4", ("4", "hashes")),
        ("#### 3 #### 4", ("4", "hashes")),
        ("#### 3\n#### 4 apples\nDone.", ("4 apples", "hashes")),
        ("The answer is 4", ("4", "said")),
        ("**Answer:** 4", ("4", "said")),
        ("The final answer is: **4**", ("4", "said")),
        ("The answer is:\n\n$4$", ("$4$", "said")),
        ("The answer is 3. Wait. The answer is 4.", ("4.", "said")),
        ("The answer is 3.\nThe answer is 4.", ("4.", "said")),
        ("<answer> 4 </answer>", ("4", "tag")),
        ("<answer>3</answer> or <answer>4</answer>", ("4", "tag")),
        (r"<answer>it is \boxed{4}</answer>", ("4", "boxed")),
        (r"\boxed{4} <answer>5</answer>", ("5", "tag")),
        ("<answer>4", ("<answer>4", "none")),
        ("", None),
        ("  \n", None),
    ],
)
def test_the_last_mark_of_the_strongest_kind(text, found):
    assert final_answer(completion(text)) == found


@pytest.mark.parametrize(
    "text, prompt_text, found",
    [
        (r"<think>\boxed{3}</think>4", "", ("4", "none")),
        (r"\boxed{3}</think>4", PREFILLED, ("4", "none")),
        (r"<think>\boxed{3}", "", None),
        (r"\boxed{3}", PREFILLED, None),
        ("<think>a</think>3<think>4", "", None),
        ("<think>4</think>", "", None),
        ("a</think>b</think>4", "", ("4", "none")),
    ],
)
def test_trap_grpo_14_a_thought_is_no_answer(text, prompt_text, found):
    assert final_answer(completion(text, prompt_text=prompt_text)) == found


@pytest.mark.parametrize("junk", [r"\boxed{", "<answer>", "answer is ", "####", "{" * 9 + "}" * 9, "</think>", "\\"])
def test_long_junk_takes_no_time(junk):
    final_answer(completion(junk * 20_000))
    last_box(junk * 20_000)
