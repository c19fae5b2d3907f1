"""A second model that is asked, yes or no, whether an answer says what an accepted one says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptl.data.render import Renderer
from ptl.models.heads import causal_lm, head_side
from ptl.models.logprobs import side_logprobs
from ptl.types import Message

PROMPT = """Question: {question}
Accepted answers: {accepted}
Given answer: {given}

Does the given answer say the same as one of the accepted answers? Answer with one word, yes or no."""
YES, NO = ("Yes", "yes", " Yes", " yes", "YES"), ("No", "no", " No", " no", "NO")
MOST = 16
"""Answers that are judged at a time, and accepted answers that are shown."""


class Case(NamedTuple):
    """What is judged: a question, the answers that are right, and the one that was given."""

    question: str
    accepted: tuple[str, ...]
    given: str


class Judge:
    """A model as a judge.

    Arguments:
        model: a causal language model in eval mode.
        renderer: of its prompts.

    Raises:
        ValueError: its tokenizer begins yes and no with the same token.
    """

    def __init__(self, model: nn.Module, renderer: Renderer) -> None:
        self.model, self.renderer = model, renderer
        yes, no = (self._first(words) for words in (YES, NO))
        self.yes, self.no = sorted(yes - no), sorted(no - yes)
        if not self.yes or not self.no:
            raise ValueError("--judge: its tokenizer has no token that tells yes from no: take another model")

    def _first(self, words: Sequence[str]) -> set[int]:
        """First ids of the words, without a space in front that is a token of its own."""
        space = self.renderer.tokenizer.encode(" ", add_special_tokens=False)
        ids = [self.renderer.tokenizer.encode(word, add_special_tokens=False) for word in words]
        return {each[0] for each in ids if each and each[:1] != space[:1]}

    @torch.no_grad()
    def margins(self, cases: Sequence[Case]) -> list[float]:
        """``log p(yes) - log p(no)`` of the next token, for each case; above 0 means right.

        Raises:
            ValueError: the judge gives numbers that are not finite.
        """
        found: list[float] = []
        for begin in range(0, len(cases), MOST):
            prompts = [self.renderer.prompt([_message(case)]) for case in cases[begin : begin + MOST]]
            found += self._margins(prompts).tolist()
        return found

    def _margins(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        lm: Any = causal_lm(self.model)
        device = lm.get_input_embeddings().weight.device
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        longest = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        mask = torch.arange(longest, device=device) <= ends[:, None]  # padded on the right: positions stay as they are
        hidden = lm.get_decoder()(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0]
        last = hidden[torch.arange(len(prompts), device=device), ends]
        asked = torch.tensor([*self.yes, *self.no], device=device)
        side = head_side(self.model, last.repeat_interleave(len(asked), 0))
        logprobs = side_logprobs(side, asked.repeat(len(prompts))).view(len(prompts), -1)
        yes, no = logprobs.split([len(self.yes), len(self.no)], -1)
        margins = yes.logsumexp(-1) - no.logsumexp(-1)
        if not bool(torch.isfinite(margins).all()):
            raise ValueError("--judge: the model gives numbers that are not finite: its weights are damaged")
        return margins.cpu()


def _message(case: Case) -> Message:
    shown = "; ".join(case.accepted[:MOST])
    return Message(role="user", content=PROMPT.format(question=case.question, accepted=shown, given=case.given))
