"""What ``ptl plan`` predicts for published runs, against what was published.

    python -m benchmarks.plan_published [--record]

Prints every modelled row, misses among them, and the rows left out with their reason. ``--record`` appends the table to
``benchmarks/results/plan_published.json``.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import record
from benchmarks.published import EXCLUDED, ROWS, Published
from ptl.functional.plan_rates import rates_of
from ptl.functional.step_time import step_time

LIMIT = 0.25


def predict(row: Published) -> dict[str, Any]:
    """Predicted and published tokens a second of one device, and the relative error."""
    found = step_time(row.job, row.strategy, rates_of(row.device, row.cluster))
    return {
        "name": row.name,
        "device": row.device,
        "gpus": row.job.world,
        "published": row.tokens_per_second,
        "predicted": round(found.tokens_per_second),
        "error": round(found.tokens_per_second / row.tokens_per_second - 1, 4),
        "mfu": round(found.mfu, 4),
        "exposed_share": round(found.exposed / found.step, 4),
        "section": row.section,
        "assumed": row.assumed,
        "source": row.source,
    }


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_published", description=__doc__)
    parser.add_argument("--record", action="store_true", help="append the table to the results")
    options = parser.parse_args()
    rows = [predict(row) for row in ROWS]
    table = Table(title="tokens/s of one GPU, predicted against published")
    for column in ("run", "device", "published", "predicted", "error", "MFU", "assumed"):
        table.add_column(column, overflow="fold")
    for row in rows:
        mark = "" if abs(row["error"]) <= LIMIT else "  miss"
        name = row["name"] + ("" if row["section"] else " *")
        numbers = (
            f"{row['published']:,.0f}",
            f"{row['predicted']:,}",
            f"{row['error']:+.1%}{mark}",
            f"{row['mfu']:.0%}",
        )
        table.add_row(name, row["device"], *numbers, row["assumed"])
    Console(width=150).print(table)
    own = [row for row in rows if row["section"]]
    for title, part in (("of the survey's table", own), ("of all", rows)):
        within = sum(abs(row["error"]) <= LIMIT for row in part)
        mean = sum(abs(row["error"]) for row in part) / len(part)
        print(f"{title}: {within} of {len(part)} within {LIMIT:.0%}, mean error {mean:.1%}")
    print("* further rows of the same sources\nleft out:")
    for name, reason in EXCLUDED:
        print(f"  {name}: {reason}")
    if options.record:
        within = sum(abs(row["error"]) <= LIMIT for row in rows)
        result = {"stage": "plan", "variant": "full and lora, bf16", "device": "arithmetic", "rows": rows}
        record.append("plan_published", {**result, "within": within, "limit": LIMIT})


if __name__ == "__main__":
    main()
