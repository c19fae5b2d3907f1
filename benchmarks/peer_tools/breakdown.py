"""Where the time of a step goes: operations of a profile, grouped by what they are for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SCOPES = (
    ("_FusedLinearCrossEntropy", "loss"),
    ("scaled_dot_product", "attention"),
    ("flash_attention", "attention"),
    ("_fused_adam", "optimizer"),
    ("_foreach_", "optimizer"),
    ("DataLoader", "data"),
)
"""Parts of names of operations that claim all that runs inside them; the outermost decides. ``Optimizer.step`` is none
of them: the trainer runs the last forward and backward pass of a step inside it."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear", "mkldnn")


def group(names: Iterable[str]) -> str:
    """The group of an operation, from its own name (first) and those it runs inside, innermost first."""
    names = list(names)
    for name in reversed(names):
        for part, scope in SCOPES:
            if part in name:
                return f"{scope} products" if scope == "loss" and _is_product(names[0]) else scope
    return "products" if _is_product(names[0]) else "rest"


def _is_product(name: str) -> bool:
    return name.startswith(PRODUCTS)


def breakdown(events: Iterable[Any], wall_seconds: float) -> dict[str, Any]:
    """Shares of the wall time by group, and the ten heaviest operations of the group ``rest``.

    Arguments:
        events: of ``torch.profiler``, recorded on the CPU with the tree of calls.
        wall_seconds: what the profiled steps took; what no operation claims is ``python``.
    """
    groups: dict[str, float] = {}
    rest: dict[str, float] = {}
    for event in events:
        chain, parent = [event.name], event.cpu_parent
        while parent is not None:
            chain.append(parent.name)
            parent = parent.cpu_parent
        name = group(chain)
        seconds = event.self_cpu_time_total / 1e6
        groups[name] = groups.get(name, 0.0) + seconds
        if name == "rest":
            rest[event.name] = rest.get(event.name, 0.0) + seconds
    groups["python"] = max(0.0, wall_seconds - sum(groups.values()))
    heaviest = sorted(rest, key=lambda name: -rest[name])[:10]
    return {
        "shares": {name: round(groups[name] / wall_seconds, 4) for name in sorted(groups, key=lambda n: -groups[n])},
        "rest": {name: round(rest[name] / wall_seconds, 4) for name in heaviest},
    }
