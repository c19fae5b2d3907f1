"""The fused divergence against the obvious one: both sides' whole logits, autograd, fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptl.functional.cross_entropy import fused_linear_cross_entropy
from ptl.functional.divergence import Divergence
from ptl.functional.fused_divergence import Side, fused_divergence
from ptl.types import SparseTargets
from tests.gpu_parts import error, exact_products, on_gpu

N, V, HS, HT, R = 13, 37, 8, 12, 3
KINDS = [
    Divergence(kind="forward_kl"),
    Divergence(kind="reverse_kl"),
    Divergence(kind="jsd", beta=0.5),
    Divergence(kind="jsd", beta=0.1),
    Divergence(kind="jsd", beta=0.9),
    Divergence(kind="skew_kl", skew=0.1),
    Divergence(kind="skew_kl", skew=0.7),
    Divergence(kind="skew_reverse_kl", skew=0.1),
    Divergence(kind="skew_reverse_kl", skew=0.7),
    Divergence(kind="total_variation"),
]


def name(divergence: Divergence) -> str:
    return f"{divergence.kind}-{divergence.beta}-{divergence.skew}"


def obvious(log_p, log_q, d: Divergence):
    """Textbook sums over the vocabulary, from probabilities."""
    p, q = log_p.exp(), log_q.exp()

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if d.kind == "forward_kl":
        return kl(p, q)
    if d.kind == "reverse_kl":
        return kl(q, p)
    if d.kind == "jsd":
        m = d.beta * p + (1 - d.beta) * q
        return (d.beta * kl(p, m) + (1 - d.beta) * kl(q, m)) / (d.beta * (1 - d.beta))
    if d.kind == "skew_kl":
        return kl(p, d.skew * p + (1 - d.skew) * q)
    if d.kind == "skew_reverse_kl":
        return kl(q, (1 - d.skew) * p + d.skew * q)
    return 0.5 * (p - q).abs().sum(-1)


def make(dtype=torch.float64, *, grown: bool = False, seed: int = 0, n: int = N, v: int = V):
    """Tensors of both sides; ``grown``: with bias, a LoRA branch, soft caps and scales."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    student = {"hidden": rand(n, HS), "weight": rand(v, HS)}
    teacher = {"hidden": rand(n, HT), "weight": rand(v + 5, HT)}
    if grown:
        student |= {"bias": rand(v), "reduced": rand(n, R), "up": rand(v, R)}
        teacher |= {"bias": rand(v + 5), "reduced": rand(n, R), "up": rand(v + 5, R)}
    for tensor in student.values():
        tensor.requires_grad_()
    targets = torch.randint(0, v, (n,), generator=gen)
    weights = torch.rand(n, generator=gen, dtype=torch.float64).to(dtype)
    return student, teacher, targets, weights


def side(tensors, *, grown: bool) -> Side:
    low_rank = (tensors["reduced"], tensors["up"]) if "reduced" in tensors else None
    more = {"softcap": 4.0, "logit_scale": 0.5} if grown else {}
    return Side(tensors["hidden"], tensors["weight"], tensors.get("bias"), low_rank, **more)


def logits(tensors, *, grown: bool):
    z = tensors["hidden"] @ tensors["weight"].T
    if "bias" in tensors:
        z = z + tensors["bias"] + tensors["reduced"] @ tensors["up"].T
    return 4.0 * torch.tanh(0.5 * z / 4.0) if grown else z


