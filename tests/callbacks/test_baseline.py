"""The first validation row is the untrained model's."""

import pytest
import torch

from ptl.callbacks.baseline import Baseline
from ptl.callbacks.jsonl import read_metrics
from ptl.callbacks.record import RunRecord
from tests.callbacks.parts import Toy, loader, packed, trainer

BATCHES = [packed([8, 8], trained=4, seed=i) for i in range(6)]


def test_the_loss_before_training_is_the_first_row(tmp_path):
    torch.manual_seed(0)
    model = Toy()
    with torch.no_grad():
        expected = sum(model.loss(batch).item() for batch in BATCHES[:2]) / 2
    options = {"num_sanity_val_steps": -1, "val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 4}
    fit = trainer(tmp_path, [Baseline(), RunRecord(tmp_path)], **options)
    fit.fit(model, loader(BATCHES), loader(BATCHES[:2]))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "val/loss" in row]
    assert [row["step"] for row in rows] == [0, 1, 3]
    assert rows[0]["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[1]["val/loss"] != rows[0]["val/loss"]


def test_a_part_of_the_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got trainer\.num_sanity_val_steps 2: set it to -1"):
        trainer(tmp_path, [Baseline()], num_sanity_val_steps=2).fit(Toy(), loader(BATCHES), loader(BATCHES[:2]))
