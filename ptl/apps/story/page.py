"""The page of a story: one HTML file and its pictures, of what each stage did, cost and gained."""

from __future__ import annotations

import html
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ptl.apps.comparing.curves import COLORS
from ptl.apps.story.gains import Bars, Curves, Gains, gains
from ptl.apps.story.running import Ledger
from ptl.apps.story.stages import Stage
from ptl.data.durable import write_text

PAGE = "index.html"


def write(stages: Sequence[Stage], ledger: Ledger, work: Path, out: Path) -> Path:
    """Writes the page of what lies in ``work`` and returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    found = {stage.name: gains(stage.name, work) for stage in stages}
    pictures = {name: _pictures(name, each, out) for name, each in found.items()}
    sections = [
        _section(i, stage, ledger[stage.name], found[stage.name], pictures[stage.name])
        for i, stage in enumerate(stages, 1)
    ]
    style = (files("ptl.apps.story") / "page" / "story.css").read_text(encoding="utf-8")
    seconds = sum(command["seconds"] for done in ledger.values() for command in done)
    peak = max(command["peak_bytes"] for done in ledger.values() for command in done)
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>From a base model to an assistant</title>
<style>
{style}</style>
</head>
<body>
<h1>From a base model to an assistant</h1>
<p class="lead">{len(stages)} stages on a CPU, {seconds / 60:.0f} minutes in all, at most {peak / 1e9:.1f} GB of memory.
Every number, picture and answer on this page comes from the run that wrote it.</p>
{_overview(stages, ledger, found)}
{"".join(sections)}
</body>
</html>
"""
    write_text(out / PAGE, text)
    return out / PAGE


def _overview(stages: Sequence[Stage], ledger: Ledger, found: dict[str, Gains]) -> str:
    rows = []
    for i, stage in enumerate(stages, 1):
        minutes = sum(command["seconds"] for command in ledger[stage.name]) / 60
        first = found[stage.name].numbers[0] if found[stage.name].numbers else ("", "", "")
        change = f"{_text(first[0])}: {_text(first[1])} → <b>{_text(first[2])}</b>" if first[0] else ""
        link = f'<a href="#{stage.name}">{_text(stage.title)}</a>'
        rows.append(
            f"<tr><td class=number>{i}</td><td>{link}</td><td class=number>{minutes:.1f}</td><td>{change}</td></tr>"
        )
    head = "<tr><th class=number></th><th>stage</th><th class=number>minutes</th><th>what it gained</th></tr>"
    return f"<div class=wide><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _section(number: int, stage: Stage, done: Sequence[dict[str, Any]], found: Gains, pictures: Sequence[str]) -> str:
    why = " ".join(stage.why.split())
    parts = [f'<section id="{stage.name}"><h2>{number}. {_text(stage.title)}</h2><p>{_text(why)}</p>']
    if found.numbers:
        rows = [(told, before, after) for told, before, after in found.numbers]
        parts.append(_table(("", "before", "after"), rows, numbers=True))
    if pictures:
        images = "".join(f'<img src="{name}" alt="{_text(stage.title)}: {name[:-4]}">' for name in pictures)
        parts.append(f"<div class=pictures>{images}</div>")
    if found.answers:
        parts.append(_table(found.columns, found.answers))
    if found.text:
        parts.append(f"<pre>{_text(found.text)}</pre>")
    told = "\n".join(f"ptl {c['command']}\n    # {c['seconds']:.0f} s, {c['peak_bytes'] / 1e9:.1f} GB" for c in done)
    parts.append(f"<details><summary>Commands</summary><pre>{_text(told)}</pre></details></section>")
    return "".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    kinds = [" class=number" if numbers and i else "" for i in range(len(columns))]
    head = "".join(f"<th{kind}>{_text(name)}</th>" for kind, name in zip(kinds, columns))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{_text(cell)}</td>' for kind, cell in zip(kinds, row))}</tr>" for row in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(text: str) -> str:
    return html.escape(text)


# ---- pictures ----


def _pictures(stage: str, found: Gains, out: Path) -> list[str]:
    """Draws and copies a stage's pictures; their names."""
    names = []
    for drawing in found.drawings:
        name = f"{drawing.name}.png"
        (_draw_curves if isinstance(drawing, Curves) else _draw_bars)(drawing, out / name)  # pyright: ignore
        names.append(name)
    for picture in found.pictures:
        shutil.copyfile(picture, out / f"{stage}-{picture.name}")
        names.append(f"{stage}-{picture.name}")
    return names


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_axisbelow(True)
    return figure, axis


def _draw_curves(curves: Curves, path: Path) -> None:
    figure, axis = _figure(3.2)
    for color, (label, points) in zip(COLORS, curves.lines.items()):
        mark = "o" if len(points) < 12 else None
        axis.plot([step for step, _ in points], [value for _, value in points], color=color, label=label, marker=mark)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(curves.label)
    if curves.share:
        axis.set_ylim(0, 1.02)
    axis.grid(color="#E6E6E6", linewidth=0.7)
    axis.legend(frameon=False)
    figure.savefig(path, format="png")


def _draw_bars(bars: Bars, path: Path) -> None:
    models = list(dict.fromkeys(model for group in bars.groups.values() for model in group))
    figure, axis = _figure(0.8 + 0.5 * len(bars.groups) * len(models) / 2)
    height = 0.8 / len(models)
    for place, (color, model) in enumerate(zip(("#999999", COLORS[0], COLORS[1]), models)):
        shares = [group.get(model) for group in bars.groups.values()]
        at = [number + (place - (len(models) - 1) / 2) * height for number in range(len(shares))]
        axis.barh(at, [share or 0.0 for share in shares], height=0.9 * height, color=color, label=model)
        for y, share in zip(at, shares):
            text = "–" if share is None else f"{100 * share:.0f} %"
            axis.annotate(text, (share or 0.0, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(bars.groups)), list(bars.groups))
    axis.set_ylim(len(bars.groups) - 0.5, -0.5)
    axis.set_xlim(0, 1.1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(models))
    figure.savefig(path, format="png")