def naive(student, teacher, targets, weights, divergence, ce, *, grown=False):
    z = logits(student, grown=grown)
    y = logits(teacher, grown=grown)[:, : z.shape[1]]
    t = divergence.temperature
    value = obvious((y / t).log_softmax(-1), (z / t).log_softmax(-1), divergence)
    nll = -z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return (weights * ((1 - ce) * t * t * value + ce * nll)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ce", [0.0, 0.3])
@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("base", KINDS, ids=name)
def test_trap_rm_kd_13_fused_equals_naive_in_loss_and_every_gradient(base, grown, ce, temperature):
    divergence = Divergence(kind=base.kind, beta=base.beta, skew=base.skew, temperature=temperature)
    student, teacher, targets, weights = make(grown=grown)
    expected = naive(student, teacher, targets, weights, divergence, ce, grown=grown)
    wanted = torch.autograd.grad(expected, list(student.values()))
    fused = fused_divergence(
        side(student, grown=grown), side(teacher, grown=grown), targets, weights, divergence=divergence, ce=ce,
        vocabulary=V, chunk_tokens=5,
    )  # fmt: skip
    got = torch.autograd.grad(fused.total, list(student.values()))
    torch.testing.assert_close(fused.total, expected, rtol=1e-10, atol=1e-10)
    for key, a, b in zip(student, got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("divergence", KINDS, ids=name)
def test_trap_rm_kd_13_gradients_equal_finite_differences(divergence):
    """In random directions; ``gradcheck`` itself runs backward more than once, which the fused loss refuses."""
    student, teacher, targets, weights = make(grown=True)
    options = {"divergence": divergence, "ce": 0.2, "vocabulary": V, "chunk_tokens": 4}

    def loss(tensors):
        return fused_divergence(side(tensors, grown=True), side(teacher, grown=True), targets, weights, **options).total

    gradients = torch.autograd.grad(loss(student), list(student.values()))
    gen = torch.Generator().manual_seed(1)
    for _ in range(4):
        way = {k: torch.randn(t.shape, generator=gen, dtype=t.dtype) for k, t in student.items()}
        with torch.no_grad():
            up, down = ({k: t + h * way[k] for k, t in student.items()} for h in (1e-6, -1e-6))
            numeric = float(loss(up) - loss(down)) / 2e-6
        exact = float(sum((g * w).sum() for g, w in zip(gradients, way.values())))
        assert numeric == pytest.approx(exact, rel=1e-5, abs=1e-5)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("divergence", KINDS, ids=name)
def test_trap_rm_kd_13_no_tensor_of_all_logits(divergence):
    n, v, h = 512, 1000, 4
    student = Side(torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True))
    teacher = Side(torch.randn(n, h), torch.randn(v, h))
    targets = torch.randint(0, v, (n,))
    with Largest() as seen:
        fused_divergence(
            student, teacher, targets, torch.ones(n), divergence=divergence, chunk_tokens=64
        ).total.backward()
    assert seen.numel <= 64 * v


@pytest.mark.parametrize("divergence", KINDS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_equal_to_student_gives_zero_and_no_gradient(divergence, dtype):
    student, _, targets, weights = make(dtype)
    same = Side(student["hidden"].detach().clone(), student["weight"].detach().clone())
    fused = fused_divergence(
        side(student, grown=False), same, targets, weights.float(), divergence=divergence, metrics=True
    )
    grads = torch.autograd.grad(fused.total, list(student.values()))
    assert abs(float(fused.total)) < 1e-5
    assert float(fused.agreement) == pytest.approx(float(fused.weight))
    assert all(float(g.abs().max()) < 1e-5 for g in grads)


def test_trap_rm_kd_8_a_one_hot_teacher_gives_exactly_cross_entropy():
    student, _, targets, weights = make()
    sure = torch.full((N, V), -1e9, dtype=torch.float64).scatter_(1, targets[:, None], 0.0)
    teacher = Side(sure, torch.eye(V, dtype=torch.float64))
    fused = fused_divergence(side(student, grown=False), teacher, targets, weights, divergence=Divergence())
    plain = fused_linear_cross_entropy(student["hidden"], student["weight"], targets, weights)
    torch.testing.assert_close(fused.total, plain.total, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(fused.total, list(student.values())),
        torch.autograd.grad(plain.total, list(student.values())),
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def gradient_at(divergence: Divergence, dtype=torch.float64):
    student, teacher, targets, weights = make(dtype)
    mild = [Side(t["hidden"] * 0.3, t["weight"]) for t in (student, teacher)]  # p / q of up to about 100
    fused = fused_divergence(*mild, targets, weights, divergence=divergence)
    return torch.autograd.grad(fused.total, student["hidden"])[0], fused.total.detach()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 5e-3), (torch.float32, 1e-2)])
