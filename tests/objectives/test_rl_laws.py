"""GRPO: one update for every split, layout, strategy and loss, from the sampling to the weights. SGD, as always."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.objectives import law, rl
from tests.ranks import run_ranks

LR = 0.5
SPLITS = [
    {"name": "1x4x2", "accumulate": 4, "micro": 2},
    {"name": "1x8x1-whole", "accumulate": 8, "micro": 1, "share": False},
    {"name": "1x4x2-padded", "accumulate": 4, "micro": 2, "layout": "padded"},
    {"name": "ddp-2x2x2", "strategy": "ddp", "world_size": 2, "accumulate": 2, "micro": 2},
    {"name": "zero1-2x1x4", "strategy": "zero1", "world_size": 2, "accumulate": 1, "micro": 4},
    {"name": "zero2-2x2x2", "strategy": "zero2", "world_size": 2, "accumulate": 2, "micro": 2},
    {"name": "zero3-2x1x4", "strategy": "zero3", "world_size": 2, "accumulate": 1, "micro": 4},
]
WHOLE = {"name": "1x8", "accumulate": 1, "micro": 8}
FEW = [SPLITS[3]]
OLD = {"minibatches": 2, "epochs": 2, "steps": 6}
KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "dapo": ({}, SPLITS),
    "grpo-kl": ({"kind": "grpo", "kl": 0.3}, [SPLITS[0], SPLITS[3], SPLITS[6]]),
    "held": ({"kl": 0.3, "reference": "reference"}, [SPLITS[0]]),
    "held-sharded": ({"kl": 0.3, "reference": "reference", "placement": "sharded"}, [SPLITS[6]]),
    "dr_grpo": ({"kind": "dr_grpo", "scale": "none", "lr": 10.0}, FEW),
    "bnpo": ({"kind": "bnpo"}, FEW),
    "gspo": ({"kind": "gspo"}, FEW),
    "cispo": ({"kind": "cispo"}, FEW),
    "rloo": ({"kind": "rloo", "baseline": "leave_one_out", "scale": "none", "lr": 2.0}, FEW),
    "batch": ({"baseline": "batch", "scale": "batch"}, FEW),
    "old": (OLD, [SPLITS[0], SPLITS[3], SPLITS[6]]),
    "entropy": ({"loss": {"entropy": 0.05}}, FEW),
    "refill": ({"coarse": True, "rollout": {"refill": 2, "group_size": 2}}, FEW),
    "masked": ({"rollout": {"mask_truncated": True}}, FEW),
    "partial": ({"rows": "partial.jsonl"}, [SPLITS[0], SPLITS[3], SPLITS[6]]),
    "lora": ({"lora": True, "kl": 0.3, "lr": 3.0}, [SPLITS[3], SPLITS[6]]),
}


def cases_of(world_size: int, out: Path) -> list[dict[str, Any]]:
    cases = []
    for kind, (options, splits) in KINDS.items():
        sharded = options.get("placement") == "sharded"
        for split in [*([] if sharded else [WHOLE]), *splits]:
            case = {"strategy": "auto", "world_size": 1, **options, **split, "name": f"{kind}-{split['name']}"}
            if split is WHOLE:
                case["record"] = str(out / f"{kind}.jsonl")
            if case["world_size"] == world_size:
                cases.append(case)
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return rl.make_folder(tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> Path:
    """The weights after each case, and what was sampled in those on one rank in one piece."""
    out = tmp_path_factory.mktemp("rl-results")
    for world_size in (1, 2):
        args = {"folder": str(folder), "out": str(out), "cases": cases_of(world_size, out)}
        run_ranks("tests.objectives.rl:run", world_size, args, timeout=420)
    return out


# ---- the obvious loop, in fp64 ----


def reference_weights(folder: Path, results: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights before and after, by a loop that takes one answer at a time and knows nothing of batches or ranks."""
    import torch
    from transformers import AutoModelForCausalLM

    options = KINDS[kind][0]
    how = {"kind": "dapo", "kl": 0.0, "baseline": "group", "scale": "group", **options}

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager").double()

    model, held = load("model"), load(options.get("reference", "model")).requires_grad_(False)

    def logits(of: Any, prompt: list[int], answer: list[int]) -> Any:
        out = of(input_ids=torch.tensor([prompt + answer])).logits[0]
        return out[len(prompt) - 1 : -1].log_softmax(-1)

    before = rl.flat_weights(model)
    for line in (results / f"{kind}.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        groups = rollout["groups"]
        advantages = obvious_advantages(groups, how["baseline"], how["scale"])
        mask_truncated = options.get("rollout", {}).get("mask_truncated", False)
        old = {}
        for group in groups:
            for k, answer in enumerate(group["answers"]):
                picked = logits(model, group["prompt"], answer).gather(1, torch.tensor(answer)[:, None])[:, 0]
                old[group["position"], k] = picked.detach()
        for _ in range(options.get("epochs", 1)):
            for window in range(rollout["count"]):
                members = [group for group in groups if group["window"] == window]
                total, weight = torch.zeros((), dtype=torch.float64), 0.0
                for group in members:
                    kept = [k for k in range(len(group["answers"])) if group["finished"][k] or not mask_truncated]
                    of_group = sum(len(group["answers"][k]) for k in kept)
                    for k in kept:
                        answer = group["answers"][k]
                        logp = logits(model, group["prompt"], answer)
                        own = logp.gather(1, torch.tensor(answer)[:, None])[:, 0]
                        losses = obvious_losses(
                            own, old[group["position"], k], advantages[group["position"], k], how["kind"]
                        )
                        if how["kl"]:
                            there = logits(held, group["prompt"], answer).gather(1, torch.tensor(answer)[:, None])[:, 0]
                            ratio = (own - old[group["position"], k]).exp()
                            k3 = (there - own).exp() - (there - own) - 1
                            losses = losses + how["kl"] * ratio * k3
                        if options.get("loss", {}).get("entropy"):
                            losses = losses + options["loss"]["entropy"] * (logp.exp() * logp).sum(-1)
                        share, counted = obvious_weight(how["kind"], len(answer), of_group, 12)
                        total, weight = total + share * losses.sum(), weight + counted
                (total / weight).backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= options.get("lr", LR) * parameter.grad
                        parameter.grad = None
    return before, rl.flat_weights(model)


def obvious_advantages(groups: list[dict[str, Any]], baseline: str, scale: str) -> dict[tuple[int, int], float]:
    every = np.array([reward for group in groups for reward in group["rewards"]])
    out = {}
    for group in groups:
        rewards = np.array(group["rewards"])
        for k, reward in enumerate(rewards):
            others = np.delete(rewards, k)
            middle = {"group": rewards.mean(), "leave_one_out": others.mean(), "batch": every.mean()}[baseline]
            spread = {"group": rewards.std(ddof=1), "batch": every.std(ddof=1), "none": 1.0}[scale]
            equal = np.ptp(rewards) < 1e-6
            out[group["position"], k] = 0.0 if equal and baseline != "batch" else (reward - middle) / max(spread, 1e-4)
    return out


def obvious_losses(own: Any, old: Any, advantage: float, kind: str) -> Any:
    import torch

    log_ratio = own - old
    if kind == "gspo":
        log_ratio = log_ratio.mean().expand(len(own))
    if kind == "rloo":
        log_ratio = log_ratio.sum().expand(len(own))
    ratio = log_ratio.exp()
    low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}.get(kind, (0.2, 0.2))
    inside = ratio.clamp(1 - low, 1 + high)
    if kind == "cispo":
        return -inside.detach() * advantage * own
    return -torch.minimum(ratio * advantage, inside * advantage)


