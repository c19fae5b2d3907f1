import itertools
import math

import pytest
import torch
from torch import nn

from ptl.models.optimizer import Optimizer, Schedule, parameter_groups


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.lora_A = nn.Linear(3, 1, bias=False)
        self.lora_B = nn.Linear(1, 2, bias=False)


def test_vectors_do_not_decay_and_lora_b_has_its_own_rate():
    groups = parameter_groups(Tiny().named_parameters(), 0.1, 0.5, lora_plus_ratio=16.0)
    by_shape = {tuple(p.shape): g for g in groups for p in g["params"]}
    assert by_shape[(2, 3)] == by_shape[(1, 3)]
    assert by_shape[(2, 3)]["weight_decay"] == 0.5 and by_shape[(2, 3)]["lr"] == 0.1
    assert by_shape[(2,)]["weight_decay"] == 0.0
    assert by_shape[(2, 1)]["lr"] == pytest.approx(1.6)


def test_every_trainable_parameter_is_in_one_group():
    model = Tiny()
    model.norm.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), 0.1, 0.0, lora_plus_ratio=None)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_nothing_trainable_is_refused():
    model = Tiny().requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.policy\.adapter"):
        Optimizer().build(model)


def test_lora_plus_without_lora_is_refused():
    with pytest.raises(ValueError, match="LoRA"):
        Optimizer().build(nn.Linear(2, 2), lora_plus_ratio=4.0)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adamw8bit"])
def test_every_kind_steps_downhill(kind):
    torch.manual_seed(0)
    model = nn.Linear(256, 64)
    optimizer = Optimizer(kind=kind, lr=1e-2).build(model)
    x, y = torch.randn(32, 256), torch.randn(32, 64)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_schedule_warms_up_and_ends_at_its_floor(kind):
    schedule = Schedule(kind=kind, warmup=10, floor=0.1)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
    assert max(factors) <= 1.0 and min(factors) > 0
    assert factors[100] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(factors[10:]))


def test_cosine_is_the_half_way_mean():
    schedule = Schedule(kind="cosine", warmup=0, floor=0.0)
    assert schedule.factor(50, 100) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)


@pytest.mark.parametrize(
    "arguments", [{"warmup": -1}, {"floor": 2.0}, {"decay": 0.0}], ids=["warmup", "floor", "decay"]
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Schedule(**arguments)
