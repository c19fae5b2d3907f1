"""GRPO as a run sees it: it learns, it goes on where it stopped, and what would go wrong in silence stops it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from ptl.data.loader import prompt_batches
from ptl.data.order import Plan
from ptl.functional.policy_loss import PolicyLoss
from ptl.models.logprobs import answer_logprobs
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.grpo import GRPO
from ptl.rewards.base import Completion, Failure, Outcome, Reward
from ptl.rewards.panel import RewardError
from ptl.rollout.engine import Abilities, Asked, Draws, Engine
from ptl.rollout.evaluation import Evaluation
from ptl.rollout.hf import HF
from ptl.rollout.sampling import Sampled, sample
from ptl.rollout.selfcheck import SelfCheck, SelfCheckError
from ptl.rollout.settings import Rollout
from tests import tiny
from tests.objectives import law, rl
from tests.objectives.rl_ranks import SaveAt
from tests.ranks import RanksFailedError, run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return rl.make_folder(tmp_path_factory.mktemp("grpo"))


def fitted(
    folder: Path, steps: int = 1, *, resume: Path | str | None = None, callbacks: Any = (), trainer=None, **options: Any
):
    """The objective after some steps on one rank, with its trainer."""
    L.seed_everything(7, verbose=False)
    objective, data = rl.build(str(folder), **{"micro": 4, **options})
    made = law.trainer_of(
        str(folder), "auto", 1, 1, max_epochs=-1, max_steps=steps, callbacks=list(callbacks), **(trainer or {})
    )
    made.fit(objective, datamodule=data, ckpt_path=resume)
    return objective, made


def weights(objective: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in objective.policy.named_parameters()}


# ---- learning ----


@pytest.fixture(scope="module")
def echo(tmp_path_factory) -> Path:
    return rl.echo_folder(tmp_path_factory.mktemp("echo"))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_echo_task_is_learned_from_random_weights(echo, seed):
    """Reward above 0.8 by step 200 in three of three seeds."""
    L.seed_everything(seed, verbose=False)
    objective = GRPO(
        ModelSpec(name=str(echo / "model"), random_init=True),
        [rl.Echo()],
        rollout=Rollout(group_size=8, max_new_tokens=4, seed=seed),
        scale="none",
        optimizer=Optimizer(lr=3e-3, weight_decay=0.0),
        schedule=Schedule(kind="constant", warmup=0),
        self_check=SelfCheck(min_finished=0.0),
    )
    data = rl.data_of(str(echo), objective.view, micro=16, layout="padded")
    watch = rl.watch("train/reward", "train/ratio")

    class StopOnceLearned(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            last = [reward for reward, _ in watch.rows[-10:]]
            trainer.should_stop = len(last) == 10 and sum(last) > 8.5

    options = {"max_epochs": -1, "max_steps": 200, "gradient_clip_val": 1.0}
    trainer = law.trainer_of(str(echo), "auto", 1, 1, callbacks=[watch, StopOnceLearned()], **options)
    trainer.fit(objective, datamodule=data)
    rewards = [reward for reward, _ in watch.rows]
    assert rewards[0] < 0.2 and sum(rewards[-10:]) / 10 > 0.8
    assert {ratio for _, ratio in watch.rows} == {1.0}


# ---- sampling is scoring (law 3) ----


def scores(objective: Any, trainer: Any, temperature: float | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities by the engine and by the trainer of a fresh rollout's tokens, by micro-batch."""
    rollouts, data = objective.rollouts, trainer.datamodule
    batch = next(prompt_batches(Plan(units=24, micro_batch_size=4), data._parts["train"].units, 0))
    rollouts.fill(objective.policy, batch, data=data, strategy=trainer.strategy, version=0)
    rollouts.buffer.set_advantages("group", "group", None)
    objective.policy.eval()
    pairs = []
    for window in range(rollouts.buffer.count):
        made = rollouts.buffer.batch(window, 0, 1, rollouts.collation(data))
        with torch.no_grad():
            own = answer_logprobs(objective.policy, made.answers, temperature or rollouts.settings.temperature)
        pairs.append((made.tokens["behaviour"], own))
    return pairs


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
def test_trap_grpo_3_the_temperature_is_in_every_log_probability(folder, temperature, layout):
    objective, trainer = fitted(folder, rollout={"temperature": temperature}, layout=layout)
    for behaviour, own in scores(objective, trainer):
        assert len(own) > 20 and float((behaviour - own).abs().max()) < 1e-5
    if temperature != 1.0:
        behaviour, own = scores(objective, trainer, temperature=1.0)[0]
        assert float((behaviour - own).abs().mean()) > 0.05


