"""The table of answers: on disk for every rank, and in W&B."""

from __future__ import annotations

import json

import lightning as L
import pytest

from ptl.callbacks.completions import Completions
from ptl.rollout.evaluation import Evaluation
from tests.objectives import law, rl


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from lightning.pytorch.loggers import WandbLogger

    folder, out = rl.make_folder(tmp_path_factory.mktemp("completions")), tmp_path_factory.mktemp("run")
    L.seed_everything(7, verbose=False)
    objective, data = rl.build(
        str(folder), micro=4, data={"val_fraction": 0.3}, evaluation=Evaluation(samples=2, threshold=0.2)
    )
    logger = WandbLogger(project="ptl", save_dir=out, offline=True)
    trainer = law.trainer_of(
        str(out),
        *("auto", 1, 1),
        max_epochs=1,
        max_steps=2,
        callbacks=[Completions(per_rollout=6)],
        logger=logger,
        val_check_interval=2,
    )
    trainer.fit(objective, datamodule=data)
    logger.experiment.finish()
    return out


def test_rows_say_what_was_asked_said_rewarded_and_how_it_compared(run):
    path = next(run.rglob("completions/rank0.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [row for row in rows if row["stage"] == "train"]
    assert len(trained) == 2 * 6 and {row["step"] for row in trained} == {1, 2}
    for row in trained:
        assert row["prompt"] and row["expected"] and row["origin"].startswith(str(row["origin"].split(":")[0]))
        assert row["rewards"]["vowels"] == row["reward"] and row["status"] in ("ok", "truncated")
        assert row["advantage"] is not None and row["tokens"] >= 1
    assert any(row["advantage"] > 0 for row in trained) and any(row["advantage"] < 0 for row in trained)
    held_out = [row for row in rows if row["stage"] == "val"]
    assert held_out and all(row["advantage"] is None for row in held_out)


def test_the_table_is_in_the_wandb_run(run):
    tables = list(run.rglob("*completions*.table.json"))
    assert tables
    table = json.loads(tables[-1].read_text())
    assert table["columns"][:4] == ["step", "stage", "prompt", "completion"] and len(table["data"]) >= 12


@pytest.mark.parametrize("options", [{"every_n_rollouts": -1}, {"per_rollout": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="every_n_rollouts 0 or more and per_rollout 1 or more"):
        Completions(**options)
