"""Bytes of a token in a teacher's cache against what they leave out, measured on some of its rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptl.synth.distributions import entropy, log_distributions, losses, usable
from ptl.synth.teacher import SMALL_IDS, Reading

KS = (1, 4, 8, 16, 32, 64, 128, 256)
DRAWS = (8, 16, 32, 64, 128)
TOKENS = 1024
"""Trained tokens that are measured, at least, where there are as many."""
MOST_ROWS = 4096
NAME = "quality"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over the measured tokens.

    Attributes:
        tokens: how many.
        entropy: of the whole distributions, nats.
        rows: one a line of the table; see ``ptl.synth.distributions.losses`` for the columns.
    """

    tokens: int
    entropy: float
    rows: list[dict[str, Any]]

    def markdown(self) -> str:
        """The table as text."""
        lines = [
            f"Means over {self.tokens:,} tokens, whose distributions have {self.entropy:.3f} nats.",
            "",
            "KL lost: KL(teacher || stored), the tail's mass spread evenly; rounding: what of it a float32 softmax "
            "and float16 numbers add. "
            "Gradient error: L2 norm of the error of the forward KL's gradient for the student's logits, once with the "
            "tail and once with the head alone, made to sum to 1; of a sample, its root mean square, with mean 0.",
            "",
            "| kept | bytes/token | tail mass | KL lost (nats) | of it rounding | gradient error | without the tail |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in self.rows:
            cells = [row["kept"], f"{row['bytes']:.0f}"]
            cells += [_number(row.get(key)) for key in ("tail", "kl", "rounding", "gradient", "cut")]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Writes ``quality.json`` and ``quality.md``."""
        facts = {"tokens": self.tokens, "entropy": self.entropy, "rows": self.rows}
        (folder / f"{NAME}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (folder / f"{NAME}.md").write_text(self.markdown(), encoding="utf-8")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


@torch.inference_mode()
def measure(reading: Reading, *, vocab: int, temperature: float, k: int, tokens: int = TOKENS) -> Quality:
    """Measures several k, and the one asked for, on rows drawn from the data.

    Raises:
        ValueError: the teacher gave no numbers for any of them.
    """
    ks = sorted({min(each, vocab) for each in (*KS, k)})
    draws = sorted({*DRAWS, k})
    total: dict[str, Any] = {}
    seen, spread = 0, 0.0
    for row in _rows(len(reading.prepared.rows)):
        for batch, _ in reading.batches(row, row + 1):
            for logp in log_distributions(reading.model, batch, vocab=vocab, temperature=temperature):
                logp = logp[usable(logp)]
                seen, spread = seen + len(logp), spread + entropy(logp).sum().item()
                _add(total, losses(logp, ks, draws))
        if seen >= tokens:
            break
    if not seen:
        raise ValueError("the teacher gave NaN for every token that was tried: check its weights and its dtype")
    width = 2 if vocab <= SMALL_IDS else 4
    rows = []
    for each, sums in total["topk"].items():
        means = {name: value / seen for name, value in sums.items()}
        rows.append({"kept": f"top {each}", "k": each, "bytes": each * (width + 2) + 8, **means})
    for each, sums in total["sample"].items():
        means = {name: value / seen for name, value in sums.items()}
        size = means["distinct"] * (width + 2) + 8
        rows.append({"kept": f"{each} draws", "draws": each, "bytes": size, "kl": None, **means})
    return Quality(tokens=seen, entropy=spread / seen, rows=rows)


def _rows(count: int) -> list[int]:
    """Rows to measure, drawn without a look at them; the same for the same number of rows."""
    return np.random.default_rng(0).choice(count, min(count, MOST_ROWS), replace=False).tolist()


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0.0) + value