def test_law_3_a_trainer_that_forgets_the_temperature_is_stopped(folder):
    class Forgets(HF):
        def _draw(self, policy: Any, asked: Sequence[Asked], draws: Draws) -> list[list[Sampled]]:
            return super()._draw(policy, asked, draws._replace(temperature=0.5))

    with pytest.raises(SelfCheckError, match=r"differ by .* nats on average .* Forgets draws with other weights"):
        fitted(folder, engine=Forgets())


def test_trap_grpo_2_nothing_of_the_generation_configuration_reaches_the_draws(folder):
    """The frequency of every first token against the softmax, with a configuration that would leave one."""
    model = tiny.make_model(18, tie=False, seed=1, initializer_range=0.3).eval()
    for key, value in {
        "do_sample": False,
        "top_k": 1,
        "top_p": 0.1,
        "temperature": 0.1,
        "min_p": 0.5,
        "typical_p": 0.1,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [3, 4],
        "eos_token_id": [5],
        "forced_eos_token_id": 2,
        "min_new_tokens": 4,
        "bad_words_ids": [[6]],
        "epsilon_cutoff": 0.2,
    }.items():
        setattr(model.generation_config, key, value)
    prompt, count = [3, 4, 5], 4000
    asked = [Asked(prompt, number, 1) for number in range(count)]
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].double(), -1).numpy() * count
    with HF().session(model, _whole(), 0) as draw:
        drawn = draw(asked, Draws(1, 1.0, 1.0, (0,), 11))
    seen = np.bincount([answers[0].ids[0] for answers in drawn], minlength=18)
    # 17 degrees of freedom: 40.8 is exceeded once in a thousand.
    assert float(((seen - expected) ** 2 / expected).sum()) < 40.8


def _whole() -> Any:
    """A strategy that has cut nothing."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    return SingleDeviceStrategy("cpu")


def test_trap_grpo_4_a_truncated_distribution_is_refused_and_detected(folder):
    with pytest.raises(ValueError, match=r"model.rollout.top_p is 0.9: .* another distribution than what is trained"):
        Rollout(top_p=0.9)

    class TopTwo(HF):
        """Draws from the two likeliest ids and says how likely they were among these."""

        def _draw(self, policy: Any, asked: Sequence[Asked], draws: Draws) -> list[list[Sampled]]:
            drawn = super()._draw(policy, asked, draws)
            return [[Sampled(one.ids, [x / 2 for x in one.logprobs]) for one in answers] for answers in drawn]

    with pytest.raises(SelfCheckError, match="truncated distribution"):
        fitted(folder, engine=TopTwo())


@pytest.mark.parametrize("kind", ["rope", "absolute"])
def test_trap_grpo_5_padding_moves_no_position(kind):
    """Prompts of many lengths share a batch; each token's log-probability is that of a forward of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if kind == "rope":
        model: Any = tiny.make_model(30, tie=False, initializer_range=0.3)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        with torch.no_grad():
            model.transformer.wpe.weight.mul_(20)
    model.eval()
    prompts = [[3], [4, 5, 6, 7, 8, 9, 10], [11, 12, 13]]
    how: dict[str, Any] = {"stop": [1], "limits": [6] * 3, "vocab": 30, "temperature": 1.0, "top_p": 1.0, "seed": 5}
    for prompt, answers in zip(prompts, sample(model, prompts, [0, 1, 2], samples=3, **how)):
        for answer in answers:
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([prompt + answer.ids])).logits[0].log_softmax(-1)
            plain = [float(logp[len(prompt) - 1 + t, token]) for t, token in enumerate(answer.ids)]
            assert answer.logprobs == pytest.approx(plain, abs=2e-5)


# ---- the ratio, the reference, dropout ----


def test_trap_grpo_6_the_first_step_is_exactly_on_policy(folder):
    watch = rl.watch("train/ratio", "train/policy_kl", "train/clip_high")
    fitted(folder, steps=4, callbacks=[watch], minibatches=2, epochs=2, lr=1.0, micro=2)
    assert watch.rows[0] == (1.0, 0.0, 0.0)
    assert all(kl > 0 for _, kl, _ in watch.rows[1:]), watch.rows  # later steps train on answers of older weights


