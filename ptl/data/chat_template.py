"""A chat template, and what it is able to print, learned by printing small probes with it.

Templates differ in the keys they read and in what they drop without a word: the reasoning is ``reasoning_content`` for
one and ``thinking`` for the next, tool arguments must be a dict here and a JSON string there, and many templates ignore
tools or tool calls altogether. A probe shows which, once; whatever a template cannot print is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from ptl.data.typed_marks import mark_pattern, with_guards
from ptl.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Chat = list[dict[str, Any]]
"""Messages as a template reads them."""
Tools = Sequence[Mapping[str, Any]]
Marks = list[tuple[int, int]]
"""Character spans that ``{% generation %}`` blocks printed."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NAME, _KEY, _VALUE, _THOUGHT, _ANSWER = "wq1name", "wq2key", "wq3value", "wq4thought", "wq5answer"
_QUESTION = {"role": "user", "content": "wq6question"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "wq7description",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "wq8text"}}},
    },
}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class RenderError(ValueError):
    """A conversation that cannot be rendered as asked.

    Attributes:
        reason: short stable name, usable as the key of a counter.
        detail: what was found, why it is refused and what to change.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class TooLong(RenderError):  # noqa: N818 - the name says what happened, as the reasons do
    """A conversation that passes ``max_length`` and cannot, or by policy may not, be cut to it."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What a template can print and in which form it wants it.

    Attributes:
        end_texts: the strings that end an assistant's turn.
        terminators: their token ids, in the same order.
        reasoning_key: message key of the reasoning; None if the template prints none of those known.
        calls: the template prints tool calls.
        text_arguments: it wants their arguments as a JSON string, not as a dict.
        null_content: it wants ``content: null`` beside them, not an empty string.
        tools: it prints the list of tools.
        tail: what it prints after an answer that ends the conversation, for messages to the user.
    """

    end_texts: tuple[str, ...]
    terminators: tuple[int, ...]
    reasoning_key: str | None
    calls: bool
    text_arguments: bool
    null_content: bool
    tools: bool
    tail: str


class ChatTemplate:
    """One Jinja chat template with the constants it is printed with, printed by the engine of ``apply_chat_template``.

    Args:
        source: Jinja text.
        tokenizer: gives the special tokens' text and says which pieces of text are special tokens.
        kwargs: further template variables, such as ``enable_thinking``.
        date: ISO date that ``strftime_now`` gives, so that the data do not depend on the day they are prepared.

    Raises:
        ValueError: the template cannot print one question and one answer, or the date is no ISO date.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerFast, kwargs: Mapping[str, Any], date: str):
        self.source = source
        self.has_marks = _GENERATION.search(source) is not None
        self._marks = mark_pattern(tokenizer)
        self._variables = {
            **tokenizer.special_tokens_map,
            "strftime_now": partial(_strftime, datetime.fromisoformat(date)),
            **kwargs,
        }
        try:
            self.dialect = _learn(self, tokenizer)
        except (RenderError, jinja2.TemplateError) as error:
            raise ValueError(
                f"template: it does not print one user question and one assistant answer ({error}); "
                "set template to a Jinja chat template, a .jinja file, or one of ptl's (chatml, im_sep)"
            ) from error

    def print(self, chat: Chat, tools: Tools = (), *, prompt: bool = False) -> str:
        """The text of a chat, with the generation prompt at its end if ``prompt``. Raises RenderError."""
        return self._print(chat, tools, prompt, False)[0]

    def print_marked(self, chat: Chat, tools: Tools = (), *, prompt: bool = False) -> tuple[str, Marks]:
        """As ``print``, and the spans of its ``{% generation %}`` blocks; none if the template has none."""
        return self._print(chat, tools, prompt, self.has_marks)

    def _print(self, chat: Chat, tools: Tools, prompt: bool, marked: bool) -> tuple[str, Marks]:
        try:
            texts, marks = render_jinja_template(
                [chat],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self._variables,
            )
        # A template is the user's program: whatever it raises is said in one line and counted.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RenderError("template_error", f"the chat template says: {error}") from error
        return texts[0], cast(Marks, marks[0]) if marked else []

    def chat(self, messages: Sequence[Message]) -> Chat:
        """The messages in this template's form, with the marks that users and tools typed guarded.

        Raises RenderError for tool calls that it cannot print.
        """
        return with_guards((m.as_dict() if _is_plain(m) else self._adapt(m) for m in messages), self._marks)

    def _adapt(self, message: Message) -> dict[str, Any]:
        out = message.as_dict()
        if message.reasoning is not None:
            out[self.dialect.reasoning_key or _REASONING_KEYS[0]] = out.pop("reasoning_content")
        if not message.tool_calls:
            return out
        if not self.dialect.calls:
            raise RenderError(
                "tool_calls_unsupported",
                "the chat template prints no tool calls; drop these rows, or set template to one that does (chatml)",
            )
        out["tool_calls"] = [_call(call, self.dialect.text_arguments) for call in message.tool_calls]
        if not message.content:
            out["content"] = None if self.dialect.null_content else ""
        return out

    def last_end(self, text: str, start: int) -> int:
        """Where the last turn of a text ends: after the last end-of-turn beyond ``start``. Raises RenderError."""
        ends = [at + len(end) for end in self.dialect.end_texts if (at := text.rfind(end, start)) >= 0]
        if not ends:
            self.no_end()
        return max(ends)

    def first_end(self, text: str, start: int, stop: int | None = None) -> int | None:
        """Where the first end-of-turn in ``text[start:stop]`` ends, or None."""
        found = [(at, at + len(end)) for end in self.dialect.end_texts if (at := text.find(end, start, stop)) >= 0]
        return min(found)[1] if found else None

    def no_end(self) -> NoReturn:
        """Raises the RenderError for an answer without an end-of-turn token."""
        raise RenderError(
            "no_end_token",
            f"after an answer the chat template prints {self.dialect.tail!r}, which holds no special token of this "
            "tokenizer, so the model would never learn to stop; end the assistant's turn with {{ eos_token }} in the "
            "template, or add its end token to the tokenizer (ptl tokens add)",
        )