def test_trap_rm_kd_6_jsd_is_continuous_in_beta(dtype, tolerance):
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    for beta, kind in ends.items():
        end, value = gradient_at(Divergence(kind=kind), dtype)
        at, at_value = gradient_at(Divergence(kind="jsd", beta=beta), dtype)
        torch.testing.assert_close(at, end)
        torch.testing.assert_close(at_value, value)
        for near in (1e-4, 1e-6):
            close, close_value = gradient_at(Divergence(kind="jsd", beta=abs(beta - near)), dtype)
            assert float((close - end).norm() / end.norm()) < tolerance
            assert float(close_value) == pytest.approx(float(value), rel=tolerance)
    norms = [float(gradient_at(Divergence(kind="jsd", beta=b / 50))[0].norm()) for b in range(51)]
    steps = [max(a, b) / min(a, b) for a, b in pairwise(norms)]
    assert max(steps) < 1.5


def test_trap_rm_kd_12_temperature_squared_once_and_not_on_the_cross_entropy():
    student, teacher, targets, weights = make()
    sides = (side(student, grown=False), side(teacher, grown=False))
    # T**2 KL nears half the squared distance of the centred logits over V as T grows.
    z, y = logits(student, grown=False), logits(teacher, grown=False)[:, :V]
    centred = (z - z.mean(-1, keepdim=True)) - (y - y.mean(-1, keepdim=True))
    limit = float((weights * 0.5 * centred.square().mean(-1)).sum())
    hot = fused_divergence(*sides, targets, weights, divergence=Divergence(temperature=2000.0), vocabulary=V)
    assert float(hot.total) == pytest.approx(limit, rel=1e-2)
    only_ce = [
        float(fused_divergence(*sides, targets, weights, divergence=Divergence(temperature=t), ce=1.0).total)
        for t in (1.0, 4.0)
    ]
    assert only_ce[0] == pytest.approx(only_ce[1], rel=1e-12)


def test_trap_rm_kd_11_rows_of_padding_change_nothing_and_zeros_would():
    student, teacher, targets, weights = make()
    one = side(student, grown=False)
    padded = Side(teacher["hidden"], teacher["weight"])
    cut = Side(teacher["hidden"], teacher["weight"][:V])
    a, b = (fused_divergence(one, t, targets, weights, divergence=Divergence()) for t in (padded, cut))
    torch.testing.assert_close(a.total, b.total, rtol=0, atol=0)
    same = Side(student["hidden"].detach(), torch.cat([student["weight"].detach(), torch.randn(8, HS).double()]))
    assert abs(float(fused_divergence(one, same, targets, weights, divergence=Divergence()).total)) < 1e-12


def test_trap_rm_kd_14_float32_softmax_under_bf16_and_sums_over_the_vocabulary():
    torch.manual_seed(0)
    n, v, h = 16, 32_000, 64
    hs, ws = torch.randn(n, h), torch.randn(v, h) * 0.2
    ht, wt = hs + 0.05 * torch.randn(n, h), ws
    low = [t.bfloat16() for t in (hs, ws, ht, wt)]
    z, y = (low[0] @ low[1].T).double(), (low[2] @ low[3].T).double()  # what bf16 products give, then exact
    expected = obvious(y.log_softmax(-1), z.log_softmax(-1), Divergence())
    got = fused_divergence(Side(low[0], low[1]), Side(low[2], low[3]), torch.zeros(n, dtype=torch.int64),
                           torch.ones(n), divergence=Divergence())  # fmt: skip
    torch.testing.assert_close(got.token_divergence.double(), expected, rtol=2e-3, atol=1e-6)
    assert float(got.token_divergence.min()) >= -1e-6


