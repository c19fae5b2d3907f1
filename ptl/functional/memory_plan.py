"""How much memory a rank takes at its peak, part by part, by arithmetic: nothing is allocated.

A step has three moments that can be the highest: the end of a forward pass (all activations, and the gradients that the
last window left, which are let go only before the backward pass), the end of a backward pass (all gradients and the
buffers that reduce them), and the update (what ZeRO flattens and gathers). Each is a sum of parts; the highest is
reported. The bytes of saved activations are those that autograd saves in transformers' Llama, counted tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ptl.functional.model_size import ModelSize
from ptl.functional.plan_job import STRATEGIES, Job, Strategy
from ptl.functional.plan_rates import Rates

_MIB = 2**20
NF4 = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a weight in nf4: half a byte, a scale of a byte for 64 weights, and that one's own scale for 256 blocks."""
LIBRARIES = 560 * _MIB
"""Resident memory of a CPU process with Python, torch, transformers and Lightning, before any tensor: what a run of a
model of a hundred thousand weights takes (558 MiB with the pinned versions on Linux)."""
ENGINE = 28 * _MIB
"""What DeepSpeed and a process group add to it: the same run on two ranks of ZeRO-2 takes 586 MiB."""
_CHUNK = {False: 64 * _MIB, True: 256 * _MIB}
"""Bytes of a chunk of logits of the fused loss on a CPU and on a GPU: ``ptl.functional.head.CHUNK_BYTES``."""
_DDP_BUCKET = 25 * _MIB
_SMALL_BUCKET = 10_000_000
_LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered before it releases any: DeepSpeed's ``stage3_max_live_parameters``."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a rank, by part; ``host`` is what all ranks of a node hold together beside their devices.

    On a CPU everything is the rank's own and in ``device``.
    """

    device: Mapping[str, float]
    host: Mapping[str, float]

    @property
    def device_total(self) -> float:
        return sum(self.device.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


def memory_plan(job: Job, strategy: Strategy, rates: Rates) -> Memory:
    """The parts of a rank's peak."""
    state, host = _state(job, strategy)
    phases = (
        _end_of_forward(job, strategy),
        _end_of_backward(job, strategy),
        *_update(job, strategy),
    )
    peak = {**state, **max(phases, key=lambda parts: sum(parts.values()))}
    if job.cuda:
        peak["driver and libraries"] = rates.context
        tensors = sum(peak.values())
        peak["fragments of the allocator"] = rates.unusable * tensors
        ranks = min(job.world, job.per_node)
        return Memory(_without_zeros(peak), _without_zeros({k: v * ranks for k, v in host.items()}))
    peak = {"libraries": LIBRARIES + (ENGINE if strategy.stage else 0.0), **peak}
    for name, value in host.items():
        if name != "libraries":
            peak[name] = peak.get(name, 0.0) + value
    return Memory(_without_zeros(peak), {})


def fits(job: Job, strategy: Strategy, rates: Rates, *, host_memory: float | None = None, margin: float = 0.05) -> bool:
    """Whether the peak leaves ``margin`` of the device's memory free, and of the host's where that is known.

    Arguments:
        job: what is trained.
        strategy: how its state is cut.
        rates: of the device; ``memory`` is its size.
        host_memory: bytes of a node's host.
        margin: share in [0, 1).
    """
    found = memory_plan(job, strategy, rates)
    on_host = host_memory is None or found.host_total <= host_memory * (1 - margin)
    return found.device_total <= rates.memory * (1 - margin) and on_host


def frozen_bytes(model: ModelSize, *, dtype_bytes: int = 2, ranks: int = 1, tokens: int = 4096) -> float:
    """Bytes that a frozen model takes on each of ``ranks`` devices that share it, running ``tokens`` forward.

    Its share of the weights, the weights that are gathered while it runs, and the widest layer's activations.
    """
    weights = dtype_bytes * model.parameters
    gathered = dtype_bytes * min(model.parameters, _LIVE) if ranks > 1 else 0
    return weights / ranks + gathered + tokens * dtype_bytes * (4 * model.hidden + 3 * model.inner)


def largest_micro_batch(job: Job, strategy: Strategy, rates: Rates, *, margin: float = 0.05) -> int:
    """Most rows of a micro-batch that fit, 0 where not one does."""
    most = 0
    for step in (2**power for power in range(12, -1, -1)):  # the peak grows with the rows
        if fits(replace(job, micro_batch=most + step), strategy, rates, margin=margin):
            most += step
    return most


