"""What a tool is, what a call of one is, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TAG_END = "-TOOL"
"""A tool ``search`` is called by ``<SEARCH-TOOL>query</SEARCH-TOOL>``."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A Python function that a model may call.

    Attributes:
        name: letters, digits and underscores.
        description: what the model is told it is for.
        parameters: JSON schema of its arguments, ``{"type": "object", "properties": {...}, "required": [...]}``.
        function: dotted path, ``package.module.function``. It takes the arguments by name and returns anything that
            ``str`` makes readable.
        bound: further arguments, which the model does not see.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: str
    bound: Mapping[str, Any] = field(default_factory=dict)

    @property
    def schema(self) -> dict[str, Any]:
        """As a chat template's ``tools`` variable has it."""
        parts = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": parts}

    @property
    def tag(self) -> str:
        """The name of its tag, without brackets."""
        return self.name.upper().replace("_", "-") + TAG_END

    @property
    def opening(self) -> str:
        return f"<{self.tag}>"

    @property
    def closing(self) -> str:
        return f"</{self.tag}>"

    @property
    def subject(self) -> str | None:
        """The one argument that a call by tag gives; None where it has none, or needs several."""
        names = list(self.parameters.get("properties", {}))
        needed = list(self.parameters.get("required", names))
        return needed[0] if len(needed) == 1 else names[0] if len(names) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Call:
    """A model's wish to use a tool.

    Attributes:
        name: as the model wrote it.
        arguments: by name; empty where ``problem`` is set.
        problem: why it cannot be run, in words for the model; None where it can.
        by_tag: it was written as a tag.
        id: names it among the calls of a dialogue.
    """

    name: str
    arguments: Mapping[str, Any]
    problem: str | None = None
    by_tag: bool = False
    id: str = ""

    def as_message(self) -> dict[str, Any]:
        """In OpenAI's form, arguments as an object."""
        made = {"type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}
        return {**made, "id": self.id} if self.id else made

    def __str__(self) -> str:
        said = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in self.arguments.items())
        return f"{self.name}({said})"


@dataclass(frozen=True)
class Result:
    """What a call gave.

    Attributes:
        call: which one.
        text: what the model reads: the tool's answer, cut where it is too long, or ``Error: ...``.
        problem: what went wrong, or None.
        seconds: that it took.
    """

    call: Call
    text: str
    problem: str | None = None
    seconds: float = 0.0
