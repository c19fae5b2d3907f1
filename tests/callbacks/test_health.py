"""A loss that is no number stops the run, on every rank; gradient norms are the ones before clipping."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.health import DivergedError, Health
from ptl.callbacks.jsonl import read_metrics
from ptl.callbacks.saved import latest_checkpoint
from tests.callbacks.parts import Toy, loader, packed, trainer


def strict(**options) -> Health:
    """Ends the run at the first step that is left out."""
    return Health(max_skipped_in_a_row=1, max_rewinds=0, **options)


BATCHES = [packed([8, 8], trained=4, seed=i) for i in range(8)]


def test_trap_scale_a_loss_that_is_not_finite_stops_and_names_its_step(tmp_path):
    words = r"loss is not finite since optimizer step 3 \(seen at step 5;.*model\.optimizer\.lr"
    with pytest.raises(DivergedError, match=words):
        trainer(tmp_path, [strict(every_n_steps=5)], max_steps=8).fit(Toy(bad_step=3), loader(BATCHES))


def test_a_run_that_has_to_stop_saves_no_more(tmp_path):
    callbacks = [strict(every_n_steps=100), Checkpoint(every_n_train_steps=2)]
    with pytest.raises(DivergedError, match=r"since optimizer step 3 \(seen at step 4;"):
        trainer(tmp_path, callbacks).fit(Toy(bad_step=3), loader(BATCHES))
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step=00000002.ckpt"
    assert all(t.isfinite().all() for t in torch.load(newest)["state_dict"].values())


def test_a_loss_that_breaks_after_the_last_look_is_not_overlooked(tmp_path):
    with pytest.raises(DivergedError, match="since optimizer step 6"):
        trainer(tmp_path, [strict(every_n_steps=5)]).fit(Toy(bad_step=6), loader(BATCHES))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_norm_is_the_one_before_clipping(tmp_path, accumulate):
    norms = []

    class Measure(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.cat(grads).norm()))

    fit = trainer(
        tmp_path,
        [Health(every_n_steps=2), Measure()],
        max_steps=4,
        gradient_clip_val=1e-3,
        accumulate_grad_batches=accumulate,
    )
    fit.fit(Toy(), loader(BATCHES))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "health/grad_norm" in row]
    assert [row["step"] for row in rows] == [1, 3]
    assert [row["health/grad_norm"] for row in rows] == pytest.approx([norms[1], norms[3]], rel=1e-5)
    assert norms[1] > 1e-2


def test_bad_arguments():
    with pytest.raises(ValueError, match="every_n_steps"):
        Health(every_n_steps=0)
