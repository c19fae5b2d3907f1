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
AGREEMENT = "reward_agreement.json"
FORMATS = "format_report.json"
DOCUMENTS, LONGEST = 64, 1024
"""Documents that two formats are compared on, and tokens of each."""
BATCH_TOKENS = 8192


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
    from ptl.apps.runs import quiet_libraries
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
    if options.rows and options.adapter_only:
        raise ValueError("--rows compares whole models: leave out --adapter-only, or --rows")
    rows = None if not options.rows else _rows(options.rows, found) if reward else _documents(options.rows, found)
    live = _load(found, reward)
    out = _write(options, found, reward, live)
    written = _load(resolve_model(str(out)), reward)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    kind = options.quantize or str(next(written.parameters()).dtype).replace("torch.", "")
    print(f"wrote {out}: {size / 1e6:,.1f} MB of weights, {kind}")
    name = "score" if reward else "logit"
    print(f"largest {name} change against the live model: {_change(found, live, written, reward):.3g}")
    if reward and rows is not None:
        _report_agreement(rows, live, written, Path(out))
    elif rows is not None:
        _report_formats(rows, found, live, written, Path(out), kind)
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


# ---- what it predicts ----


def _documents(file: str, found: Found) -> Any:
    """The first documents of a file that the model can read, rendered as in training."""
    from ptl.data.files import resolve
    from ptl.data.readers import blocks, first_rows
    from ptl.data.records import parse_row
    from ptl.data.render import Renderer, RenderError
    from ptl.data.sources import RECORD_OF, BadRow, Source, detect_format
    from ptl.data.tokenizer import load_tokenizer
    from ptl.types import Conversation, Origin

    source, renderer = Source(path=file), Renderer(load_tokenizer(found.name))
    files = resolve(source)
    row_format = detect_format(source, first_rows(source, files=files))
    if RECORD_OF[row_format] is not Conversation:
        raise ValueError(f"--rows {file} holds {row_format}: a language model is compared on conversations or texts")
    documents, why = [], ""
    for block in blocks(source, files=files):
        for line, row in block.rows():
            try:
                if isinstance(row, BadRow):
                    raise row
                record: Any = parse_row(row, row_format, source, Origin(block.file, line))
                documents += renderer.fit(record, LONGEST, "keep_start")
            except (BadRow, RenderError) as refusal:
                why = why or f"{block.file}:{line}: {refusal}"
            if len(documents) >= DOCUMENTS:
                return documents[:DOCUMENTS]
    if not documents:
        raise ValueError(f"--rows {file} has no row that can be compared ({why or 'it is empty'})")
    return documents


def _report_formats(documents: Any, found: Found, live: nn.Module, written: nn.Module, out: Path, kind: str) -> None:
    from ptl.data.durable import write_text
    from ptl.models.format_report import compare_formats

    measured = compare_formats(live, written, documents)
    sizes = [_weights(live), _weights(written)]
    facts = {"format": kind, **measured, "bytes_before": sizes[0], "bytes_after": sizes[1]}
    write_text(out / FORMATS, json.dumps(facts, indent=2) + "\n")
    perplexities = f"perplexity {facts['perplexity_before']:.4g} before and {facts['perplexity_after']:.4g} after"
    same = f"the same likeliest token in {100 * facts['greedy_agreement']:.1f} %"
    memory = f"{sizes[0] / 1e6:,.1f} MB in memory before, {sizes[1] / 1e6:,.1f} after"
    before, after = facts["tokens_per_second_before"], facts["tokens_per_second_after"]
    print(
        f"on {facts['tokens']:,} tokens: KL {facts['kl']:.4g} nats (99th percentile {facts['kl_p99']:.3g}), "
        f"{perplexities}, {same}; {memory}; {before:,.0f} tokens/s read before, {after:,.0f} after"
    )


def _weights(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, tied ones once."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())


# ---- the order of answers ----


def _rows(file: str, found: Found) -> tuple[Any, Any]:
    """The rankings, and the renderer of the model, before anything is written."""
    from ptl.data.reward_models import reward_renderer
    from ptl.data.scored_rankings import read_rankings

    return read_rankings(file), reward_renderer(found.name)[0]


def _report_agreement(rows: tuple[Any, Any], live: nn.Module, written: nn.Module, out: Path) -> None:
    from ptl.data.durable import write_text

    found = agreement(*rows, live, written)
    write_text(out / AGREEMENT, json.dumps(found, indent=2) + "\n")
    for entry in found["left_out"]:
        print(f"{entry['rows']:,} rows left out: {entry['reason']} (first: {entry['examples'][0]})")
    shown = {
        key: "unknown" if found[key] is None else f"{found[key]:.4g}"
        for key in ("kendall_tau_b", "pair_agreement", "accuracy_before", "accuracy_after", "mean_shift")
    }
    print(
        f"order of answers on {found['prompts']:,} prompts: Kendall tau-b {shown['kendall_tau_b']}, same order in "
        f"{shown['pair_agreement']} of {found['pairs']:,} pairs, accuracy {shown['accuracy_before']} before and "
        f"{shown['accuracy_after']} after, mean shift {shown['mean_shift']}, {found['new_ties']:,} new ties"
    )


def agreement(rows: Any, renderer: Any, before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """How far two models of one tokenizer order the same answers alike.

    Arguments:
        rows: ``read_rankings`` of the file.
        renderer: of both.
        before: the original.
        after: what was written.

    Returns:
        ``score_agreement`` over the rows, with ``prompts``, ``accuracy_before`` and ``accuracy_after`` against the
        rows' own ranking, and the rows ``left_out`` by reason.

    Raises:
        ValueError: no row can be scored.
    """
    import numpy as np
    import torch

    from ptl.data.reward_models import longest
    from ptl.data.scored_rankings import all_pairs, measure, render_rankings, score_examples
    from ptl.functional.score_agreement import score_agreement

    rendered = render_rankings(rows.records, renderer, longest(before))
    examples = [example for example in rendered.examples if example is not None]
    reasons = {**rows.left_out, **rendered.left_out}
    if not examples:
        raise ValueError(f"no row can be scored: {'; '.join(reason.examples[0] for reason in reasons.values())}")
    old, new = (score_examples(model, examples, batch_tokens=BATCH_TOKENS) for model in (before, after))
    groups, pairs = all_pairs([len(own) for own in old])
    flat = [torch.from_numpy(np.concatenate(scores)) for scores in (old, new)]
    return {
        "prompts": len(examples),
        **score_agreement(flat[0], flat[1], torch.from_numpy(groups), torch.from_numpy(pairs)),
        "accuracy_before": measure(old, examples)["accuracy"],
        "accuracy_after": measure(new, examples)["accuracy"],
        "left_out": [
            {"reason": name, "rows": reason.count, "examples": reason.examples} for name, reason in reasons.items()
        ],
    }


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty: give another folder, or --overwrite to replace the model in it")