@pytest.mark.parametrize("divergence", KINDS, ids=name)
def test_trap_rm_kd_14_nan_and_infinite_teacher_rows(divergence):
    student, teacher, targets, weights = make()
    y = logits(teacher, grown=False)[:, :V].clone()
    y[2, 5] = float("nan")
    y[4] = float("-inf")
    y[6, :20] = float("-inf")
    # The identity as the teacher's head would turn 0 * inf into NaN, so the rows go in one by one through a bias.
    total, bad = 0.0, 0.0
    grads = []
    for row in range(N):
        one = Side(student["hidden"][row : row + 1], student["weight"])
        other = Side(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(V, 1, dtype=torch.float64), y[row])
        out = fused_divergence(
            one, other, targets[row : row + 1], weights[row : row + 1], divergence=divergence, ce=0.1
        )
        grads.append(torch.autograd.grad(out.total, student["hidden"])[0])
        total, bad = total + float(out.total), bad + float(out.bad)
        if row in (2, 4):
            assert float(out.total) == 0 and float(grads[-1].abs().max()) == 0
    assert bad == 2 and math.isfinite(total)
    assert all(bool(g.isfinite().all()) for g in grads)


def test_metrics_change_nothing_and_are_right():
    student, teacher, targets, weights = make()
    sides = (side(student, grown=False), side(teacher, grown=False))
    for t, ce in ((1.0, 0.0), (2.0, 0.3)):
        options = {"divergence": Divergence(temperature=t), "ce": ce, "vocabulary": V}
        bare, seen = (fused_divergence(*sides, targets, weights, metrics=m, **options) for m in (False, True))
        assert torch.equal(bare.total, seen.total) and bare.agreement is None
        z, y = logits(student, grown=False), logits(teacher, grown=False)[:, :V]
        same = (z.argmax(-1) == y.argmax(-1)).double()
        nll = -z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(seen.agreement, (same * weights).sum())
        torch.testing.assert_close(seen.nll, (nll * weights).sum())


def test_float32_losses_over_a_real_vocabulary_are_exact_to_a_millionth():
    """The log-softmax of torch is 2e-5 nats off here."""
    torch.manual_seed(0)
    n, v = 16, 49_152
    z, y = 4 * torch.randn(n, v), 4 * torch.randn(n, v)
    zero, one = torch.zeros(n, 1), torch.zeros(v, 1)
    for row in range(0, n, 5):
        got = fused_divergence(
            Side(zero[:1], one, z[row]), Side(zero[:1], one, y[row]), torch.zeros(1, dtype=torch.int64), torch.ones(1),
            divergence=Divergence(), metrics=True,
        )  # fmt: skip
        log_p, log_q = (t[row].double().log_softmax(-1) for t in (y, z))
        expected = float(obvious(log_p[None], log_q[None], Divergence()))
        assert float(got.divergence) == pytest.approx(expected, rel=1e-6)
        assert float(got.nll) == pytest.approx(float(-log_q[0]), rel=1e-6)


def test_a_frozen_head_and_no_gradient_at_all():
    student, teacher, targets, weights = make()
    frozen = Side(student["hidden"], student["weight"].detach())
    fused = fused_divergence(frozen, side(teacher, grown=False), targets, weights, divergence=Divergence())
    (got,) = torch.autograd.grad(fused.total, [student["hidden"]])
    (wanted,) = torch.autograd.grad(naive(student, teacher, targets, weights, Divergence(), 0.0), [student["hidden"]])
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        again = fused_divergence(frozen, side(teacher, grown=False), targets, weights, divergence=Divergence())
    assert not again.total.requires_grad and torch.equal(again.total, fused.total.detach())