def strategies(world: int) -> tuple[Strategy, ...]:
    """Those to choose from: cutting nothing over one rank is no strategy, but offloading is."""
    single = (Strategy("single"),)
    return STRATEGIES if world > 1 else single + tuple(s for s in STRATEGIES if s.offload_optimizer)


# ---- what lies there all the time ----


def weight_bytes(job: Job, strategy: Strategy) -> int:
    """Bytes of a trained weight as the products see it."""
    if strategy.stage:
        return job.compute_bytes
    return 4 if job.weights == "fp32" and job.precision != "bf16-true" else 2


def _state(job: Job, strategy: Strategy) -> tuple[dict[str, float], dict[str, float]]:
    """Weights, masters, optimizer states and frozen models: on a device, and on the host for one rank."""
    models, trained = (2 if job.critic else 1), job.trained() * (2 if job.critic else 1)
    width = weight_bytes(job, strategy)
    cut = job.world if strategy.stage == 3 else 1
    weights = float(_whole_weights(job, width) * models) / cut
    share = trained / job.world if strategy.stage else trained
    adapter = 4 if not strategy.stage and job.weights == "bf16" and job.rank is not None else width
    masters = 4.0 * share if strategy.stage else 0.0
    moments = 8.0 * share if strategy.stage or adapter == 4 else 4.0 * share
    frozen = _frozen(job, width)
    device = {"weights": weights, "fp32 master weights": masters, "optimizer states": moments, "frozen models": frozen}
    if job.rank is not None:
        device["adapter"] = float(trained * adapter) / cut
    host = {"libraries": float(LIBRARIES)}
    if strategy.offload_optimizer:
        host |= {k: device.pop(k) for k in ("fp32 master weights", "optimizer states")}
        # Of stages 1 and 2 also the new weights in the engine's dtype, and room for the largest gradient.
        copies = width * (share + job.model.embedding) if strategy.stage < 3 else 0.0
        sums = 4.0 * share if job.accumulate > 1 else 0.0
        host |= {"gradients": 4.0 * share + sums, "copies for the transfer": float(copies)}
    if strategy.offload_parameters:
        host["weights"] = device.pop("weights")
    return device, host


def _whole_weights(job: Job, width: int) -> float:
    if job.quantize:
        return job.model.linear * NF4 + (job.model.parameters - job.model.linear) * width
    return job.model.parameters * width


def _frozen(job: Job, width: int) -> float:
    model = job.teacher
    if model is None and job.objective in ("dpo", "ppo", "grpo") and job.rank is None:
        model = job.model  # the reference: the policy as it was
    if model is None:
        return 0.0
    return frozen_bytes(model, dtype_bytes=width, ranks=job.world if job.teacher_sharded else 1, tokens=job.tokens)


# ---- the three moments ----


def _end_of_forward(job: Job, strategy: Strategy) -> dict[str, float]:
    held = 0.0
    if not strategy.stage:
        held = _gradients(job, strategy)
    elif job.accumulate > 1 and not strategy.offload_optimizer:
        held = _kept_gradients(job, strategy)
    return {
        "gradients": held,
        "activations": activations(job, strategy),
        "head and loss": _head(job, strategy),
        "buffers of communication": _buckets(job, strategy, standing=True),
        "gathered weights": _gathered(job, strategy),
        "16-bit copies": _casts(job, strategy),
    }


def _end_of_backward(job: Job, strategy: Strategy) -> dict[str, float]:
    held = _kept_gradients(job, strategy) if strategy.stage >= 2 else _gradients(job, strategy)
    table = 0.0 if job.rank is not None else job.model.embedding * weight_bytes(job, strategy)
    return {
        "gradients": 0.0 if strategy.offload_optimizer else held,
        "embedding's gradient": float(table),
        "buffers of communication": _buckets(job, strategy, standing=False),
        "gathered weights": _gathered(job, strategy),
        "activations": _layer(job, strategy) * job.tokens,
    }


def _update(job: Job, strategy: Strategy) -> tuple[dict[str, float], ...]:
    """ZeRO flattens its part of the gradients in fp32 beside what the backward pass left of it, lets both go, and
    gathers the new weights: NCCL writes them in place, gloo makes a copy of all of them first."""
    if not strategy.stage:
        return ({"gradients": _gradients(job, strategy)},)
    if strategy.offload_optimizer:
        return ()
    trained = job.trained() * (2 if job.critic else 1)
    copied = strategy.stage < 3 and not job.cuda and job.world > 1
    left = _kept_gradients(job, strategy) if strategy.stage >= 2 else _gradients(job, strategy) / job.world
    return (
        {"gradients": left + 4.0 * trained / job.world},
        {"buffers of communication": float(job.compute_bytes * trained) if copied else 0.0},
    )