def test_trap_grpo_7_dropout_is_refused_or_found(folder):
    with pytest.raises(ValueError, match=r"model.policy.adapter.dropout is 0.3"):
        GRPO(ModelSpec(name="x", adapter=LoRA(dropout=0.3)), [rl.Vowels()])
    spec = ModelSpec(name=str(folder / "model"), config_overrides={"attention_dropout": 0.4}, attention="eager")
    objective, data = rl.build(str(folder), micro=4, layout="padded")
    objective.spec = spec
    with pytest.raises(SelfCheckError, match=r"between training and evaluation mode.*attention_dropout: 0.0"):
        law.trainer_of(str(folder), "auto", 1, 1, max_steps=1).fit(objective, datamodule=data)


def test_trap_grpo_7_modes_are_afterwards_as_they_were_also_after_an_error(folder):
    objective, trainer = fitted(folder, lora=True)
    objective.policy.train()
    frozen = objective.policy.get_base_model().model.layers[0]
    frozen.eval()
    before = [module.training for module in objective.policy.modules()]
    state = torch.random.get_rng_state()
    with pytest.raises(KeyError), objective.rollouts.engine.session(objective.policy, trainer.strategy, 0) as draw:
        assert not any(module.training for module in objective.policy.modules())
        draw([Asked([3, 4], 0, 3)], Draws(2, 1.0, 1.0, (0,), 0))
        raise KeyError
    assert [module.training for module in objective.policy.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("lora", [True, False])
def test_trap_grpo_12_the_reference_is_the_policy_before_training(folder, lora):
    watch = rl.watch("train/reference_kl")
    objective, _ = fitted(folder, steps=3, callbacks=[watch], lora=lora, kl=0.1, lr=5.0 if lora else 0.5)
    assert watch.rows[0] == (0.0,) and all(kl > 0 for (kl,) in watch.rows[1:])
    live = objective._reference.live
    assert (live is None) == lora
    if live is not None:  # law 5
        own = {id(p) for p in objective.parameters()}
        assert not any(module.training for module in live.model.modules())
        assert not any(p.requires_grad or p.grad is not None or id(p) in own for p in live.model.parameters())


def test_trap_grpo_12_an_adapter_that_does_not_start_at_zero_is_found(folder):
    """Such as one that goes on from an earlier stage of training, whose base is not what the policy was."""

    class Moved(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                for name, parameter in pl_module.policy.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.5)

    with pytest.raises(SelfCheckError, match=r"policy and reference differ by .*model.policy.adapter.init"):
        fitted(folder, lora=True, kl=0.1, callbacks=[Moved()])
    fitted(folder, lora=True, callbacks=[Moved()])


# ---- what is trained of an answer ----


class Scripted(Engine):
    """Answers that a test has written."""

    abilities = Abilities(logprobs=False, zero3=True, quantized=True, reproducible=True)

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers

    @contextmanager
    def session(self, policy: Any, strategy: Any, version: int) -> Iterator[Any]:
        yield lambda asked, draws: [[Sampled(ids, []) for ids in self.answers] for _ in asked]


def test_trap_grpo_8_the_end_is_trained_and_padding_is_not(folder):
    """The end token is the padding too; of the answers one is only an end, one is cut, one ends at the limit."""
    answers = [[0], [5, 6, 7, 8], [9, 9, 9, 0], [5, 0]]
    objective, trainer = fitted(
        folder, engine=Scripted(answers), layout="padded", rollout={"max_new_tokens": 4}, micro=2
    )
    assert trainer.datamodule.renderer.tokenizer.pad_token_id == 0
    buffer = objective.rollouts.buffer
    assert [a.finished for a in buffer.groups[0].answers] == [True, False, True, True]
    assert buffer.groups[0].answers[0].said.text == ""
    batch = buffer.batch(0, 0, 1, objective.rollouts.collation(trainer.datamodule))
    for number in range(len(batch.rewards)):
        assert batch.answers.targets[batch.answers.owners == number].tolist() == answers[number % 4]
    assert batch.truncated.tolist() == [False, True, False, False] * 2
    assert float(buffer.weights[0]) == 2 * sum(map(len, answers))


def test_trap_grpo_8_every_end_of_the_template_ends_an_answer(folder):
    """Ids of several ends are all known, and an answer keeps the one that it met."""
    model = tiny.make_model(18, tie=False, seed=1, initializer_range=0.3).eval()
    ends = set()
    for answers in sample(
        model, [[3]], [0], samples=64, stop=[0, 7, 9], limits=[40], vocab=18, temperature=1.0, top_p=1.0, seed=0
    ):
        for answer in answers:
            assert not set(answer.ids[:-1]) & {0, 7, 9}
            ends.add(answer.ids[-1])
    assert {0, 7, 9} <= ends


def test_trap_grpo_13_one_missing_reward_leaves_the_others_of_its_group(folder):
    class Breaks(Reward):
        """Fails on the first answer of each group, and does not apply to the second."""

        def score(self, completions: Sequence[Completion]) -> list[Outcome]:
            made: list[Outcome] = []
            for place in range(len(completions)):
                made.append([Failure("raised"), None, float("nan"), float(place), 1.0][place % 5])
            return made

    objective, trainer = fitted(folder, rewards=[Breaks()], rollout={"group_size": 5}, error_limit=1.0)
    for group in objective.rollouts.buffer.groups:
        trained = [bool(answer.trained.all()) for answer in group.answers]
        advantages = [float(answer.tokens["advantages"][0]) for answer in group.answers]
        assert trained == [False, False, False, True, True]
        assert np.isfinite(advantages).all() and advantages[3] == -advantages[4]
    assert all(torch.isfinite(p).all() for p in objective.policy.parameters())
    assert float(trainer.callback_metrics["train/breaks_error"]) == pytest.approx(0.4)
    assert float(trainer.callback_metrics["train/breaks_absent"]) == pytest.approx(0.2)


def test_trap_grpo_14_the_sampled_ids_are_the_trained_ids(tmp_path):
    """Of a tokenizer where decoding and encoding again gives other ids."""
    tokenizer = tiny.make_tokenizer()
    tiny.save_folder(tmp_path / "model", tokenizer, tie=False, initializer_range=0.3)
    rl.write_rows(tmp_path / "rows.jsonl", count=4)
    objective, trainer = fitted(tmp_path, micro=2)
    changed = 0
    for group in objective.rollouts.buffer.groups:
        for answer in group.answers:
            again = tokenizer(answer.said.text, add_special_tokens=False)["input_ids"]
            changed += again != answer.ids[: len(answer.ids) - answer.finished].tolist()
            assert list(answer.said.ids) == answer.ids.tolist()
    assert changed > 2
    batch = objective.rollouts.buffer.batch(0, 0, 1, objective.rollouts.collation(trainer.datamodule))
    sampled = [t for group in objective.rollouts.buffer.window(0) for a in group.answers for t in a.ids.tolist()]
    assert sorted(batch.answers.targets.tolist()) == sorted(sampled)


def test_law_2_the_prompt_is_what_the_template_prints(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    objective, _ = fitted(folder, micro=8)
    for group in objective.rollouts.buffer.groups:
        expected = tokenizer.apply_chat_template(
            rows[group.row]["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert group.prompt.tolist() == expected


# ---- random numbers and resuming ----


def answers_of(objective: Any) -> dict[int, list[list[int]]]:
    groups = objective.rollouts.buffer.groups
    return {group.position: [answer.ids.tolist() for answer in group.answers] for group in groups}


def test_trap_grpo_15_draws_differ_by_answer_prompt_step_and_seed(tmp_path):
    """With weights that do not move, and one and the same prompt everywhere."""
    tokenizer = rl.word_tokenizer([*law.WORDS, "a"])
    tiny.save_folder(tmp_path / "model", tokenizer, tie=False)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "fox", "answer": "fox"}\n' * 8)
    seen = {}
    for name, steps, options in (("one", 1, {}), ("two", 2, {}), ("epoch", 3, {}), ("seed", 1, {"seed": 5})):
        objective, _ = fitted(tmp_path, steps, lr=1e-30, rollout={"max_new_tokens": 8, **options})
        seen[name] = answers_of(objective)
    for of in seen.values():
        drawn = [tuple(ids) for answers in of.values() for ids in answers]
        assert len(set(drawn)) > 0.7 * len(drawn)  # one word alone may be said twice
    assert set(seen["one"]) == {0, 1, 2, 3} and set(seen["two"]) == {4, 5, 6, 7} and set(seen["epoch"]) == {0, 1, 2, 3}
    assert list(seen["one"].values()) != list(seen["two"].values())
    assert seen["epoch"] != seen["one"] != seen["seed"]


HALFWAY: dict[str, Any] = {"minibatches": 2, "epochs": 2, "micro": 4, "kl": 0.1, "sgd": False, "lr": 1e-2}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> tuple[Any, dict[int, str]]:
    """The objective after six steps, and what was saved after the others."""
    out = tmp_path_factory.mktemp("whole")
    saved = SaveAt({stop: str(out / f"{stop}.ckpt") for stop in range(1, 6)})
    return fitted(folder, 6, callbacks=[saved], **HALFWAY)[0], saved.paths


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_law_6_a_run_goes_on_in_the_middle_of_a_rollout(folder, whole, stop):
    """Two steps of prompts, walked twice: stops fall between rollouts, between steps, and within the second walk."""
    ended, saved = whole
    kept = torch.load(saved[stop], weights_only=True)["rollout"]
    assert bool(kept) == (stop != 4)
    again, _ = fitted(folder, 6, resume=saved[stop], **HALFWAY)
    for (name, one), other in zip(weights(ended).items(), weights(again).values(), strict=True):
        assert torch.equal(one, other), name
    assert answers_of(ended) == answers_of(again)


def test_law_6_other_ranks_cannot_cut_a_rollout_that_has_begun(folder, tmp_path):
    _, trainer = fitted(folder, 1, minibatches=2, micro=4)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    with pytest.raises(ValueError, match=r"1 steps into a rollout whose steps take 4 prompts, and these .* take 2"):
        fitted(folder, 2, minibatches=2, micro=2, resume=tmp_path / "stop.ckpt")


# ---- several ranks ----


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("two")
    return run_ranks("tests.objectives.rl_ranks:run", 2, {"folder": str(folder), "out": str(out)}, timeout=280)


@pytest.mark.timeout(300)
def test_trap_grpo_15_ranks_draw_different_answers_to_the_same_prompt(two_ranks):
    one, other = (rank["same_prompt"] for rank in two_ranks)
    assert len(one) == len(other) == 8
    assert not {tuple(ids) for ids in one} & {tuple(ids) for ids in other}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_law_6_ranks_go_on_in_the_middle_of_a_rollout(two_ranks, strategy):
    for rank in two_ranks:
        assert rank["resumed"][strategy]["answers"]
        assert rank["resumed"][strategy]["distance"] < 1e-6


@pytest.mark.timeout(300)
def test_law_7_ranks_walk_together_when_one_has_no_prompt(two_ranks):
    assert [rank["few"] for rank in two_ranks] == [2, 2]


@pytest.mark.timeout(300)
def test_law_7_evaluation_under_zero3_is_that_of_one_rank(two_ranks, folder):
    objective, trainer = fitted(folder, 1, micro=4, data={"val_fraction": 0.3}, evaluation=_EVALUATION)
    found = trainer.validate(objective, datamodule=trainer.datamodule, verbose=False)[0]
    for rank in two_ranks:
        for name in ("val/pass@1", "val/pass@3", "val/length", "val/reward"):
            assert rank["evaluated"][name] == pytest.approx(found[name], abs=1e-6), name


def test_a_rank_that_fails_stops_all(folder):
    with pytest.raises(RanksFailedError, match="another rank failed while it sampled") as error:
        run_ranks("tests.objectives.rl_ranks:failing", 2, {"folder": str(folder)}, timeout=120)
    assert "failed for 16 of the last 16 answers" in str(error.value)
    assert "time is up" not in str(error.value)


# ---- evaluation, export ----

_EVALUATION = Evaluation(samples=3, k=[1, 2], temperature=1.0, top_p=1.0, threshold=0.2)


def test_evaluation_samples_for_itself_and_counts_what_it_sees(folder):
    names: dict[str, float] = {}
    objective, trainer = fitted(folder, 2, data={"val_fraction": 0.3}, evaluation=_EVALUATION)
    names = trainer.validate(objective, datamodule=trainer.datamodule, verbose=False)[0]
    again = trainer.validate(objective, datamodule=trainer.datamodule, verbose=False)[0]
    assert {k: v for k, v in names.items() if not k.endswith(("_s", "_ms"))} == {
        k: v for k, v in again.items() if not k.endswith(("_s", "_ms"))
    }
    assert 0 < names["val/pass@1"] <= names["val/pass@2"] <= names["val/pass@3"] <= 1
    assert {"val/majority@1", "val/majority@3", "val/length", "val/finished", "val/reward", "val/vowels"} <= set(names)
    groups = objective.rollouts.evaluated
    assert all(len(group.answers) == 3 for group in groups)
    buffer = answers_of(objective)
    trainer.validate(objective, datamodule=trainer.datamodule, verbose=False)
    assert answers_of(objective) == buffer, "an evaluation leaves what is trained on alone"


def test_law_9_what_was_trained_is_a_plain_folder(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from ptl.callbacks.export import Export

    objective, _ = fitted(
        folder,
        2,
        lora=True,
        lr=5.0,
        kl=0.1,
        callbacks=[Export(console=False)],
        trainer={"default_root_dir": str(tmp_path)},
    )
    loaded = AutoModelForCausalLM.from_pretrained(next(tmp_path.rglob("config.json")).parent)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        objective.policy.eval()
        assert torch.allclose(loaded(ids).logits, objective.policy(ids).logits, atol=1e-5)
        objective.policy.disable_adapter_layers()
        assert not torch.allclose(loaded(ids).logits, objective.policy(ids).logits, atol=1e-4)


# ---- what a person may get wrong ----


class Same(Reward):
    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [1.0] * len(completions)


def test_equal_rewards_move_nothing(folder):
    start = weights(_built(folder))
    objective, trainer = fitted(folder, 2, rewards=[Same()], lr=10.0)
    for (name, one), other in zip(start.items(), weights(objective).values(), strict=True):
        assert torch.equal(one, other), name
    assert float(trainer.callback_metrics["train/zero_signal"]) == 1.0


def _built(folder: Path) -> Any:
    objective, _ = rl.build(str(folder))
    objective.configure_model()
    return objective


class Raises(Reward):
    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        raise ZeroDivisionError("no division")


class Short(Reward):
    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [1.0]


@pytest.mark.parametrize(("reward", "why"), [(Raises(), "raised"), (Short(), "wrong_length")])
def test_a_reward_that_fails_stops_the_run_with_the_reason(folder, reward, why):
    with pytest.raises(RewardError, match=rf"the reward \w+ failed for 16 of the last 16 answers \(16 {why}\)"):
        fitted(folder, rewards=[reward])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Rollout, group_size=0), "model.rollout.group_size must be 1 or more, got 0"),
        (partial(Rollout, temperature=0.0), "model.rollout.temperature must be above 0"),
        (partial(Rollout, minibatches=0), "model.rollout.minibatches must be 1 or more"),
        (partial(Evaluation, samples=2, k=[4]), "model.evaluation.k must hold numbers from 1 to samples 2"),
        (partial(Evaluation, temperature=0.0), "gives 4 equal answers"),
        (partial(GRPO, ModelSpec(name="x"), []), "there is no reward"),
        (partial(GRPO, ModelSpec(name="x"), [Same(), Same()]), "two rewards have the name 'same'"),
        (
            partial(GRPO, ModelSpec(name="x"), [Same()], rollout=Rollout(group_size=1)),
            "model.rollout.group_size is 1, and baseline group with scale group",
        ),
        (
            partial(GRPO, ModelSpec(name="x"), [Same()], evaluation=Evaluation(solved_by="other")),
            "model.evaluation.solved_by is 'other'; the rewards are same",
        ),
        (
            partial(GRPO, ModelSpec(name="x"), [Same()], engine=Scripted([]), importance=PolicyLoss()),
            "model.importance needs the log-probabilities",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prompt_without_room_for_its_answer_is_named(folder):
    with pytest.raises(ValueError, match=r"max_length 20 leaves 8 to a prompt beside max_new_tokens 12"):
        fitted(folder, data={"max_length": 20})


def test_answers_that_never_end_are_found(folder):
    with pytest.raises(SelfCheckError, match=r"0 of 16 answers came to their end.*model.rollout.max_new_tokens"):
        fitted(folder, engine=Scripted([[5, 6], [7, 8], [5, 5], [6, 6]]), self_check=SelfCheck())


def test_answers_that_are_all_the_same_are_found(folder):
    with pytest.raises(SelfCheckError, match=r"the answers to each of 4 prompts are all the same"):
        fitted(folder, engine=Scripted([[5, 0]] * 4))


def test_a_model_without_an_end_is_refused(tmp_path):
    tokenizer = rl.word_tokenizer(law.WORDS)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    tiny.save_folder(tmp_path / "model", tokenizer, tie=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    rl.write_rows(tmp_path / "rows.jsonl", count=4)
    with pytest.raises(ValueError, match=r"no token ends an answer"):
        fitted(tmp_path)
