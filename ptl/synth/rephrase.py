"""A model puts questions in other words; a rule says whether they still ask the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from ptl.data.render import Renderer
from ptl.rollout.sampling import sample
from ptl.synth.questions import ends
from ptl.synth.tool_tasks import Language, Task
from ptl.types import Message

_ASKED: dict[Language, str] = {
    "en": "Say this question in other words. Keep all names and numbers. Write only the new question.\n\n{}",
    "fr": "Pose cette question avec d'autres mots. Garde tous les noms et les nombres. Écris seulement la nouvelle "
    "question.\n\n{}",
}
_NAME = re.compile(r"\b[A-ZÀ-Þ]\w+")
_MOST_TOKENS = 64


class Rephrased(NamedTuple):
    """Tasks with other questions, and why the others have none."""

    tasks: list[Task]
    dropped: Counter[str]


def rephrase(
    model: nn.Module,
    renderer: Renderer,
    tasks: Sequence[Task],
    *,
    batch: int = 16,
    temperature: float = 0.7,
    seed: int = 0,
    report: Callable[[int], object] = lambda count: None,
) -> Rephrased:
    """The tasks that the model could put in other words.

    Args:
        model: in eval mode.
        renderer: renders the prompts.
        tasks: what to ask.
        batch: questions at a time.
        temperature, seed: of the draws; they depend on the seed and a task's place alone.
        report: called with the number of tasks done.
    """
    out, dropped = [], Counter[str]()
    stop = ends(model, renderer)
    for begin in range(0, len(tasks), batch):
        some = tasks[begin : begin + batch]
        prompts = [
            renderer.prompt([Message(role="user", content=_ASKED[task.language].format(task.question))])
            for task in some
        ]
        drawn = sample(
            model,
            prompts,
            range(begin, begin + len(some)),
            samples=1,
            stop=stop,
            limits=[_MOST_TOKENS] * len(some),
            vocab=len(renderer.tokenizer),
            temperature=temperature,
            top_p=1.0,
            seed=seed,
        )
        for task, [answer] in zip(some, drawn):
            ended = answer.ids[-1] in stop
            said = str(renderer.tokenizer.decode(answer.ids[: len(answer.ids) - ended], skip_special_tokens=True))
            if problem := unlike(task.question, said, ended):
                dropped[problem] += 1
            else:
                out.append(replace(task, question=said.strip().strip('"')))
        report(len(some))
    return Rephrased(out, dropped)


def unlike(question: str, said: str, ended: bool) -> str | None:
    """Why a text does not ask the same as a question, or None: it is cut, several lines, the same words, no question,
    or has other names or numbers."""
    said = said.strip().strip('"')
    if not ended:
        return "unfinished"
    if not said or "\n" in said:
        return "no_question"
    if " ".join(said.casefold().split()) == " ".join(question.casefold().split()):
        return "same_words"
    if not said.endswith(("?", ".")) or len(said) > 3 * len(question) + 40:
        return "no_question"
    if sorted(re.findall(r"\d+", question)) != sorted(re.findall(r"\d+", said)):
        return "other_numbers"
    # A name may begin the new question, and the old question's first word need be no name.
    return "lost_names" if set(_NAME.findall(question)[1:]) - set(_NAME.findall(said)) else None