def test_no_token_gives_zero_with_a_graph():
    student, teacher, _, _ = make()
    none = {key: tensor[:0] if key == "hidden" else tensor for key, tensor in student.items()}
    empty = Side(teacher["hidden"][:0], teacher["weight"])
    fused = fused_divergence(side(none, grown=False), empty, torch.zeros(0, dtype=torch.int64),
                             torch.zeros(0, dtype=torch.float64), divergence=Divergence())  # fmt: skip
    (got,) = torch.autograd.grad(fused.total, [student["weight"]])
    assert float(fused.total) == 0 and float(got.abs().max()) == 0


# ---- kept ids ----


def top_k(y, k: int) -> SparseTargets:
    log_p = y.log_softmax(-1)
    best = log_p.topk(k)
    rest = log_p.scatter(1, best.indices, float("-inf")).logsumexp(-1)
    return SparseTargets(best.indices, best.values, rest, -(log_p.exp() * log_p).sum(-1))


def buckets(log_p, ids):
    kept = log_p.gather(1, ids)
    return torch.cat([kept, log_p.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)], 1)


@pytest.mark.parametrize("divergence", KINDS, ids=name)
def test_kept_ids_and_tail_equal_the_divergence_of_the_buckets(divergence):
    student, teacher, targets, weights = make()
    kept = top_k(logits(teacher, grown=False)[:, :V], 6)
    z = logits(student, grown=False).log_softmax(-1)
    p = torch.cat([kept.logprobs, kept.tail[:, None]], 1)
    expected = (weights * obvious(p, buckets(z, kept.ids), divergence)).sum()
    wanted = torch.autograd.grad(expected, list(student.values()))
    fused = fused_divergence(side(student, grown=False), kept, targets, weights, divergence=divergence, chunk_tokens=5)
    torch.testing.assert_close(fused.total, expected, rtol=1e-9, atol=1e-10)
    for a, b in zip(torch.autograd.grad(fused.total, list(student.values())), wanted):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_kept_ids_with_unused_places_and_rows_without_a_teacher():
    student, teacher, targets, weights = make()
    kept = top_k(logits(teacher, grown=False)[:, :V], 6)
    fused = fused_divergence(side(student, grown=False), kept, targets, weights, divergence=Divergence())
    wide = SparseTargets(
        torch.cat([kept.ids, torch.full((N, 2), -1)], 1),
        torch.cat([kept.logprobs, torch.full((N, 2), float("-inf"), dtype=torch.float64)], 1),
        kept.tail,
        kept.entropy,
    )
    same = fused_divergence(side(student, grown=False), wide, targets, weights, divergence=Divergence())
    torch.testing.assert_close(same.total, fused.total)
    for a, b in zip(
        torch.autograd.grad(same.total, list(student.values())),
        torch.autograd.grad(fused.total, list(student.values())),
    ):
        torch.testing.assert_close(a, b)
    wide.ids[3] = -1
    without = fused_divergence(side(student, grown=False), wide, targets, weights, divergence=Divergence(), ce=0.5)
    assert float(without.bad) == 1 and float(without.token_divergence[3]) == 0


def test_all_ids_kept_equal_the_dense_teacher():
    student, teacher, targets, weights = make()
    y = logits(teacher, grown=False)[:, :V]
    dense = fused_divergence(
        side(student, grown=False), side(teacher, grown=False), targets, weights, divergence=Divergence(), vocabulary=V
    )
    kept = top_k(y, V)
    sparse = fused_divergence(side(student, grown=False), kept, targets, weights, divergence=Divergence())
    torch.testing.assert_close(sparse.total, dense.total, rtol=1e-9, atol=1e-9)


