"""The pass over aligned groups that makes losses and gradients between two tokenizers; see ``cross_tokenizer``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ptl.functional.head import Inputs, Options, run


class MatchedIds(NamedTuple):
    """Which ids of two vocabularies are the same string, made once by ``cross_tokenizer.matched``.

    Attributes:
        student: int64 [K].
        teacher: int64 [K], the same strings in the same order.
        student_rest: int64, the student's other ids.
        teacher_rest: int64, the teacher's other ids.
        to_student: int64 [Vt], the student's id of each of the teacher's, or -1.
        to_teacher: int64 [Vs], the teacher's id of each of the student's, or -1.
    """

    student: Tensor
    teacher: Tensor
    student_rest: Tensor
    teacher_rest: Tensor
    to_student: Tensor
    to_teacher: Tensor


class Plan(NamedTuple):
    """What a pass needs besides the student's inputs: names as in ``fused_cross_tokenizer_loss``, T in the options."""

    groups: Tensor
    weights: Tensor
    targets: Tensor
    teacher: Inputs
    teacher_targets: Tensor
    options: Options
    teacher_options: Options
    matched: MatchedIds | None
    temperature: float
    chunk: int


def run_groups(
    inputs: Inputs, plan: Plan, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """(total, losses [G], whether each group counted [G], gradients of total for the inputs that are wanted)."""
    weights, groups = plan.weights, plan.groups
    more, owner = _later_rows(groups[:, 0], groups[:, 1], len(plan.targets))
    log_rest = _log_rest(inputs, plan.targets, more, owner, plan.options, weights)
    their_more, their_owner = _later_rows(groups[:, 2], groups[:, 3], len(plan.teacher_targets))
    their_log_rest = _log_rest(
        plan.teacher, plan.teacher_targets, their_more, their_owner, plan.teacher_options, weights
    )
    gradients = [torch.zeros_like(t) if t is not None and want else None for t, want in zip(inputs, wanted)]
    losses, d_log_rest = torch.zeros_like(weights), torch.zeros_like(weights)
    ok = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    for start in range(0, len(groups), plan.chunk):
        here = slice(start, start + plan.chunk)
        rows, their_rows = groups[here, 0], groups[here, 2]
        with torch.no_grad():
            logits = _project(plan.teacher, their_rows)
            target = _Events(logits, plan.teacher_targets[their_rows], their_log_rest[here], plan.teacher_options)
        z = _project(inputs, rows).requires_grad_(any(wanted))
        rest = log_rest[here].detach().requires_grad_(any(wanted))
        with torch.set_grad_enabled(any(wanted)):
            events = _Events(z, plan.targets[rows], rest, plan.options)
            losses[here], ok[here], total = _chunk_loss(events, target, plan, here)
        if any(wanted):
            dz, d_log_rest[here] = torch.autograd.grad(total, (z, rest))
            _accumulate(gradients, inputs, rows, dz)
    if any(wanted) and len(more):
        part = run(_rows(inputs, more), plan.targets[more], -d_log_rest[owner], plan.options, wanted)[1]
        for index, (whole, extra) in enumerate(zip(gradients, part)):
            if whole is not None and extra is not None:
                whole.index_add_(0, more, extra) if index in _BY_ROW else whole.add_(extra)
    return (losses * weights).sum(), losses, ok, gradients


_BY_ROW = (0, 3)
"""Places in ``Inputs`` of the tensors that have a row for each token."""


def _accumulate(gradients: list[Tensor | None], inputs: Inputs, rows: Tensor, dz: Tensor) -> None:
    """Adds the gradients that the gradient ``dz`` of a chunk's unscaled logits has for the inputs."""
    d_hidden, d_weight, d_bias, d_reduced, d_up = gradients
    if d_hidden is not None:
        d_hidden.index_add_(0, rows, dz @ inputs.weight)
    if d_weight is not None:
        d_weight.addmm_(dz.t(), inputs.hidden[rows])
    if d_bias is not None:
        d_bias.add_(dz.sum(0))
    if d_reduced is not None and inputs.up is not None:
        d_reduced.index_add_(0, rows, dz @ inputs.up)
    if d_up is not None and inputs.reduced is not None:
        d_up.addmm_(dz.t(), inputs.reduced[rows])


def _later_rows(first: Tensor, end: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which of the groups' ``rows`` are the second or later of their group, and the group of each."""
    counts = end - first - 1
    groups = torch.arange(len(first), device=first.device)
    owner = torch.repeat_interleave(groups, counts, output_size=rows - len(first))  # else the host reads their sum
    before = (counts.cumsum(0) - counts)[owner]
    return torch.arange(len(owner), device=first.device) - before + first[owner] + 1, owner


def _log_rest(
    inputs: Inputs, targets: Tensor, more: Tensor, owner: Tensor, options: Options, weights: Tensor
) -> Tensor:
    """[G], log of the probability of a group's second and later tokens; exactly 0 where there are none."""
    out = torch.zeros_like(weights)
    if len(more):
        rows, _ = run(_rows(inputs, more), targets[more], out.new_zeros(len(more)), options, (False,) * 5)
        out.index_add_(0, owner, -rows.nll)
    return out


def _rows(inputs: Inputs, rows: Tensor) -> Inputs:
    reduced = None if inputs.reduced is None else inputs.reduced[rows]
    return inputs._replace(hidden=inputs.hidden[rows], reduced=reduced)


def _project(inputs: Inputs, rows: Tensor) -> Tensor:
    """Logits [C, V] of some rows, before scale and soft cap."""
    weight = inputs.weight.t()
    hidden = inputs.hidden[rows]
    z = hidden @ weight if inputs.bias is None else torch.addmm(inputs.bias, hidden, weight)
    if inputs.reduced is not None and inputs.up is not None:
        z.addmm_(inputs.reduced[rows], inputs.up.t())
    return z.detach()


# ---- one chunk ----


class _Events:
    """Probabilities of the events of C groups on one side: by id ``q`` [C, V], and of the observed ``piece`` [C]."""

    def __init__(self, logits: Tensor, first: Tensor, log_rest: Tensor, options: Options):
        values = logits.to(log_rest.dtype) * options.logit_scale
        if options.softcap is not None:
            values = options.softcap * torch.tanh(values / options.softcap)
        log_q = torch.log_softmax(values, -1)
        log_first = log_q.gather(1, first[:, None])[:, 0]
        self.piece = (log_first + log_rest).exp()
        otherwise = log_first.exp() * -torch.expm1(log_rest)
        self.q = log_q.exp().scatter(1, first[:, None], otherwise[:, None])

    def spell(self, alias: Tensor) -> None:
        """Counts to the piece the token ``alias`` [C] that has its bytes; -1 where there is none."""
        index = alias.clamp_min(0)[:, None]
        moved = self.q.gather(1, index) * (alias >= 0)[:, None]
        self.q = self.q.scatter_add(1, index, -moved)
        self.piece = self.piece + moved[:, 0]


def _chunk_loss(ours: _Events, theirs: _Events, plan: Plan, here: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [C] detached, whether each group counts [C], their weighted sum)."""
    ok = theirs.q.sum(-1).add(theirs.piece).isfinite()
    theirs.q = theirs.q.where(ok[:, None], 0.0)
    theirs.piece = theirs.piece.where(ok, 0.0)
    table, t = plan.matched, plan.temperature
    if table is None:
        loss = t * _sorted_distance(_with(ours.q, ours.piece), _with(theirs.q, theirs.piece))
    else:
        first, end, their_first, their_end = plan.groups[here].unbind(1)
        single, their_single = end - first == 1, their_end - their_first == 1
        ours.spell(table.to_student[plan.teacher_targets[their_first]].where(their_single, -1))
        theirs.spell(table.to_teacher[plan.targets[first]].where(single, -1))
        rest, their_rest = ours.q[:, table.student_rest], theirs.q[:, table.teacher_rest]
        named = _with(ours.q[:, table.student], ours.piece, rest.sum(-1))
        their_named = _with(theirs.q[:, table.teacher], theirs.piece, their_rest.sum(-1))
        loss = t**2 * _jsd(their_named, named) + t * _sorted_distance(rest, their_rest)
    loss = loss.where(ok, 0.0)
    return loss.detach(), ok, (loss * plan.weights[here]).sum()


def _with(q: Tensor, *columns: Tensor) -> Tensor:
    return torch.cat([q, *(column[:, None] for column in columns)], 1)


def _sorted_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance of rows sorted from high to low, the shorter padded with zeros."""
    a, b = a.sort(-1, descending=True).values, b.sort(-1, descending=True).values
    width = max(a.shape[1], b.shape[1])
    return (F.pad(a, (0, width - a.shape[1])) - F.pad(b, (0, width - b.shape[1]))).abs().sum(-1)


def _jsd(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows that may hold zeros: there the logarithm is cut, and its factor is 0."""
    tiny = torch.finfo(p.dtype).tiny
    log_m = ((p + q) / 2).clamp_min(tiny).log()
    ours = q * (q.clamp_min(tiny).log() - log_m)
    theirs = p * (p.clamp_min(tiny).log() - log_m)
    return (ours + theirs).sum(-1) / 2
