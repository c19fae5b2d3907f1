"""The sizes of a language model by arithmetic on its ``config.json``: nothing is built and nothing is loaded.

Decoder-only transformers with (grouped) attention and a gated or plain MLP are counted to the parameter; routed experts
by their number. What a config does not say in the usual keys is an error, not a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptl.functional.flops import ModelShape

_PLAIN_MLP = ("gpt2", "gpt_neox", "gpt_neo", "gptj", "opt", "mpt", "phi", "starcoder2", "falcon", "bloom")
"""Model types whose MLP is two matrices; the others have a gate beside the first."""
_QUERY_BIAS = ("qwen2", "qwen2_moe", "gpt2", "gpt_neox", "opt", "phi", "starcoder2")
"""Model types whose query, key and value have a bias, whatever their config says."""
_HEAD_NORM = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2")
"""Model types that norm queries and keys before their product."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the arithmetic needs of a model.

    Attributes:
        layers, hidden, vocab: as in the config.
        query: width of all query heads; ``kv`` of all key heads, and again of all value heads.
        heads: query heads.
        inner: width of the MLP, of one expert where there are experts.
        gated: the MLP has a gate beside its first matrix.
        experts: routed experts of a layer, 0 for a dense MLP; ``active`` of them are visited by a token.
        tied: input and output embedding are one matrix.
        bias: entries of the biases of a layer's linear layers.
        norm: entries of a layer's norms; ``last_norm`` of the one before the head.
        positions: entries of a learnt table of positions.
    """

    layers: int
    hidden: int
    vocab: int
    query: int
    kv: int
    heads: int
    inner: int
    gated: bool = True
    experts: int = 0
    active: int = 0
    tied: bool = False
    bias: int = 0
    norm: int = 0
    last_norm: int = 0
    positions: int = 0

    @property
    def attention_weights(self) -> int:
        """Entries of a layer's four attention matrices."""
        return self.hidden * (2 * self.query + 2 * self.kv)

    @property
    def mlp_weights(self) -> int:
        """Entries of one MLP, of one expert where there are experts."""
        return (3 if self.gated else 2) * self.hidden * self.inner

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        router = self.hidden * self.experts
        return self.attention_weights + self.mlp_weights * max(1, self.experts) + router + self.bias + self.norm

    @property
    def embedding(self) -> int:
        """Entries of the input embedding."""
        return self.vocab * self.hidden

    @property
    def linear(self) -> int:
        """Entries of every linear layer but the head: what QLoRA keeps in codes."""
        return self.layers * (self.attention_weights + self.mlp_weights * max(1, self.experts))

    @property
    def parameters(self) -> int:
        """Parameters, a tied matrix counted once."""
        tables = self.embedding * (1 if self.tied else 2) + self.positions
        return self.layers * self.layer + tables + self.last_norm

    @property
    def active_body(self) -> float:
        """Weights of the layers that one token meets."""
        mlp = self.mlp_weights * (self.active if self.experts else 1) + self.hidden * self.experts
        return float(self.layers * (self.attention_weights + mlp))

    def lora(self, rank: int) -> int:
        """Parameters of an adapter of this rank on every linear layer but the head."""
        ends = 2 * (self.hidden + self.query) + 2 * (self.hidden + self.kv)
        mlp = (3 if self.gated else 2) * (self.hidden + self.inner) * max(1, self.experts)
        return self.layers * rank * (ends + mlp)

    def shape(self, rank: int | None) -> ModelShape:
        """The matrix products of training it, whole (``rank`` None) or with an adapter of a rank."""
        width = float(self.query * self.layers)
        if rank is None:
            return ModelShape(body_trained=self.active_body, head_trained=float(self.embedding), attention=width)
        return ModelShape(
            body_frozen=self.active_body,
            body_trained=float(self.lora(rank)),
            head_frozen=float(self.embedding),
            attention=width,
        )


def model_size(config: Mapping[str, Any]) -> ModelSize:
    """The sizes that a ``config.json`` tells.

    Raises:
        ValueError: a needed key is missing or no whole number above 0; the message names it.
    """
    inside = config.get("text_config")
    text = {**config, **inside} if isinstance(inside, Mapping) else config
    hidden = _whole(text, "hidden_size", "n_embd", "d_model", "dim")
    heads = _whole(text, "num_attention_heads", "n_head", "n_heads")
    kind = str(text.get("model_type", ""))
    if text.get("kv_lora_rank"):
        raise ValueError("the config's attention is latent (kv_lora_rank), whose sizes are not counted here")
    head = int(text.get("head_dim") or hidden // heads)
    query, kv = head * heads, head * int(text.get("num_key_value_heads") or heads)
    experts = next((n for key in _EXPERTS if isinstance(n := text.get(key), int) and n > 0), 0)
    inner = _inner(text, hidden, experts, kind)
    gated = kind not in _PLAIN_MLP
    biased = bool(text.get("attention_bias", kind in _QUERY_BIAS))
    bias = (query + 2 * kv if biased else 0) + (hidden if kind in _PLAIN_MLP or text.get("attention_bias") else 0)
    bias += (inner + hidden) if kind in _PLAIN_MLP and kind != "mpt" else 0
    norms = hidden * (2 if kind in _PLAIN_MLP and kind != "mpt" else 1)
    return ModelSize(
        layers=_whole(text, "num_hidden_layers", "n_layer", "n_layers"),
        hidden=hidden,
        vocab=_whole(text, "vocab_size"),
        query=query,
        kv=kv,
        heads=heads,
        inner=inner,
        gated=gated,
        experts=experts,
        active=int(text.get("num_experts_per_tok") or experts),
        tied=bool(text.get("tie_word_embeddings", kind in _TIED)),
        bias=0 if kind == "mpt" else bias,
        norm=2 * norms + (2 * head if kind in _HEAD_NORM else 0),
        last_norm=norms,
        positions=_positions(text, kind) * hidden,
    )


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TIED = ("gpt2", "gemma", "gemma2", "gemma3", "gemma3_text", "mpt", "opt", "bloom", "cohere")
"""Model types that tie their embeddings unless the config says otherwise; those of transformers' own defaults."""


def _inner(text: Mapping[str, Any], hidden: int, experts: int, kind: str) -> int:
    if experts and isinstance(text.get("moe_intermediate_size"), int):
        return int(text["moe_intermediate_size"])
    if kind in _PLAIN_MLP and not any(text.get(key) for key in ("intermediate_size", "n_inner", "ffn_dim")):
        return hidden * int(text.get("expansion_ratio") or 4)
    return _whole(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def _positions(text: Mapping[str, Any], kind: str) -> int:
    if kind == "gpt2":
        return _whole(text, "n_positions", "max_position_embeddings")
    return int(text.get("max_position_embeddings") or 0) + 2 if kind == "opt" else 0


def _whole(text: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = text.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise ValueError(f"the config's {key} is {value!r}; expected a whole number above 0")
    raise ValueError(f"the config has no {keys[0]}: expected the config.json of a decoder-only language model")
