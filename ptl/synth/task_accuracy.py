"""How many questions a model answers right, greedily, by the rules of ``ptl.rewards.matching``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ptl.data.render import Renderer
from ptl.models.heads import causal_lm
from ptl.rewards.matching import match
from ptl.rollout.sampling import sample
from ptl.synth.questions import Question, ends

BATCH = 16


def answered_right(
    model: nn.Module, renderer: Renderer, questions: Sequence[Question], *, max_new_tokens: int = 64
) -> list[bool]:
    """Whether each question is answered right.

    Args:
        model: in eval mode.
        renderer: of its template.
        questions: with their accepted ``answers`` in ``known``.
        max_new_tokens: of an answer; one that is cut is matched as far as it goes.
    """
    stop, tokenizer = tuple(ends(model, renderer)), renderer.tokenizer
    vocab = causal_lm(model).get_input_embeddings().weight.shape[0]
    right = []
    for begin in range(0, len(questions), BATCH):
        batch = questions[begin : begin + BATCH]
        drawn = sample(
            model,
            [question.ids for question in batch],
            [question.number for question in batch],
            samples=1,
            stop=stop,
            limits=[max_new_tokens] * len(batch),
            vocab=vocab,
            temperature=0.0,
            top_p=1.0,
            seed=0,
        )
        for question, [answer] in zip(batch, drawn, strict=True):
            text = str(tokenizer.decode([token for token in answer.ids if token not in stop], skip_special_tokens=True))
            said = match(text.strip(), question.known["answers"], question.messages[-1].content)
            right.append(said is not None)
    return right
