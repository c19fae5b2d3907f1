"""Which documents a conversation becomes, and which of their characters are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ptl.data.answers import Answer, answer_at, check_reasoning, marked_spans
from ptl.data.chat_template import Chat, ChatTemplate, RenderError, Tools
from ptl.data.layout import Layout, form_of, learn_layout, masked, place

History = Literal["inference", "single_pass"]
_MAX_SHAPES = 4096
_QUOTED = r"""(['"])((?:(?!\1).)+)\1"""
_SOUGHT = (
    re.compile(_QUOTED + r"\s+(?:not\s+)?in\s"),
    re.compile(r"\.(?:r?split|startswith|endswith|r?find|r?index|count|r?partition|replace)\(\s*" + _QUOTED),
)


class Document(NamedTuple):
    """A text and its trained characters: (start, end, weight), ascending and disjoint."""

    text: str
    spans: list[tuple[int, int, float]]


class Shape(NamedTuple):
    """What all conversations of one form share: the template's own text and where answers lie in it.

    An anchor (k, offset) is the character ``offset`` after the end of the k-th printed word; k = 0 is the text's start.
    """

    layout: Layout
    anchors: dict[int, tuple[tuple[tuple[int, int], tuple[int, int]], ...]]


class Documents:
    """Plans documents for one template, and remembers the shapes of conversations it has seen.

    Args:
        template: prints the chats.
        history: ``inference`` gives each trained turn the context that the model sees when it writes that turn: where
            the template prints earlier turns differently once others follow (Qwen3 drops their reasoning), such a turn
            gets a document of its own, and turns that are not rewritten share one. ``single_pass`` gives one document,
            the conversation as the template prints it.
    """

    def __init__(self, template: ChatTemplate, history: History):
        self.template = template
        self.history = history
        self._sought = sought_literals(template.source)
        self._shapes: dict[tuple, Shape | None] = {}

    def plan(self, chat: Chat, tools: Tools, weights: Sequence[float]) -> list[Document]:
        """The documents of a chat whose message i has the loss weight ``weights[i]``, in order of their last turn.

        No turn is trained twice. Raises RenderError.
        """
        return self._by_shape(chat, tools, weights) or self._by_turn(chat, tools, weights)

    def _by_shape(self, chat: Chat, tools: Tools, weights: Sequence[float]) -> list[Document] | None:
        """The documents by a remembered shape; None where the shape does not prove them."""
        if tools or any("tool_calls" in m or (weight and m["role"] != "assistant") for m, weight in zip(chat, weights)):
            return None  # hardly two of these have one form
        key, words = form_of(chat)
        if any(literal in word.text for literal in self._sought for word in words):
            return None
        if key not in self._shapes:
            if len(self._shapes) >= _MAX_SHAPES:
                return None
            self._shapes[key] = learn_shape(self.template, chat)
        shape = self._shapes[key]
        if shape is None:
            return None
        text = self.template.print(chat)
        placed = shape.layout.place(words, text)
        if placed is None:
            return None
        ends = [0, *placed.ends]
        spans = [
            (ends[k] + offset, ends[k_end] + offset_end, weight)
            for index, weight in enumerate(weights)
            if weight
            for (k, offset), (k_end, offset_end) in shape.anchors[index]
        ]
        return [Document(text, spans)]

    def _by_turn(self, chat: Chat, tools: Tools, weights: Sequence[float]) -> list[Document]:
        text = self.template.print(chat, tools)
        turns = [index for index, weight in enumerate(weights) if weight and chat[index]["role"] == "assistant"]
        others = [index for index, weight in enumerate(weights) if weight and chat[index]["role"] != "assistant"]
        whole = Document(text, [(*_said_by(self.template, chat, tools, text, i), weights[i]) for i in others])
        if self.history == "single_pass":
            _check_context(self.template, chat, tools, prompt=False)
            for index in turns:
                check_reasoning(self.template, chat[index], index)
                spans = turn_in(self.template, chat, tools, text, index)
                whole.spans.extend((start, end, weights[index]) for start, end in spans)
            return [Document(text, sorted(whole.spans))]
        _check_context(self.template, chat[: turns[-1]] if turns else chat, tools, prompt=bool(turns))
        answers = {index: answer_at(self.template, chat, tools, index) for index in turns}
        return _hosted(whole, answers, weights)


def _hosted(whole: Document, answers: dict[int, Answer], weights: Sequence[float]) -> list[Document]:
    """Each answer in the longest document that starts with its transcript."""
    hosts = [whole]
    for index in sorted(answers, reverse=True):
        answer = answers[index]
        transcript = answer.transcript
        host = next((host for host in hosts if host.text.startswith(transcript)), None)
        if host is None:
            hosts.append(host := Document(answer.text, []))
        host.spans.extend((start, end, weights[index]) for start, end in answer.spans)
    return [Document(host.text, sorted(host.spans)) for host in reversed(hosts) if host.spans]


def learn_shape(template: ChatTemplate, chat: Chat) -> Shape | None:
    """The shape of a chat without tools; None if answers are rewritten, or not all is printed in plain order."""
    sample = masked(chat)
    words = form_of(sample)[1]
    try:
        text = template.print(sample)
        layout = learn_layout(template, chat)
        placed = layout.place(words, text)
        if placed is None or set(layout.order) != set(range(len(words))):
            return None
        turns = [index for index, message in enumerate(sample) if message["role"] == "assistant"]
        answers = {index: answer_at(template, sample, (), index) for index in turns}
    except RenderError:
        return None  # planning turn by turn says what is wrong
    if not all(text.startswith(answer.transcript) for answer in answers.values()):
        return None
    edges = {edge for answer in answers.values() for span in answer.spans for edge in span}
    if any(start < edge < end for edge in edges for start, end in zip(placed.starts, placed.ends)):
        return None
    ends = [0, *placed.ends]

    def anchor(at: int) -> tuple[int, int]:
        k = max(k for k, end in enumerate(ends) if end <= at)
        return k, at - ends[k]

    anchors = {i: tuple((anchor(start), anchor(end)) for start, end in a.spans) for i, a in answers.items()}
    return Shape(layout, anchors)


def turn_in(template: ChatTemplate, chat: Chat, tools: Tools, text: str, index: int) -> tuple[tuple[int, int], ...]:
    """The characters of an assistant's turn within the print of the whole chat, later turns and all.

    Raises RenderError where they cannot be told for certain.
    """
    prompt, earlier = template.print_marked(chat[:index], tools, prompt=True) if index else ("", [])
    upto, until = template.print_marked(chat[: index + 1], tools)
    if len(until) > len(earlier):
        own = template.print_marked(chat, tools)[1][len(earlier) : len(until)]
        return marked_spans(template, text, own, len(prompt) if text.startswith(prompt) else 0)
    prompted = bool(prompt) and text.startswith(prompt)
    if prompted and upto.startswith(prompt):
        end = template.last_end(upto, len(prompt))
        if text.startswith(upto[:end]):
            return ((len(prompt), end),)
    placed = place(template, chat, tools, text)
    own = placed.of(index) if placed else None
    if own:
        start, end = (len(prompt) if prompted else own[0]), template.first_end(text, own[1], own[2])
    else:
        found = len(prompt) if prompted else _wordless_start(template, chat, tools, text, index)
        if found is None or any(end in repr(chat[index]) for end in template.dialect.end_texts):
            raise _unlocated(index)
        start, end = found, template.first_end(text, found)
    if end is None:
        raise RenderError(
            "no_end_token",
            f"message {index + 1}: once other turns follow, the template prints none of {template.dialect.end_texts} "
            "after it; use history: inference",
        )
    return ((start, end),)


def _wordless_start(template: ChatTemplate, chat: Chat, tools: Tools, text: str, index: int) -> int | None:
    """Where a turn of tool calls alone starts: where its words would stand if it had any."""
    word = "Wq0x7Zs"
    spoken = template.print([*chat[:index], {**chat[index], "content": word}, *chat[index + 1 :]], tools)
    before, found, after = spoken.partition(word)
    return len(before) if found and before + after == text else None


def _said_by(template: ChatTemplate, chat: Chat, tools: Tools, text: str, index: int) -> tuple[int, int]:
    """The words of a turn that is not the assistant's, with its end token if it has one."""
    placed = place(template, chat, tools, text)
    own = placed.of(index) if placed else None
    if own is None:
        raise _unlocated(index)
    return own[0], template.first_end(text, own[1], own[2]) or own[1]


def _unlocated(index: int) -> RenderError:
    return RenderError(
        "unlocated",
        f"message {index + 1}: the template changes its words, so their place in the print cannot be proved; leave its "
        "role out of train_roles, set train: 0 on it, use history: inference, or add {% generation %} marks",
    )


def _check_context(template: ChatTemplate, chat: Chat, tools: Tools, *, prompt: bool) -> None:
    """Raises RenderError unless every word that is not the assistant's is printed."""
    if not chat:
        return
    printed = set(learn_layout(template, chat, tools, prompt=prompt).order)
    for number, word in enumerate(form_of(chat)[1]):
        message = chat[word.message]
        if number not in printed and message["role"] != "assistant":
            raise RenderError(
                "message_dropped",
                f"message {word.message + 1}: the template prints nothing of what the {message['role']} says "
                f"({word.text[:60]!r}); drop these rows, or use a template that knows the role",
            )


def sought_literals(source: str) -> tuple[str, ...]:
    """The strings for which a template's text looks in what it prints: words that hold one may change its course."""
    found = {match[2] for pattern in _SOUGHT for match in pattern.finditer(source)}
    return tuple(sorted(text.replace("\\n", "\n") for text in found))
