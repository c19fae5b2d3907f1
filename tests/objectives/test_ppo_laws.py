"""PPO: one update for every split, layout and strategy, from the sampling to the weights. SGD, as always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.objectives import law, ppo_rl, rl
from tests.ranks import run_ranks

WHOLE = {"name": "1x8", "accumulate": 1, "micro": 8}
CUT = {"name": "1x4x2", "accumulate": 4, "micro": 2}
PADDED = {**CUT, "name": "1x4x2-padded", "layout": "padded"}
DDP, ZERO1, ZERO2, ZERO3 = (
    {"name": f"{strategy}-2x{k}x{m}", "strategy": strategy, "world_size": 2, "accumulate": k, "micro": m}
    for strategy, k, m in (("ddp", 2, 2), ("zero1", 1, 4), ("zero2", 1, 4), ("zero3", 1, 4))
)
# Of three steps the second trains on answers of older weights, and the third on those of another rollout.
LATE: dict[str, Any] = {"rollout": {"minibatches": 2}}
KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "head": (LATE, [CUT, PADDED, DDP, ZERO1, ZERO2, ZERO3]),
    "twice": ({"rollout": {"epochs": 2, "temperature": 0.8}, "steps": 6, "lr": 0.2}, [CUT, ZERO3]),
    "critic": ({**LATE, "critic": "critic"}, [CUT, ZERO3]),
    "ptx": ({"ptx": True, "plain": True}, [CUT, DDP, ZERO3]),
    "partial": ({"rows": "partial.jsonl"}, [DDP, ZERO3]),
    "lora": ({"lora": True, "lr": 1.0}, [DDP, ZERO3]),
}


def cases_of(world_size: int, out: Path) -> list[dict[str, Any]]:
    cases = []
    for kind, (options, splits) in KINDS.items():
        for split in (WHOLE, *splits):
            case = {"strategy": "auto", "world_size": 1, **options, **split, "name": f"{kind}-{split['name']}"}
            if split is WHOLE:
                case["record"] = str(out / f"{kind}.jsonl")
            if case["world_size"] == world_size:
                cases.append(case)
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ppo_rl.make_folder(tmp_path_factory.mktemp("ppo"))


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> Path:
    """The weights after each case, and what was sampled in those on one rank in one piece."""
    out = tmp_path_factory.mktemp("ppo-results")
    for world_size in (1, 2):
        args = {"folder": str(folder), "out": str(out), "cases": cases_of(world_size, out)}
        run_ranks("tests.objectives.ppo_rl:run", world_size, args, timeout=300)
    return out


# ---- the obvious loop, in fp64 ----


class Obvious:
    """Policy, critic and reference in fp64, one answer at a time, without batches, ranks or buffers."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        def load(auto: Any, name: str, **how: Any) -> Any:
            return auto.from_pretrained(folder / name, attn_implementation="eager", **how).double()

        self.model = load(AutoModelForCausalLM, "model")
        self.held = load(AutoModelForCausalLM, "model").requires_grad_(False)
        self.plain, self.temperature = options.get("plain", False), options.get("rollout", {}).get("temperature", 1.0)
        if options.get("critic"):
            self.critic = load(AutoModelForSequenceClassification, options["critic"], num_labels=1)
        else:
            self.critic = torch.nn.Linear(32, 1).double()
            torch.nn.init.zeros_(self.critic.weight)
            torch.nn.init.zeros_(self.critic.bias)
        self.coefficient = 0.0 if self.plain else ppo_rl.COEFFICIENT
        self.rewards: list[float] = []

    def logprobs(self, of: Any, prompt: list[int], answer: list[int]) -> Any:
        import torch

        logits = of(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return (logits / self.temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]

    def values(self, prompt: list[int], answer: list[int]) -> Any:
        """Of the states before each token of the answer and after the last."""
        import torch

        trunk = getattr(self.critic, "model", None) or self.model.model
        states = trunk(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 :]
        head: Any = getattr(self.critic, "score", self.critic)
        return head(states)[:, 0]

    def score(self, reward: float, finished: bool) -> float:
        if self.plain:
            return reward
        scaled = (reward - np.mean(self.rewards)) / np.std(self.rewards, ddof=1)
        return float(np.clip(scaled, -ppo_rl.CLIP, ppo_rl.CLIP)) - (0.0 if finished else ppo_rl.PENALTY)

    def targets(self, rollout: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
        """What is known of each answer before the first update on the rollout."""
        import torch

        self.rewards += [reward for group in rollout["groups"] for reward in group["rewards"]]
        known, divergence = {}, []
        with torch.no_grad():
            for group in rollout["groups"]:
                for k, answer in enumerate(group["answers"]):
                    old = self.logprobs(self.model, group["prompt"], answer)
                    kl = old - self.logprobs(self.held, group["prompt"], answer)
                    said = self.values(group["prompt"], answer)
                    divergence.append(float(kl.sum()))
                    rewards = [float(-self.coefficient * x) for x in kl.tolist()]
                    rewards[-1] += self.score(group["rewards"][k], group["finished"][k])
                    after, carried = (0.0 if group["finished"][k] else float(said[-1])), 0.0
                    advantages = [0.0] * len(answer)
                    for t in reversed(range(len(answer))):
                        surprise = rewards[t] + ppo_rl.DISCOUNT * after - float(said[t])
                        carried = surprise + ppo_rl.DISCOUNT * ppo_rl.DECAY * carried
                        advantages[t], after = carried, float(said[t])
                    found = {"old": old, "values": said[:-1], "returns": torch.tensor(advantages) + said[:-1]}
                    known[group["position"], k] = {**found, "advantages": torch.tensor(advantages).double()}
        every = np.concatenate([of["advantages"].numpy() for of in known.values()])
        for of in known.values():
            of["advantages"] = (of["advantages"] - every.mean()) / every.std(ddof=1)
        if not self.plain:
            error = np.clip(np.mean(divergence) / ppo_rl.TARGET - 1, -0.2, 0.2)
            self.coefficient *= float(1 + error * min(len(divergence) / ppo_rl.HORIZON, 1.0))
        return known

    def answer_loss(self, group: dict[str, Any], k: int, of: dict[str, Any]) -> Any:
        """The sum over an answer's tokens."""
        import torch

        prompt, answer, clip = group["prompt"], group["answers"][k], ppo_rl.VALUE_CLIP
        total = torch.zeros((), dtype=torch.float64)
        own, values = self.logprobs(self.model, prompt, answer), self.values(prompt, answer)
        for t in range(len(answer)):
            ratio, advantage = (own[t] - of["old"][t]).exp(), of["advantages"][t]
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            kept = values[t].clamp(of["values"][t] - clip, of["values"][t] + clip)
            squares = torch.maximum((values[t] - of["returns"][t]) ** 2, (kept - of["returns"][t]) ** 2)
            total = total + ppo_rl.VALUE_FACTOR * squares / 2
        return total

    def supervised(self, batch: Any) -> Any:
        """The mean loss of a step's conversations."""
        total, ids, mask = 0.0, batch.input_ids[0], batch.loss_mask[0]
        for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
            logp = self.model(ids[None, begin:end]).logits[0, :-1].log_softmax(-1)
            own = logp.gather(1, ids[begin + 1 : end, None])[:, 0]
            total = total - (own * mask[begin + 1 : end]).sum()
        return total / float(batch.window_weight)

    def step(self, loss: Any, lr: float) -> None:
        import torch

        loss.backward()
        with torch.no_grad():
            for parameter in (*self.model.parameters(), *self.critic.parameters()):
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
                parameter.grad = None

    def weights(self) -> np.ndarray:
        return np.concatenate([rl.flat_weights(self.model), rl.flat_weights(self.critic)])


def reference_weights(folder: Path, results: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights before and after the obvious loop over what was sampled."""
    options = KINDS[kind][0]
    model, lr, steps = Obvious(folder, options), options.get("lr", ppo_rl.LR), 0
    before, mix = model.weights(), None
    if options.get("ptx"):
        from ptl.objectives.ptx import Mix

        objective, data = ppo_rl.build(str(folder), ptx=True)
        assert objective.ptx is not None
        mix = Mix(objective.ptx, data)
    for rollout in ppo_rl.rollouts_of(results / f"{kind}.jsonl"):
        known = model.targets(rollout)
        for _ in range(options.get("rollout", {}).get("epochs", 1)):
            for window in range(rollout["count"]):
                members = [
                    (group, k)
                    for group in rollout["groups"]
                    if group["window"] == window
                    for k in range(len(group["answers"]))
                ]
                tokens = sum(len(group["answers"][k]) for group, k in members)
                loss = sum(model.answer_loss(group, k, known[group["position"], k]) for group, k in members) / tokens
                if mix is not None:
                    batch = mix.batch(steps, 0, 0, world_size=1, accumulate=1)
                    loss = loss + ppo_rl.PTX_FACTOR * model.supervised(batch)
                model.step(loss, lr)
                steps += 1
    return before, model.weights()


@pytest.fixture(scope="module")
def references(folder, results):
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def of(kind: str) -> tuple[np.ndarray, np.ndarray]:
        if kind not in kept:
            kept[kind] = reference_weights(folder, results, kind)
        return kept[kind]

    return of


def error(after: np.ndarray, reference: tuple[np.ndarray, np.ndarray]) -> float:
    before, expected = reference
    return float(np.linalg.norm(after - expected) / np.linalg.norm(expected - before))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_law_1_the_update_equals_the_obvious_loop(kind, results, references):
    assert error(np.load(results / f"{kind}-1x8.npy"), references(kind)) < 1e-5


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "split"), [(kind, split["name"]) for kind in KINDS for split in KINDS[kind][1] if kind != "lora"]
)
def test_law_1_the_update_is_the_same_however_the_step_is_cut(kind, split, results, references):
    """Each split samples for itself: that its update is the same says that its answers and targets were."""
    assert error(np.load(results / f"{kind}-{split}.npy"), references(kind)) < 1e-5


@pytest.mark.timeout(900)
@pytest.mark.parametrize("split", [split["name"] for split in KINDS["lora"][1]])
def test_law_1_the_update_of_an_adapter_and_the_value_head_is_the_same(split, results):
    one, other = (np.load(results / f"lora-{of}.npy") for of in ("1x8", split))
    assert one.shape == other.shape
    assert float(np.linalg.norm(other - one) / np.linalg.norm(one)) < 1e-5


@pytest.mark.timeout(900)
def test_law_1_answers_are_ragged_some_are_cut_and_the_clips_are_reached(folder, results):
    """The control of the tests above: what they hold to the loop is all there."""
    import torch

    assert len(ppo_rl.rollouts_of(results / "head.jsonl")) == 2
    rollouts = ppo_rl.rollouts_of(results / "twice.jsonl")
    finished = [done for rollout in rollouts for group in rollout["groups"] for done in group["finished"]]
    lengths = {len(answer) for rollout in rollouts for group in rollout["groups"] for answer in group["answers"]}
    assert len(rollouts) == law.STEPS and len(lengths) > 6 and any(finished) and not all(finished)
    model = Obvious(folder, KINDS["twice"][0])
    moved, valued, scores, coefficients = [], [], [], [model.coefficient]
    for rollout in rollouts:
        known = model.targets(rollout)
        coefficients.append(model.coefficient)
        members = [(group, k) for group in rollout["groups"] for k in range(ppo_rl.GROUP)]
        scores += [model.score(group["rewards"][k], True) for group, k in members]
        tokens = sum(len(group["answers"][k]) for group, k in members)
        for _ in range(2):
            model.step(sum(model.answer_loss(g, k, known[g["position"], k]) for g, k in members) / tokens, 0.2)
            with torch.no_grad():
                for group, k in members:
                    of, prompt, answer = known[group["position"], k], group["prompt"], group["answers"][k]
                    moved.append(model.logprobs(model.model, prompt, answer) - of["old"])
                    valued.append(model.values(prompt, answer)[:-1] - of["values"])
    assert float((torch.cat(moved).exp() - 1).abs().max()) > 0.2
    assert float(torch.cat(valued).abs().max()) > ppo_rl.VALUE_CLIP
    assert max(map(abs, scores)) == ppo_rl.CLIP and len(set(coefficients)) == len(coefficients)
