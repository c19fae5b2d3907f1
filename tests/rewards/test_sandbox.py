"""The sandbox as its callers see it: results, limits, refusal where nothing holds."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from ptl.rewards.sandbox import Job, Limits, Sandbox, SandboxError, SandboxUnavailableError, run_code
from ptl.rewards.sandbox import canaries as canaries_module
from ptl.rewards.sandbox.backends import BACKENDS, HERE, Backend, interpreter
from ptl.rewards.sandbox.canaries import choose, verify
from ptl.rewards.sandbox.results import CallResult
from ptl.rewards.sandbox.values import read
from tests.rewards.sandbox_here import REQUIRED, sandbox_holds  # noqa: F401  (a fixture for all of this module)

LOCK = BACKENDS[-1]
VALUES = (
    "None", "True", "0", "-5", "1 << 20000", "0.5", "-0.0", "5e-324", "float('inf')", "1e400", "'é\\0\\n'",
    "b'\\xff'", "2j",
    "[1, [2, (3, {4: 'x'})]]", "{1, 2}", "frozenset([1])", "()", "{}", "{(1, 2): [3]}", "'\\ud800'",
)  # fmt: skip


class Broken(Backend):
    """The lock backend without one of its locks."""

    def command(self):
        start = "import sys; sys.path.insert(0, sys.argv.pop()); import inside.{0} as m; m.{1} = lambda *a: {2}; {3}"
        parts = {
            "landlock": ("landlock", "restrict", "None"),
            "seccomp": ("seccomp", "install", "None"),
            "start": ("landlock", "ruleset", "1 / 0"),
        }
        code = start.format(*parts[self.name], "from inside.server import main; main()")
        return [interpreter(), "-I", "-S", "-B", "-c", code, str(HERE)]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2) as made:
        yield made


def test_it_works_alone_and_without_torch():
    code = (
        "import sys; from ptl.rewards.sandbox import run_code; "
        "print(run_code('def double(x): return 2 * x', ['double(4)']).calls[0].value, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("8 False", "")


@pytest.mark.parametrize("value", VALUES)
def test_plain_values_come_back_exactly(sandbox, value):
    expected = eval(value)
    got = sandbox.run("", [value]).calls[0]
    assert got.error is None
    assert type(got.value) is type(expected)
    assert got.value == expected if type(expected) is int else repr(got.value) == repr(expected)


def test_the_dicts_of_the_standard_library_come_back_as_dicts(sandbox):
    code = "import collections as c\nd = c.defaultdict(int, a=1)"
    calls = sandbox.run(code, ["c.Counter('aab')", "d", "c.OrderedDict(b=2)"]).calls
    assert [call.value for call in calls] == [{"a": 2, "b": 1}, {"a": 1}, {"b": 2}]
    assert all(type(call.value) is dict for call in calls)


def test_what_a_call_raises_is_its_error_and_the_next_one_runs(sandbox):
    result = sandbox.run("def f(x):\n    return 1 // x", ["f(0)", "f(1)", "g(1)", "f(", "object()"])
    assert result.status == "ok"
    assert [call.value for call in result.calls] == [None, 1, None, None, None]
    said = [call.error for call in result.calls]
    assert said[0] == "ZeroDivisionError: integer division or modulo by zero"
    assert said[2] == "NameError: name 'g' is not defined"
    assert said[3].startswith("SyntaxError") and said[4].startswith("TypeError: expected a plain value")


def test_what_the_code_raises_is_the_error_of_the_run(sandbox):
    result = sandbox.run("import nothing_of_that_name", ["1"])
    assert result.status == "error"
    assert result.error == "ModuleNotFoundError: No module named 'nothing_of_that_name'"
    assert result.calls[0].error.startswith("no result: ModuleNotFoundError")


def test_results_before_a_time_limit_are_kept(sandbox):
    result = sandbox.run("import time", ["1 + 1", "time.sleep(60)", "2"], Limits(wall=0.5))
    assert result.status == "timeout" and result.error == "it ran longer than 0.5 s"
    assert [call.value for call in result.calls] == [2, None, None]


def test_the_memory_limit_is_the_program_s_and_not_the_worker_s(sandbox):
    small, large = Limits(memory=128 << 20), Limits(memory=1 << 30)
    code = "def f():\n    return len(bytearray(256 << 20))"
    assert sandbox.run(code, ["f()"], small).calls[0].error == "MemoryError"
    assert sandbox.run(code, ["f()"], large).calls[0].value == 256 << 20


def test_installed_packages_are_out_of_reach(sandbox):
    result = sandbox.run(
        f"import sys; sys.path += {sys.path!r}", ["__import__('pytest')", "__import__('json').__name__"]
    )
    assert result.calls[0].error is not None and result.calls[1].value == "json"


def test_many_programs_keep_their_order_and_a_failed_one_costs_itself_only(sandbox):
    jobs = [Job(f"x = {i}" if i % 3 else "import os; os._exit(3)", ("x",)) for i in range(30)]
    results = sandbox.map(jobs)
    assert [result.calls[0].value for result in results] == [i if i % 3 else None for i in range(30)]


def test_a_worker_that_died_is_replaced():
    with Sandbox(1, LOCK) as sandbox:
        assert sandbox.run("", ["1"]).calls[0].value == 1
        (worker,) = sandbox._all
        os.killpg(worker.process.pid, signal.SIGKILL)
        assert sandbox.run("", ["2"]).calls[0].value == 2
        assert len(sandbox._all) == 1


def test_a_worker_that_dies_under_a_program_is_an_error_and_not_a_result():
    with Sandbox(1, LOCK) as sandbox:
        sandbox.run("", [])
        found = []

        def run():
            try:
                found.append(sandbox.run("import time; time.sleep(20)", ["1"]))
            except SandboxError as failure:
                found.append(failure)

        thread = threading.Thread(target=run)
        thread.start()
        begun = time.monotonic()
        while thread.is_alive() and time.monotonic() < begun + 15:
            for worker in list(sandbox._all):
                if worker.process.returncode is None:
                    os.killpg(worker.process.pid, signal.SIGKILL)
            time.sleep(0.1)
        thread.join(20)
        assert isinstance(found[0], SandboxError)
        assert sandbox.run("", ["3"]).calls[0].value == 3


def test_closing_ends_the_processes():
    sandbox = Sandbox(1, LOCK)
    sandbox.run("", ["1"])
    (worker,) = sandbox._all
    sandbox.close()
    assert worker.process.returncode is not None
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run("", ["1"])


def test_a_killed_trainer_leaves_no_process():
    code = (
        "import sys, time; from ptl.rewards.sandbox import Sandbox, backends\n"
        "s = Sandbox(1, backends.BACKENDS[-1]); s.run('', []); print([w.process.pid for w in s._all][0], flush=True)\n"
        "s.run('import time; time.sleep(60)', ['1'])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return  # it ended, and who inherited it has not looked yet
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    raise AssertionError("the process inside outlived the trainer")


def test_the_shared_sandbox_is_not_used_by_a_fork():
    assert run_code("", ["1"]).calls[0].value == 1
    pid = os.fork()
    if pid == 0:
        try:
            right = run_code("", ["2"]).calls[0].value == 2
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert run_code("", ["3"]).calls[0].value == 3


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_each_way_that_starts_holds(backend):
    try:
        assert verify(backend) == []
    except SandboxError as failure:
        if REQUIRED:
            raise
        pytest.skip(str(failure))


class Public(Backend):
    """The lock backend with an interpreter that every user may read."""

    def command(self):
        return [shutil.which("python3.11", path="/usr/bin:/usr/local/bin"), *super().command()[1:]]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_root_becomes_nobody_where_nobody_may_read_the_library():
    backend = Public("public", list)
    if backend.command()[0] is None:
        pytest.skip("no python3.11 under /usr")
    assert verify(backend) == []
    with Sandbox(1, backend) as sandbox:
        calls = sandbox.run("import os", ["os.getuid()", "os.geteuid()", "os.getgid()"]).calls
    assert [call.value for call in calls] == [65534] * 3


@pytest.mark.parametrize(("missing", "what"), [("landlock", "read("), ("seccomp", "datagram()")])
def test_a_way_that_lacks_a_lock_is_found_out(missing, what):
    assert any(breach.startswith(what) for breach in verify(Broken(missing, list)))


def test_where_no_way_holds_nothing_is_run(monkeypatch):
    broken = tuple(Broken(name, list) for name in ("landlock", "seccomp", "start"))
    monkeypatch.setattr(canaries_module, "BACKENDS", broken)
    monkeypatch.setattr(canaries_module, "_choice", {})
    with pytest.raises(SandboxUnavailableError) as refusal:
        choose()
    said = str(refusal.value)
    assert said.startswith("no sandbox holds on this machine, so no program is run. ")
    assert "landlock: read(" in said and "seccomp: " in said and "start: start: ZeroDivisionError" in said


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "1",
        "[]",
        '{"0": 1}',
        '[0, "value"]',
        '[0, "value", 1]',
        '[0, "value", NaN]',
        '[0, "ok", true]',
        '[false, "value", true]',
        '["0", "value", true]',
        '[9, "value", true]',
        f'[{"9" * 5000}, "value", true]',
        '[0, "value", []]',
        '[0, "value", [[]]]',
        '[0, "value", ["q"]]',
        '[0, "value", ["i", "1"]]',
        '[0, "value", ["i", "0x1_0"]]',
        '[0, "value", ["f", "1e5"]]',
        '[0, "value", ["f", "0x1.0p+99999"]]',
        '[0, "value", ["b", "zz"]]',
        '[0, "value", ["d", ["a"]]]',
        '[0, "value", ["s", ["l"]]]',
        '[0, "value", ' + "[" * 5000 + "]" * 5000 + "]",
        '[0, "value", ' + '["l", ' * 200 + "null" + "]" * 200 + "]",
        "\xff\xfe",
    ],
)
def test_what_is_no_result_is_ignored(line):
    assert read([line.encode("latin-1"), b'[1, "value", true]'], 3) == (None, {1: CallResult(True)})


def test_limits_are_checked():
    with pytest.raises(ValueError, match="memory 5: expected at least"):
        Limits(memory=5)
    with pytest.raises(ValueError, match="wall > 0"):
        Limits(wall=0)
    with pytest.raises(ValueError, match="workers 0"):
        Sandbox(0)
