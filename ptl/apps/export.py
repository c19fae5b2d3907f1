"""``ptl export``: merge an adapter into its base, change the dtype, and say what it cost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "Pourquoi le ciel est-il bleu ? Parce que l'air diffuse la lumière.",
)
"""What both models read for the comparison."""


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="ptl export", description="Write a model as one plain Hugging Face folder.")
    parser.add_argument("model", help="run folder, adapter folder or model folder")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="of the weights; the model's own by default")
    parser.add_argument(
        "--base",
        choices=("dequantized", "original"),
        default="dequantized",
        help="what a QLoRA adapter is merged onto: the weights it was trained on, or the base before quantisation",
    )
    parser.add_argument("--adapter-only", action="store_true", help="the adapter alone, as one that its base loads")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already at --out")
    options = parser.parse_args(list(argv))
    try:
        return _export(options)
    except (ValueError, OSError) as mistake:
        print(f"ptl export: error: {mistake}", file=sys.stderr)
        return 2


def _export(options: argparse.Namespace) -> int:
    from ptl.apps.runs import base_spec, load_model, quiet_libraries, resolve_model
    from ptl.data.render import Renderer
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.adapters import is_adapted
    from ptl.models.export import export, largest_logit_change

    _check_target(Path(options.out), options.overwrite)
    quiet_libraries()
    found = resolve_model(options.model, adapter=True)
    if Path(found.name).resolve() == Path(options.out).resolve():
        raise ValueError(f"--out {options.out} is the model that is read: give another folder")
    live = load_model(found)
    if options.adapter_only and not is_adapted(live):
        raise ValueError(f"{options.model} has no adapter: leave out --adapter-only")
    tokenizer = load_tokenizer(found.name)
    ends = Renderer(tokenizer).terminators if tokenizer.chat_template else ()
    chosen = live if options.base == "dequantized" else load_model(found, quantized=False)
    spec = base_spec(found) if options.adapter_only else None
    merged = not options.adapter_only
    out = export(chosen, tokenizer, options.out, dtype=options.dtype, merged=merged, generation_eos=ends, spec=spec)
    written = load_model(resolve_model(str(out)))
    documents = [list(tokenizer(text)["input_ids"]) for text in TEXTS]  # pyright: ignore[reportArgumentType]
    change = largest_logit_change(live, written, documents)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    print(f"wrote {out}: {size / 1e6:,.1f} MB of weights, {next(written.parameters()).dtype}".replace("torch.", ""))
    print(f"largest logit change against the live model: {change:.3g}")
    return 0


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty: give another folder, or --overwrite to replace the model in it")
