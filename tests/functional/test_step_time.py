"""The predicted step: what must hold between strategies, devices and sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptl.functional.model_size import model_size
from ptl.functional.plan_job import STRATEGIES, Job, Strategy
from ptl.functional.plan_rates import DEVICES, rates_of
from ptl.functional.step_time import model_flops, ring_bandwidth, step_time

CONFIG = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
MODEL = model_size({**CONFIG, **HEADS})
SINGLE, ZERO = Strategy("single"), {s.name: s for s in STRATEGIES}
H100 = rates_of("h100")


def job(**changes) -> Job:
    return Job(**{"model": MODEL, "sequence": 4096, **changes})


def test_flops_follow_the_known_formula():
    tokens, weights = 4096, MODEL.parameters - MODEL.embedding  # the input embedding is no product
    norms = MODEL.layers * MODEL.norm + MODEL.last_norm
    products, attention = tokens * (weights - norms), 12 * MODEL.layers * 4096 * tokens**2
    assert model_flops(job()) == pytest.approx(6 * products + attention)
    assert model_flops(job(rank=8)) == pytest.approx(4 * products + 6 * tokens * MODEL.lora(8) + attention)


def test_no_device_beats_its_peak():
    for name in DEVICES:
        found = step_time(job(), SINGLE, rates_of(name))
        assert 0 < found.mfu < rates_of(name).matmul < 1


def test_recomputing_costs_a_forward_pass_of_the_layers():
    plain, again = (step_time(job(checkpointing=way), SINGLE, H100) for way in ("none", "full"))
    body = MODEL.active_body / (MODEL.active_body + MODEL.embedding)
    assert again.products / plain.products == pytest.approx(1 + body / 3)
    assert again.attention / plain.attention == pytest.approx(4.5 / 3.5)
    assert again.tokens_per_second < plain.tokens_per_second and again.mfu < plain.mfu


def test_bytes_sent_are_those_of_the_algorithms():
    around = 7 / 8
    whole = job(world=8, weights="fp32", accumulate=3)
    assert step_time(whole, ZERO["ddp"], H100).sent == pytest.approx(2 * around * 4 * MODEL.parameters)
    two = 2 * MODEL.parameters
    zero = job(world=8, accumulate=3)
    assert step_time(zero, ZERO["zero1"], H100).sent == pytest.approx(3 * around * two)
    assert step_time(zero, ZERO["zero2"], H100).sent == pytest.approx((3 + 1) * around * two)
    assert step_time(zero, ZERO["zero3"], H100).sent == pytest.approx(3 * 3 * around * two)


def test_a_slow_network_is_waited_for():
    across = job(world=16)
    fast, slow = step_time(across, ZERO["zero3"], H100), step_time(across, ZERO["zero3"], replace(H100, network=1e9))
    assert fast.exposed < 0.05 * fast.step and slow.exposed > 0.5 * slow.step
    assert ring_bandwidth(across, H100) == pytest.approx(min(H100.link, 8 * 50e9 * 0.85))
    assert ring_bandwidth(job(world=8), H100) == H100.link


def test_more_nodes_are_never_faster_for_a_device():
    speeds = [step_time(job(world=8 * n), ZERO["zero3"], H100).tokens_per_second for n in (1, 2, 8, 64, 128)]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] > 0.8 * speeds[0]


def test_accumulation_spreads_the_optimizer():
    one, eight = (step_time(job(accumulate=k), SINGLE, H100) for k in (1, 8))
    assert eight.optimizer == one.optimizer and eight.tokens_per_second > one.tokens_per_second


def test_a_teacher_and_offloading_cost_time():
    plain = step_time(job(world=8), ZERO["zero2"], H100)
    taught = step_time(job(world=8, teacher=MODEL, objective="distillation"), ZERO["zero2"], H100)
    assert 0.25 < taught.frozen / (plain.products + plain.attention + plain.elementwise) < 0.4
    assert step_time(job(world=8), ZERO["zero2-offload"], H100).step > plain.step


def test_rates_can_be_replaced_and_mistakes_are_named():
    assert rates_of("h100", {"matmul": 0.5}).matmul == 0.5
    for change, told in (
        ({"matmull": 0.5}, "matmull"),
        ({"matmul": "much"}, "matmul is 'much'"),
        ({"link": -1}, "link"),
    ):
        with pytest.raises(ValueError, match=told):
            rates_of("h100", change)
    with pytest.raises(ValueError, match="h1000"):
        rates_of("h1000")
