"""Tiny reward models and their rankings, for the tests of what becomes of a trained one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from ptl.data.groups import RankingView
from ptl.data.records import parse_row
from ptl.data.render import Renderer
from ptl.data.sources import Source
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.reward import RewardModeling
from ptl.types import Origin
from tests import tiny
from tests.objectives.law import WORDS


def ranking_rows(count: int = 12, seed: int = 0, answers: tuple[int, int] = (2, 5)) -> list[dict[str, Any]]:
    """Rankings of two to five answers of ragged lengths, without ties."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows = []
    for _ in range(count):
        k = rng.randint(*answers)
        ranks = rng.sample(range(1, k + 1), k)
        rows.append({"prompt": words(1, 8), "completions": [words(1, 14) for _ in range(k)], "ranks": ranks})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward_policy(folder: Path, *, spread: float = 0.3, seed: int = 0, **spec: Any) -> RewardModeling:
    """The objective with its policy built, and head and adapter moved, so that scores differ by some tenths."""
    torch.manual_seed(seed)
    objective = RewardModeling(ModelSpec(name=str(folder), **spec))
    objective.configure_model()
    with torch.no_grad():
        for name, parameter in objective.policy.named_parameters():
            if parameter.requires_grad and ("lora" in name or "score" in name):
                parameter.add_((spread if "score" in name else 0.02) * torch.randn_like(parameter))
    objective.policy.eval()
    return objective


LORA = {"adapter": LoRA(rank=4, alpha=8, init="gaussian")}


def examples(renderer: Renderer, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    records = [parse_row(row, "ranking", Source(path="x.jsonl"), Origin("x.jsonl", i)) for i, row in enumerate(rows, 1)]
    return [{**made[0], "source": 0} for made in RankingView().encode(records, renderer, 512, "error")]


def documents(found: list[dict[str, Any]]) -> list[list[int]]:
    """Every answer with its prompt, as ids."""
    out = []
    for example in found:
        ids, prefix = list(map(int, example["ids"])), int(example["prefix"])
        at = prefix
        for length in example["suffixes"]:
            out.append(ids[:prefix] + ids[at : at + int(length)])
            at += int(length)
    return out


@torch.no_grad()
def own_scores(objective: RewardModeling, found: list[dict[str, Any]], *, layout: str, share: bool) -> torch.Tensor:
    view = RankingView(share_prompt=share)
    return objective.scores(view.collate(found, layout=layout, pad_id=7, window_weight=1.0))


def save_base(folder: Path, tokenizer: Any = None, **model: Any) -> Path:
    return tiny.save_folder(folder, tokenizer or tiny.make_tokenizer(), **model)
