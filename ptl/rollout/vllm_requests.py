"""What vLLM is asked, the same beside this process and on a server."""

from __future__ import annotations

from typing import Any

from ptl.rollout.engine import Asked, Draws
from ptl.rollout.sampling import numbered

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM makes room for."""


def sampling(asked: Asked, draws: Draws) -> dict[str, Any]:
    """Fields of vLLM's ``SamplingParams``: every one that could change a draw.

    The model's own end of an answer is ignored: the stop ids are all there are. Answers of a prompt draw with ``seed``,
    ``seed + 1`` and so on.
    """
    return {
        "n": draws.samples if draws.temperature else 1,
        "temperature": draws.temperature,
        "top_p": draws.top_p if draws.temperature else 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": numbered(draws.seed, asked.number) >> 2,
        "stop_token_ids": list(draws.stop),
        "ignore_eos": True,
        "max_tokens": asked.limit,
        "min_tokens": 0,
        "logprobs": 0,
        "detokenize": False,
    }
