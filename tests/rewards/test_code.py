"""The reward for programs: what is found in an answer, what it is worth, and the cheats that pass elsewhere."""

import subprocess
import sys

import pytest

from ptl.rewards.base import Completion, Failure
from ptl.rewards.code import CodeTests, code_in, grade, unit_tests_of, whole_program
from ptl.rewards.sandbox import Sandbox
from ptl.types import Message, Origin, Prompt
from tests.rewards.sandbox_here import sandbox_holds  # noqa: F401  (a fixture for all of this module)

TESTS = ("assert add(2, 3) == 5", "assert add(20, 22) == 42", "assert add([1], [2]) == [1, 2]")
ANSWER = "I add them.\n```python\n{}\n```\n"


def prompt(tests=TESTS, question="Write add.", **meta):
    return Prompt(
        messages=(Message(role="user", content=question),), tests=tests, meta=meta, origin=Origin("tasks.jsonl", 1)
    )


def completion(code, given=None, text=ANSWER):
    return Completion(prompt=given or prompt(), text=text.format(code))


@pytest.fixture(scope="module")
def reward():
    return CodeTests(seconds_each=5.0)


def one(reward, answer):
    return reward.score([answer])[0]


def test_right_wrong_and_not_applicable(reward):
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
    outcomes = reward.score(
        [completion(right), completion(wrong), completion(right, prompt(tests=())), completion(right)]
    )
    assert outcomes == [1.0, 0.0, None, 1.0]


def test_a_share_of_the_tests_where_that_is_asked_for():
    numbers_only = completion("def add(a, b):\n    return int(a) + int(b)")
    assert one(CodeTests(partial=True), numbers_only) == pytest.approx(2 / 3)
    assert one(CodeTests(), numbers_only) == 0.0


def test_no_program_is_worth_nothing(reward):
    for text in ("I cannot.", "", "<think>```python\ndef add(a, b): return a + b\n```", "```python\n```"):
        assert one(reward, Completion(prompt=prompt(), text=text)) == 0.0


def test_tests_that_cannot_be_judged_are_failures_and_not_zeros(reward):
    code = "def add(a, b):\n    return a + b"
    weak = prompt(tests=("x = input\nassert add(x, 1)[x] == 2",))
    outcomes = [
        one(reward, completion(code, given))
        for given in (weak, prompt(tests=("assert add(",)), prompt(tests=("x = 1",)))
    ]
    assert [outcome.reason for outcome in outcomes] == ["weak_tests", "bad_tests", "bad_tests"]
    assert "weak_tests=True" in outcomes[0].detail


def test_weak_tests_run_where_they_are_asked_for():
    weak = prompt(tests=("import random\nx = random.random()\nassert add(x, 1) == x + 1",))
    reward = CodeTests(weak_tests=True)
    assert one(reward, completion("def add(a, b):\n    return a + b", weak)) == 1.0
    assert one(reward, completion("def add(a, b):\n    return a", weak)) == 0.0
    assert one(reward, completion("import sys\nsys.exit(0)", weak)) == 0.0


def test_a_sandbox_that_fails_is_a_failure(monkeypatch):
    reward = CodeTests(workers=1)
    reward.close()
    outcome = one(reward, completion("def add(a, b):\n    return a + b"))
    assert isinstance(outcome, Failure) and outcome.reason == "sandbox"


def test_the_same_program_runs_once(monkeypatch):
    sent = []
    reward = CodeTests(workers=1)
    real = Sandbox.map
    monkeypatch.setattr(Sandbox, "map", lambda self, jobs: real(self, [sent.append(job) or job for job in jobs]))
    same = completion("def add(a, b):\n    return a + b")
    assert reward.score([same, same, completion("add = 1")]) == [1.0, 1.0, 0.0]
    assert len(sent) == 2
    reward.close()


def test_law_4_the_expected_answer_never_enters_the_sandbox(monkeypatch):
    sent = []
    reward = CodeTests(workers=1)
    real = Sandbox.map
    monkeypatch.setattr(Sandbox, "map", lambda self, jobs: real(self, [sent.append(job) or job for job in jobs]))
    begun = 'def add(a, b):\n    """Adds.\n\n    >>> add(1, 1)\n    "expected-0"\n    """\n'
    check = "def check(candidate):\n    wanted = 'expected-1'\n    assert candidate(1, 1) == wanted\n"
    given = prompt((check,), begun, entry_point="add", canonical_solution="    return 'expected-1'")
    for code in ("    return 'e'", "def add(a, b):\n    return 'e'"):
        assert one(reward, completion(code, given)) == 0.0
    mbpp = prompt(("assert add(1) == 'expected-2'", "assert 'expected-3' == add(2)"), answer="expected-4")
    assert one(reward, completion("def add(a):\n    return 'e'", mbpp)) == 0.0
    assert len(sent) == 3 and "expected" not in repr(sent)
    reward.close()