def _gradients(job: Job, strategy: Strategy) -> float:
    """Whole gradients, of the dtype of the weights that they belong to."""
    width = weight_bytes(job, strategy)
    if job.rank is not None and not strategy.stage and job.weights == "bf16":
        width = 4
    return float(job.trained() * (2 if job.critic else 1) * width)


def _kept_gradients(job: Job, strategy: Strategy) -> float:
    """A rank's part under ZeRO-2 and -3; fp32 where several micro-batches are summed."""
    width = 4 if job.accumulate > 1 else job.compute_bytes
    if strategy.stage < 2:
        return _gradients(job, strategy)
    return float(job.trained() * (2 if job.critic else 1) * width) / job.world


def _buckets(job: Job, strategy: Strategy, *, standing: bool) -> float:
    """DDP keeps its buckets, a second copy of the gradients; ZeRO makes two reduce buckets in the backward pass."""
    if strategy.stage == 0:
        return max(_gradients(job, strategy), 0.0) if job.world > 1 else 0.0
    if standing:
        return 0.0
    bucket = max(job.model.hidden**2, _SMALL_BUCKET)
    return 2.0 * min(bucket, job.trained()) * job.compute_bytes


def _gathered(job: Job, strategy: Strategy) -> float:
    if strategy.stage < 3:
        return 0.0
    whole = job.model.embedding * (1 if job.model.tied else 2)
    live = min(job.model.parameters, max(_LIVE, whole + job.model.layer))
    return float(live * job.compute_bytes) if job.world > 1 or strategy.offload_parameters else 0.0


def _casts(job: Job, strategy: Strategy) -> float:
    """16-bit copies of fp32 weights that autocast keeps until the backward pass has used them."""
    casts = not strategy.stage and job.precision == "bf16-mixed" and job.weights == "fp32"
    return 2.0 * (job.model.linear + job.model.embedding) if casts else 0.0


def activations(job: Job, strategy: Strategy) -> float:
    """Bytes that autograd keeps at the end of a forward pass."""
    model, layer = job.model, _layer(job, strategy)
    if job.checkpointing == "none":
        return job.tokens * layer * model.layers
    # The inputs of all layers, and one layer whole while it is done again.
    residual = 4 if not strategy.stage and job.weights == "fp32" and job.precision != "bf16-true" else job.compute_bytes
    kept = job.tokens * model.hidden * model.layers * residual
    part = 0.5 * layer * model.layers if job.checkpointing == "selective" else layer
    return kept + job.tokens * part


def _layer(job: Job, strategy: Strategy) -> float:
    """Bytes of one layer for a token, tensor by tensor.

    A norm computes in fp32 and keeps its input in it; a trained one also its normed value; what a trained matrix (or an
    adapter) multiplies is kept as it was multiplied. Under autocast over fp32 weights, and where fp32 adapters sit on a
    16-bit base, the five products that share an input each keep a 16-bit copy of it. Attention keeps query, key, value
    and output (on a CPU the output twice); SiLU and the products of the MLP four times its width.
    """
    model, a = job.model, job.compute_bytes
    lora, h = job.rank is not None, job.model.hidden
    engine = strategy.stage > 0 or job.precision == "bf16-true"
    mixed = job.precision == "bf16-mixed" and not engine
    if a == 4:
        norms = 2.0 * h * (8 if lora else 12)
    elif mixed and (job.weights == "fp32" or lora):
        norms = h * (8.0 if lora else 16.0) + 10.0 * h
    else:
        norms = 2.0 * h * (6 if lora else 8)
    outputs = 1 if job.cuda else 2
    attention = a * ((1 + outputs) * model.query + 2 * model.kv) + 4 * model.heads
    inner = model.inner * (model.active if model.experts else 1)
    ranks = 7 * job.rank * a if job.rank is not None else 0
    return norms + attention + a * (4 if model.gated else 2) * inner + 8 + ranks


def _head(job: Job, strategy: Strategy) -> float:
    """A chunk of logits with its fp32 working copies, and the gradients that the fused loss holds."""
    model, a = job.model, job.compute_bytes
    if job.objective == "reward":
        return 4.0 * job.tokens * model.hidden
    rows = min(job.tokens, max(64, _CHUNK[job.cuda] // (model.vocab * a)))
    chunk = float(rows * model.vocab * a)
    if job.cuda:
        chunk += rows * model.vocab * 4.0 * (1 + (a != 4))
    if job.objective == "distillation":
        chunk *= 2  # student's and teacher's
    weight = model.embedding * a if job.rank is None else 0
    return chunk + weight + job.tokens * model.hidden * a


def _without_zeros(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if value > 0}
