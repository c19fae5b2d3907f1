"""The fused head and loss against a slow, obvious one that makes all the logits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptl.functional.cross_entropy import fused_linear_cross_entropy
from tests.gpu_parts import error, exact_products, on_gpu

N, H, V, R = 7, 5, 11, 2


def plain(
    hidden,
    weight,
    targets,
    loss_weights,
    bias=None,
    low_rank=None,
    softcap=None,
    logit_scale=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
) -> Tensor:
    """The loss as the docstring's formula reads."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if low_rank is not None:
        z = z + low_rank[0] @ low_rank[1].T
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, targets, reduction="none", label_smoothing=label_smoothing)
    return (loss_weights * (losses + z_loss * z.logsumexp(-1) ** 2)).sum()


def tensors(dtype=torch.float64, n=N, h=H, v=V, seed=0):
    """Hidden states, head, bias and low-rank pair with gradients; targets; weights that are not 0 and 1."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    hidden, weight, bias = make(n, h), make(v, h), make(v)
    low_rank = (make(n, R), make(v, R))
    targets = torch.randint(0, v, (n,), generator=g)
    loss_weights = torch.rand(n, generator=g) * 3 - 0.5
    return hidden, weight, bias, low_rank, targets, loss_weights


OPTIONS = [
    {"use_bias": b, "use_low_rank": r, "softcap": c, "logit_scale": s, "label_smoothing": e, "z_loss": z}
    for b, r, c, s, e, z in itertools.product(
        (False, True), (False, True), (None, 2.5), (1.0, 0.3), (0.0, 0.2), (0.0, 0.07)
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_value_and_gradients_equal_the_plain_loss(options):
    options = dict(options)
    hidden, weight, bias, low_rank, targets, loss_weights = tensors()
    given = {
        "bias": bias if options.pop("use_bias") else None,
        "low_rank": low_rank if options.pop("use_low_rank") else None,
        **options,
    }
    leaves = [hidden, weight, bias, *low_rank]
    fused = fused_linear_cross_entropy(hidden, weight, targets, loss_weights, chunk_tokens=3, metrics=True, **given)
    got = torch.autograd.grad(fused.total * 0.7, leaves, allow_unused=True)
    reference = plain(hidden, weight, targets, loss_weights.double(), **given)
    expected = torch.autograd.grad(reference * 0.7, leaves, allow_unused=True)
    torch.testing.assert_close(fused.total, reference, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, expected):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Again(torch.autograd.Function):
    """``gradcheck`` runs backward many times through one graph; this makes a fresh one each time."""

    @staticmethod
    def forward(ctx, total, *leaves):
        ctx.total, ctx.leaves = total, leaves
        return total(*leaves).detach()

    @staticmethod
    def backward(ctx, *grad_outputs):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.leaves]
            grads = torch.autograd.grad(ctx.total(*leaves), leaves, grad_outputs[0])
        return None, *grads


@pytest.mark.parametrize("chunk", [1, 4, N, None])
@pytest.mark.parametrize("metrics", [False, True])
def test_gradcheck(chunk, metrics):
    hidden, weight, bias, low_rank, targets, loss_weights = tensors()

    def total(h, w, b, reduced, up):
        return fused_linear_cross_entropy(
            h,
            w,
            targets,
            loss_weights,
            bias=b,
            low_rank=(reduced, up),
            softcap=3.0,
            logit_scale=0.5,
            label_smoothing=0.1,
            z_loss=0.01,
            chunk_tokens=chunk,
            metrics=metrics,
        ).total

    def fresh(*leaves):
        return Again.apply(total, *leaves)

    assert torch.autograd.gradcheck(fresh, (hidden, weight, bias, *low_rank))


def test_statistics():
    hidden, weight, _, _, targets, loss_weights = tensors()
    out = fused_linear_cross_entropy(
        hidden, weight, targets, loss_weights, label_smoothing=0.3, z_loss=0.1, metrics=True, chunk_tokens=2
    )
    logp = (hidden @ weight.T).log_softmax(-1)
    nll = -logp.gather(1, targets[:, None])[:, 0]
    hits = logp.argmax(-1) == targets
    entropy = -(logp.exp() * logp).sum(-1)
    w = loss_weights.double()
    torch.testing.assert_close(out.token_nll, nll)
    torch.testing.assert_close(out.nll, (w * nll).sum())  # neither smoothing nor z-loss
    assert torch.equal(out.token_correct, hits)
    torch.testing.assert_close(out.correct, (w * hits).sum())
    torch.testing.assert_close(out.token_entropy, entropy)
    torch.testing.assert_close(out.entropy, (w * entropy).sum())
    torch.testing.assert_close(out.weight, w.sum())
    assert not any(t is not None and t.requires_grad for t in out[1:])
    assert fused_linear_cross_entropy(hidden, weight, targets, loss_weights).entropy is None


def test_float32_keeps_its_precision_where_probabilities_underflow():
    hidden, weight, _, _, targets, loss_weights = tensors(torch.float32, n=64, h=16, v=300)
    big = (hidden * 60).detach().requires_grad_()  # losses of several hundred nats
    out = fused_linear_cross_entropy(big, weight, targets, loss_weights)
    out.total.backward()
    exact_hidden = big.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact = plain(exact_hidden, exact_weight, targets, loss_weights.double())
    exact.backward()
    assert out.token_nll.max() > 300
    torch.testing.assert_close(out.total.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(big.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("chunks", [1, 4])
def test_bfloat16_is_as_close_as_the_plain_bfloat16_loss(chunks):
    n = 128
    hidden, weight, _, _, targets, loss_weights = tensors(torch.bfloat16, n=n, h=32, v=500)

    def gradients(dtype, loss):
        leaves = [hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()]
        loss(*leaves).backward()
        assert all(leaf.grad.dtype == dtype for leaf in leaves)
        return [leaf.grad.double() for leaf in leaves]

    def fused(h, w):
        total = fused_linear_cross_entropy(h, w, targets, loss_weights, chunk_tokens=n // chunks).total
        assert total.dtype == torch.float32
        return total

    def upcast(h, w):
        return (loss_weights * F.cross_entropy((h @ w.T).float(), targets, reduction="none")).sum()

    exact = gradients(torch.float64, lambda h, w: plain(h, w, targets, loss_weights.double()))
    for got, reference, true in zip(gradients(torch.bfloat16, fused), gradients(torch.bfloat16, upcast), exact):
        assert (got - true).norm() < 1.1 * (reference - true).norm() + 0.001 * (chunks > 1) * true.norm()


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters():
    hidden, weight, bias, _, targets, loss_weights = tensors(torch.float32, n=64, h=32, v=300)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_linear_cross_entropy(hidden, weight, targets, loss_weights, bias=bias)
    out.total.backward()
    got = [t.grad.clone() for t in (hidden, weight, bias)]
    leaves = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    half = fused_linear_cross_entropy(leaves[0], leaves[1], targets, loss_weights, bias=leaves[2])
    half.total.backward()
    assert torch.equal(out.total, half.total)
    for a, b in zip(got, leaves):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.grad.float())


def test_a_head_in_float32_over_bfloat16_states_computes_in_float32():
    hidden, weight, _, _, targets, loss_weights = tensors(torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    fused_linear_cross_entropy(half, weight, targets, loss_weights).total.backward()
    got = weight.grad.clone()
    weight.grad = None
    fused_linear_cross_entropy(half.detach().float(), weight, targets, loss_weights).total.backward()
    assert torch.equal(got, weight.grad)
    assert half.grad.dtype == torch.bfloat16


class Record(TorchDispatchMode):
    """Sizes and names of everything that is computed inside."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = out if isinstance(out, (tuple, list)) else (out,)
        self.calls.append((func.__name__, max((t.numel() for t in flat if isinstance(t, Tensor)), default=0)))
        return out

    def largest(self) -> int:
        return max(size for _, size in self.calls)

    def products(self) -> int:
        return sum(name.startswith(("mm", "addmm", "addmm_")) for name, _ in self.calls)


