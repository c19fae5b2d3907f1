"""PPO as a run sees it: it learns, by the right gradient, goes on where it stopped, and says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ptl.callbacks.export import Export
from ptl.data.sources import Source
from ptl.functional.importance import Importance
from ptl.functional.kl import FixedKL
from ptl.functional.policy_loss import PolicyLoss
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.ppo import PPO
from ptl.objectives.ppo_targets import correlation
from ptl.objectives.ptx import PTX, Mix
from ptl.rewards.base import Completion, Outcome, Reward
from ptl.rollout.selfcheck import SelfCheck
from ptl.rollout.settings import Rollout
from tests import tiny
from tests.objectives import law, ppo_mdp, ppo_rl, rl
from tests.objectives.rl_ranks import SaveAt
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ppo_rl.make_folder(tmp_path_factory.mktemp("ppo"))


def fitted(
    folder: Path, steps: int = 1, *, resume: Path | str | None = None, callbacks: Any = (), trainer=None, **options: Any
) -> tuple[Any, Any]:
    """The objective after some steps on one rank, with its trainer."""
    L.seed_everything(7, verbose=False)
    objective, data = ppo_rl.build(str(folder), **{"micro": 4, **options})
    made = law.trainer_of(
        str(folder), "auto", 1, 1, max_epochs=-1, max_steps=steps, callbacks=list(callbacks), **(trainer or {})
    )
    made.fit(objective, datamodule=data, ckpt_path=resume)
    return objective, made


def weights(objective: Any) -> dict[str, torch.Tensor]:
    """Policy and critic."""
    return {name: p.detach().clone() for name, p in objective.named_parameters()}


# ---- learning ----


@pytest.fixture(scope="module")
def echo(tmp_path_factory) -> Path:
    return rl.echo_folder(tmp_path_factory.mktemp("echo"))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "own"), [(0, False), (1, False), (2, False), (0, True)])
def test_the_echo_task_is_learned_from_random_weights(echo, seed, own):
    """Reward above 0.8 by step 200 in three of three seeds with a value head, and with a critic of its own."""
    L.seed_everything(seed, verbose=False)
    start = ModelSpec(name=str(echo / "model"), random_init=True)
    objective = PPO(
        start,
        [rl.Echo()],
        critic=start if own else None,
        rollout=Rollout(group_size=8, max_new_tokens=4, seed=seed),
        bootstrap=False,  # every answer is four letters, and cut there
        optimizer=Optimizer(lr=4e-3),
        schedule=Schedule(kind="constant", warmup=0),
        self_check=SelfCheck(min_finished=0.0),
    )
    data = rl.data_of(str(echo), objective.view, micro=16, layout="padded")
    rewards, explained = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step % 10 == 0 and "train/reward" in trainer.callback_metrics:
                rewards.append(float(trainer.callback_metrics["train/reward"]))
                explained.append(float(trainer.callback_metrics["train/explained_variance"]))
                trainer.should_stop = rewards[-1] > 0.8

    options = {"max_epochs": -1, "max_steps": 200, "log_every_n_steps": 10}
    law.trainer_of(str(echo), "auto", 1, 1, callbacks=[Watch()], **options).fit(objective, datamodule=data)
    assert rewards[0] < 0.2 and rewards[-1] > 0.8
    assert max(explained) > 0.3 and explained[0] < 0.2


# ---- the gradient, against a process that is walked through whole ----


@pytest.fixture(scope="module")
def process(tmp_path_factory) -> Path:
    return ppo_mdp.make_folder(tmp_path_factory.mktemp("mdp"))


def policy_step(process: Path, decay: float, values: dict[tuple[int, ...], float]) -> tuple[np.ndarray, np.ndarray]:
    """How a step of the real objective moves the policy, and how the exact gradient would; the values are given."""
    count, factor = len(ppo_mdp.answers()), 1e-9
    objective = PPO(
        ModelSpec(name=f"{process}/model"),
        [ppo_mdp.Table()],
        rollout=Rollout(group_size=count, max_new_tokens=ppo_mdp.LONGEST),
        engine=ppo_mdp.Every(),
        importance=Importance(level="sequence", high=1e6),
        decay=decay,
        bootstrap=False,
        value_factor=factor,  # the head shares the trunk, and its own gradient must not be seen
        value_clip=None,
        optimizer=Optimizer(kind="sgd", lr=1.0),
        schedule=Schedule(kind="constant", warmup=0),
        self_check=SelfCheck(min_finished=0.0, tolerance=1e3),
    )
    objective.configure_model()
    start = AutoModelForCausalLM.from_pretrained(process / "model", attn_implementation="eager").double()
    states = list(values)
    hidden = torch.cat([ppo_mdp.states_of(start, states), torch.ones(len(states), 1, dtype=torch.float64)], 1)
    solved = torch.linalg.pinv(hidden) @ torch.tensor([values[state] for state in states], dtype=torch.float64)
    assert torch.allclose(hidden @ solved, torch.tensor([values[s] for s in states], dtype=torch.float64), atol=1e-8)
    with torch.no_grad():
        objective.value_head.weight.copy_(solved[None, :-1])
        objective.value_head.bias.copy_(solved[-1:])
    before = rl.flat_weights(objective.policy)
    data = rl.data_of(str(process), objective.view, micro=1)
    trainer = law.trainer_of(str(process), "auto", 1, 1, max_epochs=-1, max_steps=1)
    trainer.fit(objective, datamodule=data)
    moved = rl.flat_weights(objective.policy) - before
    ppo_mdp.expected_reward(start).backward()
    gradients = {k: v.grad for k, v in start.state_dict(keep_vars=True).items() if v.requires_grad}
    # What the loss is over: the deviation of the advantages, and the mean over all tokens of all answers.
    advantages = []
    for ids in ppo_mdp.answers():
        said = [values[tuple(ids[:t])] for t in range(len(ids))]
        errors = [after - now for now, after in zip(said, [*said[1:], ppo_mdp.reward_of(ids)])]
        advantages += [sum(decay**k * e for k, e in enumerate(errors[t:])) for t in range(len(ids))]
    return moved, law.flat(gradients) * count / (len(advantages) * np.std(advantages, ddof=1))


def test_the_expected_gradient_is_that_of_the_expected_reward(process):
    """With lambda 1 the critic only takes noise away, whatever it says; below 1 it must be right, and then it is."""
    model = AutoModelForCausalLM.from_pretrained(process / "model", attn_implementation="eager").double()
    true = ppo_mdp.true_values(model)
    wrong = {state: value + 0.3 * len(state) for state, value in true.items()}
    assert true[()] == pytest.approx(ppo_mdp.expected_reward(model).item(), abs=1e-12)
    assert len(true) == 7 and len({round(v, 3) for v in true.values()}) == 7

    def error(decay: float, values: dict[tuple[int, ...], float]) -> float:
        moved, exact = policy_step(process, decay, values)
        return float(np.linalg.norm(moved - exact) / np.linalg.norm(exact))

    assert error(1.0, wrong) < 1e-5
    assert error(0.3, true) < 1e-5
    assert error(0.3, wrong) > 1e-2


# ---- a rollout's targets ----


def answers_of(objective: Any) -> list[Any]:
    return [answer for group in objective.rollouts.buffer.groups for answer in group.answers]


def test_the_score_is_at_the_last_token_and_nowhere_else(folder):
    """Of a critic that says 0 everywhere, and half the discount a token."""
    objective, _ = fitted(folder, plain=True, discount=0.5, decay=1.0)
    ended = [answer for answer in answers_of(objective) if answer.finished and len(answer.ids) > 2]
    assert ended and any(answer.reward > 0 for answer in ended)
    for answer in ended:
        away = np.arange(len(answer.ids))[::-1]
        np.testing.assert_allclose(answer.tokens["returns"], answer.reward * 0.5**away, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bootstrap", [True, False])
def test_an_answer_that_was_cut_is_followed_by_what_the_critic_expects(folder, bootstrap):
    """At its last token, without what lambda carries: the score less the penalty, and the value behind it."""
    options = {"critic": "critic", "decay": 0.0, "missing_end_penalty": 0.25, "bootstrap": bootstrap}
    objective, _ = fitted(folder, plain=True, **options)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic", num_labels=1).double()
    cut = [(group, a) for group in objective.rollouts.buffer.groups for a in group.answers if not a.finished]
    assert cut and any(answer.finished for answer in answers_of(objective))
    for group, answer in cut:
        with torch.no_grad():
            ids = torch.tensor([[*group.prompt, *answer.ids]])
            said = critic.score(critic.model(ids).last_hidden_state)[0, len(group.prompt) - 1 :, 0].numpy()
        np.testing.assert_allclose(answer.tokens["values"], said[:-1], rtol=1e-4, atol=1e-5)
        expected = answer.reward - 0.25 + (ppo_rl.DISCOUNT * said[-1] if bootstrap else 0.0)
        assert answer.tokens["returns"][-1] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for answer in answers_of(objective):
        if answer.finished:
            assert answer.tokens["returns"][-1] == pytest.approx(answer.reward, abs=1e-5)


def test_advantages_are_whitened_over_the_rollout_and_returns_are_not(folder):
    objective, _ = fitted(folder, plain=True, critic="critic", rollout={"minibatches": 2}, steps=2)
    advantages, returns = (
        np.concatenate([answer.tokens[name] for answer in answers_of(objective)]) for name in ("advantages", "returns")
    )
    assert abs(advantages.mean()) < 1e-5 and advantages.std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert abs(returns.mean()) > 0.01 and abs(returns.std(ddof=1) - 1) > 0.1


def test_the_divergence_is_taken_from_every_token(folder):
    """With lambda and discount 1 and a critic of 0, the return of a token is the score less what is still to pay."""
    how = {"plain": True, "kl": FixedKL(0.3), "discount": 1.0, "decay": 1.0, "lr": 0.5}
    objective, _ = fitted(folder, 2, rollout={"minibatches": 1}, value_factor=1e-9, **how)
    for answer in answers_of(objective):
        if answer.finished and len(answer.ids) > 1:
            assert "reference" in answer.tokens
            steps = np.diff(answer.tokens["returns"])
            assert np.abs(steps).max() > 1e-4  # the policy has left the reference after a step
            last = answer.tokens["returns"][-1]
            assert last != pytest.approx(answer.reward, abs=1e-6)


def test_an_answer_without_a_reward_is_left_out(folder):
    class Some(rl.Vowels):
        def score(self, completions: Any) -> Any:
            return [None if i % 3 == 0 else x for i, x in enumerate(super().score(completions))]

    objective, _ = fitted(folder, rewards=[Some()])
    held = [answer for answer in answers_of(objective) if not np.isfinite(answer.reward)]
    assert held and all(not answer.trained.any() for answer in held)
    kept = np.concatenate([a.tokens["advantages"][a.trained] for a in answers_of(objective)])
    assert np.isfinite(kept).all() and objective.rollouts.buffer.weights[0] == len(kept)


# ---- the first step, the critic's warm-up, the reference ----


@pytest.mark.parametrize("critic", [None, "critic"])
def test_the_first_step_is_exactly_on_policy_and_its_numbers_are_told(folder, critic):
    """Ratio 1 and divergence 0, exactly."""
    _, trainer = fitted(folder, critic=critic)
    seen = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
    assert seen["ratio"] == 1.0 and seen["clip_low"] == seen["clip_high"] == seen["policy_kl"] == 0.0
    assert seen["sequence_kl"] == seen["token_kl"] == 0.0
    assert seen["kl_coefficient"] == pytest.approx(ppo_rl.COEFFICIENT)
    wanted = {"value_error", "value_clip", "value_loss", "policy_loss", "explained_variance", "returns", "entropy"}
    assert wanted | {"reward", "length", "finished", "reward_length"} <= set(seen)
    assert seen["loss"] == pytest.approx(seen["policy_loss"] + ppo_rl.VALUE_FACTOR * seen["value_loss"], abs=1e-6)
    assert -1 <= seen["reward_length"] <= 1 and "perplexity" not in seen


@pytest.mark.parametrize("critic", [None, "critic"])
@pytest.mark.parametrize("lora", [False, True])
def test_warm_up_trains_the_critic_and_leaves_the_policy_to_the_bit(folder, tmp_path, critic, lora):
    options = {"critic": critic, "lora": lora, "warm_up": 2, "sgd": False, "lr": 1e-2}
    start = weights(fitted(folder, 1, **{**options, "lr": 1e-30})[0])
    saved = SaveAt({2: str(tmp_path / "warm.ckpt")}, weights)
    after = weights(fitted(folder, 3, callbacks=[saved], **options)[0])
    warm = saved.said[2]
    for name, value in start.items():
        if name.startswith("policy."):
            assert torch.equal(value, warm[name]), name
    assert any(not torch.equal(value, warm[name]) for name, value in start.items() if not name.startswith("policy."))
    assert any(not torch.equal(value, after[name]) for name, value in start.items() if name.startswith("policy."))


def test_warm_up_leaves_the_coefficient_of_the_divergence(folder):
    assert fitted(folder, 2, warm_up=2)[0].kl.value == ppo_rl.COEFFICIENT
    assert fitted(folder, 2)[0].kl.value < ppo_rl.COEFFICIENT  # nothing lies between the two models yet


@pytest.mark.parametrize("lora", [False, True])
def test_law_5_the_reference_is_frozen_and_saved_nowhere(folder, tmp_path, lora):
    objective, trainer = fitted(folder, 2, lora=lora, lr=1.0)
    live = objective._reference.live
    assert (live is None) == lora
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert set(saved) == trained or not lora
    assert {"value_head.weight", "value_head.bias"} <= set(saved)
    assert all(name.startswith(("policy.", "value_head.")) for name in saved)
    if live is not None:
        start = tiny.make_model(18, tie=False, initializer_range=0.2).state_dict()
        assert not any(module.training for module in live.model.modules())
        own = {id(p) for p in objective.parameters()}
        assert not any(p.requires_grad or p.grad is not None or id(p) in own for p in live.model.parameters())
        for name, value in live.model.state_dict().items():
            assert torch.equal(value, start[name]), name


# ---- in four bits ----


class SaysA(Reward):
    """The share of an answer's words that are ``a``."""

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [one.text.split().count("a") / max(1, len(one.text.split())) for one in completions]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Models of 128 columns, which codes need on the CPU, whose answers end now and then."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = rl.word_tokenizer([*law.WORDS, "a"])
    tiny.save_folder(folder / "model", tokenizer, tie=False, hidden=128, initializer_range=0.1)
    torch.manual_seed(5)
    scored = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    scored.save_pretrained(folder / "critic")
    tokenizer.save_pretrained(folder / "critic")
    rl.write_rows(folder / "rows.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("critic", [None, "critic"])
def test_a_policy_in_four_bits_learns_and_its_codes_stay(wide, critic):
    """Adapters, and the critic's head, are all that moves; the reference is the base in its codes."""
    pytest.importorskip("bitsandbytes")
    seen: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            groups = pl_module.rollouts.buffer.groups
            seen.append(float(np.mean([answer.reward for group in groups for answer in group.answers])))

    how: dict[str, Any] = {"quantize": "nf4", "critic": critic, "sgd": False, "lr": 1e-2, "rewards": [SaysA()]}
    how |= {"kl": FixedKL(0.001), "normalise_rewards": True, "missing_end_penalty": 0.0, "rollout": {"group_size": 8}}
    start, _ = fitted(wide, 1, **{**how, "lr": 1e-30})
    objective, _ = fitted(wide, 24, callbacks=[Watch()], **how)
    assert np.mean(seen[-4:]) > 2 * np.mean(seen[:4]), seen
    before = {name: p.detach() for name, p in start.named_parameters()}
    coded = 0
    for name, p in objective.named_parameters():
        moved = not torch.equal(p, before[name])
        coded += p.dtype == torch.uint8
        assert moved == p.requires_grad, name
        assert p.requires_grad == (
            "lora_" in name or name.startswith("value_head") or "score.modules_to_save" in name
        ), name
    layers = 7 * 2 * (1 if critic is None else 2)  # projections of two layers, of policy and critic
    assert coded == layers
    assert objective._reference.live is None  # no second copy of the policy


# ---- checkpoints ----


STOPS: dict[str | None, list[int]] = {None: [1, 2, 3, 4, 5], "critic": [3]}
HALFWAY: dict[str, Any] = {"rollout": {"minibatches": 2, "epochs": 2}, "sgd": False, "lr": 1e-2}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> dict[str | None, tuple[Any, SaveAt]]:
    """By critic, six steps of which some were saved: the objective, and what it said of itself at each."""
    found = {}
    for critic, stops in STOPS.items():
        out = tmp_path_factory.mktemp("whole")
        saved = SaveAt({stop: str(out / f"{stop}.ckpt") for stop in stops}, said_of)
        found[critic] = fitted(folder, 6, critic=critic, callbacks=[saved], **HALFWAY)[0], saved
    return found


def said_of(objective: Any) -> dict[str, Any]:
    return {"normaliser": dict(objective.normaliser.state_dict()), "kl": {"value": objective.kl.value}}


@pytest.mark.parametrize(("critic", "stop"), [(critic, stop) for critic, stops in STOPS.items() for stop in stops])
def test_law_6_a_run_goes_on_in_the_middle_of_a_rollout(folder, whole, critic, stop):
    """Two steps of prompts, walked twice: stops fall between rollouts, between steps, and within the second walk."""
    ended, saves = whole[critic]
    saved = torch.load(saves.paths[stop], weights_only=True)
    assert bool(saved["rollout"]) == (stop != 4)
    assert {"normaliser": saved["ppo"]["normaliser"], "kl": saved["ppo"]["kl"]} == saves.said[stop]
    assert saved["ppo"]["normaliser"]["count"] >= 16 and saved["ppo"]["kl"]["value"] != ppo_rl.COEFFICIENT
    again, _ = fitted(folder, 6, critic=critic, resume=saves.paths[stop], **HALFWAY)
    for (name, one), other in zip(weights(ended).items(), weights(again).values(), strict=True):
        assert torch.equal(one, other), name
    assert said_of(ended) == said_of(again)


RESUMED: list[dict[str, Any]] = [
    {"name": "ddp", "strategy": "ddp", "stops": [1, 3]},
    {"name": "ddp-critic", "strategy": "ddp", "stops": [3], "critic": "critic"},
    {"name": "zero2", "strategy": "zero2", "stops": [1, 3]},
    {"name": "zero3", "strategy": "zero3", "stops": [3]},
]


@pytest.fixture(scope="module")
def resumed(folder) -> list[dict[str, Any]]:
    args = {"folder": str(folder), "cases": RESUMED}
    return run_ranks("tests.objectives.ppo_ranks:resumed", 2, args, timeout=240)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "stop"), [(case["name"], stop) for case in RESUMED for stop in case["stops"]])
