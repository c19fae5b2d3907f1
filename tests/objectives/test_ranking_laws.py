"""Reward modelling and DPO: one update for every split, layout, strategy and number of answers. SGD, as always."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.objectives import law, ranking
from tests.ranks import run_ranks

CUTS = [
    {"name": "1x1x8", "accumulate": 1, "micro": 8},
    {"name": "1x4x2", "accumulate": 4, "micro": 2},
    {"name": "1x8x1-whole", "accumulate": 8, "micro": 1, "share": False},
    {"name": "1x4x2-padded", "accumulate": 4, "micro": 2, "layout": "padded"},
]
SPLITS = {
    strategy: {"name": f"{strategy}-2x{k}x{m}", "strategy": strategy, "world_size": 2, "accumulate": k, "micro": m}
    for strategy, k, m in (("ddp", 2, 2), ("zero2", 2, 2), ("zero3", 1, 4))
}


def cases(objective: str, of: list[dict[str, Any]], suffix: str = "", **options: Any) -> list[dict[str, Any]]:
    one = {"strategy": "auto", "world_size": 1}
    return [
        {**one, **case, "objective": objective, "name": f"{objective}{suffix}-{case['name']}", **options} for case in of
    ]


REWARD, DPO = (cases(objective, [*CUTS, *SPLITS.values()]) for objective in ("reward", "dpo"))
HELD = [
    *cases("dpo", CUTS[:1], "-other", reference="reference"),
    *cases("dpo", [SPLITS["zero3"]], "-other", reference="reference", placement="sharded"),
]
ADAPTED = [
    *cases("reward", [CUTS[0], SPLITS["ddp"], SPLITS["zero3"]], "-lora", lora=True),
    *cases("dpo", [CUTS[0], SPLITS["zero2"], SPLITS["zero3"]], "-lora", lora=True),
]
PARTIAL = [
    *cases("reward", [CUTS[0], SPLITS["zero3"]], "-partial", rows="partial.jsonl"),
    *cases("dpo", [CUTS[0], SPLITS["ddp"]], "-partial", rows="partial.jsonl"),
]
ALL = [*REWARD, *DPO, *HELD, *ADAPTED, *PARTIAL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ranking.make_folder(tmp_path_factory.mktemp("ranking"))


@pytest.fixture(scope="module")
def reward_results(folder, tmp_path_factory) -> Path:
    return run_cases(folder, tmp_path_factory.mktemp("reward"), "reward")


@pytest.fixture(scope="module")
def dpo_results(folder, tmp_path_factory) -> Path:
    return run_cases(folder, tmp_path_factory.mktemp("dpo"), "dpo")


@pytest.fixture(scope="module")
def results(request) -> dict[str, Path]:
    """The weights after each case, by objective."""
    return {name: request.getfixturevalue(f"{name}_results") for name in ("reward", "dpo")}


def run_cases(folder: Path, out: Path, objective: str) -> Path:
    """Runs all cases of an objective, in one start for each number of ranks."""
    common = {"folder": str(folder), "out": str(out)}
    for world_size in (1, 2):
        own = [case for case in ALL if case["world_size"] == world_size and case["objective"] == objective]
        run_ranks("tests.objectives.ranking:run", world_size, {**common, "cases": own}, timeout=280)
    return out


@pytest.fixture(scope="module")
def rendered(folder) -> list[dict[str, Any]]:
    """The rows with each answer's ids and where it begins, by the template and not by our renderer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        chats = [[*row["prompt"], {"role": "assistant", "content": answer}] for answer in row["completions"]]
        row["ids"] = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
        start = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        row["start"] = len(start)
    return rows


