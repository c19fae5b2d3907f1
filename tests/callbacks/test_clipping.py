"""The norm that health takes is the one that gradients are clipped by: one pass over them, the same weights."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from ptl.callbacks.health import Health
from tests.callbacks.real import chat, make_inputs, sft
from tests.objectives.law import trainer_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("clipping"))


class Counts(Callback):
    """Counts the passes that take a norm in one step, and keeps the norm after clipping."""

    def __init__(self):
        self.passes, self.after, self.profiler = 0, [], profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.profiler.start() if batch_idx == 1 else None

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.after.append(float(torch.cat(grads).norm())) if grads else None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.profiler.stop()
            self.passes = sum(event.name == "aten::_foreach_norm" for event in self.profiler.events() or [])


def fitted(inputs, folder, *callbacks, **options):
    objective, data, counts = sft(inputs[0]), chat(*inputs), Counts()
    data.bind(view=objective.view, tokenizer=objective.spec.name)
    trainer_of(str(folder), "auto", 1, 1, callbacks=[*callbacks, counts], max_steps=4, **options).fit(objective, data)
    return [p.detach().clone() for p in objective.policy.parameters()], counts, objective


@pytest.mark.parametrize(
    "options", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
def test_the_weights_are_those_of_the_trainers_own_clipping(inputs, tmp_path, options):
    plain, own, _ = fitted(inputs, tmp_path / "plain", **options)
    watched, ours, objective = fitted(inputs, tmp_path / "watched", Health(), **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert own.after == ours.after and len(ours.after) >= 3
    if "gradient_clip_algorithm" not in options:
        assert own.after == pytest.approx([0.1] * len(own.after), rel=1e-4)  # it did clip
    assert objective.gradient_norm is None  # nothing stale is left for a step that nobody measures


def test_one_pass_over_the_gradients_serves_health_and_clipping(inputs, tmp_path):
    _, plain, _ = fitted(inputs, tmp_path / "plain", gradient_clip_val=0.1)
    _, watched, _ = fitted(inputs, tmp_path / "watched", Health(), gradient_clip_val=0.1)
    assert watched.passes == plain.passes > 0


def test_nothing_is_clipped_where_nothing_was_asked(inputs, tmp_path):
    plain, _, _ = fitted(inputs, tmp_path / "plain")
    watched, _, objective = fitted(inputs, tmp_path / "watched", Health())
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert objective.gradient_norm is None


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("how", ["norm", "value"])
def test_under_autocast_in_bf16_a_fused_optimizer_clips_as_one_that_is_not(inputs, tmp_path, how, watched):
    """Nothing scales the loss there, so that there is no reason to refuse it."""
    limit = 0.1 if how == "norm" else 1e-3
    options = {"precision": "bf16-mixed", "gradient_clip_val": limit, "gradient_clip_algorithm": how}
    callbacks = [Health()] if watched else []
    _, counts, objective = fitted(inputs, tmp_path / how, *callbacks, **options)
    optimizer = objective.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    entries = sum(p.numel() for p in objective.policy.parameters())
    assert len(counts.after) >= 3
    if how == "norm":
        assert counts.after == pytest.approx([limit] * len(counts.after), rel=1e-3)
    else:
        assert all(0 < norm <= limit * entries**0.5 for norm in counts.after)