def test_law_6_ranks_go_on_in_the_middle_of_a_rollout(resumed, name, stop):
    """Stops between the two steps of prompts, and within the second walk over them."""
    found = [rank[name][str(stop)] for rank in resumed]
    for rank in found:
        assert rank["distance"] < 1e-6
        assert rank["answers"] and rank["targets"] and rank["normaliser"] and rank["kl"]
    assert found[0]["moved"] > 1e-3  # the steps after the stop are worth something


@pytest.mark.parametrize(
    "options", [{}, {"critic": "critic"}, {"lora": True, "lr": 5.0}], ids=["head", "critic", "lora"]
)
def test_law_9_what_was_trained_is_the_policy_alone_in_a_plain_folder(folder, tmp_path, options):
    objective, _ = fitted(
        folder, 2, callbacks=[Export(console=False)], trainer={"default_root_dir": str(tmp_path)}, **options
    )
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, info = load(tmp_path / "export", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        objective.policy.eval()
        assert torch.allclose(loaded(ids).logits, objective.policy(ids).logits, atol=1e-5)
        start = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert not torch.allclose(loaded(ids).logits, start(ids).logits, atol=1e-4)


# ---- the supervised mix ----


def mix_of(folder: Path, rows: int = 6) -> Mix:
    _, data = ppo_rl.build(str(folder))
    return Mix(PTX(sources=[Source(path=f"{folder}/chats.jsonl")], rows=rows), data)


def test_every_conversation_comes_once_before_any_comes_again(folder):
    mix = mix_of(folder, rows=7)
    drawn = np.concatenate([mix.of_step(step) for step in range(20)])
    assert all(sorted(drawn[20 * k : 20 * k + 20]) == list(range(20)) for k in range(7))
    assert not np.array_equal(drawn[:20], drawn[20:40])
    assert np.array_equal(mix.of_step(3), mix_of(folder, rows=7).of_step(3))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 2), (4, 4)])