def obvious_weight(kind: str, length: int, of_group: int, longest: int) -> tuple[float, float]:
    """The factor of an answer's tokens, and what the answer adds to the divisor."""
    if kind in ("dapo", "cispo"):
        return 1.0, float(length)
    if kind == "dr_grpo":
        return 1 / longest, 1.0
    if kind == "bnpo":
        return 1 / of_group, length / of_group
    return 1 / length, 1.0


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
@pytest.mark.parametrize(
    "kind", [kind for kind, (options, _) in KINDS.items() if "lora" not in options and "placement" not in options]
)
def test_law_1_the_update_equals_the_obvious_loop(kind, results, references):
    """Trap 11: the loss is divided once, by what its kind says, whatever the lengths."""
    assert error(np.load(results / f"{kind}-1x8.npy"), references(kind)) < 1e-5


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "split"),
    [(kind, split["name"]) for kind, (options, splits) in KINDS.items() for split in splits if "lora" not in options],
)
def test_law_1_the_update_is_the_same_however_the_step_is_cut(kind, split, results, references):
    """Traps 1, 10 and 11 of the GRPO page: accumulation under ZeRO, whole groups on a rank, and one normalisation.

    Each split samples for itself: that its update is the same says that its answers were.
    """
    whole = "held" if kind == "held-sharded" else kind
    assert error(np.load(results / f"{kind}-{split}.npy"), references(whole)) < 1e-5


@pytest.mark.timeout(900)
@pytest.mark.parametrize("split", [split["name"] for split in KINDS["lora"][1]])
def test_law_1_the_update_of_an_adapter_is_the_same(split, results):
    one, other = (np.load(results / f"lora-{of}.npy") for of in ("1x8", split))
    assert float(np.linalg.norm(other - one) / np.linalg.norm(one)) < 1e-5


@pytest.mark.timeout(900)
def test_law_1_the_answers_are_ragged_and_some_are_cut(results):
    """The control of the tests above: lengths, ends, signals and substitutes are all there."""

    def rollouts(kind: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (results / f"{kind}.jsonl").read_text().splitlines()]

    groups = [group for rollout in rollouts("dapo") for group in rollout["groups"]]
    lengths = {len(answer) for group in groups for answer in group["answers"]}
    finished = [done for group in groups for done in group["finished"]]
    assert len(rollouts("dapo")) == law.STEPS and len(rollouts("old")) == 2
    assert len(lengths) > 6 and any(finished) and not all(finished)
    asked = [[group["prompt"] for group in rollouts(kind)[0]["groups"]] for kind in ("dapo", "refill")]
    assert len(asked[0]) == len(asked[1]) == 8 and asked[0] != asked[1]
