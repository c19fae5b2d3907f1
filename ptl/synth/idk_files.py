"""The files of ``ptl synth idk``: rows to learn from, held-out questions, graded answers, and how they were made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ptl.data.mapped import published
from ptl.data.sources import Source
from ptl.synth.asking import LeftOut
from ptl.synth.idk import Asking
from ptl.synth.idk_rows import Choice, Row, make_rows, mix_count, mixed_rows


class Paths(NamedTuple):
    """Where the files are.

    Attributes:
        train: rows to learn from; the file that was asked for.
        held_out: graded questions that are kept for the report.
        graded: all graded questions, from which the other files are made anew in no time.
        manifest: how the files were made.
    """

    train: Path
    held_out: Path
    graded: Path
    manifest: Path


def paths_of(out: str) -> Paths:
    """The files beside ``out``.

    Raises:
        ValueError: another suffix than .jsonl, or a file of that name that was not made by this command.
    """
    path = Path(out).expanduser()
    if path.suffix != ".jsonl":
        raise ValueError(f"--out {out}: expected a .jsonl file")
    paths = Paths(path, *(path.with_suffix(end) for end in (".held_out.jsonl", ".graded.jsonl", ".manifest.json")))
    if path.exists() and not paths.manifest.exists():
        raise ValueError(f"{path} is there and was not made by this command: give another file")
    return paths


def write_files(
    paths: Paths,
    choice: Choice,
    asking: Asking,
    mix: Sequence[Source],
    left_out: LeftOut,
    *,
    name: str,
    judge: str | None,
) -> dict[str, Any]:
    """Writes the rows, the held-out questions and the manifest, which it returns.

    Several processes may do so at the same time: they write the same.

    Raises:
        ValueError: no row would be left to learn from.
    """
    made = make_rows(read_rows(paths.graded), choice)
    total = sum(made.counts.values(), Counter())
    if not made.train:
        raise ValueError(_why_empty(total, choice))
    unmixed = LeftOut()
    wanted = mix_count(len(made.train), choice.mix_share)
    mixed = mixed_rows(mix, wanted, read_rows(paths.graded), unmixed) if wanted else []
    manifest = {
        "model": {"name": name, "digest": asking.model},
        "judge": None if judge is None else {"name": judge, "digest": asking.judge},
        "asking": asdict(asking),
        "choice": asdict(choice),
        "rows": len(made.train) + len(mixed),
        "held_out": len(made.held_out),
        "mixed": {"wanted": wanted, "rows": len(mixed), "left_out": dict(sorted(unmixed.counts.items()))},
        "total": dict(sorted(total.items())),
        "by_source": {source: dict(sorted(count.items())) for source, count in sorted(made.counts.items())},
        "left_out": dict(sorted(left_out.counts.items())),
        "first_left_out": dict(sorted(left_out.first.items())),
    }
    write_rows(paths.held_out, made.held_out)
    with published(paths.manifest) as partial:
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_rows(paths.train, [*made.train, *mixed])
    return manifest


def _why_empty(total: Mapping[str, int], choice: Choice) -> str:
    known, unknown, capped, cut = (total.get(name, 0) for name in ("known", "unknown", "capped", "no_finished_answer"))
    told = f"{known} questions are known, {unknown} unknown, {total.get('between', 0)} between"
    if cut:
        told += f", and of {cut} no right answer came to its end within --max-new-tokens"
    if capped:
        return (
            f"no row is left: {told}, and refusals may be {choice.max_refusals:g} of the rows; lower --known, raise "
            "--max-refusals, or ask more questions that the model can answer"
        )
    return (
        f"no row is left: {told}, {total.get('held_out', 0)} of them held out; change --known, --unknown or --held-out"
    )


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that was written whole."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A .jsonl file, whole or as it was."""
    with published(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