def test_a_step_s_conversations_are_dealt_once_whatever_the_split(folder, world_size, accumulate):
    """Also to more micro-batches than there are conversations: what only fills a place has no weight."""
    mix = mix_of(folder)
    parts = [
        mix.batch(5, micro, rank, world_size=world_size, accumulate=accumulate)
        for micro in range(accumulate)
        for rank in range(world_size)
    ]
    trained = []
    for part in parts:
        assert part.rows is not None
        owned = torch.zeros(len(part.rows)).index_add_(0, part.document_ids.flatten(), part.loss_mask.flatten())
        trained += part.rows[owned > 0].tolist()
    assert sorted(trained) == sorted(mix.of_step(5).tolist())
    weight = sum(float(part.loss_mask.sum()) for part in parts)
    assert weight == pytest.approx(float(parts[0].window_weight)) and weight > 0


def test_the_mix_lowers_the_loss_of_its_conversations(folder):
    seen: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if "train/ptx_loss" in trainer.callback_metrics:
                seen.append(float(trainer.callback_metrics["train/ptx_loss"]))

    fitted(folder, 12, ptx=True, plain=True, callbacks=[Watch()])
    assert np.mean(seen[-3:]) < 0.9 * np.mean(seen[:3])
    _, trainer = fitted(folder, 1, ptx=True, warm_up=1)
    assert "train/ptx_loss" not in trainer.callback_metrics  # it would train the policy


