"""``ptl chat``: talk to a model, a run folder or an adapter; the answer is streamed as it is made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ptl.types import Message

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ptl.data.render import Renderer


def stream_reply(
    model: nn.Module,
    renderer: Renderer,
    messages: Sequence[Message],
    *,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int | None = None,
) -> Iterator[str]:
    """Pieces of the answer as they are decoded; together they are the answer without its special tokens.

    Every sampling field is given here; none comes from the model's generation configuration.

    Arguments:
        model: a causal language model in eval mode.
        renderer: renders the prompt as in training, and names the tokens that end a turn.
        messages: the dialogue so far, a user's turn last.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability, in (0, 1], that is sampled from.
        max_new_tokens: most tokens of the answer.
        seed: of the sampling; None draws another each time.

    Raises:
        ValueError: a field out of its range, messages that the template refuses, or a dialogue that fills the model's
            context.
    """
    import torch

    check_sampling(temperature, top_p, max_new_tokens)
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    prompt = renderer.prompt(messages)
    room = _context(model) - len(prompt)
    if room < 1:
        raise ValueError(
            f"the dialogue has {len(prompt)} tokens and the model reads {_context(model)}: start a new one"
        )
    inputs, cache = torch.tensor([prompt], device=device), None
    ends, ids, shown = _ends(model, renderer), [], ""
    with torch.inference_mode():
        for _ in range(min(max_new_tokens, room)):
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            token = choose(out.logits[0, -1].float(), temperature, top_p, generator)
            if token in ends:
                break
            ids.append(token)
            inputs = inputs.new_tensor([[token]])
            text = str(renderer.tokenizer.decode(ids, skip_special_tokens=True))
            # A character of several tokens decodes to the replacement mark until its last one is there.
            if not text.endswith("\ufffd") and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
    text = str(renderer.tokenizer.decode(ids, skip_special_tokens=True))
    if len(text) > len(shown):
        yield text[len(shown) :]


def check_sampling(temperature: float, top_p: float, max_new_tokens: int) -> None:
    """Refuses a field out of its range with a ``ValueError`` that names the option."""
    if temperature < 0:
        raise ValueError(f"--temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p}")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be 1 or more, got {max_new_tokens}")


def _context(model: Any) -> int:
    """Positions that the model was made for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _ends(model: Any, renderer: Renderer) -> set[int]:
    """Tokens that end an answer: the template's, and those that the model itself stops at."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {*renderer.terminators, *([] if own is None else [own] if isinstance(own, int) else own)}


def choose(logits: Tensor, temperature: float, top_p: float, generator: object) -> int:
    """One token id from logits [V]; with ``top_p``, from the smallest set of likeliest tokens that holds that share."""
    import torch

    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ranked)
    return int(torch.multinomial(probabilities, 1, generator=generator))  # pyright: ignore[reportArgumentType]


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
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32", "fp16"), default="auto")
    options = parser.parse_args(list(argv))
    try:
        return _chat(options)
    except (ValueError, OSError) as mistake:
        print(f"ptl chat: error: {mistake}", file=sys.stderr)
        return 2


def _chat(options: argparse.Namespace) -> int:
    check_sampling(options.temperature, options.top_p, options.max_new_tokens)
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
    messages = list(first)
    for text in _turns(options.message):
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            messages = list(first)
            continue
        messages.append(Message(role="user", content=text))
        said = ""
        try:
            for piece in stream_reply(model, renderer, messages, **sampling):
                print(piece, end="", flush=True)
                said += piece
        except KeyboardInterrupt:
            pass  # stops the answer, not the program
        except ValueError as mistake:
            if options.message or not sys.stdin.isatty():
                raise
            # A person at a terminal keeps the loaded model and may say /reset.
            print(f"ptl chat: error: {mistake}", file=sys.stderr)
            messages.pop()
            continue
        print(flush=True)
        messages.append(Message(role="assistant", content=said))
    return 0


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
