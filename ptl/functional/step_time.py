"""How long an optimizer step takes, by arithmetic on stated rates: compute, memory traffic, communication, overlap.

Four clocks run: the matrix products (operations over the sustained rate), attention (its own rate), the element-wise
kernels and the optimizer (bytes over bandwidth), and the network (bytes over the slowest link of a ring). The first
three add up. The network hides behind them as far as the strategy lets it, and slows them by ``contention`` where it
does. A host that cannot launch kernels fast enough sets a floor. Nothing is fitted: see ``plan_rates``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ptl.functional.flops import training_flops
from ptl.functional.model_size import ModelSize
from ptl.functional.plan_job import Job, Strategy
from ptl.functional.plan_rates import Rates

_EAGER_KERNELS = 130
"""Kernels of a layer of transformers, forward and backward, as a profiler counts them for Llama; 45 where fused."""
_FUSED_KERNELS = 45
_LORA_KERNELS = 70
"""More of them for the seven adapters of a layer."""
_HOOK_SECONDS = 2.5e-3
"""Host time of ZeRO-3's hooks for one layer, forward and backward: some ten modules, each fetched and released."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank, and what they come to.

    Attributes:
        products, attention, elementwise, optimizer, frozen, offload: where the device's and the bus's time goes;
            ``frozen`` is the forward pass of a teacher or reference.
        network: communication of the step, hidden or not; ``exposed`` the part that is waited for.
        host: least time that the host needs to launch the step's kernels.
        waiting: for the slowest of many nodes.
        step: all of it.
        sent: bytes that a rank sends in a step.
        tokens_per_second: of one device.
        mfu: operations that the model needs over the device's dense peak.
    """

    products: float
    attention: float
    elementwise: float
    optimizer: float
    frozen: float
    offload: float
    network: float
    exposed: float
    host: float
    waiting: float
    step: float
    sent: float
    tokens_per_second: float
    mfu: float


def step_time(job: Job, strategy: Strategy, rates: Rates) -> StepTime:
    """The time of a step, without generation where the objective samples answers."""
    peak = rates.peak32 if job.precision == "fp32" else rates.peak
    products, attention, elementwise = (part * job.accumulate for part in _compute(job, rates, peak))
    frozen = _frozen(job, rates, peak) * job.accumulate
    optimizer, offload = _update(job, strategy, rates)
    busy = products + attention + elementwise + frozen
    network, tail, sent = _network(job, strategy, rates)
    # What can hide needs compute to hide behind, and slows it; the rest is waited for.
    hidden = min(network - tail, busy)
    exposed = network - hidden
    host = _host(job, strategy, rates) * job.accumulate
    device = busy + rates.contention * hidden + exposed
    slowest = max(device, host)
    waiting = slowest * rates.jitter * math.log2(max(1, job.nodes))
    step = slowest + waiting + optimizer + offload
    tokens = job.tokens * job.accumulate
    return StepTime(
        products=products,
        attention=attention,
        elementwise=elementwise,
        optimizer=optimizer,
        frozen=frozen,
        offload=offload,
        network=network,
        exposed=exposed,
        host=host,
        waiting=waiting,
        step=step,
        sent=sent,
        tokens_per_second=tokens / step,
        mfu=model_flops(job) * job.accumulate / step / peak,
    )


def model_flops(job: Job) -> float:
    """Operations that a micro-batch needs: recomputation not counted, causality not discounted (``flops``)."""
    needed = training_flops(job.model.shape(job.rank), job.work) * (2 if job.critic else 1)
    if job.teacher is not None:
        needed += training_flops(job.teacher.shape(None), job.work) / 3
    return needed


def _compute(job: Job, rates: Rates, peak: float) -> tuple[float, float, float]:
    """Seconds of a micro-batch in products, attention and element-wise kernels, forward and backward."""
    model, work = job.model, job.work
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[job.checkpointing]
    flops = training_flops(model.shape(job.rank), work._replace(pairs=0.0))
    # Recomputation is another forward pass of the layers; a quantised base is dequantised in each pass.
    flops += again * 2 * model.active_body * work.tokens
    products = flops / (peak * rates.matmul)
    if job.quantize:
        passes = 2 + again
        products += passes * model.linear * 2.5 / (rates.bandwidth * rates.stream)
    # Causal attention: half of the square; backward 2.5 times forward. Selective policies keep its result.
    forward = 2 * model.query * model.layers * work.pairs
    attention = forward * (3.5 + (1.0 if job.checkpointing == "full" else 0.0)) / (peak * rates.attention)
    layers = model.layers * _layer_bytes(job) * (3 + (1.0 if again else 0.0))
    # The head's logits are read and written six times in chunks, in fp32.
    head = 24.0 * model.vocab * work.head_tokens / job.tokens
    elementwise = job.tokens * (layers + head) / (rates.bandwidth * rates.stream)
    share = 2 if job.critic else 1
    return products * share, attention * share, elementwise * share


def _layer_bytes(job: Job) -> float:
    """Bytes that element-wise kernels of one layer move for a token, forward; backward moves about twice as many.

    Eager, from the code of transformers' Llama with 16-bit activations: a norm makes six kernels through fp32 (36 bytes
    an entry), rotary embedding ten (20), SiLU and product 10, an addition 6. Fused: 4, 4, 6 and 6. A product's own
    operands are in its rate. An adapter reads its layer's input and adds to its output.
    """
    model = job.model
    norm, rotary, act, add = (4, 4, 6, 6) if job.fused else (36, 20, 10, 6)
    inner = model.inner * (model.active if model.experts else 1)
    moved = 2.0 * (norm + add) * model.hidden + rotary * (model.query + model.kv) + act * inner
    if job.rank is not None:
        inputs = 3 * model.hidden + model.query + 2 * model.hidden + inner
        outputs = model.query + 2 * model.kv + 2 * model.hidden + 2 * inner
        moved += 2 * inputs + (4 if job.fused else 12) * outputs
    return moved * job.compute_bytes / 2


def _frozen(job: Job, rates: Rates, peak: float) -> float:
    """Seconds of the forward pass of what is frozen beside the policy."""
    model = job.teacher if job.teacher is not None else _own_reference(job)
    if model is None:
        return 0.0
    flops = 2 * (model.active_body + model.embedding) * job.tokens
    attention = 2 * model.query * model.layers * job.work.pairs
    seconds = flops / (peak * rates.matmul) + attention / (peak * rates.attention)
    bare = replace(job, model=model, rank=None)
    return seconds + job.tokens * model.layers * _layer_bytes(bare) / (rates.bandwidth * rates.stream)


def _own_reference(job: Job) -> ModelSize | None:
    return job.model if job.objective in ("dpo", "ppo") and job.teacher is None else None


def _update(job: Job, strategy: Strategy, rates: Rates) -> tuple[float, float]:
    """Seconds of the optimizer on the device, and of an offloaded one with its transfers.

    AdamW reads weight, gradient and two moments and writes three, in fp32; clipping reads the gradients once more.
    """
    share = job.trained() * (2 if job.critic else 1) / (job.world if strategy.stage else 1)
    if not strategy.offload_optimizer:
        return share * 32 / (rates.bandwidth * rates.stream), 0.0
    ranks = min(job.world, job.per_node)
    transfers = share * (4 + job.compute_bytes) / rates.host_link
    offload = share * 32 * ranks / rates.host_memory + transfers
    if strategy.offload_parameters:
        passes = 2 * job.accumulate
        offload += passes * job.model.parameters / job.world * job.compute_bytes / rates.host_link
    return 0.0, offload


def _network(job: Job, strategy: Strategy, rates: Rates) -> tuple[float, float, float]:
    """Seconds of communication of a step, those that nothing hides, and the bytes that a rank sends."""
    n = job.world
    if n == 1:
        return 0.0, 0.0, 0.0
    width = job.compute_bytes
    around = (n - 1) / n
    gradients = job.trained() * (2 if job.critic else 1) * width
    weights = job.model.parameters * (2 if job.critic else 1) * width
    bandwidth = ring_bandwidth(job, rates)
    hops = rates.latency * (min(n, job.per_node) + 2 * job.nodes)
    if strategy.stage == 3:
        # Each micro-batch gathers the weights for both passes and scatters the gradients; the first layer's gather
        # and the last one's scatter have nothing to hide behind.
        sent = job.accumulate * around * (2 * weights + gradients)
        messages = job.accumulate * 3 * job.model.layers
        tail = job.accumulate * around * (weights + gradients) / job.model.layers / bandwidth
    elif strategy.stage in (1, 2):
        # Gradients are scattered (stage 2: each micro-batch) and the new weights gathered after the step, exposed.
        rounds = job.accumulate if strategy.stage == 2 else 1
        scattered = around * gradients * rounds * (1 if strategy.stage == 2 else 2)
        sent = scattered + around * gradients
        messages = rounds * job.model.layers + 1
        tail = around * gradients / bandwidth
    else:
        sent = 2 * around * job.trained() * (2 if job.critic else 1) * (4 if job.weights == "fp32" else 2)
        messages = job.model.layers
        tail = sent / job.model.layers / bandwidth
    if job.teacher is not None and job.teacher_sharded:
        sent += job.accumulate * around * job.teacher.parameters * width
        messages += job.accumulate * job.teacher.layers
    return sent / bandwidth + messages * hops, tail, sent


def ring_bandwidth(job: Job, rates: Rates) -> float:
    """Bytes a second that a rank sends in a ring: the slower of the link and of the node's ports.

    A ring passes a node once in and once out, and NCCL makes one ring a port, so a node's ports work together.
    """
    if job.nodes == 1:
        return rates.link
    return min(rates.link, rates.network * rates.network_share * min(job.world, job.per_node))


def _host(job: Job, strategy: Strategy, rates: Rates) -> float:
    """Seconds that the host needs to launch a micro-batch."""
    kernels = _FUSED_KERNELS if job.fused else _EAGER_KERNELS
    kernels += _LORA_KERNELS if job.rank is not None else 0
    kernels *= 1.33 if job.checkpointing != "none" else 1.0
    layers = job.model.layers * (2 if job.critic else 1)
    hooks = _HOOK_SECONDS if strategy.hooks else 0.0
    return layers * (kernels * rates.launch + hooks)
