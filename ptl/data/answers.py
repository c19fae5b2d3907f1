"""One assistant turn as the model must write it: from its generation prompt to its end-of-turn token."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptl.data.chat_template import Chat, ChatTemplate, Marks, RenderError, Tools
from ptl.data.layout import place, split_text

_OPENING = re.compile(r"\s*<think>\n*")


@dataclass(frozen=True)
class Answer:
    """A turn printed as the last of its conversation.

    Attributes:
        text: the print, which goes on after the turn's end where the template prints something there.
        spans: characters that the model generates; more than one where ``{% generation %}`` leaves something out.
    """

    text: str
    spans: tuple[tuple[int, int], ...]

    @property
    def transcript(self) -> str:
        """The text up to and with the turn's end token."""
        return self.text[: self.spans[-1][1]]


def answer_at(template: ChatTemplate, chat: Chat, tools: Tools, index: int) -> Answer:
    """``chat[index]`` as the model writes it at inference, where nothing follows it.

    In this order: the template's ``{% generation %}`` marks; else everything that the print of ``chat[: index + 1]``
    adds to the generation prompt of ``chat[:index]``, up to the end token; else, for templates that print a prompt
    which their own history does not continue, that prompt followed by the answer.

    Raises:
        RenderError: the template refuses the chat, changes or drops words of the answer, prints no end token, or
            prints a generation prompt that the answer does not continue.
    """
    text, marks = template.print_marked(chat[: index + 1], tools)
    prompt, earlier = template.print_marked(chat[:index], tools, prompt=True) if index else ("", [])
    own = marks[len(earlier) :]
    if own:
        floor = len(prompt) if text.startswith(prompt) else 0
        answer = Answer(text, marked_spans(template, text, own, floor))
    elif index == 0:
        floor = _opening_start(template, chat, tools, text)
        answer = Answer(text, ((floor, template.last_end(text, floor)),))
    elif text.startswith(prompt):
        floor = len(prompt)
        answer = Answer(text, ((floor, template.last_end(text, floor)),))
    else:
        floor = len(prompt)
        answer = _spliced(template, chat[: index + 1], tools, prompt, text)
    _check_words(chat[index], index, answer.text[floor : answer.spans[-1][1]])
    return answer


def marked_spans(template: ChatTemplate, text: str, marks: Marks, floor: int) -> tuple[tuple[int, int], ...]:
    """The marks of one turn, from ``floor`` on, with the turn's end token and without what follows it."""
    spans = [(max(start, floor), end) for start, end in marks]
    start, end = spans[-1]
    said = text[start:end].rstrip()
    if any(said.endswith(end_text) for end_text in template.dialect.end_texts):
        end = start + len(said)
    else:
        found = template.first_end(text, end)
        if found is None:
            template.no_end()
        end = found
    spans[-1] = (start, end)
    return tuple((start, end) for start, end in spans if start < end)


def _opening_start(template: ChatTemplate, chat: Chat, tools: Tools, text: str) -> int:
    """Where the words of a conversation's very first message start: it has no generation prompt."""
    placed = place(template, chat[:1], tools, text)
    own = placed.of(0) if placed else None
    if own is None:
        raise RenderError("unlocated", "message 1 opens the conversation and its words cannot be found in the print")
    return own[0]


def _spliced(template: ChatTemplate, chat: Chat, tools: Tools, prompt: str, text: str) -> Answer:
    """The generation prompt followed by the answer, for a template that does not print the one as it prints the other.

    Mistral's first templates print the system prompt only before the last user turn, which is gone once an answer
    follows; DeepSeek-R1's opens a think block that it removes from every answer.
    """
    index = len(chat) - 1
    asked = place(template, chat[:index], tools, prompt, prompt=True)
    shown = place(template, chat, tools, text)
    if asked and shown and asked.ends:
        own = shown.of(index)
        before = [k for k, end in enumerate(shown.ends) if end <= (own[0] if own else len(text))]
        before = [k for k in before if shown.messages[k] != index]
        tail = prompt[asked.ends[-1] :]
        if (
            before
            and shown.messages[before[-1]] == asked.messages[-1]
            and text.startswith(tail, shown.ends[before[-1]])
        ):
            joined = prompt + text[shown.ends[before[-1]] + len(tail) :]
            return Answer(joined, ((len(prompt), template.last_end(joined, len(prompt))),))
    written = _after_think_opening(chat[index], prompt)
    if written is None:
        raise RenderError(
            "prompt_not_continued",
            f"message {index + 1}: the generation prompt ends in {prompt[-40:]!r}, which the printed answer does not "
            "continue, so training would not see what inference sees; give the answers a <think> block if the prompt "
            "opens one, set template_kwargs so that it does not, or history: single_pass to train answers as printed",
        )
    if not template.dialect.end_texts:
        template.no_end()
    joined = prompt + written + template.dialect.end_texts[0]
    return Answer(joined, ((len(prompt), len(joined)),))


def _after_think_opening(message: dict, prompt: str) -> str | None:
    """What the model writes after a prompt that ends in ``<think>``; None if the message has no think block."""
    if not prompt.rstrip().endswith("<think>") or message.get("tool_calls"):
        return None
    content = message["content"]
    thought = next((message[key] for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)), None)
    if thought is not None:
        return f"{thought.strip()}\n</think>\n\n{content}"
    opening = _OPENING.match(content)
    return content[opening.end() :] if opening and "</think>" in content else None


def _check_words(message: dict, index: int, said: str) -> None:
    """Raises RenderError unless all that the message says is in the text to be trained, white space apart."""
    squeezed = _squeeze(said)
    for field in ("content", "reasoning_content", "reasoning", "thinking"):
        value = message.get(field)
        if not isinstance(value, str) or _squeeze(_untagged(value)) in squeezed:
            continue
        words = split_text(value).words
        missing = [k for k, word in enumerate(words) if _squeeze(word) not in squeezed]
        if missing and (field != "content" or (len(words) == 2 and missing == [0])):
            raise _reasoning_dropped(index)
        if missing:
            raise RenderError(
                "answer_altered",
                f"message {index + 1}: the template prints other words than the message's, {said[:80]!r}",
            )
    for call in message.get("tool_calls") or ():
        if str(call["function"]["name"]) not in said:
            raise RenderError(
                "tool_call_dropped",
                f"message {index + 1}: the template does not print its call of {call['function']['name']!r}; many "
                "print either text or calls: give the text a message of its own, or use another template (chatml)",
            )


def check_reasoning(template: ChatTemplate, message: dict, index: int) -> None:
    """Raises RenderError for a message whose reasoning no turn of the template prints."""
    if template.dialect.reasoning_key is None and message.get("reasoning_content"):
        raise _reasoning_dropped(index)


def _reasoning_dropped(index: int) -> RenderError:
    return RenderError(
        "reasoning_dropped",
        f"message {index + 1}: the template does not print its reasoning, so it would not be trained; put it into the "
        "content, drop it from the rows, or use a template that prints it",
    )


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _untagged(text: str) -> str:
    return text.removeprefix("<think>") if text.startswith("<think>") else text
