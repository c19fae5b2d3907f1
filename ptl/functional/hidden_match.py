"""Matching a student's hidden states to a teacher's, layer by layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_EPSILON = 1e-8


def hidden_match(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    projection: Tensor | None = None,
    kind: Literal["cosine", "mse"] = "cosine",
) -> Tensor:
    """Weighted sum over tokens of the distance between a student's and a teacher's hidden states.

    With s_n the student's state, t_n the teacher's and P the projection::

        mse     sum_n w_n * |P s_n - t_n|^2 / Ht
        cosine  sum_n w_n * (1 - <P s_n, t_n> / (|P s_n| |t_n|))

    It is the student that is projected and never the teacher: a target that could move would shrink to 0 and take the
    student with it. The regression onto a wider teacher is FitNets' (arXiv:1412.6550, equation 3), with mean squares by
    layer TinyBERT's (arXiv:1909.10351, equation 8), where P is learned with the student. MiniLM (arXiv:2002.10957)
    matches attention instead, to need no P; the cosine, as in DistilBERT (arXiv:1910.01108, section 3), leaves the
    length of the states free, which differs by orders of magnitude between layers and families.

    Args:
        student: [N, Hs], with its graph.
        teacher: [N, Ht]; no gradient flows to it.
        weights: [N]; no gradient flows to them. A token of weight 0 takes no part, whatever its states hold.
        projection: [Ht, Hs], laid out as the weight of ``nn.Linear(Hs, Ht)``, or None where Hs is Ht.
        kind: the distance.

    Returns:
        float32 [] (float64 for float64 students), a sum and never a mean.

    Raises:
        ValueError: shapes do not fit, or there is no such kind.
    """
    if kind not in ("cosine", "mse"):
        raise ValueError(f"kind is {kind!r}; it must be cosine or mse")
    _check(student, teacher, weights, projection)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        # Rows that do not count are set to 0 first: 0 * NaN would be NaN.
        counts = (weights != 0)[:, None]
        ours = student.to(dtype).where(counts, 0.0)
        theirs = teacher.detach().to(dtype).where(counts, 0.0)
        if projection is not None:
            ours = ours @ projection.to(dtype).t()
        if kind == "mse":
            distance = (ours - theirs).square().mean(-1)
        else:
            lengths = torch.linalg.vector_norm(ours, dim=-1) * torch.linalg.vector_norm(theirs, dim=-1)
            distance = 1 - (ours * theirs).sum(-1) / lengths.clamp_min(_EPSILON)
        return (distance * weights.detach().to(dtype)).sum()


def teacher_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher's layer at the same relative depth as a student's layer.

    Layers are counted as transformers returns hidden states: 0 is the embeddings, L the output of the last block.
    ``layer * teacher_layers / student_layers``, rounded, halves up: TinyBERT's uniform map (arXiv:1909.10351, section
    4.1). Embeddings go to embeddings and the last layer to the last.

    Args:
        layer: in 0 to ``student_layers``.
        student_layers: blocks of the student, at least 1.
        teacher_layers: blocks of the teacher, at least as many.

    Raises:
        ValueError: a number is out of its range.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"a student of {student_layers} layers and a teacher of {teacher_layers}; the student must have at least 1 "
            "layer and not more than the teacher"
        )
    if not 0 <= layer <= student_layers:
        raise ValueError(f"layer is {layer}; it must be 0 (the embeddings) to {student_layers} (the last layer)")
    return (2 * layer * teacher_layers + student_layers) // (2 * student_layers)


def _check(student: Tensor, teacher: Tensor, weights: Tensor, projection: Tensor | None) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or weights.shape != student.shape[:1]:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)} and weights "
            f"{tuple(weights.shape)}; expected [N, Hs], [N, Ht] and [N]"
        )
    ours, theirs = student.shape[1], teacher.shape[1]
    if projection is None and ours != theirs:
        raise ValueError(f"the student's states have {ours} numbers and the teacher's {theirs}: a projection is needed")
    if projection is not None and tuple(projection.shape) != (theirs, ours):
        raise ValueError(f"projection has shape {tuple(projection.shape)}; expected {(theirs, ours)}")
