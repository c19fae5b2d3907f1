"""Noise on embeddings while training (NEFTune, arXiv:2310.05914)."""

from __future__ import annotations

import torch
from torch import Tensor


def neftune_noise(embeddings: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Uniform noise in ``±alpha / sqrt(L * H)`` for each element (algorithm 1 of the paper).

    Args:
        embeddings: [B, T, H]; gives shape, dtype and device.
        lengths: [B, T], the length L of each token's own document, also where several share a row; 0 on padding, which
            gets no noise.
        alpha: 5 to 15 in the paper.

    Returns:
        [B, T, H], without a graph.
    """
    largest = alpha * (lengths.clamp_min(1) * embeddings.shape[-1]).to(torch.float32).rsqrt() * (lengths > 0)
    uniform = torch.empty_like(embeddings).detach().uniform_(-1, 1)
    return uniform * largest[..., None].to(embeddings.dtype)
