"""Runs the battery under one backend as one user: ``python sandbox_battery.py settings.json``, which writes a report.

It is a process of its own, so that what a broken sandbox would let out meets limits that do not depend on it: a
session and, where the machine allows, process numbers of its own; bounds on memory, file size and processes; a
deadline. Nothing runs unless the backend holds against the canaries first; what would kill runs last, after the same
attempts with signal 0.
"""

import contextlib
import json
import os
import re
import resource
import secrets
import socket
import sys
import time
from pathlib import Path

from sandbox_programs import PROGRAMS, TESTS, Program


def main(settings: dict) -> dict:
    """The whole battery; the report has ``breaches`` or ``refused`` where it was not run."""
    if settings["uid"]:
        os.setgroups([])
        os.setresgid(*[settings["uid"]] * 3)
        os.setresuid(*[settings["uid"]] * 3)
        resource.setrlimit(resource.RLIMIT_NPROC, (400, 400))
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(0)  # the report shows what programs answered
    from ptl.rewards.sandbox import Sandbox, SandboxError
    from ptl.rewards.sandbox.backends import BACKENDS
    from ptl.rewards.sandbox.canaries import verify

    backend = next(backend for backend in BACKENDS if backend.name == settings["backend"])
    try:
        breaches = verify(backend)
    except SandboxError as failure:
        return {"refused": str(failure)}
    if breaches:
        return {"breaches": breaches}
    with Bait(Path(settings["folder"])) as bait, Sandbox(settings["workers"], backend) as sandbox:
        report = {"uid": os.getuid(), "programs": {}}
        quiet = {name: program for name, program in PROGRAMS.items() if not program.kills}
        report["programs"] = run_all(sandbox, quiet, bait)
        report["leak"] = between_programs(backend)
        report["rate"] = rate(sandbox)
        report["touched"] = bait.touched()
        for name, program in PROGRAMS.items():
            if program.kills and not any(done["found"] for done in report["programs"].values()):
                report["programs"] |= run_all(sandbox, {name: program}, bait)
        report["pids"] = sorted(worker.process.pid for worker in sandbox._all)
    time.sleep(0.2)
    report["left"] = left_over(settings["mark"])
    return report


