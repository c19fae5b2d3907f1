"""ZeRO-3 as the Hugging Face libraries see it: an announced configuration that changes what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.integrations import HfDeepSpeedConfig, deepspeed_config, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@contextmanager
def zero3_hidden(keeper: nn.Module) -> Iterator[None]:
    """Inside, transformers and peft act as in a job without ZeRO-3: what they make is whole, on this rank alone.

    Two things need it. peft 0.21 copies trained token rows on CUDA alone under ZeRO-3
    (``TrainableTokensLayer._collect_token_weights``). And a model class that makes another inside itself, as every
    sequence classifier does, would enter collectives though one rank alone makes it.

    Arguments:
        keeper: what keeps the announcement, which transformers knows by a weak reference, alive afterwards.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    announced = deepspeed_config()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        keeper.announced_zero3 = HfDeepSpeedConfig(announced)  # pyright: ignore[reportArgumentType]
