"""An answer while a model writes it, for one dialogue at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ptl.types import Message

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ptl.data.render import Renderer

LOOK_BACK = 64
"""Characters before the newest ones in which a stop text may begin."""


class Writer(Protocol):
    """What writes tokens behind others.

    Attributes:
        longest: most tokens of a dialogue with its answer.
        ends: ids at which the model stops by its own configuration.
    """

    longest: int
    ends: frozenset[int]

    def tokens(
        self, prompt: Sequence[int], *, temperature: float, top_p: float, seed: int | None, limit: int, ends: set[int]
    ) -> Iterator[int]:
        """Ids, as they are there: at most ``limit``, and none behind the first of ``ends``. ``temperature`` 0 takes the
        likeliest token; ``seed`` None draws otherwise each time."""
        ...

    def close(self) -> None:
        """Ends what it has started."""
        ...


class ModelWriter:
    """A causal language model in eval mode, in this process."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        # Positions that the model was made for.
        self.longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.ends = frozenset([] if own is None else [own] if isinstance(own, int) else own)

    def tokens(
        self, prompt: Sequence[int], *, temperature: float, top_p: float, seed: int | None, limit: int, ends: set[int]
    ) -> Iterator[int]:
        import torch

        device = next(self._model.parameters()).device
        generator = torch.Generator(device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        inputs, cache = torch.tensor([list(prompt)], device=device), None
        for _ in range(limit):
            with torch.inference_mode():
                out = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            token = choose(out.logits[0, -1].float(), temperature, top_p, generator)
            yield token
            if token in ends:
                return
            inputs = torch.tensor([[token]], device=device)

    def close(self) -> None: ...


class Reply:
    """Pieces of an answer as they are decoded; together they are the answer without its special tokens.

    Every sampling field is given here; none comes from the model's generation configuration.

    Arguments:
        writer: of the tokens.
        renderer: renders the prompt as in training, and names the tokens that end a turn.
        messages: the dialogue so far, a user's turn last.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability, in (0, 1], that is sampled from.
        max_new_tokens: most tokens of the answer.
        seed: of the sampling; None draws another each time.
        tools: JSON schemas that the template prints.
        stops: texts behind which the answer ends, such as the closing tag of a tool.

    Attributes:
        prompt: ids that the model read.
        ids: ids that it wrote, without the one that ended the turn.
        end: that id, or None.
        finish: why it ended: ``stop`` by itself, ``text`` behind a stop text, ``length`` at its limit; None before.

    Raises:
        ValueError: a field out of its range, messages that the template refuses, or a dialogue that fills the model's
            context.
    """

    def __init__(
        self,
        writer: Writer,
        renderer: Renderer,
        messages: Sequence[Message],
        *,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        seed: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        stops: Sequence[str] = (),
    ) -> None:
        check_sampling(temperature, top_p, max_new_tokens)
        self._writer, self._renderer, self._stops = writer, renderer, tuple(stops)
        self._sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        self.prompt = renderer.prompt(messages, tools)
        self.ids: list[int] = []
        self.end: int | None = None
        self.finish: Literal["stop", "text", "length"] | None = None
        room = writer.longest - len(self.prompt)
        if room < 1:
            raise ValueError(
                f"the dialogue has {len(self.prompt)} tokens and the model reads {writer.longest}: start a new one"
            )
        self._limit = min(max_new_tokens, room)

    def __iter__(self) -> Iterator[str]:
        shown, ends = "", {*self._renderer.terminators, *self._writer.ends}
        written = self._writer.tokens(self.prompt, **self._sampling, limit=self._limit, ends=ends)
        with contextlib.closing(written):  # pyright: ignore[reportArgumentType]  a generator
            for token in written:
                if token in ends:
                    self.end, self.finish = token, "stop"
                    break
                self.ids.append(token)
                text = self._text()
                # A character of several tokens decodes to the replacement mark until its last one is there.
                if not text.endswith("\ufffd") and len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
                if any(stop in text[-len(stop) - LOOK_BACK :] for stop in self._stops):
                    self.finish = "text"
                    break
            else:
                self.finish = "length"
        text = self._text()
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _text(self) -> str:
        return str(self._renderer.tokenizer.decode(self.ids, skip_special_tokens=True))


def check_sampling(temperature: float, top_p: float, max_new_tokens: int) -> None:
    """Refuses a field out of its range with a ``ValueError`` that names the option."""
    if temperature < 0:
        raise ValueError(f"--temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p}")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be 1 or more, got {max_new_tokens}")


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
