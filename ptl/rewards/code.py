"""Whether a program that an answer contains passes its unit tests, run in the sandbox."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ptl.rewards.answers import said
from ptl.rewards.base import Completion, Failure, Outcome, Reward
from ptl.rewards.sandbox import (
    ConversionError,
    Job,
    Limits,
    RunResult,
    Sandbox,
    SandboxError,
    UnitTests,
    convert,
    shared,
)
from ptl.types import Prompt

_PYTHON = ("", "py", "python", "python3")
_DEFINITION = re.compile(r"^(async def|def|class) \w+", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)


@dataclass(frozen=True)
class CodeScore:
    """How a program did.

    Attributes:
        status: ``passed``, ``wrong`` (it ran, and a test failed), or the sandbox's: ``error``, ``timeout``, ``output``,
            ``killed``, ``exited``.
        passed: tests that it passed, of ``total``.
        total: number of tests.
        error: what went wrong first, where something did.
    """

    status: str
    passed: int
    total: int
    error: str | None = None


class CodeTests(Reward):
    """1 where the program in the answer passes all unit tests of the prompt, else 0; None where the prompt has none.

    The program is the last fenced block behind the think block. The prompt's ``tests`` are assertions or a HumanEval
    ``check(candidate)``; its ``meta`` may hold ``entry_point``, ``test_setup_code`` and ``test_imports``. What the
    tests expect stays outside of the sandbox. Tests that cannot be split in this way (``docs/sandbox.md``) are left
    out; a prompt that has no other is a failure, ``weak_tests``.

    Arguments:
        partial: give the share of the tests that passed instead of all or nothing.
        weak_tests: run what cannot be split too, inside, where a program can read what is expected and cheat.
        seconds_each: wall time of a program, above 0.
        cpu_seconds: processor time of a program, 1 or more.
        memory_mb: MiB of address space of a program, 64 or more.
        workers: programs at the same time; None takes this rank's share of the processors.
        weight, name: as in ``Reward``.

    Raises:
        SandboxUnavailableError: this machine has no way to lock programs in.
        ValueError: an argument out of its range.
    """

    seconds = None

    def __init__(
        self,
        *,
        partial: bool = False,
        weak_tests: bool = False,
        seconds_each: float = 10.0,
        cpu_seconds: int = 5,
        memory_mb: int = 512,
        workers: int | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.partial, self.weak_tests = partial, weak_tests
        self.limits = Limits(wall=seconds_each, cpu=cpu_seconds, memory=memory_mb << 20)
        self._own = Sandbox(workers) if workers else None
        self._sandbox = self._own or shared()

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        outcomes: list[Outcome] = [None] * len(completions)
        work: dict[int, tuple[UnitTests, Job]] = {}
        for i, completion in enumerate(completions):
            prepared = self._prepare(completion)
            if isinstance(prepared, tuple):
                work[i] = prepared
            else:
                outcomes[i] = prepared
        # The same program for the same tests runs once: samples of a group agree often.
        distinct = list(dict.fromkeys(job for _, job in work.values()))
        results = dict(zip(distinct, self._sandbox.map(distinct)))
        for i, (tests, job) in work.items():
            result = results[job]
            if isinstance(result, SandboxError):
                outcomes[i] = Failure("sandbox", str(result))
            else:
                outcomes[i] = self._value(grade(tests, result, weak=self.weak_tests))
        return outcomes

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def _prepare(self, completion: Completion) -> Outcome | tuple[UnitTests, Job]:
        prompt = completion.prompt
        if not prompt.tests:
            return None
        try:
            tests = unit_tests_of(prompt)
        except ConversionError as mistake:
            return Failure("bad_tests", str(mistake))
        calls = tests.calls(weak=self.weak_tests)
        if not calls:
            return Failure("weak_tests", f"no test can be split: {tests.reason}; weak_tests=True would run them inside")
        code = code_in(said(completion))
        if code is None:
            return 0.0
        return tests, Job(whole_program(code, prompt, tests.setup), calls, self.limits)

    def _value(self, score: CodeScore) -> float:
        return score.passed / score.total if self.partial else float(score.passed == score.total)


def grade(tests: UnitTests, result: RunResult, *, weak: bool = False) -> CodeScore:
    """Compares what a program answered with what its tests expect."""
    verdicts = tests.passed(result, weak=weak)
    errors = [result.error, *(call.error for call in result.calls)]
    if all(verdicts) and verdicts:
        return CodeScore("passed", len(verdicts), len(verdicts))
    status = "wrong" if result.status == "ok" else result.status
    return CodeScore(status, sum(verdicts), len(verdicts), next(filter(None, errors), None))


def unit_tests_of(prompt: Prompt) -> UnitTests:
    """The unit tests of a prompt, split. Raises ``ConversionError`` where they are no Python, or test nothing."""
    setup = [prompt.meta.get("test_setup_code") or "", *(prompt.meta.get("test_imports") or ())]
    entry_point = prompt.meta.get("entry_point") or None
    tests = _converted(prompt.tests, entry_point, "\n".join(part for part in setup if part))
    if not tests.checks and not tests.weak:
        raise ConversionError("the tests hold no assertion")
    return tests


@lru_cache(4096)
def _converted(source: tuple[str, ...], entry_point: str | None, setup: str) -> UnitTests:
    return convert(source, entry_point, setup)


def code_in(text: str | None) -> str | None:
    """The program in an answer: its last fenced Python block, one that was cut included; None where there is none.

    Text without a fence is a program where it defines something. It is not parsed: that can be made to take all memory.
    """
    if not text:
        return None
    blocks = [code for language, code in _blocks(text) if language in _PYTHON and code.strip()]
    if blocks:
        return blocks[-1].rstrip()
    return text if _DEFINITION.search(text) else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a text: language and contents, without the indentation of the fence."""
    found: list[tuple[str, list[str]]] = []
    inside, indent = False, 0
    for line in text.splitlines():
        mark = line.strip()
        if mark.startswith("```") and "`" not in mark[3:]:
            inside = mark != "```" or not inside  # a fence with a language opens, even where none was closed
            indent = len(line) - len(line.lstrip())
            if inside:
                found.append((mark[3:].strip().lower(), []))
        elif inside:
            found[-1][1].append(line[indent:] if not line[:indent].strip() else line)
    return [(language, "\n".join(lines)) for language, lines in found]


def whole_program(code: str, prompt: Prompt, setup: str) -> str:
    """What runs: the tests' setup, the beginning that a HumanEval prompt gives, and the answer's code.

    Code that is indented goes on with the function that the prompt has begun. Docstrings of the beginning are taken
    out: they hold examples with their results. The answer's code is not parsed on this side.
    """
    first = "\n".join(_FUTURE.findall(code))  # it must come before everything else
    start = _beginning(prompt.messages[-1].content, prompt.meta.get("entry_point")) if prompt.messages else ""
    return "\n".join(part for part in (first, setup, start, _FUTURE.sub("", code)) if part)


def _beginning(text: str, function: str | None) -> str:
    """A prompt that is a program which begins a function, without docstrings; nothing where it is something else."""
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    if function not in [getattr(node, "name", "") for node in module.body]:
        return ""
    lines = text.encode().split(b"\n")  # positions count bytes
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in sorted(functions, key=lambda node: -node.lineno):
        said = node.body[0]
        if ast.get_docstring(node) is not None and said.end_lineno is not None:
            rest = lines[said.end_lineno - 1][said.end_col_offset :]
            lines[said.lineno - 1 : said.end_lineno] = [lines[said.lineno - 1][: said.col_offset] + b"pass" + rest]
    return b"\n".join(lines).decode()
