"""What an export cost: how far the written model predicts, answers and orders otherwise than the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ptl.models.names import Found

AGREEMENT = "reward_agreement.json"
FORMATS = "format_report.json"
DOCUMENTS, LONGEST = 64, 1024
"""Documents that two formats are compared on, and tokens of each."""
QUESTIONS = 200
"""Questions that are put to both."""
BATCH_TOKENS = 8192


# ---- what it predicts ----


def documents_of(file: str, found: Found) -> Any:
    """The first documents of a file that the model can read, rendered as in training."""
    from ptl.data.files import resolve
    from ptl.data.readers import first_rows, rows_of
    from ptl.data.records import parse_row
    from ptl.data.render import Renderer, RenderError
    from ptl.data.sources import RECORD_OF, BadRow, Source, detect_format
    from ptl.data.tokenizer import load_tokenizer
    from ptl.types import Conversation

    source, renderer = Source(path=file), Renderer(load_tokenizer(found.name))
    files = resolve(source)
    row_format = detect_format(source, first_rows(source, files=files))
    if RECORD_OF[row_format] is not Conversation:
        raise ValueError(f"--rows {file} holds {row_format}: a language model is compared on conversations or texts")
    documents, why = [], ""
    for origin, row in rows_of(source, files):
        try:
            record: Any = parse_row(row, row_format, source, origin)
            documents += renderer.fit(record, LONGEST, "keep_start")
        except (BadRow, RenderError) as refusal:
            why = why or f"{origin}: {refusal}"
        if len(documents) >= DOCUMENTS:
            return documents[:DOCUMENTS]
    if not documents:
        raise ValueError(f"--rows {file} has no row that can be compared ({why or 'it is empty'})")
    return documents


def compare_predictions(documents: Any, live: nn.Module, written: nn.Module) -> dict[str, Any]:
    from ptl.models.format_report import compare_formats

    measured = compare_formats(live, written, documents)
    sizes = [_weights(live), _weights(written)]
    facts = {**measured, "bytes_before": sizes[0], "bytes_after": sizes[1]}
    perplexities = f"perplexity {facts['perplexity_before']:.4g} before and {facts['perplexity_after']:.4g} after"
    same = f"the same likeliest token in {100 * facts['greedy_agreement']:.1f} %"
    memory = f"{sizes[0] / 1e6:,.1f} MB in memory before, {sizes[1] / 1e6:,.1f} after"
    before, after = facts["tokens_per_second_before"], facts["tokens_per_second_after"]
    print(
        f"on {facts['tokens']:,} tokens: KL {facts['kl']:.4g} nats (99th percentile {facts['kl_p99']:.3g}), "
        f"{perplexities}, {same}; {memory}; {before:,.0f} tokens/s read before, {after:,.0f} after"
    )
    return facts


# ---- what it answers ----


def questions_of(file: str, found: Found) -> Any:
    """The first questions of a file that have accepted answers."""
    from itertools import islice

    from ptl.data.render import Renderer
    from ptl.data.sources import Source
    from ptl.data.tokenizer import load_tokenizer
    from ptl.synth.asking import LeftOut
    from ptl.synth.idk_questions import reader
    from ptl.synth.questions import read_questions

    sources, left_out = [Source(path=file)], LeftOut()
    renderer = Renderer(load_tokenizer(found.name))
    asked = list(islice(read_questions(sources, reader(sources), renderer, left_out), QUESTIONS))
    if not asked:
        why = left_out.why if left_out.counts else "it is empty"
        raise ValueError(f"--questions {file} has no question with accepted answers ({why})")
    return asked


def compare_answers(asked: Any, found: Found, live: nn.Module, written: nn.Module) -> dict[str, Any]:
    from ptl.data.render import Renderer
    from ptl.data.tokenizer import load_tokenizer
    from ptl.synth.task_accuracy import answered_right

    renderer = Renderer(load_tokenizer(found.name))
    before, after = (answered_right(model, renderer, asked) for model in (live, written))
    same = sum(one == other for one, other in zip(before, after))
    print(
        f"of {len(asked)} questions {sum(before)} answered right before, {sum(after)} after; "
        f"{same} as before, right or wrong"
    )
    shares = {"accuracy_before": sum(before) / len(asked), "accuracy_after": sum(after) / len(asked)}
    return {"questions": len(asked), **shares, "same_verdict": same / len(asked)}


def _weights(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, tied ones once."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())


# ---- the order of answers ----


def rankings_of(file: str, found: Found) -> tuple[Any, Any]:
    """The rankings, and the renderer of the model, before anything is written."""
    from ptl.data.reward_models import reward_renderer
    from ptl.data.scored_rankings import read_rankings

    return read_rankings(file), reward_renderer(found.name)[0]


def report_agreement(rows: tuple[Any, Any], live: nn.Module, written: nn.Module, out: Path) -> None:
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
