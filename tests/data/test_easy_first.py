"""Prompts from easy to hard: the order, that a stop does not change it, and rows without a rate."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from ptl.data.easy_first import easiest_first
from ptl.data.module import ChatDataModule
from ptl.data.prompts import PromptView
from ptl.data.sources import Source
from ptl.data.views import ChatView
from ptl.types import PromptBatch
from tests.data.chats import data_module, make_trainer
from tests.data.test_resume import SaveAndStop
from tests.ranks import rank, run_ranks, world_size

ROWS = 23
RATES = (0.5, 0.0, 1.0, 0.25)


def write_rated(path: Path, count: int = ROWS, rates: tuple[Any, ...] = RATES, start: int = 0) -> Path:
    """Different questions; neighbours have different rates, and several rows the same one. None leaves it out."""
    with path.open("w") as file:
        for i in range(start, start + count):
            rated = {} if rates[i % len(rates)] is None else {"pass_rate": rates[i % len(rates)]}
            file.write(json.dumps({"question": f"What is {i}?", "answer": str(i), **rated}) + "\n")
    return path


def rates_of(rows: list[int]) -> list[float]:
    return [RATES[row % len(RATES)] for row in rows]


@pytest.fixture(scope="module")
def rated(tmp_path_factory) -> Path:
    return write_rated(tmp_path_factory.mktemp("rated") / "rated.jsonl")


def module(path: Path, model: Path, windows: int = 1, passes: int = 1, **settings: Any) -> ChatDataModule:
    data = data_module(path, model, **{"seed": 3, "easy_first": True, "micro_batch_size": 2, **settings})
    data.bind(view=PromptView(room=8, windows=windows, passes=passes), tokenizer=None)
    return data


class Asked(L.LightningModule):
    """Notes the rows that this rank is asked at each optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps: list[list[int]] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> torch.Tensor:
        turn = batch.turn
        assert turn is not None
        if turn.micro == 0:
            self.steps.append(batch.rows[turn.windows == turn.window].tolist())
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def asked(folder: Path, data: ChatDataModule, resume: Path | None = None, **trainer: Any) -> list[list[int]]:
    model = Asked()
    make_trainer(folder, **{"max_epochs": 2, **trainer}).fit(
        model, datamodule=data, ckpt_path=resume, weights_only=False
    )
    return model.steps


def flat(steps: list[list[int]]) -> list[int]:
    return list(itertools.chain(*steps))


# ---- the order ----


def test_equals_keep_the_order_of_the_walk():
    rates, walk = np.array([0.5, 1.0, 0.5, 0.0, 1.0]), np.array([4, 3, 2, 1, 0])
    assert easiest_first(rates, walk).tolist() == [4, 1, 2, 0, 3]
    assert easiest_first(np.zeros(5), walk).tolist() == walk.tolist()


def test_law_8_each_epoch_asks_every_row_once_the_easiest_first(tmp_path, rated, model_folder):
    steps = asked(tmp_path, module(rated, model_folder, micro_batch_size=1))
    one, other = steps[:ROWS], steps[ROWS:]
    for epoch in (one, other):
        rows = flat(epoch)
        assert sorted(rows) == list(range(ROWS))
        assert rates_of(rows) == sorted(rates_of(rows), reverse=True)
        assert rows != sorted(rows, key=lambda row: (-RATES[row % len(RATES)], row))  # equals are shuffled
    assert one != other
    reseeded = flat(asked(tmp_path, module(rated, model_folder, micro_batch_size=1, seed=4), max_epochs=1))
    assert reseeded != flat(one) and rates_of(reseeded) == rates_of(flat(one))


def test_without_shuffle_equals_stay_as_they_were_made(tmp_path, rated, model_folder):
    steps = asked(tmp_path, module(rated, model_folder, micro_batch_size=1, shuffle=False))
    rows = sorted(range(ROWS), key=lambda row: (-RATES[row % len(RATES)], row))
    assert flat(steps) == rows + rows


