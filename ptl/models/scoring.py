"""Scores of a reward model: read at the last token of each answer, by its position and never by a padding id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ptl.models.heads import causal_lm, chosen, hidden_states
from ptl.models.modes import evaluating
from ptl.types import GroupBatch

HEAD = "score.weight"


def group_scores(model: nn.Module, batch: GroupBatch) -> Tensor:
    """The score of each answer, float32 [D], with its graph and in the mode that the model is in.

    Args:
        model: with a scalar head, adapted or not.
        batch: on the model's device, padded, or packed with or without a shared prompt.

    Raises:
        ValueError: a packed batch for a model that cannot keep documents apart (``hidden_states``).
    """
    hidden = hidden_states(model, batch.tokens, parents=batch.parents)
    return _scored(model, chosen(hidden, batch.last))


@torch.no_grad()
def answer_scores(model: nn.Module, batch: GroupBatch) -> Tensor:
    """``group_scores`` in eval mode and without a graph."""
    with evaluating(model):
        return group_scores(model, batch)


@torch.no_grad()
def document_scores(model: nn.Module, documents: Sequence[Sequence[int]]) -> Tensor:
    """The score of each document, float32 [documents]; each is read on its own, to its last token.

    Args:
        model: with a scalar head, adapted or not.
        documents: token ids.
    """
    backbone = causal_lm(model).get_decoder()
    device = next(model.parameters()).device
    with evaluating(model):
        ends = [
            backbone(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)[0][:, -1] for ids in documents
        ]
        return _scored(model, torch.cat(ends))


def _scored(model: nn.Module, states: Tensor) -> Tensor:
    """States [N, H] -> float32 [N]; a head in 16 bits that is the library's own reads states in 16 bits."""
    head = causal_lm(model).score
    if type(head) is nn.Linear:
        states = states.to(head.weight.dtype)
    return head(states)[:, 0].float()


def saved_head(folder: str | Path) -> Tensor | None:
    """``score.weight`` [1, H] as a folder has it, or None where it has none.

    transformers reads a file into one dtype, so that the fp32 head of a bf16 model loads rounded.
    """
    from safetensors import safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if HEAD in file.keys():  # noqa: SIM118  (the file is no mapping)
                return file.get_tensor(HEAD)
    return None
