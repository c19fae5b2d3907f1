"""From a ``ModelSpec`` to a module in training mode.

Under a ZeRO-3 strategy the weights are sharded while they are read; what is made after that (adapters, a scalar head,
trained rows) is made whole on every rank and sharded later by the engine. So nothing here looks at the shape of a
loaded parameter.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled

from ptl.models.adapters import CONFIG_FILE as ADAPTER_CONFIG
from ptl.models.adapters import add_lora, gathered
from ptl.models.compiled import compile_layers
from ptl.models.export import DTYPES
from ptl.models.gguf import is_gguf, plain_folder
from ptl.models.quantize import is_quantized, keep_codes_in_place, quantization_config
from ptl.models.scoring import saved_head
from ptl.models.scratch import scratch_config, tokenizer_alone
from ptl.models.spec import ModelSpec
from ptl.models.students import make_student


class ScalarHead(nn.Linear):
    """One number a position, [*, hidden] -> [*, 1], computed in fp32 whatever the dtype of states and weights.

    ZeRO casts the weights to the engine's 16 bits and keeps fp32 ones in its optimizer; a product in 16 bits would make
    ties of scores that differ.
    """

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.to(wide), self.weight.to(wide))


def build(spec: ModelSpec) -> nn.Module:
    """The model that ``spec`` describes, in training mode, without a key-value cache.

    Raises:
        ValueError: no such model; pickled weights or foreign code that were not allowed; weights that the checkpoint
            lacks; options that the model cannot take.
    """
    model = load_base(spec)
    for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        part.use_cache = False  # a cache would also switch off the masks between packed documents
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    built: nn.Module = model
    if spec.adapter is not None:
        ids = _token_ids(spec, str(model.name_or_path))
        built = add_lora(model, spec.adapter, token_ids=ids, quantized=spec.quantize is not None)
    if spec.compile:
        compile_layers(model.get_decoder())
    # Models come from the library in eval mode, where neither dropout nor gradient checkpointing works.
    return built.train()


def load_base(spec: ModelSpec) -> PreTrainedModel:
    """The model of ``spec`` as the library gives it, in eval mode and without its adapter: what inference starts from.

    Raises:
        ValueError: as in ``build``.
    """
    bare = tokenizer_alone(spec.name) if spec.random_init else None
    source = str(bare) if bare else find_source(spec.name)
    config = scratch_config(bare, spec.config_overrides) if bare else _config(spec, source)
    if spec.attention == "packed":
        import ptl.models.attention  # noqa: F401  registers the implementation
    model = _random(spec, config) if spec.random_init else _pretrained(spec, source, config)
    if spec.shrink is not None:
        model = make_student(model, spec.shrink)
    model.name_or_path = source
    _check_tie(model)
    return model


def find_source(name: str) -> str:
    """What to load from: an absolute folder for anything local or packaged, else the hub name unchanged.

    Raises:
        ValueError: a path that is not there or holds no model.
    """
    if is_gguf(name):
        return str(plain_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path.resolve())
        if (path / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{name} is an adapter, not a model: merge it with `ptl export {name} --out FOLDER`")
        if (path / "export" / "config.json").is_file():
            raise ValueError(f"{name} is a run folder: give its model, {path / 'export'}")
        if tokenizer_alone(name):
            raise ValueError(
                f"{name} is a tokenizer alone: set random_init: true and config_overrides.model_type to begin a model"
            )
        raise ValueError(f"{name} has no config.json: it is not a Hugging Face model folder")
    if path.exists():
        raise ValueError(f"{name} is a file: give a model folder, a .gguf file or a hub name")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"no model folder at {name}")
    return name


def _config(spec: ModelSpec, source: str) -> PreTrainedConfig:
    """The model's configuration with the overrides, each of which must be a known key."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, revision=spec.revision)
    except (OSError, ValueError) as error:
        raise _not_found(spec, error) from error
    overrides = dict(spec.config_overrides)
    if raw.get("auto_map") and overrides.get("auto_map", raw["auto_map"]) and not spec.trust_remote_code:
        raise ValueError(
            f"{spec.name} comes with its own Python code (auto_map in its config.json), which is not run unless "
            "trust_remote_code is true; to use the class of transformers for it, set config_overrides.auto_map: null"
        )
    layers, kinds = overrides.get("num_hidden_layers"), raw.get("layer_types")
    if layers is not None and kinds and "layer_types" not in overrides and layers <= len(kinds):
        overrides["layer_types"] = kinds[:layers]
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        plain = AutoConfig.from_pretrained(source, **options)
        changed = AutoConfig.from_pretrained(source, **options, **overrides) if overrides else plain
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_found(spec, error) from error
    if not overrides.get("auto_map", True):
        delattr(changed, "auto_map")
    for key in spec.config_overrides:
        if key not in raw and not hasattr(plain, key):
            near = difflib.get_close_matches(key, list(plain.to_dict()), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config_overrides: the model's config has no key {key!r}{hint}")
    return changed


def _not_found(spec: ModelSpec, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"cannot read the model {spec.name!r}: {reason[:300]}")


def _options(spec: ModelSpec) -> dict[str, Any]:
    dtype: Any = "auto" if spec.dtype == "auto" else DTYPES[spec.dtype]
    attention = "ptl_packed" if spec.attention == "packed" else spec.attention
    return {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": spec.trust_remote_code}


def _random(spec: ModelSpec, config: PreTrainedConfig) -> PreTrainedModel:
    """Random weights that the seed alone decides, the same on each rank.

    Under ZeRO-3 the library draws at another time and on one rank alone, so it draws from a fork of the generator. On
    the CPU it draws the same as without ZeRO-3; ranks that hold their shards on GPUs draw there, and other numbers.
    """
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _drawn(spec, config)


def _drawn(spec: ModelSpec, config: PreTrainedConfig) -> PreTrainedModel:
    options = _options(spec)
    if options["dtype"] == "auto":
        options["dtype"] = config.dtype or torch.float32
    auto: Any = AutoModelForCausalLM
    if spec.head == "scalar":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    with no_init_weights():
        model = auto.from_config(config, **options)
    if not is_deepspeed_zero3_enabled():  # else the library has drawn them, a shard at a time
        model.initialize_weights()
        model.tie_weights()
    if spec.head == "scalar":
        _scalar_head(model)
    return model


def _pretrained(spec: ModelSpec, source: str, config: PreTrainedConfig) -> PreTrainedModel:
    options = _options(spec)
    if spec.quantize is not None:
        compute: Any = (config.dtype or torch.float32) if spec.dtype == "auto" else options["dtype"]
        options["quantization_config"] = quantization_config(spec.quantize, compute)
    if not spec.allow_pickle:
        options["use_safetensors"] = True
        _refuse_pickle(spec, source)
    auto: Any = AutoModelForCausalLM
    if spec.head == "scalar":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    try:
        model, info = auto.from_pretrained(
            source, config=config, revision=spec.revision, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_found(spec, error) from error
    # Neither library nor log line stops a run whose weights are partly random.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("score."))
    if missing:
        raise ValueError(f"the checkpoint {spec.name} lacks {len(missing)} weights of its model, first {missing[0]}")
    if spec.quantize is not None and not is_quantized(model):
        raise ValueError(f"quantize {spec.quantize}: {type(model).__name__} has no linear layer to quantise")
    if is_quantized(model):  # also a folder whose weights are kept as codes
        keep_codes_in_place(model)
    if spec.head == "scalar":
        _scalar_head(model)
        saved = saved_head(source)
        if saved is not None:  # the library reads a file into one dtype and has rounded an fp32 head to 16 bits
            with torch.no_grad():
                model.score.weight.copy_(saved)
    return model


def _refuse_pickle(spec: ModelSpec, source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(
            f"{spec.name} has pickled weights only ({pickles[0]}), which can run code when loaded: set allow_pickle: "
            "true if you trust them, or convert them to safetensors"
        )
    raise ValueError(f"{spec.name} has no weights (*.safetensors): set random_init: true to start from random ones")


def _scalar_head(model: Any) -> None:
    """Puts an fp32 head in the place of ``score``, with its weights: those loaded, or fresh where there were none."""
    old: Any = getattr(model, "score", None)
    if not isinstance(old, nn.Linear):
        raise ValueError(f"head scalar: {type(model).__name__} has no linear module called score")
    # ZeRO-3 takes parameters of one dtype alone; its optimizer holds fp32 ones.
    dtype = old.weight.dtype if is_deepspeed_zero3_enabled() else torch.float32
    head = ScalarHead(old.in_features, 1, bias=False, dtype=dtype)
    with gathered(old.parameters()), torch.no_grad():
        head.weight.copy_(old.weight)
    model.score = head.to(old.weight.device)
    if model.config.pad_token_id is None:
        # The library's own forward refuses a batch without it; the objective reads its own positions.
        end = model.config.eos_token_id
        model.config.pad_token_id = end[0] if isinstance(end, list) else end


def _check_tie(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return
    if head.weight is not model.get_input_embeddings().weight:
        raise ValueError(f"{type(model).__name__} should tie its embedding and its head, but they are two matrices")


def _token_ids(spec: ModelSpec, source: str) -> list[int]:
    """``adapter.train_tokens`` as ids."""
    tokens = spec.adapter.train_tokens if spec.adapter is not None else []
    if not any(isinstance(token, str) for token in tokens):
        return [int(token) for token in tokens]
    tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision)
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in tokens if isinstance(token, str) and token not in vocabulary]
    if unknown:
        raise ValueError(
            f"adapter.train_tokens: the tokenizer of {spec.name} has no token {unknown[0]!r}; rows are trained, never "
            "added: add the token to the base model first (ptl tokens add)"
        )
    return [token if isinstance(token, int) else vocabulary[token] for token in tokens]
