"""Divergences between a teacher's and a student's distribution over the vocabulary, and their gradients.

For one position let p be the teacher's and q the student's probabilities, both at the temperature of the divergence,
and u = log p - log q. Every function here is D = sum_v f(p_v, q_v). With a = z / T the student's tempered logits,

    dD/da_v = s_v - q_v * sum_w s_w,     s_v = q_v * df/dq_v

so a divergence is told by D and s. Nothing here needs the vocabulary itself: p and q may as well be the probabilities
of k kept ids and of all the rest together, since the rest's dD/dq is the same for each of its ids.

- ``forward_kl``: KL(p || q), mass where the teacher has mass (Hinton et al., arXiv:1503.02531).
- ``reverse_kl``: KL(q || p), no mass where the teacher has none (MiniLLM, arXiv:2306.08543).
- ``jsd``: [beta KL(p || m) + (1 - beta) KL(q || m)] / (beta (1 - beta)), m = beta p + (1 - beta) q. It is the
  generalised Jensen-Shannon divergence of GKD (arXiv:2306.13649, equation 1) over beta (1 - beta): that one vanishes
  as beta nears 0 or 1, so that a special case there makes the gradient jump; divided, it is continuous in beta, with
  KL(p || q) at 0, KL(q || p) at 1, and four times the usual Jensen-Shannon divergence at 1/2.
- ``skew_kl``: KL(p || skew p + (1 - skew) q), bounded by -log(skew) (DistiLLM, arXiv:2402.03898, equation 3).
- ``skew_reverse_kl``: KL(q || (1 - skew) p + skew q), the same with the roles exchanged. DistiLLM's code holds the q of
  the mixture constant; here the gradient is that of the whole expression.
- ``total_variation``: 1/2 sum |p - q|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]
FLOOR = -100.0
"""Least log of a teacher's probability over that of its likeliest id: an id that it excludes costs at most about 100
nats, not infinity."""
_LARGEST = 80.0
"""Bound of u in ``expm1``: exp(80) is below float32's largest number, and p = exp(80) q > 0 means q < 1e-34."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Which divergence the student is trained to make small.

    Attributes:
        kind: one of ``forward_kl``, ``reverse_kl``, ``jsd``, ``skew_kl``, ``skew_reverse_kl``, ``total_variation``.
        beta: of ``jsd``, in [0, 1]: 0 is ``forward_kl``, 1 is ``reverse_kl``.
        skew: share of the other distribution in the mixture of the skew divergences, in [0, 1).
        temperature: T > 0; both sides' logits are divided by it, and the loss is multiplied by T squared once, so that
            its gradient keeps its size as T grows (arXiv:1503.02531, section 2.1).

    Raises:
        ValueError: a value out of its range.
    """

    kind: Kind = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"divergence.kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"divergence.beta must be from 0 to 1, got {self.beta}")
        if not 0 <= self.skew < 1:
            raise ValueError(f"divergence.skew must be at least 0 and below 1, got {self.skew}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"divergence.temperature must be above 0, got {self.temperature}")


def divergence_rows(p: Tensor, q: Tensor, u: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """D and dD/da of each row, without T squared; see the top of the file.

    Args:
        p: [N, K], probabilities of the teacher. Overwritten.
        q: [N, K], probabilities of the student.
        u: [N, K], log p - log q, finite. Overwritten.
        divergence: which.

    Returns:
        D [N] and dD/da [N, K]; the latter may be ``p`` or ``u``.
    """
    kind, beta, alpha = divergence.kind, divergence.beta, divergence.skew
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return _dot(p, u), p.neg_().add_(q)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        value = -_dot(q, u)
        return value, u.add_(value[:, None]).mul_(q).neg_()
    if kind == "total_variation":
        difference = torch.sub(q, p, out=p)
        sign = torch.sign(difference, out=u)
        mean = _dot(q, sign)[:, None]
        return difference.abs_().sum(-1).mul_(0.5), sign.sub_(mean).mul_(q).mul_(0.5)
    if kind == "jsd":
        w = _log_mixture_over_student(u, beta)
        of_q = _dot(q, w)
        value = _dot(p, u.sub_(w)) / (1 - beta) - of_q / beta
        return value, w.sub_(of_q[:, None]).mul_(q).div_(-beta)
    if kind == "skew_kl":
        w = _log_mixture_over_student(u, alpha)
        value = _dot(p, u.sub_(w))
        s = w.neg_().exp_().mul_(p).mul_(alpha - 1)
        return value, s.addcmul_(q, s.sum(-1, keepdim=True), value=-1)
    w = _log_mixture_over_student(u, 1 - alpha)
    value = -_dot(q, w)
    h = w.add_(torch.neg(w, out=p).exp_().mul_(alpha))  # the negative of df/dq but for a constant
    return value, h.sub_(_dot(q, h)[:, None]).mul_(q).neg_()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[N], by rows. ``einsum`` says the same in nine times the time: on the CPU it is no vectorised loop."""
    return (left * right).sum(-1)


def _log_mixture_over_student(u: Tensor, share: float) -> Tensor:
    """log(m / q) for m = share * p + (1 - share) * q, from u = log(p / q), exact also for a share near 0 or 1."""
    if share <= 0.5:
        return u.clamp(max=_LARGEST).expm1_().mul_(share).log1p_()
    # m / p = share + (1 - share) q / p
    return (-u).clamp_(max=_LARGEST).expm1_().mul_(1 - share).log1p_().add_(u)
