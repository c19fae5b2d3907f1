"""The pages of maths name every loss that the code accepts, every key of it, and the defaults that the code has."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import get_args

import pytest

from ptl.functional import advantages, cross_tokenizer, divergence, kl, policy_weights
from ptl.functional.importance import Importance
from ptl.functional.policy_loss import PolicyLoss
from ptl.models.spec import LoRA, Quantization
from ptl.objectives import reward
from ptl.objectives.distillation import Distillation, HiddenMatch
from ptl.objectives.dpo import DPO
from ptl.objectives.grpo import GRPO
from ptl.objectives.ppo import PPO
from ptl.objectives.ptx import PTX
from ptl.objectives.sft import SFT
from tests.ranks import ROOT

PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("maths*.md"))}
PROSE = re.sub(r"^```.*?^```", "", "\n".join(PAGES.values()), flags=re.DOTALL | re.MULTILINE)
CODE = set(re.findall(r"`([^`]+)`", PROSE))
KEYS = {code.removeprefix("model.").partition(":")[0] for code in CODE}
NAMES = {
    "divergence": get_args(divergence.Kind),
    "cross-tokenizer loss": get_args(cross_tokenizer.Kind),
    "hidden match": get_args(inspect.get_annotations(HiddenMatch, eval_str=True)["kind"]),
    "reward loss": get_args(reward.Loss),
    "policy loss": get_args(policy_weights.Kind),
    "baseline": get_args(advantages.Baseline),
    "scale": get_args(advantages.Scale),
    "estimator": get_args(kl.Estimator),
    "controller": ("FixedKL", "AdaptiveKL"),
    "importance": get_args(inspect.get_annotations(Importance, eval_str=True)["method"]),
    "adapter": get_args(inspect.get_annotations(LoRA, eval_str=True)["init"]),
    "codes": get_args(Quantization),
}
PARTS = {"divergence": divergence.Divergence, "loss": PolicyLoss, "hidden": HiddenMatch, "ptx": PTX}
OBJECTIVES = (SFT, Distillation, reward.RewardModeling, DPO, GRPO, PPO)
NO_TERM = {
    *("policy", "optimizer", "schedule", "teacher", "critic", "rollout", "engine", "rewards", "tools"),
    *("evaluation", "self_check", "error_limit", "share_prompt", "sequence_parallel"),
    *("hidden", "divergence", "loss", "ptx"),
}
"""Arguments of objectives that are no term of a loss, or whose parts are."""


def test_names_are_found():
    assert all(NAMES.values()) and set(policy_weights.FORMS) == set(NAMES["policy loss"])


@pytest.mark.parametrize("kind", NAMES)
def test_every_name_that_the_code_accepts_is_explained(kind):
    assert set(NAMES[kind]) <= CODE


@pytest.mark.parametrize("name", PARTS)
def test_every_key_of_a_part_is_there(name):
    for field in dataclasses.fields(PARTS[name]):
        if (name, field.name) not in {("ptx", "sources"), ("ptx", "rows")}:  # which conversations, and how many
            assert f"{name}.{field.name}" in CODE or field.name in KEYS, field.name


@pytest.mark.parametrize("cls", OBJECTIVES, ids=lambda cls: cls.__name__)
def test_every_key_of_an_objective_that_is_a_term_is_there(cls):
    for name in set(inspect.signature(cls).parameters) - NO_TERM:
        assert name in KEYS, name


def test_the_table_of_policy_losses_is_what_the_code_has():
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", PAGES["maths-rl"], re.MULTILINE))
    counted = {"token": "tokens", "sequence": "answers", "group": "groups", "constant": "answers"}
    for kind, form in policy_weights.FORMS.items():
        ratio, _, divisor, clip, _ = (cell.strip() for cell in rows[kind].split("|"))
        assert (ratio, divisor) == (form.ratio, counted[form.weighing]), kind
        assert re.match(r"[\d.]+, [\d.]+", clip)[0] == f"{form.clip_low:g}, {form.clip_high:g}", kind


def defaults_of(key: str) -> set[object]:
    """The defaults that a key has in any objective, or in the part that it names."""
    part, _, name = key.rpartition(".")
    owners = [PARTS[part]] if part in PARTS else [*OBJECTIVES, kl.FixedKL] if not part else []
    signatures = [inspect.signature(owner).parameters for owner in owners]
    return {parameters[name].default for parameters in signatures if name in parameters}


def test_defaults_in_brackets_are_those_of_the_code():
    found = re.findall(r"`(?:model\.)?([\w.]+)` \((\d[\d.]*)\)", PROSE)
    assert len(found) > 15
    for key, number in found:
        assert float(number) in defaults_of(key), key


def test_a_sigmoid_is_said_to_lie_between_0_and_1_and_its_loss_to_be_made_small():
    page = PAGES["maths-rankings"]
    assert "A sigmoid lies between 0 and 1" in page and "positive for either sign" in page and "minimised" in page
