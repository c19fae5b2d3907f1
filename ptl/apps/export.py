"""``ptl export``: merge an adapter into its base, change the dtype or quantise, and say what it cost."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ptl.models.names import Found

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "Pourquoi le ciel est-il bleu ? Parce que l'air diffuse la lumière.",
)
"""What both models read for the comparison."""


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="ptl export", description="Write a model as one plain Hugging Face folder.")
    parser.add_argument("model", help="run folder, adapter folder or model folder; a language or a reward model")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="of the weights; the model's own by default")
    parser.add_argument(
        "--quantize", choices=("nf4", "int8"), help="keep the linear layers as codes of bitsandbytes; heads stay floats"
    )
    parser.add_argument(
        "--rows",
        metavar="FILE",
        help="rows on which to compare both: conversations or texts, of a reward model rankings",
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="questions with accepted answers, as `ptl synth idk` reads them: how many both models answer right",
    )
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
    from ptl.apps.export_costs import (
        FORMATS,
        compare_answers,
        compare_predictions,
        documents_of,
        questions_of,
        rankings_of,
        report_agreement,
    )
    from ptl.apps.runs import quiet_libraries
    from ptl.data.durable import write_text
    from ptl.data.reward_models import is_reward_model
    from ptl.models.names import resolve_model

    _check_target(Path(options.out), options.overwrite)
    quiet_libraries()
    found = resolve_model(options.model, adapter=True)
    if Path(found.name).resolve() == Path(options.out).resolve():
        raise ValueError(f"--out {options.out} is the model that is read: give another folder")
    reward = is_reward_model(found)
    if options.adapter_only and not found.adapter:
        raise ValueError(f"{options.model} has no adapter: leave out --adapter-only")
    if options.adapter_only and options.quantize:
        raise ValueError("--quantize makes codes of whole weights: leave out --adapter-only, or --quantize")
    for name in ("rows", "questions"):
        if getattr(options, name) and options.adapter_only:
            raise ValueError(f"--{name} compares whole models: leave out --adapter-only, or --{name}")
    if options.questions and reward:
        raise ValueError(f"--questions is for language models, and {options.model} is a reward model: leave it out")
    asked = questions_of(options.questions, found) if options.questions else None
    rows = (
        None if not options.rows else rankings_of(options.rows, found) if reward else documents_of(options.rows, found)
    )
    live = _load(found, reward)
    out = _write(options, found, reward, live)
    written = _load(resolve_model(str(out)), reward)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    kind = options.quantize or str(next(written.parameters()).dtype).replace("torch.", "")
    print(f"wrote {out}: {size / 1e6:,.1f} MB of weights, {kind}")
    name = "score" if reward else "logit"
    print(f"largest {name} change against the live model: {_change(found, live, written, reward):.3g}")
    if reward and rows is not None:
        report_agreement(rows, live, written, Path(out))
    facts: dict[str, Any] = {"format": kind}
    if rows is not None and not reward:
        facts |= compare_predictions(rows, live, written)
    if asked is not None:
        facts |= compare_answers(asked, found, live, written)
    if len(facts) > 1:
        write_text(Path(out) / FORMATS, json.dumps(facts, indent=2) + "\n")
    return 0


def _load(found: Found, reward: bool, *, quantized: bool = True) -> nn.Module:
    from ptl.apps.runs import load_model
    from ptl.data.reward_models import load_reward_model
    from ptl.models.quantize import is_quantized, keep_codes_in_place

    if reward:
        return load_reward_model(found, quantized=quantized)
    model = load_model(found, quantized=quantized)
    if is_quantized(model):
        keep_codes_in_place(model)
    return model


def _write(options: argparse.Namespace, found: Found, reward: bool, live: nn.Module) -> Path:
    from ptl.data.render import Renderer
    from ptl.data.reward_facts import FILE, read_reward_facts
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.export import export
    from ptl.models.names import base_spec
    from ptl.models.quantized_export import export_quantized

    tokenizer = load_tokenizer(found.name)
    ends = Renderer(tokenizer).terminators if tokenizer.chat_template else ()
    chosen = live if options.base == "dequantized" else _load(found, reward, quantized=False)
    facts = Path(found.name) / FILE
    known = reward and read_reward_facts(found.name) is not None
    how: dict[str, Any] = {
        "dtype": options.dtype,
        "generation_eos": ends,
        "files": {FILE: facts.read_text(encoding="utf-8")} if known else {},
    }
    if options.quantize:
        return export_quantized(chosen, tokenizer, options.out, options.quantize, **how)
    spec = base_spec(found) if options.adapter_only else None
    return export(chosen, tokenizer, options.out, merged=not options.adapter_only, spec=spec, **how)


def _change(found: Found, live: nn.Module, written: nn.Module, reward: bool) -> float:
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.export import largest_logit_change
    from ptl.models.scoring import document_scores

    tokenizer = load_tokenizer(found.name)
    documents = [list(tokenizer(text)["input_ids"]) for text in TEXTS]  # pyright: ignore[reportArgumentType]
    if not reward:
        return largest_logit_change(live, written, documents)
    return float((document_scores(live, documents) - document_scores(written, documents)).abs().max())


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty: give another folder, or --overwrite to replace the model in it")