def reference_update(rendered, order, model, loss_of_row, lr) -> tuple[np.ndarray, np.ndarray]:
    """Weights before and after the obvious loop: one prompt at a time, sum over the window over its prompts, SGD."""
    import torch

    def weights() -> np.ndarray:
        return law.flat({k: v.detach() for k, v in model.state_dict(keep_vars=True).items() if v.requires_grad})

    before = weights()
    for step in range(law.STEPS):
        window = [rendered[i] for i in order[8 * step : 8 * step + 8]]
        (sum(loss_of_row(row) for row in window) / len(window)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
                parameter.grad = None
    return before, weights()


@pytest.fixture(scope="module")
def in_order(folder) -> list[int]:
    """The rows in the order in which the data module deals them, found by their index."""
    _, data = ranking.build(str(folder))
    data.prepare()
    order = [int(batch.tokens.rows[0]) for batch in data.train_dataloader()]
    assert sorted(order) == list(range(8 * law.STEPS))
    return order


def pairs_loss(values, ranks, beta: float = 1.0):
    """The mean over the ranked pairs of a prompt, ties as half, written out."""
    import torch

    losses = []
    for i in range(len(ranks)):
        for j in range(i):
            if ranks[i] is None or ranks[j] is None:
                continue
            d = beta * (values[i] - values[j])
            p = torch.sigmoid(d if ranks[i] <= ranks[j] else -d)
            losses.append(-p.log() if ranks[i] != ranks[j] else -(p.log() + (1 - p).log()) / 2)
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def reward_reference(folder, rendered, in_order):
    import torch
    from transformers import AutoModelForSequenceClassification

    load: dict[str, Any] = {"num_labels": 1, "attn_implementation": "eager"}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "scored", **load).double()

    def loss(row):
        states = [model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in row["ids"]]
        return pairs_loss([model.score(state)[0] for state in states], row["ranks"])

    return reference_update(rendered, in_order, model, loss, ranking.LR["reward"])


def dpo_reference_of(folder, rendered, order, name):
    import torch
    from transformers import AutoModelForCausalLM

    def load(of):
        return AutoModelForCausalLM.from_pretrained(folder / of, attn_implementation="eager").double()

    model, held_to = load("model"), load(name).requires_grad_(False)

    def logprob(of, ids, start):
        logp = of(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logp[t - 1, ids[t]] for t in range(start, len(ids) - 1))  # the last line feed is the template's

    def loss(row):
        own = [logprob(model, ids, row["start"]) - logprob(held_to, ids, row["start"]) for ids in row["ids"]]
        return pairs_loss(own, row["ranks"], ranking.BETA)

    return reference_update(rendered, order, model, loss, ranking.LR["dpo"])


@pytest.fixture(scope="module")
def dpo_reference(folder, rendered, in_order):
    return dpo_reference_of(folder, rendered, in_order, "model")


@pytest.fixture(scope="module")
def held_reference(folder, rendered, in_order):
    return dpo_reference_of(folder, rendered, in_order, "reference")


def error(after: np.ndarray, reference: tuple[np.ndarray, np.ndarray]) -> float:
    before, expected = reference
    return float(np.linalg.norm(after - expected) / np.linalg.norm(expected - before))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [case["name"] for case in REWARD])
def test_law_1_the_update_of_a_reward_model_equals_the_obvious_loop(name, reward_results, reward_reference):
    """Traps 7 and 9 of the distillation page: nothing goes past the wrapper, and denominators, with SGD."""
    assert error(np.load(reward_results / f"{name}.npy"), reward_reference) < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [case["name"] for case in DPO])
def test_law_1_the_update_of_dpo_equals_the_obvious_loop(name, dpo_results, dpo_reference):
    assert error(np.load(dpo_results / f"{name}.npy"), dpo_reference) < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [case["name"] for case in HELD])
def test_law_1_a_reference_of_another_model_replicated_or_sharded(name, dpo_results, held_reference):
    assert error(np.load(dpo_results / f"{name}.npy"), held_reference) < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [case["name"] for case in ADAPTED if case["world_size"] == 2])
def test_law_1_the_update_of_an_adapter_and_its_head_is_the_same(name, results):
    objective = name.split("-")[0]
    one, other = (np.load(results[objective] / f"{of}.npy") for of in (f"{objective}-lora-1x1x8", name))
    assert one.shape == other.shape
    assert float(np.linalg.norm(other - one) / np.linalg.norm(one)) < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [case["name"] for case in PARTIAL if case["world_size"] == 2])
def test_law_7_ranks_walk_together_through_a_last_window_that_is_not_full(name, results):
    """Five prompts for two ranks and two micro-batches, with answers in other numbers on each rank."""
    objective = name.split("-")[0]
    one, other = (np.load(results[objective] / f"{of}.npy") for of in (f"{objective}-partial-1x1x8", name))
    assert float(np.linalg.norm(other - one) / np.linalg.norm(one)) < 1e-5


def test_law_1_a_mean_over_pairs_would_be_another_update(rendered):
    """The prompts have from one to ten pairs: the control of the tests above."""
    ranked = [sum(rank is not None for rank in row["ranks"]) for row in rendered]
    pairs = [math.comb(n, 2) for n in ranked]
    assert min(pairs) == 1 and max(pairs) == 10 and {2, 3, 4, 5} <= {len(row["ranks"]) for row in rendered}