# ---- what a person may get wrong ----


ONE = ModelSpec(name="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": PolicyLoss(kind="grpo")}, r"model.loss.kind is grpo; PPO clips .* dapo"),
        ({"loss": PolicyLoss(kind="cispo")}, r"model.loss.kind is cispo"),
        ({"loss": PolicyLoss(kl=0.1), "kl": FixedKL(0.1)}, r"model.loss.kl is 0.1 and model.kl is set.*count twice"),
        ({"rollout": Rollout(refill=2)}, r"model.rollout.refill is 2"),
        ({"rollout": Rollout(mask_truncated=True), "missing_end_penalty": 1.0}, r"mask_truncated leaves out"),
        ({"warm_up": 3, "optimizer": Optimizer(weight_decay=0.1)}, r"model.warm_up is 3 and .*decay would move"),
        ({"warm_up": -1}, r"model.warm_up must be 0 or more"),
        ({"discount": 1.1}, r"model.discount must be in \[0, 1\], got 1.1"),
        ({"decay": -0.1}, r"model.decay must be in \[0, 1\]"),
        ({"value_clip": 0.0}, r"model.value_clip must be above 0, or null"),
        ({"value_factor": 0.0}, r"model.value_factor must be above 0.*would not learn"),
        ({"missing_end_penalty": -1.0}, r"model.missing_end_penalty .* 0 or more"),
        ({"normalise_rewards": -2.0}, r"model.normalise_rewards must be true, false, or a clip above 0"),
        ({"critic": ModelSpec(name="./nowhere")}, r"no folder './nowhere'"),
        ({"critic": ModelSpec(name="x", adapter=LoRA(dropout=0.1))}, r"model.critic.adapter.dropout is 0.1"),
        ({"critic": ModelSpec(name="x", quantize="nf4")}, r"model.critic.quantize nf4 without an adapter"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PPO(ONE, [rl.Echo()], **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(PTX, sources=[]), r"model.ptx.sources is empty"),
        (partial(PTX, sources=[Source(path="a")], factor=0.0), r"model.ptx.factor must be above 0"),
        (partial(PTX, sources=[Source(path="a")], rows=0), r"model.ptx.rows must be 1 or more"),
    ],
)
def test_a_mix_that_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_clip_is_ppo_s_own_unless_another_is_set():
    assert PPO(ONE, [rl.Echo()]).policy_loss.form[-2:] == (0.2, 0.2)
    assert PPO(ONE, [rl.Echo()], loss=PolicyLoss(entropy=0.1)).policy_loss.form[-2:] == (0.2, 0.2)
    assert PPO(ONE, [rl.Echo()], loss=PolicyLoss(clip_low=0.1)).policy_loss.form[-2:] == (0.1, 0.1)
    assert PPO(ONE, [rl.Echo()], loss=PolicyLoss(clip_high=0.3)).policy_loss.form[-2:] == (0.2, 0.3)