@pytest.mark.parametrize("head_trains,inference,products", [(True, False, 3), (False, False, 2), (True, True, 1)])
def test_only_the_gradients_that_are_needed_are_computed(head_trains, inference, products):
    hidden, weight, _, _, targets, loss_weights = tensors()
    weight.requires_grad_(head_trains)
    with Record() as record, torch.inference_mode(inference):
        out = fused_linear_cross_entropy(hidden, weight, targets, loss_weights)
        if not inference:
            out.total.backward()
    assert record.products() == products
    assert out.total.requires_grad is not inference
    assert (weight.grad is not None) == (head_trains and not inference)


def test_no_tensor_of_all_logits():
    n, h, v, chunk = 96, 8, 200, 16
    hidden, weight, _, _, targets, loss_weights = tensors(torch.float32, n=n, h=h, v=v)
    with Record() as record:
        fused_linear_cross_entropy(
            hidden, weight, targets, loss_weights, chunk_tokens=chunk, metrics=True, softcap=5.0, label_smoothing=0.1
        ).total.backward()
    assert record.largest() <= max(chunk * v, v * h)


def test_the_head_gradient_is_handed_over_not_copied():
    hidden, weight, _, _, targets, loss_weights = tensors()
    total = fused_linear_cross_entropy(hidden, weight, targets, loss_weights).total
    held = total.grad_fn.gradients[1].data_ptr()
    total.backward()
    assert weight.grad.data_ptr() == held


def test_a_tied_matrix_gets_both_gradients():
    _, weight, _, _, targets, loss_weights = tensors()
    ids = torch.tensor([0, 3, 3, 10, 2, 1, 5])
    fused_linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, targets, loss_weights).total.backward()
    got = weight.grad.clone()
    weight.grad = None
    plain(F.embedding(ids, weight).tanh(), weight, targets, loss_weights.double()).backward()
    torch.testing.assert_close(got, weight.grad)


