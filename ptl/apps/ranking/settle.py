"""Which verdicts of a file stand, written into the file: an append-only file says it only by the order of its lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptl.apps.ranking.prompts import json_object
from ptl.data.durable import replacing
from ptl.data.sources import BadRow


def settle(path: Path) -> int:
    """Marks every verdict that its annotator revised later as ``superseded``, and the later one as ``settled``.

    A reader of the file then learns from the last verdict of each annotator on each prompt, and counts the others. The
    file is replaced at once, or left as it was. Nothing may write it meanwhile.

    Returns:
        Rows that are superseded, newly or before.

    Raises:
        ValueError: a line was not written by ``ptl rank serve``, with its number.
        OSError: the file cannot be read or written.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    rows: list[dict[str, Any] | None] = []
    for number, raw in enumerate(lines, 1):
        try:
            row = None if raw.isspace() else json_object(raw)
            if row is not None:
                _ = [row[key] for key in ("annotator", "id", "status", "revision")]
        except (BadRow, KeyError) as bad:
            raise ValueError(f"{path}:{number}: the row was not written by ptl rank serve ({bad})") from None
        rows.append(row)
    last = {(row["annotator"], row["id"]): number for number, row in enumerate(rows) if row is not None}
    superseded = 0
    for number, row in enumerate(rows):
        if row is None:
            continue
        stands = last[row["annotator"], row["id"]] == number
        wanted = {"settled": True} if stands and row["revision"] > 1 else {} if stands else {"status": "superseded"}
        superseded += not stands
        if any(row.get(key) != value for key, value in wanted.items()):
            lines[number] = json.dumps({**row, **wanted}, ensure_ascii=False).encode("utf-8") + b"\n"
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(lines))
    return superseded