def test_a_critic_of_another_vocabulary_is_refused(folder):
    tiny.save_folder(folder / "other", rl.word_tokenizer(law.WORDS[::-1]), tie=False)
    with pytest.raises(ValueError, match=r"has another vocabulary than the policy: id 2 is 'the' to the policy and"):
        fitted(folder, critic="other")


def test_a_run_folder_stands_for_its_export(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(folder / "critic")
    objective = PPO(ONE, [rl.Echo()], critic=ModelSpec(name=str(tmp_path / "run")))
    assert objective.critic_spec is not None
    assert objective.critic_spec.name == str(tmp_path / "run" / "export") and objective.critic_spec.head == "scalar"


def test_reward_and_length_are_correlated_by_sums():
    x, y = np.array([0.1, 0.5, 0.2, 0.9]), np.array([3.0, 7.0, 9.0, 12.0])
    sums = torch.tensor([4, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()], dtype=torch.float64)
    assert correlation(sums) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlation(torch.tensor([3.0, 3.0, 6.0, 3.0, 14.0, 6.0])) is None  # one reward for all
    assert correlation(torch.tensor([1.0, 0.5, 4.0, 0.25, 16.0, 2.0])) is None


def test_a_loss_with_its_own_divergence_needs_no_coefficient_in_the_reward(folder):
    objective, trainer = fitted(folder, 2, plain=True, loss=PolicyLoss(kl=0.2))
    seen = trainer.callback_metrics
    assert float(seen["train/reference_kl"]) > 0 and "train/kl_coefficient" not in seen
    assert float(seen["train/sequence_kl"]) != 0 and objective.kl is None