def test_micro_batches_add_up():
    hidden, weight, _, _, targets, loss_weights = tensors()
    for part in (slice(0, 3), slice(3, N)):
        fused_linear_cross_entropy(hidden[part], weight, targets[part], loss_weights[part]).total.backward()
    got = weight.grad.clone()
    weight.grad = None
    plain(hidden, weight, targets, loss_weights.double()).backward()
    torch.testing.assert_close(got, weight.grad)


def test_no_token_at_all_is_a_zero_with_a_graph():
    hidden, weight, bias, low_rank, _, _ = tensors(n=0)
    empty = torch.zeros(0, dtype=torch.int64)
    out = fused_linear_cross_entropy(
        hidden, weight, empty, torch.zeros(0), bias=bias, low_rank=low_rank, metrics=True, z_loss=0.1
    )
    out.total.backward()
    assert out.total == 0 and out.weight == 0 and out.entropy == 0
    assert hidden.grad.shape == (0, H)
    for tensor in (weight, bias, low_rank[1]):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_memory_that_was_not_cleared_does_not_reach_the_gradients():
    hidden, weight, bias, low_rank, targets, loss_weights = tensors(torch.float32)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        out = fused_linear_cross_entropy(
            hidden, weight, targets, loss_weights, bias=bias, low_rank=low_rank, softcap=4.0, metrics=True
        )
        out.total.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in (hidden, weight, bias, *low_rank):
        assert tensor.grad.isfinite().all()


def test_a_second_backward_is_refused():
    hidden, weight, _, _, targets, loss_weights = tensors()
    total = fused_linear_cross_entropy(hidden, weight, targets, loss_weights).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be at least 0 and below 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); expected \(11,\)"),
        ({"weight": torch.zeros(0)}, "partitioned by ZeRO-3"),
        ({"targets": torch.zeros(N)}, "expected torch.int64"),
        ({"loss_weights": torch.zeros(2)}, r"loss_weights has shape \(2,\); expected \(7,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change, message):
    hidden, weight, _, _, targets, loss_weights = tensors()
    given = {"hidden": hidden, "weight": weight, "targets": targets, "loss_weights": loss_weights, **change}
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**given)


# ---- on a GPU ----


def check_exact(
    device: str, dtype: torch.dtype, chunk: int | None, tolerance: float, *, metrics: bool = False, **options: float
) -> None:
    """Loss and gradients on a device against the plain loss in fp64 of the same numbers."""
    hidden, weight, bias, low_rank, targets, loss_weights = tensors(dtype, n=300, h=64, v=3001)
    sizes = zip((hidden, weight, bias, *low_rank), (1, 0.2, 0.5, 1, 0.5))
    leaves = [(t.detach() * size).to(device).requires_grad_() for t, size in sizes]
    h, w, b, reduced, up = leaves
    with exact_products():
        fused = fused_linear_cross_entropy(
            h, w, targets.to(device), loss_weights.to(device), bias=b, low_rank=(reduced, up), chunk_tokens=chunk,
            metrics=metrics, **options,
        )  # fmt: skip
        got = torch.autograd.grad(fused.total * 0.7, leaves)
    exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
    h, w, b, reduced, up = exact
    reference = plain(h, w, targets, loss_weights.double(), bias=b, low_rank=(reduced, up), **options)
    wanted = torch.autograd.grad(reference * 0.7, exact)
    assert fused.total.item() == pytest.approx(reference.item(), rel=tolerance)
    assert (fused.entropy is not None) == metrics
    for name, a, e in zip(("hidden", "weight", "bias", "reduced", "up"), got, wanted):
        assert a.dtype == dtype and error(a, e) < tolerance, name


def check_memory(device: str, n: int, v: int, h: int) -> None:
    """Inputs and gradients apart, far less is held than the logits of all tokens in their own dtype."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, h, generator=g, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(v, h, generator=g, device=device, dtype=torch.bfloat16) * 0.02).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    loss = fused_linear_cross_entropy(hidden, weight, targets, torch.ones(n, device=device)).total / n
    loss.backward()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    gradients = 2 * (hidden.numel() + weight.numel())
    logits = 2 * n * v
    assert peak - before - gradients < 0.6 * logits, (peak, before, gradients, logits)
    assert 0.95 < loss.item() / math.log(v) < 1.1
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (hidden, weight))


@on_gpu
@pytest.mark.parametrize("chunk", [64, 128, None])
@pytest.mark.parametrize(
    "options", [{}, {"metrics": True}, {"softcap": 2.5}, {"label_smoothing": 0.2, "z_loss": 0.01}], ids=str
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)], ids=str)
def test_on_a_gpu_loss_and_gradients_equal_the_plain_loss(dtype, tolerance, options, chunk):
    check_exact("cuda", dtype, chunk, tolerance, **options)


@on_gpu
def test_on_a_gpu_the_logits_of_all_tokens_never_exist():
    check_memory("cuda", 8192, 151_936, 1024)