class Bait:
    """What the attacks aim at: files, listeners and names that exist for them only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.abstract = f"ptl-battery-{secrets.token_hex(8)}"
        self.answer = f"expected-{secrets.token_hex(8)}"

    def __enter__(self) -> "Bait":
        home = self.folder / "home"
        (home / ".cache" / "huggingface").mkdir(parents=True)
        for path in (self.folder / "secret", home / ".netrc", home / ".cache" / "huggingface" / "token"):
            path.write_text(f"secret-{secrets.token_hex(8)}")
        self.files = {path: path.read_text() for path in self.folder.rglob("*") if path.is_file()}
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.stream, self.hidden = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.stream.bind(str(self.folder / "stream"))
        self.hidden.bind(f"\0{self.abstract}")
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagram.bind(str(self.folder / "datagram"))
        for listener in (self.stream, self.hidden):
            listener.listen()
        self.sockets = [self.tcp, self.udp, self.stream, self.hidden, self.datagram]
        for name in self.sockets:
            name.setblocking(False)
        self.before = set(self.folder.rglob("*"))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.sockets:
            name.close()

    def fill(self, code: str) -> str:
        words = {
            "FOLDER": self.folder,
            "TCP": self.tcp.getsockname()[1],
            "UDP": self.udp.getsockname()[1],
            "ABSTRACT": self.abstract,
            "PARENT": os.getpid(),
            "LIBRARY": Path(os.__file__).parent,
            "SITE": Path(os.__file__).parent / "site-packages",
        }
        return re.sub(r"@([A-Z]+)@", lambda found: str(words[found[1]]), code)

    def touched(self) -> list[str]:
        """What was changed, reached or written."""
        out = [f"{path} changed" for path, text in self.files.items() if not path.exists() or path.read_text() != text]
        out += [f"{path} made" for path in set(self.folder.rglob("*")) - self.before]
        for name in self.sockets:
            with contextlib.suppress(BlockingIOError):
                got = name.accept()[0].close() if name in (self.tcp, self.stream, self.hidden) else name.recv(10)
                out.append(f"{name} got {got}")
        for folder in ("/tmp", "/", "/dev/shm", "/var/tmp", "/usr", str(Path(os.__file__).parent)):
            for pattern in ("ptl-battery-written*", "ptl_battery_written*", "written"):
                for path in Path(folder).glob(pattern):
                    if path != self.folder and path not in self.folder.parents:
                        out.append(f"{path} made")
                        with contextlib.suppress(OSError):
                            path.unlink()
        return out


def run_all(sandbox, programs: dict[str, Program], bait: Bait) -> dict[str, dict]:
    """The programs, several at once: what each scored, found and said."""
    from ptl.rewards.sandbox import Job, Limits, convert

    tests, hunted = convert(TESTS), convert(f"assert add('x', 'y') == {bait.answer!r}")
    jobs = {}
    for name, program in programs.items():
        limits = Limits(wall=program.wall, cpu=program.cpu)
        calls = (hunted if program.hunts else tests).calls()
        found = ("FOUND",) if program.attack else ()
        jobs[name] = Job(bait.fill(program.code), (*calls, *found), limits)
    out = {}
    for (name, job), result in zip(jobs.items(), sandbox.map(jobs.values())):
        program = programs[name]
        if isinstance(result, Exception):
            out[name] = {"failure": str(result), "found": []}
            continue
        passed = (hunted if program.hunts else tests).passed(result)
        found = result.calls[-1].value if program.attack else []
        told = repr([(call.value, call.error) for call in result.calls])
        out[name] = {
            "passed": sum(passed),
            "total": len(passed),
            "status": result.status,
            "error": result.error,
            "found": found,
            "leaks": bait.answer in told or "secret-" in told,
            "first": repr(job.calls and result.calls[0])[:300],
            "seconds": result.seconds,
        }
    return out


LEAVES = """
import builtins, sys, os, random
builtins.left_behind = sys.left_behind = os.environ["LEFT"] = "left-behind-by-the-first"
sys.modules["left_behind"] = sys
random.seed(1)
text = "left-behind-by-the-first" * 100
"""
LOOKS = """
import builtins, gc, sys, os
def looks():
    gc.unfreeze()
    known = [o for o in gc.get_objects() if isinstance(o, (str, dict, list, tuple, set)) and len(o) < 2000]
    spaces = [vars(builtins), vars(sys), dict(os.environ), list(sys.modules), known]
    return [i for i, space in enumerate(spaces) if "".join(["left-behind-by", "-the-first"]) in repr(space)]
"""


def between_programs(backend) -> dict:
    """What a program finds of the one before it, in the same worker; and that a fresh process serves each."""
    from ptl.rewards.sandbox import Sandbox

    with Sandbox(1, backend) as sandbox:
        first = sandbox.run(LEAVES, ["left_behind", "__import__('os').getpid()"])
        second = sandbox.run(LOOKS, ["looks()", "__import__('os').getpid()"])
    return {"left": first.calls[0].value, "found": second.calls[0].value, "error": second.calls[0].error,
            "fresh": first.calls[1].value != second.calls[1].value}  # fmt: skip


def rate(sandbox) -> float:
    """Programs a second."""
    from ptl.rewards.sandbox import Job

    jobs = [Job(f"def add(a, b):\n    return a + b + {i}", ("add(2, 3)", "add([1], [2])")) for i in range(100)]
    begun = time.monotonic()
    results = sandbox.map(jobs)
    assert [result.calls[0].value for result in results] == [5 + i for i in range(100)]
    return len(jobs) / (time.monotonic() - begun)


def left_over(mark: str) -> list[str]:
    """Processes of the sandbox that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes()
            if int(folder.name) != os.getpid() and b"inside.server" in words and mark.encode() in words:
                found.append(f"{folder.name} {words!r}")
    return found


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["report"]).write_text(json.dumps(main(given)))
