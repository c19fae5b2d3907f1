"""Whether models call the right tool and answer right with it, and leave tools alone where none is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ptl.data.render import Renderer
from ptl.functional.intervals import wilson
from ptl.models.heads import causal_lm
from ptl.rewards.matching import match
from ptl.rollout.engine import Asked, Draw, Draws
from ptl.rollout.sampling import Sampled, sample
from ptl.rollout.tool_turns import Written, answered_with_tools
from ptl.synth.questions import ends
from ptl.tools.toolbox import Toolbox
from ptl.types import Message, Origin, Prompt

Row = dict[str, Any]
BATCH = 16


def ask(
    model: nn.Module,
    renderer: Renderer,
    questions: Sequence[str],
    box: Toolbox,
    *,
    rounds: int = 2,
    max_new_tokens: int = 768,
    report: Callable[[int], object] = lambda count: None,
) -> list[Written]:
    """Greedy answers to questions, with the tools that there are.

    Args:
        model: in eval mode.
        renderer: of its template.
        questions: what the user says.
        box: the tools; without any the model answers by itself.
        rounds: turns that may call tools.
        max_new_tokens: of an answer, results included.
        report: called with the number of questions done.
    """
    draw, stop = _greedy(model), tuple(ends(model, renderer))
    out: list[Written] = []
    for begin in range(0, len(questions), BATCH):
        prompts = [
            Prompt(messages=(Message(role="user", content=text),), origin=Origin("questions", begin + i + 1))
            for i, text in enumerate(questions[begin : begin + BATCH])
        ]
        asked = [Asked(renderer.prompt(prompt.messages), begin + i, max_new_tokens) for i, prompt in enumerate(prompts)]
        draws = Draws(1, 0.0, 1.0, stop, 0)
        out += [one for [one] in answered_with_tools(draw, draws, asked, prompts, renderer, box, rounds)]
        report(len(prompts))
    return out


def _greedy(model: nn.Module) -> Draw:
    vocab = causal_lm(model).get_input_embeddings().weight.shape[0]

    def draw(asked: Sequence[Asked], draws: Draws) -> list[list[Sampled]]:
        return sample(
            model,
            [one.ids for one in asked],
            [one.number for one in asked],
            samples=draws.samples,
            stop=draws.stop,
            limits=[min(one.limit, 128) for one in asked],  # of a turn: a model that rambles is cut
            vocab=vocab,
            temperature=0.0,
            top_p=1.0,
            seed=0,
        )

    return draw


def graded(rows: Iterable[Mapping[str, Any]], answers: Sequence[Written]) -> list[Row]:
    """What became of each question: the tools that were called, and whether the answer is right; None where unknown."""
    out = []
    for row, written in zip(rows, answers):
        accepted = list(row.get("answers") or ())
        right = match(written.text, accepted) is not None if accepted else None
        calls = [result.call.name for result in written.results]
        said = [{"call": str(result.call), "result": result.text[:300]} for result in written.results]
        facts = {"calls": calls, "right": right, "ended": written.finished, "text": written.text, "results": said}
        out.append({"question": row["question"], "tool": row.get("tool"), "source": row.get("source", ""), **facts})
    return out


def measures(with_tools: Sequence[Row], without: Sequence[Row], ordinary: Sequence[Row]) -> Row:
    """Shares with their 95 % intervals, by tool and of all.

    Args:
        with_tools, without: ``graded`` of the same questions, which need a tool.
        ordinary: ``graded`` of questions that need none, with tools at hand.
    """
    tools = sorted({row["tool"] for row in with_tools})
    return {
        "all": _part(with_tools, without),
        "by_tool": {
            tool: _part(
                [row for row in with_tools if row["tool"] == tool], [row for row in without if row["tool"] == tool]
            )
            for tool in tools
        },
        "ordinary": {
            "questions": len(ordinary),
            "calls": _share([bool(row["calls"]) for row in ordinary]),
            "ended": _share([row["ended"] for row in ordinary]),
        },
    }


def _part(rows: Sequence[Row], without: Sequence[Row]) -> Row:
    known = [row for row in rows if row["right"] is not None]
    return {
        "questions": len(rows),
        "right_tool": _share([row["calls"][:1] == [row["tool"]] for row in rows]),
        "right": _share([row["right"] for row in known]),
        "right_without": _share([row["right"] for row in without if row["right"] is not None]),
        "ended": _share([row["ended"] for row in rows]),
    }


def _share(hits: Sequence[bool]) -> Row:
    low, high = wilson(sum(hits), len(hits))
    return {"share": sum(hits) / len(hits) if hits else None, "low": low, "high": high, "count": len(hits)}


def page(models: Mapping[str, Row]) -> str:
    """The measures of some models as a table in Markdown."""
    lines = [
        "| model | questions | | right tool | right with tools | without | turns ended |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, found in models.items():
        for part, row in (("all", found["all"]), *found["by_tool"].items()):
            shares = " | ".join(_told(row[key]) for key in ("right_tool", "right", "right_without", "ended"))
            lines.append(f"| {name} | {part} | {row['questions']} | {shares} |")
        row = found["ordinary"]
        if row["questions"]:
            lines.append(
                f"| {name} | ordinary | {row['questions']} | calls {_told(row['calls'])} | | | {_told(row['ended'])} |"
            )
    return "\n".join(lines) + "\n"


def _told(share: Row) -> str:
    if share["share"] is None:
        return "-"
    return f"{100 * share['share']:.0f} % ({100 * share['low']:.0f}-{100 * share['high']:.0f})"
