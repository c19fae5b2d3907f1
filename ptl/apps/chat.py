"""``ptl chat``: talk to a model, a run folder or an adapter; the answer is streamed as it is made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ptl.apps.reply import ModelWriter, Reply, check_sampling
from ptl.tools.base import Result
from ptl.tools.calls import form_of, stop_texts
from ptl.tools.load import load_tools
from ptl.tools.loop import ROUNDS, Piece, Stopped, answer
from ptl.tools.toolbox import Toolbox
from ptl.types import Message

if TYPE_CHECKING:
    from torch import nn

    from ptl.data.render import Renderer

SHOWN = 300
"""Characters of a tool's result that a person sees."""


def stream_reply(model: nn.Module, renderer: Renderer, messages: Sequence[Message], **sampling: Any) -> Iterator[str]:
    """Pieces of the answer as they are decoded; arguments and errors as of ``Reply``."""
    return iter(Reply(ModelWriter(model), renderer, messages, **sampling))


def generate_reply(model: nn.Module, renderer: Renderer, messages: Sequence[Message], **sampling: float) -> str:
    """The whole answer; arguments as in ``stream_reply``."""
    return "".join(stream_reply(model, renderer, messages, **sampling))  # pyright: ignore[reportArgumentType]


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="ptl chat", description="Talk to a model, a run folder or an adapter.")
    parser.add_argument("model", help="run folder, model folder, adapter folder or hub name")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--template", help="chat template: a packaged name, a .jinja file or Jinja text")
    parser.add_argument("--message", action="append", metavar="TEXT", help="say this and stop; once a turn")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--tools",
        nargs="+",
        default=[],
        metavar="TOOL",
        help="tools that the model may call: search=PATH, python, calculator, clock, package.module:function",
    )
    parser.add_argument("--tool-seconds", type=float, default=20.0, help="most time of a call")
    parser.add_argument("--tool-rounds", type=int, default=ROUNDS, help="most turns that call tools for an answer")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32", "fp16"), default="auto")
    options = parser.parse_args(list(argv))
    try:
        return _chat(options)
    except (ValueError, OSError) as mistake:
        print(f"ptl chat: error: {mistake}", file=sys.stderr)
        return 2


def _chat(options: argparse.Namespace) -> int:
    check_sampling(options.temperature, options.top_p, options.max_new_tokens)
    if options.tool_rounds < 1:
        raise ValueError(f"--tool-rounds must be 1 or more, got {options.tool_rounds}")
    from ptl.apps.runs import load_model, quiet_libraries
    from ptl.data.render import Renderer
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.names import resolve_model

    quiet_libraries()
    found = resolve_model(options.model)
    model = load_model(found, dtype=options.dtype, device="auto")
    renderer = Renderer(load_tokenizer(found.name, template=options.template))
    first = [Message(role="system", content=options.system)] if options.system else []
    sampling = {
        "temperature": 0.0 if options.greedy else options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
    }
    box = Toolbox(load_tools(options.tools), seconds=options.tool_seconds)
    listed = box.schemas if form_of(renderer, box.tools) == "calls" else []

    def write(messages: Sequence[Message]) -> Iterator[str]:
        return stream_reply(model, renderer, messages, **sampling, tools=listed, stops=stop_texts(box.tools))

    messages = list(first)
    for text in _turns(options.message):
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            messages = list(first)
            continue
        asked = [*messages, Message(role="user", content=text)]
        try:
            for event in answer(asked, write, box, rounds=options.tool_rounds):
                show(event)
        except KeyboardInterrupt:
            pass  # stops the answer, not the program
        except ValueError as mistake:
            if options.message or not sys.stdin.isatty():
                raise
            # A person at a terminal keeps the loaded model and may say /reset.
            print(f"ptl chat: error: {mistake}", file=sys.stderr)
            continue
        print(flush=True)
        messages = asked
    return 0


def show(event: Piece | Result | Stopped) -> None:
    """Prints what happens: the answer on stdout, tools on stderr."""
    if isinstance(event, Piece):
        print(event.text, end="", flush=True)
    elif isinstance(event, Result):
        text = " ".join(event.text.split())
        print(flush=True)
        print(
            f"[{event.call}: {event.seconds:.1f} s] {text[:SHOWN]}{'...' if len(text) > SHOWN else ''}", file=sys.stderr
        )
        if event.problem:
            print(f"ptl chat: warning: {' '.join(event.problem.split())[:SHOWN]}", file=sys.stderr)
    else:
        print(f"\nptl chat: warning: {event.reason}; raise --tool-rounds", file=sys.stderr)


def _turns(given: list[str] | None) -> Iterator[str]:
    """What the person says: the messages given, else lines typed or piped."""
    if given:
        yield from given
        return
    typed = sys.stdin.isatty()
    if typed:
        print("/reset forgets the dialogue, /exit leaves, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line