def test_weighted_sources_are_mixed_by_rate(tmp_path, model_folder):
    half = write_rated(tmp_path / "half.jsonl", 8, rates=(0.75,))
    whole = write_rated(tmp_path / "whole.jsonl", 8, rates=(1.0, 0.5), start=100)
    train = [Source(path=str(whole)), Source(path=str(half), weight=0.5)]
    data = module(half, model_folder, train=train, micro_batch_size=1)
    rows = flat(asked(tmp_path, data))
    assert len(rows) == 2 * (8 + 4) and len(set(rows)) == 16  # two epochs of a half see all of it
    for epoch in (rows[:12], rows[12:]):
        assert [row % 2 if row < 8 else 2 for row in epoch] == [0] * 4 + [2] * 4 + [1] * 4


def test_held_out_rows_are_left_out_and_need_no_order(tmp_path, rated, model_folder):
    data = module(rated, model_folder, val_fraction=0.3, micro_batch_size=1)
    rows = flat(asked(tmp_path, data, max_epochs=1, limit_val_batches=0))
    held = [int(row) for batch in data.val_dataloader() for row in batch.rows]
    assert held == sorted(held) and sorted(rows + held) == list(range(ROWS))
    assert rates_of(rows) == sorted(rates_of(rows), reverse=True)


# ---- stopped and gone on ----


@pytest.mark.parametrize(
    ("windows", "passes", "accumulate", "stop"),
    [(1, 1, 1, 5), (1, 1, 2, 3), (1, 1, 1, 12), (2, 2, 1, 3), (2, 2, 1, 27)],
)
def test_law_6_a_killed_run_goes_on_exactly(tmp_path, rated, model_folder, windows, passes, accumulate, stop):
    def data() -> ChatDataModule:
        return module(rated, model_folder, windows, passes)

    whole = asked(tmp_path, data(), accumulate_grad_batches=accumulate)
    saving = {"accumulate_grad_batches": accumulate, "callbacks": [SaveAndStop(stop, tmp_path / "stop.ckpt")]}
    first = asked(tmp_path, data(), **saving)
    again = asked(tmp_path, data(), tmp_path / "stop.ckpt", accumulate_grad_batches=accumulate)
    assert len(first) == stop and first + again == whole


@pytest.mark.parametrize(("before", "after", "micro"), [(1, 3, 1), (2, 1, 4), (1, 1, 5)])
def test_law_6_on_other_sizes(tmp_path, rated, model_folder, before, after, micro):
    order = flat(asked(tmp_path, module(rated, model_folder, micro_batch_size=1)))
    saving = {"accumulate_grad_batches": before, "callbacks": [SaveAndStop(3, tmp_path / "stop.ckpt")]}
    first = asked(tmp_path, module(rated, model_folder), **saving)
    data = module(rated, model_folder, micro_batch_size=micro)
    second = asked(tmp_path, data, tmp_path / "stop.ckpt", accumulate_grad_batches=after)
    done = 2 * before * 3
    assert [sorted(step) for step in first] == [sorted(order[i : i + 2 * before]) for i in range(0, done, 2 * before)]
    assert second[0] == sorted(order[done : done + after * micro], key=second[0].index)
    assert sorted(flat(second)[: ROWS - done]) == sorted(order[done:ROWS])
    assert rates_of(flat(second))[ROWS - done :] != [] and len(flat(first)) + len(flat(second)) == 2 * ROWS


def ask_on_ranks(rated: str, model: str, folder: str, stop: int) -> dict[str, Any]:
    """Runs in each rank process: is asked up to a stop."""
    data = module(Path(rated), Path(model))
    data.prepare()
    saving = {"callbacks": [SaveAndStop(stop, Path(folder) / "ranks.ckpt")]}
    steps = asked(Path(folder), data, devices=world_size(), strategy="ddp", **saving)
    return {"rank": rank(), "steps": steps}


