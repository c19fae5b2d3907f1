"""Rows for new tokens in the embedding and in the output head, made once and before any training.

A new row starts near the mean of rows that were trained: of all, or of those of a few words that say what the token
stands for. Random rows as wide as trained ones would draw probability away from the trained tokens (Hewitt,
"Initializing New Word Embeddings for Pretrained Language Models", 2021): 64 of them 3 % of SmolLM2-135M's on plain
text, and half of it at some positions, where rows near the mean draw 0.0003 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptl.models.quantize import is_quantized


class NewRow(NamedTuple):
    """The row of one new token.

    Attributes:
        id: where it is.
        text: the token; part of the seed of its noise.
        like: ids of the tokens whose rows it starts as the mean of; empty for all that are known.
    """

    id: int
    text: str
    like: tuple[int, ...] = ()


def first_values(
    matrix: Tensor, new: Sequence[NewRow], known: Tensor, *, noise: float = 0.1, seed: str = "0"
) -> Tensor:
    """The first values of new rows, float32 [N, columns]: a mean each, and noise that sets rows of one mean apart.

    Arguments:
        matrix: float [rows, columns].
        new: the N rows.
        known: int64 [K], the rows that were trained.
        noise: standard deviation of the noise, over that of the known rows in each column.
        seed: any text. A row's noise depends on it and on the token's text alone, and is the same on every machine.
    """
    rows = matrix[known].float()
    mean, spread = rows.mean(0), rows.std(0)
    values = torch.empty(len(new), matrix.shape[1])
    for value, row in zip(values, new):
        start = matrix[torch.tensor(row.like)].float().mean(0) if row.like else mean
        digest = hashlib.blake2b(f"{seed} {row.text}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        value.copy_(start + noise * spread * torch.randn(len(start), generator=generator))
    return values


@torch.no_grad()
def add_rows(
    model: PreTrainedModel,
    new: Sequence[NewRow],
    known: Sequence[int],
    *,
    noise: float = 0.1,
    seed: int = 0,
    multiple: int = 64,
) -> None:
    """Gives new tokens rows in the embedding and in the head, where that is a matrix of its own.

    Other rows are not touched, and the matrices never get smaller: published models have more rows than tokens, and a
    new token takes one of those. Where rows are missing, the matrices grow to a multiple, and rows without a token are
    the mean. Matrices that were one stay one.

    Arguments:
        model: whole, in floats, on the CPU. It is changed, its configuration too.
        new: tokens whose rows are written.
        known: ids of the tokens that were trained.
        noise: as in ``first_values``.
        seed: of the noise, with the matrix and the token's text.
        multiple: the number of rows is rounded up to one, where it grows.

    Raises:
        ValueError: a quantised model, or matrices of other sizes than the tokens'.
    """
    if is_quantized(model):
        raise ValueError(f"{model.name_or_path} is quantised: add the tokens to the model it was made of")
    matrices = _matrices(model)
    sizes = {name: len(module.weight) for name, module in matrices.items()}
    old = sizes["embedding"]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the embedding has {old} rows and the head {sizes['head']}: tokens need a row in both")
    if max(known) >= old:
        raise ValueError(f"the tokenizer has id {max(known)}, and the embedding {old} rows: not this model's tokenizer")
    size = max(row.id for row in new) + 1 if new else 0
    if size > old:
        model.resize_token_embeddings(-(-size // multiple) * multiple, mean_resizing=False)
    trained, written = torch.tensor(sorted(known)), torch.tensor([row.id for row in new], dtype=torch.int64)
    for name, module in _matrices(model).items():
        weight: Any = module.weight
        values = first_values(weight, new, trained, noise=noise, seed=f"{seed} {name}")
        weight[old:] = weight[trained].float().mean(0).to(weight.dtype)
        weight[written] = values.to(weight.dtype)
        bias: Any = getattr(module, "bias", None)
        if bias is not None:
            bias[old:] = bias[written] = bias[trained].float().mean().to(bias.dtype)


def _matrices(model: Any) -> dict[str, Any]:
    """The embedding, and the head where it is another matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = head is not None and head.weight is not embedding.weight
    return {"embedding": embedding, **({"head": head} if apart else {})}
