"""A comparison as a report on the W&B server that has its runs: the tables, and panels of their curves."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ptl.apps.comparing.curves import COLORS
from ptl.apps.comparing.runs import Online, Run
from ptl.apps.comparing.summary import Comparison
from ptl.apps.comparing.tables import METHOD, group_table, headline, markdown_table
from ptl.apps.comparing.wandb_files import STEP
from ptl.apps.comparing.wandb_online import ServerError, one_line

MOST_SETS = len(COLORS)
"""Groups with curves in the report; more colours cannot be told apart."""


def need_workspaces() -> None:
    """Raises ``ValueError`` where the package that writes reports is missing."""
    if find_spec("wandb_workspaces") is None:
        raise ValueError("--report needs the package wandb-workspaces: pip install 'ptl[report]'")


def write_report(comparison: Comparison, runs: Sequence[Run], project: str, notes: Sequence[str] = ()) -> str:
    """Saves a new report in a project: the table of groups, a panel of curves a metric, a run set a group.

    A run set names its runs by their ids, so that the curves stay those of the table whatever is logged later. Runs
    that are not on the server are in the table alone.

    Arguments:
        comparison: of ``runs``.
        runs: at least one of them is online.
        project: ``ENTITY/PROJECT``, where the runs are.
        notes: remarks on this comparison, behind those on the method.

    Returns:
        The address of the report.

    Raises:
        ServerError: the server cannot be reached or refuses.
    """
    import wandb_workspaces.reports.v2 as wr

    entity, name = project.split("/")
    remarks = [*METHOD, *notes, *_left_out(comparison, runs)]
    report = wr.Report(
        entity=entity,
        project=name,
        title=f"Comparison of {headline(comparison)}",
        description=f"What differs: {', '.join(comparison['keys']) or 'seeds alone'}",
        width="fluid",
        blocks=[
            wr.H2("Groups"),
            wr.MarkdownBlock("\n".join(markdown_table(group_table(comparison)))),
            wr.H2("Learning curves"),
            _curves(comparison, runs, entity, name),
            wr.H2("How to read it"),
            wr.MarkdownBlock("\n".join(f"- {remark}" for remark in remarks)),
        ],
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # W&B tells the address too
            report.save()
            return report.url
    except Exception as problem:  # the package raises W&B's errors of several families, and a bare Exception
        raise ServerError(f"no report was written into {project} on W&B: {one_line(problem)}") from problem


def _online(group: dict[str, Any], runs: Sequence[Run]) -> list[Online]:
    return [found for i in group["runs"] if (found := runs[i].online)]


def _sets(comparison: Comparison, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The groups that have a run set, the best first."""
    return [group for group in comparison["groups"] if _online(group, runs)][:MOST_SETS]


def _curves(comparison: Comparison, runs: Sequence[Run], entity: str, project: str) -> Any:
    """A panel a shown metric over the optimizer steps, each run in the colour of its group."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    found = {group["tag"]: _online(group, runs) for group in _sets(comparison, runs)}
    labels = {group["tag"]: f"{group['tag']}  {group['label']}".strip() for group in comparison["groups"]}
    everything = [run for members in found.values() for run in members]
    axis = STEP if all(run.axis == STEP for run in everything) else "_step"
    return wr.PanelGrid(
        runsets=[
            wr.Runset(
                entity=entity,
                project=project,
                name=labels[tag],
                filters=expr.And(expr.Metric("ID").isin([run.id for run in members])),
                run_settings={run.id: wr.RunSettings(color=color) for run in members},
            )
            for color, (tag, members) in zip(COLORS, found.items(), strict=False)
        ],
        panels=[
            wr.LinePlot(
                title=metric,
                x=axis,
                y=[metric],
                title_x="optimizer step" if axis == STEP else "step",
                max_runs_to_show=len(everything),  # W&B shows ten where nothing is said
                layout=wr.Layout(w=12, h=8),
            )
            for metric in comparison["shown"]
        ],
    )


def _left_out(comparison: Comparison, runs: Sequence[Run]) -> list[str]:
    """What is in the table and not in the curves."""
    groups = sum(bool(_online(group, runs)) for group in comparison["groups"]) - MOST_SETS
    away = sum(run.online is None for run in runs)
    return [
        *([f"Curves are those of the {MOST_SETS} best groups; {groups:,} more are in the table alone."] * (groups > 0)),
        *([f"{away:,} of the {len(runs):,} runs are not on this server: they are in the table alone."] * (away > 0)),
    ]
