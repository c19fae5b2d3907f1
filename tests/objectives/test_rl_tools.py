"""GRPO on a task that only a tool can answer: to say the code of the moment, which no weights can hold."""

import json
from importlib.util import find_spec

import lightning as L
import numpy as np
import pytest

from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import ModelSpec
from ptl.objectives.grpo import GRPO
from ptl.rewards.base import Reward
from ptl.rollout.hf import HF
from ptl.rollout.hf_cb import HFContinuous
from ptl.rollout.selfcheck import SelfCheck
from ptl.rollout.settings import Rollout
from ptl.rollout.tool_turns import ToolUse
from ptl.rollout.vllm import INSTALL, VLLM
from tests import tiny
from tests.objectives import law, rl
from tests.tools.parts import LETTERS

TEMPLATE = (
    "{% for m in messages %}{{ ('? ' if m['role'] == 'assistant' else '') + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ '<|im_end|> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '? ' }}{% endif %}"
)
TAGS = ("<CODE-TOOL>", "</CODE-TOOL>")


class Code(Reward):
    """1 for an answer that says what its tool has said, a fifth for one that only asked it."""

    def score(self, completions):
        return [
            (1.0 if one.text.split() == [one.results[-1]] else 0.2)
            if one.results[-1:] and one.results[-1] in LETTERS
            else 0.0
            for one in completions
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    tokenizer = rl.word_tokenizer(list(LETTERS))
    tokenizer.add_tokens(list(TAGS))
    tokenizer.chat_template = TEMPLATE
    tiny.save_folder(folder / "model", tokenizer, tie=False)
    tiny.save_folder(folder / "wide", tokenizer, tie=False, hidden=128)  # heads of 32 columns, which vLLM needs
    rows = [{"prompt": letter, "answer": letter} for letter in LETTERS] * 8
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def objective_of(folder, model="model", **options):
    return GRPO(
        ModelSpec(name=str(folder / model), random_init=True),
        [Code()],
        rollout=Rollout(group_size=8, max_new_tokens=12),
        tools=ToolUse(names=["tests.tools.parts:code"], rounds=1),
        scale="none",
        optimizer=Optimizer(lr=3e-3, weight_decay=0.0),
        schedule=Schedule(kind="constant", warmup=0),
        self_check=SelfCheck(min_finished=0.0),
        **options,
    )


def vllm():
    return VLLM(dtype="fp32", kv_cache_gib=0.1, max_model_len=128, enforce_eager=True)


WITHOUT_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason=f"vllm is not installed: {INSTALL}")
ENGINES = [
    pytest.param(HF, "model", id="hf"),
    pytest.param(HFContinuous, "model", id="continuous"),
    pytest.param(vllm, "wide", id="vllm", marks=[pytest.mark.slow, pytest.mark.timeout(600), WITHOUT_VLLM]),
]


@pytest.mark.parametrize(("engine", "model"), ENGINES)
def test_law_3_what_a_tool_said_is_read_and_never_trained(folder, engine, model):
    """The run passes the check of sampling against scoring, and no token of a tool's is a target."""
    L.seed_everything(1, verbose=False)
    objective = objective_of(folder, model, engine=engine())
    data = rl.data_of(str(folder), objective.view, micro=16, layout="padded")
    watch = rl.watch("train/tool_calls", "train/tool_tokens")
    trainer = law.trainer_of(str(folder), "auto", 1, 1, callbacks=[watch], max_epochs=-1, max_steps=3)
    trainer.fit(objective, datamodule=data)
    assert all(calls > 0 and tokens > 0 for calls, tokens in watch.rows)
    buffer = objective.rollouts.buffer
    batch = buffer.batch(0, 0, 1, objective.rollouts.collation(data))
    answers = [answer for group in buffer.members(0, 0, 1)[0] for answer in group.answers]
    masked = 0
    for number, answer in enumerate(answers):
        own = batch.answers.targets[batch.answers.owners == number].tolist()
        assert own == answer.ids[answer.trained].tolist()
        assert np.isnan(answer.tokens["behaviour"][~answer.trained]).all()
        masked += int((~answer.trained).sum())
    assert masked > 0 and float(buffer.weights[0]) == len(batch.answers.targets)
    assert objective.rollouts.buffer.restored([buffer.state()], np.array([g.position for g in buffer.groups]))


@pytest.mark.slow
def test_a_policy_learns_to_ask_a_tool(folder):
    L.seed_everything(0, verbose=False)
    objective = objective_of(folder)
    data = rl.data_of(str(folder), objective.view, micro=16, layout="padded")
    watch = rl.watch("train/reward", "train/tool_calls", "train/tool_failures")
    options = {"max_epochs": -1, "max_steps": 50, "gradient_clip_val": 1.0}
    trainer = law.trainer_of(str(folder), "auto", 1, 1, callbacks=[watch], **options)
    trainer.fit(objective, datamodule=data)
    assert watch.rows[0][0] < 0.1 and sum(reward for reward, *_ in watch.rows[-5:]) / 5 > 0.18
    assert watch.rows[0][1] < 0.6 and watch.rows[-1][1] > 0.95  # calls an answer
    assert watch.rows[0][2] > 0.2 and watch.rows[-1][2] < 0.1  # of them failed, for want of an argument
