"""An answer while a model writes it, for one dialogue at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ptl.types import Message

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ptl.data.render import Renderer

LOOK_BACK = 64
"""Characters before the newest ones in which a stop text may begin."""


class Reply:
    """Pieces of an answer as they are decoded; together they are the answer without its special tokens.

    Every sampling field is given here; none comes from the model's generation configuration.

    Arguments:
        model: a causal language model in eval mode.
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
        model: nn.Module,
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
        self._model, self._renderer, self._stops = model, renderer, tuple(stops)
        self._temperature, self._top_p, self._seed = temperature, top_p, seed
        self.prompt = renderer.prompt(messages, tools)
        self.ids: list[int] = []
        self.end: int | None = None
        self.finish: Literal["stop", "text", "length"] | None = None
        room = _context(model) - len(self.prompt)
        if room < 1:
            raise ValueError(
                f"the dialogue has {len(self.prompt)} tokens and the model reads {_context(model)}: start a new one"
            )
        self._limit = min(max_new_tokens, room)

    def __iter__(self) -> Iterator[str]:
        import torch

        shown = ""
        with torch.inference_mode():
            for token in self._tokens():
                self.ids.append(token)
                text = self._text()
                # A character of several tokens decodes to the replacement mark until its last one is there.
                if not text.endswith("\ufffd") and len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
                if any(stop in text[-len(stop) - LOOK_BACK :] for stop in self._stops):
                    self.finish = "text"
                    break
        text = self._text()
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _tokens(self) -> Iterator[int]:
        """Ids until one that ends the turn."""
        import torch

        model: Any = self._model
        device = next(model.parameters()).device
        generator = torch.Generator(device)
        generator.manual_seed(self._seed) if self._seed is not None else generator.seed()
        inputs, cache, ends = torch.tensor([self.prompt], device=device), None, _ends(model, self._renderer)
        for _ in range(self._limit):
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            token = choose(out.logits[0, -1].float(), self._temperature, self._top_p, generator)
            if token in ends:
                self.end, self.finish = token, "stop"
                return
            yield token
            inputs = inputs.new_tensor([[token]])
        self.finish = "length"

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
