"""What a change of format costs a language model: how far it now predicts otherwise, on the same tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptl.types import Tokens


@torch.no_grad()
def compare_formats(before: nn.Module, after: nn.Module, documents: Sequence[Tokens]) -> dict[str, Any]:
    """Measures two models of one tokenizer on the trained tokens of documents.

    Arguments:
        before: the original, in eval mode.
        after: what was written.
        documents: those without a trained token are passed over.

    Returns:
        ``tokens``; ``kl``, the mean of KL(before || after) in nats; ``kl_p99``, its 99th percentile;
        ``perplexity_before`` and ``perplexity_after``; ``greedy_agreement``, the share of tokens of which both find the
        same likeliest; ``tokens_per_second_before`` and ``_after``, of whole documents read one at a time, the faster
        half of them.

    Raises:
        ValueError: no token is trained, or a model gives numbers that are not finite.
    """
    kls, nlls, same, speeds = [], ([], []), [], ([], [])
    for document in documents:
        mask = torch.from_numpy(document.loss_mask[1:] > 0)
        if not bool(mask.any()):
            continue
        ids = torch.from_numpy(document.ids.astype("int64"))
        logp = []
        for model, own, speed in zip((before, after), nlls, speeds):
            begun = time.perf_counter()
            logits = _logits(model, ids)
            speed.append(len(ids) / (time.perf_counter() - begun))
            logp.append(torch.log_softmax(logits[:-1].double()[mask], -1))
            if not bool(torch.isfinite(logp[-1]).all()):
                raise ValueError(
                    f"the model {'before' if own is nlls[0] else 'after'} gives numbers that are not finite"
                )
            own.append(-logp[-1].gather(-1, ids[1:][mask][:, None])[:, 0])
        kls.append((logp[0].exp() * (logp[0] - logp[1])).sum(-1).clamp_min(0.0))
        same.append(logp[0].argmax(-1) == logp[1].argmax(-1))
    if not kls:
        raise ValueError("no document has a trained token")
    kl = torch.cat(kls)
    perplexities = [math.exp(float(torch.cat(own).mean())) for own in nlls]
    quick = [sorted(speed)[len(speed) // 2 :] for speed in speeds]
    return {
        "tokens": len(kl),
        "kl": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "perplexity_before": perplexities[0],
        "perplexity_after": perplexities[1],
        "greedy_agreement": float(torch.cat(same).double().mean()),
        "tokens_per_second_before": sum(quick[0]) / len(quick[0]),
        "tokens_per_second_after": sum(quick[1]) / len(quick[1]),
    }


def _logits(model: Any, ids: Tensor) -> Tensor:
    device = model.get_input_embeddings().weight.device
    return model(input_ids=ids[None].to(device), use_cache=False).logits[0].float().cpu()
