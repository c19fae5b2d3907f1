"""bf16 products on the CPU by way of fp32: the rounded exact product, in both passes, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ptl.strategies import cpu_products
from ptl.strategies.cpu_products import SLOW_BF16, WideProducts, bf16_slowdown, computes_in_bf16, fast_bf16
from tests import tiny

UNIT = 2.0**-8
"""Half of a bf16 number's last place, relative to it."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


PRODUCTS = {
    "mm": (torch.mm, [(7, 33), (33, 5)]),
    "addmm": (torch.addmm, [(7, 5), (7, 33), (33, 5)]),
    "bmm": (torch.bmm, [(3, 7, 33), (3, 33, 5)]),
    "baddbmm": (torch.baddbmm, [(3, 7, 5), (3, 7, 33), (3, 33, 5)]),
    "mv": (torch.mv, [(7, 33), (33,)]),
    "addmv": (torch.addmv, [(7,), (7, 33), (33,)]),
    "matmul": (torch.matmul, [(2, 3, 7, 33), (33, 5)]),
    "linear": (F.linear, [(2, 7, 33), (5, 33), (5,)]),
    "attention": (F.scaled_dot_product_attention, [(1, 2, 9, 16), (1, 2, 9, 16), (1, 2, 9, 16)]),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_exact_one_rounded(name, inference):
    product, shapes = PRODUCTS[name]
    factors = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    exact = product(*[factor.double() for factor in factors])
    with torch.inference_mode(inference), torch.no_grad(), WideProducts():
        found = product(*factors)
    assert found.dtype == torch.bfloat16
    assert torch.all((found.double() - exact).abs() <= UNIT * exact.abs() * 1.01 + 1e-5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_are_the_exact_ones_rounded(name):
    product, shapes = PRODUCTS[name]
    factors = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    doubles = [factor.detach().double().requires_grad_() for factor in factors]
    exact = product(*doubles)
    weight = draw(*exact.shape, seed=9)
    exact.backward(weight.double())
    with WideProducts():
        product(*factors).backward(weight)
    # The attention's backward pass reads its own rounded result.
    room = {"attention": 0.02}.get(name, 1e-5)
    for factor, double in zip(factors, doubles, strict=True):
        assert factor.grad.dtype == torch.bfloat16
        assert torch.all((factor.grad.double() - double.grad).abs() <= UNIT * double.grad.abs() * 1.01 + room)


@pytest.mark.parametrize("how", ["whole", "autocast", "recomputed"])
def test_a_model_trains_as_without(how):
    """Loss and gradients of torch's own bf16 products, to what their rounding leaves."""
    ids = torch.tensor([[5, 9, 20, 33, 1, 7, 12, 40]])

    def run() -> tuple[float, torch.Tensor]:
        model = tiny.make_model(hidden=64)
        if how != "autocast":
            model = model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            hidden = model.get_input_embeddings()(ids)
            if how == "recomputed":
                logits = checkpoint(
                    lambda h: model(inputs_embeds=h, use_cache=False).logits, hidden, use_reentrant=False
                )
            else:
                logits = model(inputs_embeds=hidden, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        loss.backward()
        return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters()])

    loss, gradient = run()
    with WideProducts():
        mine, own = run()
    assert mine == pytest.approx(loss, rel=2e-3)
    assert (own - gradient).norm() / gradient.norm() < 0.02


SHAPES = {"rows": (4096, 48, 40), "columns": (40, 48, 4096), "sum": (40, 4096, 48)}


@pytest.mark.parametrize("form", ["mm", "mm_out", "addmm_out", "addmm_", "addmm_of_nothing"])
@pytest.mark.parametrize("longest", SHAPES)
def test_a_long_product_goes_by_blocks_and_writes_where_it_is_told(longest, form, monkeypatch):
    monkeypatch.setattr(cpu_products, "BLOCK", 1 << 15)
    m, k, n = SHAPES[longest]
    left, right, added = draw(k, m, seed=1).t(), draw(k, n, seed=2), draw(m, n, seed=3)
    exact = left.double() @ right.double()
    if form.startswith("addmm"):
        exact = 0.5 * exact if form.endswith("nothing") else 0.5 * exact + 2 * added.double()
    out = added.clone().fill_(torch.nan) if form.endswith("nothing") else added.clone()
    widest = Widest()
    with widest, WideProducts():
        if form == "mm":
            out = torch.mm(left, right)
        elif form == "mm_out":
            torch.mm(left, right, out=out)
        elif form == "addmm_out":
            torch.addmm(added, left, right, beta=2, alpha=0.5, out=out)
        else:
            out.addmm_(left, right, beta=0 if form.endswith("nothing") else 2, alpha=0.5)
    assert out.dtype == torch.bfloat16
    assert torch.all((out.double() - exact).abs() <= UNIT * exact.abs() * 1.01 + 1e-4)
    assert 0 < widest.numbers <= 2 * (1 << 15)


class Widest(TorchDispatchMode):
    """The most numbers of an fp32 tensor that is made while it is entered."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_the_fused_loss_trains_as_without():
    from ptl.functional.cross_entropy import fused_linear_cross_entropy

    def run() -> tuple[float, torch.Tensor, torch.Tensor]:
        hidden, head = draw(50, 16, seed=1).requires_grad_(), draw(90, 16, seed=2).requires_grad_()
        targets = torch.arange(50)
        loss = fused_linear_cross_entropy(hidden, head, targets, torch.ones(50), chunk_tokens=16).total
        loss.backward()
        return loss.item(), hidden.grad.float(), head.grad.float()

    theirs = run()
    calls = Slow()
    with calls, WideProducts():
        ours = run()
    assert ours[0] == pytest.approx(theirs[0], rel=2e-3)
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one - other).norm() / other.norm() < 0.01
    assert not calls.narrow


class Slow(TorchDispatchMode):
    """The matrix products of bf16 that come to be made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__ and any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args):
            self.narrow.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_fp32_is_bit_for_bit_as_without():
    ids = torch.tensor([[5, 9, 20, 33, 1, 7]])
    model = tiny.make_model()
    expected = model(ids).logits
    with WideProducts():
        assert torch.equal(model(ids).logits, expected)


def test_it_is_entered_where_the_cpu_needs_it():
    slowdown = bf16_slowdown()
    with fast_bf16() as told:
        within = bf16_slowdown()
    assert (told is not None) == (slowdown > SLOW_BF16)
    if told is not None:
        assert within < slowdown / 2
    assert bf16_slowdown() > within / 4  # it is left again


def test_what_computes_in_bf16():
    assert not computes_in_bf16("32-true", "fp32") and not computes_in_bf16("16-mixed", None)
    assert computes_in_bf16("bf16-mixed", "fp32") and computes_in_bf16("32-true", "bf16")
