"""What model to build, as plain values that a YAML can hold; torch is loaded only by ``ModelSpec.build``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import nn

Init = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]
AdapterDtype = Literal["auto", "base", "fp32"]
Dtype = Literal["bf16", "fp32", "fp16", "auto"]
Attention = Literal["packed", "sdpa", "eager", "flash_attention_2"]
Quantization = Literal["nf4", "int8"]
Head = Literal["lm", "scalar"]
Keep = Literal["uniform", "first", "last", "ends"]

CHANGES_BASE = ("pissa", "olora")
"""LoRA initialisations that take the adapter's first value out of the base weights."""
WIDTHS = ("intermediate_size", "heads", "hidden_size")
"""Keys of ``Shrink`` that make a layer narrower."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank adapter: each targeted matrix W becomes W + scale * B @ A, and only A and B train (arXiv:2106.09685).

    Attributes:
        rank: columns of B and rows of A.
        alpha: scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``.
        dropout: probability, in [0, 1), of dropping an input of A.
        targets: ``all-linear`` for every linear layer but the output head, or the last parts of module names
            (``q_proj``, ``mlp.down_proj``), each of which must match a layer.
        exclude: last parts of module names that get no adapter.
        rslora: rank-stabilised scale (arXiv:2312.03732).
        dora: learn the length of each row of W apart from its direction (DoRA, arXiv:2402.09353).
        init: ``default`` (A random, B zero), ``gaussian`` (A normal), ``orthogonal``, or ``pissa`` (arXiv:2404.02948)
            and ``olora`` (arXiv:2406.01775), which start from the largest part of W and take it out of W.
        plus_ratio: learning rate of B over that of A (LoRA+, arXiv:2402.12354, where 16 is advised); None for one rate.
        train_tokens: ids or strings of tokens whose rows are trained in the input embedding and in the output head;
            where the two are tied, it is one row.
        save_modules: last parts of names of modules that are trained whole and kept with the adapter.
        dtype: of the adapter's weights. ``base`` as the weights they are added to, ``fp32``, or ``auto``: fp32 on a
            quantised base, else as the base. With ``dtype: bf16`` and no ZeRO optimizer that keeps fp32 master
            weights, ``fp32`` keeps small updates from being rounded away.

    Raises:
        ValueError: a value out of its range, or two values that exclude each other.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    exclude: list[str] = field(default_factory=list)
    rslora: bool = False
    dora: bool = False
    init: Init = "default"
    plus_ratio: float | None = None
    train_tokens: list[int | str] = field(default_factory=list)
    save_modules: list[str] = field(default_factory=list)
    dtype: AdapterDtype = "auto"

    def __post_init__(self) -> None:
        _one_of("adapter.init", self.init, get_args(Init))
        _one_of("adapter.dtype", self.dtype, get_args(AdapterDtype))
        if self.rank < 1:
            raise ValueError(f"adapter.rank must be 1 or more, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"adapter.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout must be at least 0 and below 1, got {self.dropout}")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError(f"adapter.targets must be all-linear or a list of module names, got {self.targets!r}")
        if not self.targets:
            raise ValueError("adapter.targets is empty: name at least one layer, or give all-linear")
        if self.plus_ratio is not None and not self.plus_ratio > 0:
            raise ValueError(f"adapter.plus_ratio must be above 0, got {self.plus_ratio}")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"adapter.init orthogonal needs an even adapter.rank, got {self.rank}")
        for token in self.train_tokens:
            if isinstance(token, int) and token < 0:
                raise ValueError(f"adapter.train_tokens holds {token}: a token id is 0 or more")


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """A smaller model out of a trained one: whole layers kept as they are, and within them the parts that matter most.

    What to start a student from that a teacher then trains (Minitron, arXiv:2407.14679; ShortGPT, arXiv:2403.03853).

    Attributes:
        layers: how many layers to keep, chosen by ``keep``; or exactly which, counted from 0, in ascending order; None
            keeps all.
        keep: which layers, where ``layers`` is a number. ``uniform`` spreads them over the depth, first and last
            included; ``first`` and ``last`` take one end; ``ends`` takes half from each, the odd one from the front.
        intermediate_size: neurons to keep in each MLP; None keeps all.
        heads: attention heads to keep in each layer, with whole key-value groups: a multiple of the number of heads
            that share a key-value head; None keeps all.
        hidden_size: channels of the residual stream to keep, the same in every layer, in decoders made as Llama,
            Qwen2 or Qwen3 are; Llama's configuration asks for a multiple of the number of heads. None keeps all.

    Raises:
        ValueError: a value out of its range, or nothing to take away.
    """

    layers: int | list[int] | None = None
    keep: Keep = "uniform"
    intermediate_size: int | None = None
    heads: int | None = None
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        _one_of("policy.shrink.keep", self.keep, get_args(Keep))
        if self.layers is None and not self.narrows:
            raise ValueError(
                "policy.shrink is empty: set its layers, hidden_size, intermediate_size or heads, or remove it"
            )
        if isinstance(self.layers, list):
            ascending = all(a < b for a, b in zip(self.layers, self.layers[1:]))
            if not self.layers or self.layers[0] < 0 or not ascending:
                raise ValueError(
                    "policy.shrink.layers must be a number, or a list of layers counted from 0, each once and in "
                    f"ascending order, got {self.layers}"
                )
        elif self.layers is not None and self.layers < 1:
            raise ValueError(f"policy.shrink.layers must be 1 or more, got {self.layers}")
        for key in WIDTHS:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"policy.shrink.{key} must be 1 or more, got {value}")

    @property
    def narrows(self) -> bool:
        """Whether a layer that stays is cut."""
        return any(getattr(self, key) is not None for key in WIDTHS)

    @property
    def within_layers(self) -> bool:
        """Whether neurons or heads are taken away."""
        return self.intermediate_size is not None or self.heads is not None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A language model to build, by name and options.

    Attributes:
        name: a Hugging Face hub name; a local folder; a ``.gguf`` file; or ``gguf://PACKAGE/FILE.gguf``, a file inside
            an installed Python package, which is found without importing the package. GGUF weights are dequantised.
        dtype: of the weights. ``fp32`` (the default) is right for weights that a plain optimizer updates, with
            ``trainer.precision: bf16-mixed`` where the machine computes in bf16. ``bf16`` halves the memory: right
            for a frozen base (LoRA), for inference, and under ZeRO, whose optimizer keeps fp32 master weights.
            ``auto`` is the checkpoint's own. On a quantised base it is the dtype of computation.
        attention: ``packed`` (documents that share a row do not see each other, on any device), ``sdpa``, ``eager``,
            or ``flash_attention_2`` (CUDA, fp16 or bf16).
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        compile: join the element-wise work of each layer into few kernels (``torch.compile``), which takes a minute
            before the first step and needs a C compiler; not under ZeRO-3.
        adapter: LoRA; everything else is frozen then. None trains every weight.
        quantize: keep the frozen linear layers in 4-bit ``nf4`` (QLoRA, arXiv:2305.14314) or 8-bit ``int8``
            (arXiv:2208.07339); a policy also needs ``adapter``, a teacher has none.
        head: ``lm`` predicts the next token; ``scalar`` gives one fp32 number a sequence.
        random_init: build from the configuration alone with random weights: pre-training and benchmarks. ``name`` may
            then be the folder of a tokenizer alone; ``config_overrides`` says the model's type and sizes.
        config_overrides: keys of the model's ``config.json`` to change; fewer ``num_hidden_layers`` keeps the first.
        shrink: keep only some layers, neurons, heads and channels of the checkpoint: a student made of its teacher.
        revision: branch, tag or commit of a hub name.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: read pickled weights (``*.bin``), which can run code when loaded.

    Raises:
        ValueError: values that exclude each other.
    """

    name: str
    dtype: Dtype = "fp32"
    attention: Attention = "packed"
    gradient_checkpointing: bool = False
    compile: bool = False
    adapter: LoRA | None = None
    quantize: Quantization | None = None
    head: Head = "lm"
    random_init: bool = False
    config_overrides: dict[str, Any] = field(default_factory=dict)
    shrink: Shrink | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, get_args(Dtype))
        _one_of("attention", self.attention, get_args(Attention))
        _one_of("quantize", self.quantize, (None, *get_args(Quantization)))
        _one_of("head", self.head, get_args(Head))
        if not self.name.strip():
            raise ValueError("policy.name is empty: give a hub name, a model folder or a .gguf file")
        if self.attention == "flash_attention_2" and self.dtype == "fp32":
            raise ValueError("attention flash_attention_2 works in 16 bits: set dtype bf16 or fp16, got fp32")
        if self.shrink is not None and self.random_init:
            raise ValueError(
                "policy.shrink chooses among trained weights, and random_init has none: remove random_init, or give "
                "the sizes in config_overrides (num_hidden_layers, ...) instead of shrink"
            )
        if self.quantize is None:
            return
        if self.shrink is not None and self.shrink.narrows:
            key = next(key for key in WIDTHS if getattr(self.shrink, key) is not None)
            raise ValueError(
                f"policy.shrink.{key} cuts rows of matrices, and quantize {self.quantize} keeps codes: shrink layers "
                "alone, or make the student without quantize first"
            )
        if self.random_init:
            raise ValueError(f"quantize {self.quantize} needs trained weights: remove quantize or random_init")
        if self.adapter is None:
            return
        if self.adapter.init in (*CHANGES_BASE, "orthogonal"):
            raise ValueError(
                f"adapter.init {self.adapter.init} needs base weights in floats, and quantize {self.quantize} keeps "
                "codes: use default or gaussian"
            )
        if self.quantize == "int8" and self.adapter.dora:
            raise ValueError("adapter.dora on an int8 base loses the base's scales: use quantize nf4, or no dora")

    def build(self) -> nn.Module:
        """The model in training mode, on the CPU, or on the current CUDA device when quantised.

        Raises:
            ValueError: nothing of that name, weights or code that are refused, or options the model cannot take.
        """
        from ptl.models.build import build

        return build(self)


def _one_of(key: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(str(k) for k in known)}, got {value!r}")