PEERS = {  # the cheat, and who gives it full marks (research of 2026-11: see docs/sandbox.md)
    "verl: an int that equals everything": (
        "class X(int):\n    def __eq__(s, o): return True\ndef add(a, b): return X(0)"
    ),
    "open-instruct: an object that equals everything": (
        "class X:\n    def __eq__(s, o): return True\n    def __len__(s): return 2\ndef add(a, b): return X()"
    ),
    "verl: expected outputs in the caller's frame": (
        "import sys\ndef add(a, b):\n    f = sys._getframe(1)\n    while f:\n        if 'in_outs' in f.f_locals:\n"
        "            return f.f_locals['in_outs']\n        f = f.f_back\n    return [v for v in globals().values()]"
    ),
    "open-instruct: results written through the frame": (
        "import sys\nf = sys._getframe()\nwhile f:\n    for k, v in f.f_locals.items():\n"
        "        if isinstance(v, list): v[:] = [1] * len(v)\n    f = f.f_back\ndef add(a, b): return 0"
    ),
    "verl: a secret in the environment": "import os\ndef add(a, b): return os.environ['HOME'] and a + b",
    "verl, open-instruct: a file outside": "open('/tmp/ptl-peer', 'w')\ndef add(a, b): return a + b",
    "NeMo-RL: posix behind the list of imports": "import posix\nposix.system('true') and 1 / 0\nraise SystemExit",
    "NeMo-RL: a file through io": "import io\nio.open('/etc/passwd')\ndef add(a, b): return a + b",
    "NeMo-RL: subclasses of object": (
        "for c in ().__class__.__base__.__subclasses__():\n    if c.__name__ == 'Popen': c(['true'])\n"
        "def add(a, b): return __import__('subprocess').run(['true']) and a + b"
    ),
    "NeMo-RL: SystemExit ends the worker": "raise SystemExit",
    "open-r1: only the first expected line": "print(5)\ndef add(a, b):\n    if a == 2: return 5",
    "nanochat: ctypes is open": "import ctypes\ndef add(a, b): return ctypes.CDLL(None).system(b'true') or 5",
    "the process ends well": "import os\nos._exit(0)",
}


@pytest.mark.parametrize("cheat", PEERS)
def test_cheats_that_pass_elsewhere_are_worth_nothing(reward, cheat):
    assert one(reward, completion(PEERS[cheat])) == 0.0
    assert one(reward, completion("def add(a, b):\n    return a + b")) == 1.0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```\n```\nx = 2\n```", "x = 2"),
        ("```Python\r\nx = 1\n```".replace("\r", ""), "x = 1"),
        ("- so:\n  ```python\n  def f():\n      pass\n  ```", "def f():\n    pass"),
        ("```bash\nls\n```\ntext\n```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\nthen ```inline``` text", "x = 1"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("```bash\nls\n```", None),
        ("text only", None),
        ("x", None),
        ("", None),
        (None, None),
    ],
)
def test_the_program_in_an_answer(text, code):
    assert code_in(text) == code


def test_a_humaneval_prompt_is_begun_or_complete():
    begun = "from typing import List\n\ndef helper(x):\n    return x\n\ndef add(a: List, b):\n    '''Adds.'''\n"
    given = prompt(question=begun, entry_point="add")
    assert whole_program("    return helper(a)", given, "").endswith(
        "def add(a: List, b):\n    pass\n\n    return helper(a)"
    )
    whole = whole_program("def add(a: List, b):\n    return helper(a)", given, "import math")
    assert whole.startswith("import math\nfrom typing import List") and "Adds" not in whole
    compile(whole, "whole", "exec")
    assert whole_program("def add(a, b): return", prompt(), "") == "def add(a, b): return"


def test_a_future_import_stays_first():
    code = '"""Text."""\nfrom __future__ import annotations\nx = 1'
    compile(whole_program(code, prompt(), "import math"), "whole", "exec")


def test_setup_of_mbpp_runs_first(reward):
    given = prompt(
        ("assert value(Node(3)) == 3",), test_setup_code="class Node:\n    def __init__(s, v): s.v = v", test_imports=[]
    )
    assert one(reward, completion("def value(node):\n    return node.v", given)) == 1.0


def test_why_a_program_failed_is_told():
    tests = unit_tests_of(prompt())
    with Sandbox(1) as sandbox:
        told = {
            code: grade(tests, sandbox.run(code, tests.calls()))
            for code in ("def add(a, b):\n    return a + b", "def add(a, b):\n    return 5", "add = 1", "1 / 0")
        }
    assert [score.status for score in told.values()] == ["passed", "wrong", "wrong", "error"]
    assert [score.passed for score in told.values()] == [3, 1, 0, 0]
    assert told["1 / 0"].error == "ZeroDivisionError: division by zero"


def test_the_reward_needs_no_torch():
    code = "import sys, ptl.rewards.code; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
