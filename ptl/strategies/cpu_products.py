"""bf16 on a CPU without bf16 instructions: matrix products in fp32, rounded once, not 50 to 100 times slower."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

SLOW_BF16 = 4.0
"""How many times slower than float32 a CPU may be in bf16 before something is done; one with bf16 instructions is
faster."""
BLOCK = 4 << 20
"""Numbers that are held in fp32 at a time of a factor or a result with more: a head has tens of millions."""
_aten = torch.ops.aten
_ALL = (0, 1, 2)
_MM = (_aten.mm.default, _aten.mm.out)
_ADDMM = (_aten.addmm.default, _aten.addmm.out, _aten.addmm_.default)
# What torch computes on such a CPU without vector instructions, and which of its results have its arguments' type.
_PRODUCTS: dict[Any, tuple[int, ...]] = {
    _aten.bmm.default: _ALL,
    _aten.baddbmm.default: _ALL,
    _aten.mv.default: _ALL,
    _aten.addmv.default: _ALL,
    # In inference mode these come whole; elsewhere as those above.
    _aten.linear.default: _ALL,
    _aten.matmul.default: _ALL,
    _aten.scaled_dot_product_attention.default: _ALL,
    # The second result of the forward pass, log-sums, is fp32 anyway.
    _aten._scaled_dot_product_flash_attention_for_cpu.default: (0,),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _ALL,
}


class WideProducts(TorchDispatchMode):
    """While it is entered, matrix products of bf16 tensors on the CPU are made in fp32 and their results rounded.

    The factors are exact in fp32 and the sums are fp32 in bf16 products too, so that a result is the correctly rounded
    one but for the order of its sums. Forward and backward passes alike, of whatever model, under autocast too, and the
    products that the fused losses write in place; of these and of plain ones large factors are fp32 a block at a time.
    All other operations are as they were. It counts for the thread that enters it.

    ``TorchDispatchMode`` is the one place below autograd where an operation may be done in another way; torch has it in
    a module with an underscore.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MM or func in _ADDMM:
            out = args[0] if func is _aten.addmm_.default else kwargs.get("out")
            if all(_narrow(factor) for factor in (*args, out) if factor is not None):
                left, right = args[-2:]
                added = args[0] if func in _ADDMM else None
                return _product(left, right, added, kwargs.get("beta", 1), kwargs.get("alpha", 1), out)
        rounded = _PRODUCTS.get(func)
        if rounded is None or not any(_narrow(value) for value in args):
            return func(*args, **kwargs)
        result = func(*tree_map(_wide, args), **tree_map(_wide, kwargs))
        if isinstance(result, Tensor):
            return result.bfloat16()
        return tuple(part.bfloat16() if i in rounded and _wide32(part) else part for i, part in enumerate(result))


def _product(
    left: Tensor, right: Tensor, added: Tensor | None, beta: float, alpha: float, out: Tensor | None
) -> Tensor:
    """``out``, or a new tensor, with ``beta * added + alpha * left @ right`` in it; the longest side goes by blocks."""
    (m, k), n = left.shape, right.shape[1]
    out = left.new_empty(m, n) if out is None else out
    added = None if added is None or beta == 0 else added.expand(m, n)  # with 0 it may hold anything

    def finish(product: Tensor, rows: slice, columns: slice) -> None:
        if alpha != 1:
            product.mul_(alpha)
        if added is not None:
            product.add_(added[rows, columns], alpha=beta)
        out[rows, columns].copy_(product)

    everything = slice(None)
    step = max(1, BLOCK * max(m, k, n) // max(m * k, k * n, m * n, 1))
    if k > max(m, n):
        total = left.new_zeros(m, n, dtype=torch.float32)
        for start in range(0, k, step):
            part = slice(start, start + step)
            total.addmm_(left[:, part].float(), right[part].float())
        finish(total, everything, everything)
    elif n > m:
        wide = left.float()
        for start in range(0, n, step):
            columns = slice(start, start + step)
            finish(wide @ right[:, columns].float(), everything, columns)
    else:
        wide = right.float()
        for start in range(0, m, step):
            rows = slice(start, start + step)
            finish(left[rows].float() @ wide, rows, everything)
    return out


def _narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _wide(value: Any) -> Any:
    return value.float() if _narrow(value) else value


def _wide32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


@contextlib.contextmanager
def fast_bf16() -> Iterator[float | None]:
    """``WideProducts`` where this CPU needs it, else nothing; gives how many times slower bf16 would be, or None."""
    slowdown = bf16_slowdown()
    if slowdown <= SLOW_BF16:
        yield None
        return
    with WideProducts():
        yield slowdown


def bf16_slowdown(size: int = 192) -> float:
    """Time of a [size, size] matrix product on the CPU in bf16 over its time in fp32, by a probe of about 50 ms."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=dtype)
        best = float("inf")
        for _ in range(3):  # the first one also makes the kernel
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) / seconds(torch.float32)


def computes_in_bf16(precision: str, dtype: str | None) -> bool:
    """Whether a run computes in bf16.

    Arguments:
        precision: the trainer's.
        dtype: the policy's, where there is one.
    """
    return precision.startswith("bf16") or dtype == "bf16"