def _strftime(day: datetime, form: str) -> str:
    return day.strftime(form)


def _is_plain(message: Message) -> bool:
    return message.reasoning is None and not message.tool_calls


def _call(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or "name" not in function:
        raise RenderError("bad_tool_call", f"got {dict(call)!r}; expected {{'function': {{'name':, 'arguments':}}}}")
    arguments = function.get("arguments", {})
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise RenderError("bad_tool_call", f"arguments of {function['name']!r} are not JSON: {error}") from error
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _learn(template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> Dialect:
    """Prints probes and reads from them what the template supports."""
    exchange = [_QUESTION, {"role": "assistant", "content": _ANSWER}]
    tail = template.print(exchange).partition(_ANSWER)[2]
    followed = _prints(template, [*exchange, _QUESTION], ()).partition(_ANSWER)[2]
    ends: dict[str, int] = {}
    runs = _specials(tokenizer, tail)
    if runs:
        ends.update([_turn_end(tokenizer, runs[0], _specials(tokenizer, followed))])
    calls, text_arguments, null_content, after = _learn_calls(template)
    if calls and not any(end in after for end in ends):
        runs = _specials(tokenizer, after)
        if runs:
            ends.update([runs[-1][-1]])
    return Dialect(
        end_texts=tuple(ends),
        terminators=tuple(ends.values()),
        reasoning_key=_learn_reasoning(template),
        calls=calls,
        text_arguments=text_arguments,
        null_content=null_content,
        tools=_prints(template, [_QUESTION], [_TOOL], prompt=True).find(_NAME) >= 0,
        tail=tail,
    )


def _prints(template: ChatTemplate, chat: Chat, tools: Tools, prompt: bool = False) -> str:
    """The print of a probe; empty if the template refuses it."""
    try:
        return template.print(chat, tools, prompt=prompt)
    except RenderError:
        return ""


def _specials(tokenizer: PreTrainedTokenizerFast, text: str) -> list[list[tuple[str, int]]]:
    """Runs of neighbouring special tokens in a text, as (text, id)."""
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    runs: list[list[tuple[str, int]]] = []
    inside = False
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in special:
            if not inside:
                runs.append([])
            runs[-1].append((str(added[token]) if token in added else str(tokenizer.decode([token])), token))
        inside = token in special
    return runs


def _turn_end(tokenizer: PreTrainedTokenizerFast, run: list, followed: list[list]) -> tuple[str, int]:
    """Which of the special tokens after a last answer ends the turn.

    Of those that also come after an answer in mid conversation, EOS or else the last; failing any, EOS or the first.
    """
    common = []
    for ours, theirs in zip(run, followed[0] if followed else ()):
        if ours != theirs:
            break
        common.append(ours)
    among = common or run
    return next((pair for pair in among if pair[1] == tokenizer.eos_token_id), (common or run[:1])[-1])


def _learn_reasoning(template: ChatTemplate) -> str | None:
    for key in _REASONING_KEYS:
        answer = {"role": "assistant", "content": _ANSWER, key: _THOUGHT}
        if _THOUGHT in _prints(template, [_QUESTION, answer], ()):
            return key
    return None


def _learn_calls(template: ChatTemplate) -> tuple[bool, bool, bool, str]:
    """(prints tool calls, arguments as text, null content, text after the call): the first form that prints well."""
    for as_text in (False, True):
        arguments = json.dumps({_KEY: _VALUE}) if as_text else {_KEY: _VALUE}
        # An id of nine letters and digits: Mistral's templates accept no other.
        call = {"type": "function", "id": "call00001", "function": {"name": _NAME, "arguments": arguments}}
        for content in ("", None):
            turn = {"role": "assistant", "content": content, "tool_calls": [call]}
            text = _prints(template, [_QUESTION, turn], ()) or _prints(template, [_QUESTION, turn], [_TOOL])
            # A dict printed by Python's repr, or a string quoted twice, is no JSON: the other form is wanted.
            if all(part in text for part in (_NAME, _KEY, _VALUE)) and not re.search(rf"\{{'{_KEY}|\\\"{_KEY}", text):
                # Some templates print the end of the turn only after a second call.
                second = _prints(template, [_QUESTION, {**turn, "tool_calls": [call, call]}], ())
                return True, as_text, content is None, text.rpartition(_VALUE)[2] + second.rpartition(_VALUE)[2]
    return False, False, False, ""