@pytest.mark.timeout(400)
def test_law_6_and_7_two_ranks_then_one(tmp_path, rated, model_folder):
    """Two gloo ranks share each step and stop together; one process goes on where they stopped."""
    order, stop = flat(asked(tmp_path, module(rated, model_folder, micro_batch_size=1))), 3
    args = {"rated": str(rated), "model": str(model_folder), "folder": str(tmp_path), "stop": stop}
    ranks = run_ranks("tests.data.test_easy_first:ask_on_ranks", 2, args, timeout=120)
    for step in range(stop):
        seen = [row for one in ranks for row in one["steps"][step]]
        assert sorted(seen) == sorted(order[4 * step : 4 * step + 4]) and len(ranks[0]["steps"][step]) == 2
    second = asked(tmp_path, module(rated, model_folder), tmp_path / "ranks.ckpt")
    assert [sorted(step) for step in second[:3]] == [sorted(order[i : i + 2]) for i in (12, 14, 16)]
    assert sorted(flat(second)) == sorted(order[4 * stop :])


@pytest.mark.parametrize("change", ["rates", "setting"])
def test_a_checkpoint_of_another_order_is_refused_inside_an_epoch(tmp_path, model_folder, change):
    path = write_rated(tmp_path / "rated.jsonl")
    asked(tmp_path, module(path, model_folder), callbacks=[SaveAndStop(3, tmp_path / "stop.ckpt")])
    if change == "rates":
        write_rated(path, rates=(0.5, 0.0, 1.0, 0.75))
    with pytest.raises(ValueError, match=r"easy_first [0-9a-f]+ -> .*data\.easy_first \(with the same rates\)"):
        asked(tmp_path, module(path, model_folder, easy_first=change == "rates"), tmp_path / "stop.ckpt")


def test_a_checkpoint_from_before_the_setting_goes_on(tmp_path, rated, model_folder):
    """Its position has no ``easy_first``; that of a run without the setting is None."""
    whole = asked(tmp_path, module(rated, model_folder, easy_first=False))
    first = asked(
        tmp_path, module(rated, model_folder, easy_first=False), callbacks=[SaveAndStop(3, tmp_path / "stop.ckpt")]
    )
    checkpoint = torch.load(tmp_path / "stop.ckpt", weights_only=False)
    assert checkpoint["ChatDataModule"].pop("easy_first") is None
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0].pop("easy_first")
    torch.save(checkpoint, tmp_path / "stop.ckpt")
    assert first + asked(tmp_path, module(rated, model_folder, easy_first=False), tmp_path / "stop.ckpt") == whole


# ---- what is refused ----


@pytest.mark.parametrize("rate", [None, "half", 1.5, True])
def test_rows_without_a_rate_are_refused_by_name(tmp_path, model_folder, rate):
    path = write_rated(tmp_path / "rated.jsonl", 6, rates=(0.5, 0.5, rate))
    told = rf"2 of 6 rows have none from 0 to 1, the first at {path}:3: .*remove data\.easy_first"
    with pytest.raises(ValueError, match=told):
        module(path, model_folder).prepare()
    module(path, model_folder, easy_first=False).prepare()


def test_a_renamed_column_and_text_are_rates(tmp_path, model_folder):
    path = tmp_path / "rated.csv"
    path.write_text("question,answer,solved\na,1,0.25\nb,1,0.75\n")
    train = [Source(path=str(path), columns={"pass_rate": "solved"})]
    assert flat(asked(tmp_path, module(path, model_folder, train=train, micro_batch_size=1), max_epochs=1)) == [1, 0]


def test_equal_questions_are_duplicates_whatever_their_rates(tmp_path, model_folder):
    path = tmp_path / "rated.jsonl"
    rows = [{"question": "a", "answer": "1", "pass_rate": rate} for rate in (0.25, 0.75)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert module(path, model_folder).audits["train"].sources[0].duplicates == 1


def test_other_objectives_have_no_easy_rows(rated, model_folder):
    data = data_module(rated, model_folder, easy_first=True)
    with pytest.raises(ValueError, match="learns from Conversation records: remove data.easy_first"):
        data.bind(view=ChatView(), tokenizer=None)
