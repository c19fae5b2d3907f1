"""The one renderer: from a conversation to token ids and a loss mask.

Training, reward models, reinforcement learning, the preview and chat all go through it, so what is trained is what is
sampled. A conversation's text comes from the chat template alone and is tokenised once. BOS is there if the template
prints it, exactly as ``apply_chat_template(tokenize=True)`` has it, and never twice.

What is trained of an assistant's turn is everything that the model must generate from the generation prompt on:
reasoning, words and tool calls as the template prints them, and the end-of-turn token, but not the line feed after it.
Where the mask comes from, in this order: the template's ``{% generation %}`` marks; the conversation's print with
sentinels for its words, proved equal to the real print; each turn's print against its own generation prompt; a refusal
that says why. See ``documents.py``, ``answers.py`` and ``layout.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ptl.data.chat_template import ChatTemplate, RenderError, TooLong
from ptl.data.documents import Document, Documents
from ptl.data.spans import Encoder, finished
from ptl.data.tokenizer import PACKAGED_TEMPLATES, resolve_template
from ptl.data.truncation import Truncation, keep_start, split, without_oldest
from ptl.types import Conversation, Message, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["RenderError", "RenderPolicy", "Renderer", "TooLong", "Truncation", "stop_token_ids"]


@dataclass(frozen=True, kw_only=True)
class RenderPolicy:
    """What of a conversation is trained, and how its template is called.

    Args:
        train_roles: roles whose turns have weight 1. A message's own ``train`` weight comes before this.
        last_turn_only: of those turns, only the conversation's last one.
        history: ``inference`` trains each turn in the context that the model sees when it writes it; templates that
            print earlier turns differently (Qwen3 drops their reasoning) then give several documents a conversation.
            ``single_pass`` trains the conversation as the template prints it, in one document.
        template_kwargs: further variables of the template, such as ``enable_thinking: false``.
        date: ISO date for templates that print today's, so that the data do not depend on the day; chat uses it too.
    """

    train_roles: tuple[str, ...] = ("assistant",)
    last_turn_only: bool = False
    history: Literal["inference", "single_pass"] = "inference"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    date: str = "2025-01-01"


class Renderer:
    """Renders conversations for one tokenizer, chat template and policy. Picklable; build it once a process.

    Args:
        tokenizer: a fast tokenizer. It is read, never changed.
        template: None takes the tokenizer's own template; else a packaged name, a ``.jinja`` path or Jinja text.
        policy: what is trained.

    Attributes:
        template: Jinja text; empty if there is none, which plain text does not need.
        terminators: ids of the tokens that end an assistant's turn, learned from the template.

    Raises:
        ValueError: the tokenizer is not a fast one, or the template is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str | None = None,
        policy: RenderPolicy = RenderPolicy(),
    ):
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer: got {type(tokenizer).__name__}; expected a fast tokenizer (tokenizer.json)")
        self.tokenizer = tokenizer
        self.policy = policy
        source, with_tools = _sources(tokenizer, template)
        self.template = source or ""
        self._templates = [
            ChatTemplate(text, tokenizer, policy.template_kwargs, policy.date) for text in (source, with_tools) if text
        ]
        self._documents = [Documents(template, policy.history) for template in self._templates]
        ends = [token for template in self._templates for token in template.dialect.terminators]
        self.terminators: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self._encoder = Encoder(tokenizer, self.terminators)
        self._eos = _eos_id(tokenizer)
        self._text_prefix = _text_prefix(tokenizer)

    def render(self, conversation: Conversation) -> list[Tokens]:
        """The conversation's documents; more than one only where the template rewrites history.

        Plain text is one document: BOS if the tokenizer adds one, the text, EOS; all trained but position 0.

        Raises:
            RenderError: with a stable ``reason`` and what to change.
        """
        rendered = self.render_batch([conversation])[0]
        if isinstance(rendered, RenderError):
            raise rendered
        return rendered

    def render_batch(self, conversations: Sequence[Conversation]) -> list[list[Tokens] | RenderError]:
        """``render`` of each, with one tokenizer call for all; what ``render`` raises stands in its place."""
        planned: list[list[Document] | RenderError] = []
        for conversation in conversations:
            try:
                planned.append(self._plan(conversation))
            except RenderError as error:
                planned.append(error)
        documents = [document for plan in planned if not isinstance(plan, RenderError) for document in plan]
        encoded = iter(self._encoder.encode(documents))
        results: list[list[Tokens] | RenderError] = []
        for conversation, plan in zip(conversations, planned):
            if isinstance(plan, RenderError):
                results.append(plan)
                continue
            tokens = [next(encoded) for _ in plan]
            error = next((each for each in tokens if isinstance(each, RenderError)), None)
            whole = [each for each in tokens if isinstance(each, Tokens)]
            results.append(error or ([self._text(each) for each in whole] if _is_text(conversation) else whole))
        return results

    def fit(self, conversation: Conversation, max_length: int, truncation: Truncation) -> list[Tokens]:
        """The conversation's documents, none longer than ``max_length`` tokens.

        Args:
            conversation: as in ``render``.
            max_length: tokens, at least 1.
            truncation: ``drop`` and ``error`` refuse a conversation any document of which is too long (the caller
                counts or stops). ``keep_start`` cuts the tokens: a cut answer is trained without its end, documents
                with nothing trained left are left out. ``drop_oldest_turns`` drops the oldest exchanges, each a
                question with all that answers it, tool calls and results included, but no leading system message.
                ``split`` cuts plain text into windows, of which nothing is lost, and refuses conversations.

        Raises:
            TooLong: it does not fit, by policy or because no trained token would be left.
            RenderError: as ``render``.
        """
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}; expected at least 1")
        documents = self.render(conversation)
        longest = max(len(tokens.ids) for tokens in documents)
        if longest <= max_length:
            return documents
        if truncation == "keep_start":
            return keep_start(documents, max_length)
        if truncation == "drop_oldest_turns":
            return without_oldest(conversation, self.render, max_length, longest)
        if truncation == "split" and _is_text(conversation) and max_length > 1:
            return [window for tokens in documents for window in split(tokens, max_length)]
        raise TooLong(
            "too_long",
            f"{longest} tokens, more than max_length {max_length}; raise max_length, or set truncation to keep_start "
            "or drop_oldest_turns",
        )

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids that chat, samples and reinforcement learning feed: the messages and the generation prompt."""
        template = self._templates[self._which(tools)]
        return self._encoder.ids(template.print(template.chat(messages), tools, prompt=True))

    @property
    def prints_tools(self) -> bool:
        """Whether the template prints the list of tools and the calls of them."""
        return bool(self._templates) and self._templates[-1].dialect.tools and self._templates[-1].dialect.calls

    def fingerprint(self) -> str:
        """Hex digest that changes with the tokenizer, the template or the policy, and with nothing else."""
        parts = {
            "tokenizer": self._encoder.description(),
            "special": self.tokenizer.special_tokens_map,
            "prefix": self._text_prefix,
            "templates": [template.source for template in self._templates],
            "policy": asdict(self.policy),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _which(self, tools: Sequence[Mapping[str, Any]]) -> int:
        if not self._templates:
            raise RenderError(
                "no_chat_template",
                "the tokenizer has no chat template; set template to one of "
                f"{', '.join(PACKAGED_TEMPLATES)}, the path of a .jinja file, or Jinja text",
            )
        return len(self._templates) - 1 if tools else 0

    def _plan(self, conversation: Conversation) -> list[Document]:
        if _is_text(conversation):
            if not conversation.text:
                raise RenderError("empty_text", "the text is empty")
            if self._eos is None:
                raise RenderError(
                    "no_end_token", "the tokenizer has no EOS token to end a text with; set its eos_token"
                )
            return [Document(conversation.text, [])]
        if not conversation.messages:
            raise RenderError("empty_conversation", "there is no message")
        which = self._which(conversation.tools)
        template = self._templates[which]
        if conversation.tools and not template.dialect.tools:
            raise RenderError(
                "tools_unsupported",
                "the chat template does not print the list of tools; drop the tools column, or set template to one "
                "that does (chatml)",
            )
        weights = self._weights(conversation.messages)
        if not any(weights):
            raise RenderError(
                "nothing_trained", f"no message has a role in train_roles {self.policy.train_roles} or a train weight"
            )
        return self._documents[which].plan(template.chat(conversation.messages), conversation.tools, weights)

    def _weights(self, messages: Sequence[Message]) -> list[float]:
        roles = self.policy.train_roles
        first = 0
        if self.policy.last_turn_only:
            first = max((index for index, message in enumerate(messages) if message.role in roles), default=0)
        weights = [
            float(index >= first and message.role in roles) if message.train is None else float(message.train)
            for index, message in enumerate(messages)
        ]
        if not all(0 <= weight < float("inf") for weight in weights):
            raise RenderError("bad_weight", f"train weights {weights}; expected finite numbers of 0 or more")
        return weights

    def _text(self, tokens: Tokens) -> Tokens:
        ids = tokens.ids
        prefix = [] if self._text_prefix and ids[:1].tolist() == self._text_prefix[:1] else self._text_prefix
        ids = np.array([*prefix, *ids.tolist(), self._eos], dtype=np.int32)
        return finished(ids, np.ones(len(ids), np.float32))


def stop_token_ids(renderer: Renderer, existing: int | Sequence[int] | None = None) -> list[int]:
    """What ``generation_config.eos_token_id`` must hold, so that generation stops where training taught it to.

    Args:
        renderer: gives the template's end-of-turn tokens, then the tokenizer's EOS.
        existing: the ids that the model's generation config has; they are kept.
    """
    eos = _eos_id(renderer.tokenizer)
    old = [existing] if isinstance(existing, int) else list(existing or ())
    return list(dict.fromkeys([*renderer.terminators, *([] if eos is None else [eos]), *old]))


def _eos_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    return None if tokenizer.eos_token is None else tokenizer.backend_tokenizer.token_to_id(str(tokenizer.eos_token))


def _is_text(conversation: Conversation) -> bool:
    return conversation.text is not None


def _sources(tokenizer: PreTrainedTokenizerFast, template: str | None) -> tuple[str | None, str | None]:
    """The Jinja text, and the one for conversations with tools where a tokenizer keeps the two apart (Command-R)."""
    source = resolve_template(template) or tokenizer.chat_template
    if not isinstance(source, dict):
        return source, None
    default = source.get("default") or next(iter(source.values()))
    return default, source.get("tool_use")


def _text_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids, such as BOS, that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next(k for k in range(len(full)) if full[k : k + len(plain)] == plain)
    return full[:at]