def test_a_sample_is_unbiased_and_refuses_nothing_it_can_do():
    student, teacher, targets, weights = make()
    y = logits(teacher, grown=False)[:, :V]
    log_p = y.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    dense = fused_divergence(
        side(student, grown=False), side(teacher, grown=False), targets, weights, divergence=Divergence(), vocabulary=V
    )
    (wanted,) = torch.autograd.grad(dense.total, [student["hidden"]])
    gen = torch.Generator().manual_seed(0)
    totals, grads = [], []
    for _ in range(400):
        draws = torch.multinomial(log_p.exp(), 16, replacement=True, generator=gen)
        counts = torch.zeros(N, V, dtype=torch.float64).scatter_add_(1, draws, torch.ones(N, 16, dtype=torch.float64))
        share = (counts / 16).topk(16)
        ids = torch.where(share.values > 0, share.indices, -1)
        sample = SparseTargets(ids, share.values.log(), torch.full((N,), float("-inf"), dtype=torch.float64), entropy)
        out = fused_divergence(side(student, grown=False), sample, targets, weights, divergence=Divergence())
        totals.append(out.total.detach())
        grads.append(torch.autograd.grad(out.total, [student["hidden"]])[0])
    known = sample._replace(whole=True)
    told = fused_divergence(side(student, grown=False), known, targets, weights, divergence=Divergence())
    assert torch.equal(told.total, totals[-1])
    values = torch.stack(totals)
    error = float(values.std() / len(values) ** 0.5)
    assert abs(float(values.mean() - dense.total)) < 4 * error
    stacked = torch.stack(grads)
    z = (stacked.mean(0) - wanted) / (stacked.std(0) / len(grads) ** 0.5)
    assert float(z.abs().mean()) < 1.2  # a standard normal's mean size is 0.8


