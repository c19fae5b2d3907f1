"""Rows and columns taken out of whole matrices: what a narrower model is cut with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def double(weight: Tensor) -> Tensor:
    """The same numbers in float64 on the CPU: ranks that choose by sums in another order must not choose otherwise."""
    return weight.detach().cpu().double()


def highest(scores: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: where the highest of the scores [N] are, of equal ones the first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def kept_of(parameter: Tensor, kept: Tensor, dim: int) -> nn.Parameter:
    """A parameter of its own with the entries ``kept``, int64 [count], of one dimension of ``parameter``.

    A copy, since ZeRO-3 takes what it had gathered apart again.
    """
    where = kept.to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, where), parameter.requires_grad)


def cut(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keeps some rows (outputs, with their bias) or columns (inputs) of a layer whose weights are whole.

    Arguments:
        linear: the layer, changed in place.
        rows: int64 [outputs to keep], or None; one of the two is given.
        columns: int64 [inputs to keep], or None.
    """
    if rows is None:
        assert columns is not None
        linear.weight = kept_of(linear.weight, columns, 1)
        linear.in_features = len(columns)
        return
    linear.weight = kept_of(linear.weight, rows, 0)
    linear.out_features = len(rows)
    if linear.bias is not None:
        linear.bias = kept_of(linear.bias, rows, 0)