@pytest.mark.parametrize("k", [8])
def test_the_tail_bucket_recovers_the_tail_mass_that_other_ways_lose(k):
    """A student fitted to top-k of a teacher whose tail holds half the mass (V = 200)."""
    torch.manual_seed(0)
    y = (torch.randn(1, 200) * 1.5).double()
    kept = top_k(y, k)
    eye = torch.eye(200, dtype=torch.float64)

    def fit(targets: SparseTargets) -> tuple[float, float]:
        z = torch.zeros(1, 200, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([z], 0.05)
        for _ in range(1500):
            optimizer.zero_grad()
            fused_divergence(
                Side(z, eye), targets, torch.zeros(1, dtype=torch.int64), torch.ones(1), divergence=Divergence()
            ).total.backward()
            optimizer.step()
        log_q = z.detach().log_softmax(-1)
        return float(1 - log_q.exp().gather(1, kept.ids).sum()), float(obvious(y.log_softmax(-1), log_q, Divergence()))

    true_tail = float(kept.tail.exp())
    tail, kl = fit(kept)
    assert true_tail > 0.4 and tail == pytest.approx(true_tail, abs=1e-3)
    renormalised = kept._replace(
        logprobs=kept.logprobs - kept.logprobs.logsumexp(-1, keepdim=True), tail=torch.full_like(kept.tail, -math.inf)
    )
    lost_tail, lost_kl = fit(renormalised)
    assert lost_tail < 0.01 and lost_kl > 3 * kl


def test_errors_say_what_and_where():
    student, teacher, targets, weights = make()
    with pytest.raises(ValueError, match=r"divergence.kind must be one of forward_kl.*got 'kl'"):
        Divergence(kind="kl")  # pyright: ignore[reportArgumentType]
    for bad in ({"beta": 1.5}, {"skew": 1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=rf"divergence.{next(iter(bad))}"):
            Divergence(**bad)
    with pytest.raises(ValueError, match="ce is 2"):
        fused_divergence(side(student, grown=False), side(teacher, grown=False), targets, weights,
                         divergence=Divergence(), ce=2.0)  # fmt: skip
    with pytest.raises(ValueError, match="vocabulary is 99"):
        fused_divergence(side(student, grown=False), side(teacher, grown=False), targets, weights,
                         divergence=Divergence(), vocabulary=99)  # fmt: skip
    with pytest.raises(ValueError, match="partitioned by ZeRO-3"):
        fused_divergence(side(student, grown=False), Side(teacher["hidden"], torch.zeros(0)), targets, weights,
                         divergence=Divergence())  # fmt: skip


# ---- on a GPU ----


def check_exact(device: str, base: Divergence, *, grown: bool) -> None:
    """fp32 on a device against the naive loss in fp64 of the same numbers, with a share of cross-entropy."""
    divergence = Divergence(kind=base.kind, beta=base.beta, skew=base.skew, temperature=2.0)
    student, teacher, targets, weights = make(torch.float32, grown=grown, n=200, v=3001)
    learner = {k: t.detach().to(device).requires_grad_() for k, t in student.items()}
    taught = {k: t.to(device) for k, t in teacher.items()}
    with exact_products():
        fused = fused_divergence(
            side(learner, grown=grown), side(taught, grown=grown), targets.to(device), weights.to(device),
            divergence=divergence, ce=0.3, vocabulary=3001, chunk_tokens=64, metrics=True,
        )  # fmt: skip
        got = torch.autograd.grad(fused.total, list(learner.values()))
    exact = {k: t.detach().double().requires_grad_() for k, t in student.items()}
    double = {k: t.double() for k, t in teacher.items()}
    expected = naive(exact, double, targets, weights.double(), divergence, 0.3, grown=grown)
    wanted = torch.autograd.grad(expected, list(exact.values()))
    assert fused.total.item() == pytest.approx(expected.item(), rel=1e-5) and float(fused.bad) == 0
    for key, a, b in zip(student, got, wanted):
        # The slope of the total variation jumps where p and q are equal.
        assert error(a, b) < (1e-2 if base.kind == "total_variation" else 1e-4), key


def check_kept(device: str, divergence: Divergence) -> None:
    """A teacher of whom some ids are kept, of which one row is bad."""
    student, teacher, targets, weights = make(torch.float32, n=200, v=3001)
    y = logits({k: t.double() for k, t in teacher.items()}, grown=False)[:, :3001]
    kept = top_k(y, 50)
    exact = {k: t.detach().double().requires_grad_() for k, t in student.items()}
    p = torch.cat([kept.logprobs, kept.tail[:, None]], 1)
    q = buckets(logits(exact, grown=False).log_softmax(-1), kept.ids)
    rows = weights.double() * obvious(p, q, divergence)
    expected = rows.sum() - rows[3]
    wanted = torch.autograd.grad(expected, list(exact.values()))
    ids = kept.ids.clone()
    ids[3] = -1
    logprobs, tail, entropy = (t.float().to(device) for t in (kept.logprobs, kept.tail, kept.entropy))
    on_device = SparseTargets(ids.to(device), logprobs, tail, entropy)
    learner = {k: t.detach().to(device).requires_grad_() for k, t in student.items()}
    with exact_products():
        fused = fused_divergence(
            side(learner, grown=False), on_device, targets.to(device), weights.to(device), divergence=divergence,
            chunk_tokens=64,
        )  # fmt: skip
        got = torch.autograd.grad(fused.total, list(learner.values()))
    assert fused.total.item() == pytest.approx(expected.item(), rel=1e-5) and float(fused.bad) == 1
    for key, a, b in zip(student, got, wanted):
        assert error(a, b) < (1e-2 if divergence.kind == "total_variation" else 3e-4), key


@on_gpu
@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("base", KINDS, ids=name)
def test_on_a_gpu_loss_and_every_gradient_equal_the_naive_loss(base, grown):
    check_exact("cuda", base, grown=grown)


@on_gpu
@pytest.mark.parametrize("divergence", KINDS, ids=name)
def test_on_a_gpu_kept_ids_and_tail_equal_the_divergence_of_the_buckets(divergence):
    check_kept("cuda", divergence)
