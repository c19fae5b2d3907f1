"""Every program of the battery, as root and as a user without rights, with bubblewrap and without."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ptl.rewards.sandbox.backends import interpreter
from tests.rewards.sandbox_here import REQUIRED
from tests.rewards.sandbox_programs import PROGRAMS

USER = 64123
"""A user that nobody else is, so that its limits count its own processes and its signals reach no others."""
HERE = Path(__file__).parent
WAYS = [(user, backend) for user in ("root", "user") for backend in ("bwrap+lock", "lock")]
LABELS = [f"{user}-{backend}" for user, backend in WAYS]
MINUTES = 4


@functools.cache
def work() -> Path:
    """A folder that every user may enter, with a copy of the package; it goes when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="ptl-battery-tests-", dir="/tmp"))
    folder.chmod(0o755)
    package = Path(sys.modules["ptl.rewards"].__file__ or "").parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package / "sandbox", folder / "ptl" / "rewards" / "sandbox", ignore=ignore)
    for path in ("ptl/__init__.py", "ptl/rewards/__init__.py"):
        (folder / path).touch()
    for name in ("sandbox_battery.py", "sandbox_programs.py"):
        shutil.copy(HERE / name, folder)
    return folder


@functools.cache
def python_for_everybody() -> str | None:
    """An interpreter that a user without rights can start: this one is in a folder that may be closed to others."""
    no_rights = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
    ask = "import ctypes, json, os, sys; assert sys.version_info >= (3, 11); os.listdir(os.path.dirname(os.__file__))"
    for python in (
        interpreter(),
        *(shutil.which(f"python3.{n}", path="/usr/bin:/usr/local/bin") for n in (11, 12, 13)),
    ):
        with contextlib.suppress(PermissionError, FileNotFoundError):
            if python and not subprocess.run([python, "-I", "-c", ask], cwd="/", timeout=30, **no_rights).returncode:
                return os.path.realpath(python)
    return None


@functools.cache
def battery(user: str, backend: str) -> dict:
    """The report of the battery, run once for each way."""
    if user == "root" and os.getuid() != 0:
        return {"skip": "these tests do not run as root"}
    python = interpreter() if user == "root" else python_for_everybody()
    if python is None:
        return {"skip": "no Python from 3.11 on that a user without rights may start"}
    folder = Path(tempfile.mkdtemp(prefix=f"{user}-", dir=work()))
    bait = folder / "bait"
    bait.mkdir()
    for path in (folder, bait):
        path.chmod(0o777)
    change = user == "user" and os.getuid() == 0
    settings = {
        "uid": USER if change else 0,
        "backend": backend,
        "workers": 4,
        "folder": str(bait),
        "mark": str(work()),
        "report": str(folder / "report.json"),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [python, "-S", str(work() / "sandbox_battery.py"), str(folder / "settings.json")]
    said = bounded([*own_process_numbers(), *command])
    if not (folder / "report.json").exists():
        return {"refused": f"the battery ended without a report: {said[-2000:]}"}
    report = json.loads((folder / "report.json").read_text())
    return {"skip": report["refused"]} if "refused" in report and not REQUIRED else report


def own_process_numbers() -> list[str]:
    """Words that give a command process numbers of its own, where the machine lets us: then no signal leaves it."""
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    try:
        held = subprocess.run([*words, "true"], timeout=30, capture_output=True).returncode == 0
    except FileNotFoundError:
        return []
    return words if held else []


def bounded(command: list[str]) -> str:
    """Runs a command in a session of its own, which is killed at a deadline; gives what it said."""
    environment = {
        "PTL_BATTERY_SECRET": "secret-of-the-environment",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(work()),
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=MINUTES * 60)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"it took more than {MINUTES} minutes: {process.communicate()[0]}"


@pytest.fixture(scope="module", autouse=True)
def cleaned():
    yield
    shutil.rmtree(work(), ignore_errors=True)


@pytest.fixture(params=WAYS, ids=LABELS, scope="module")
def report(request):
    found = battery(*request.param)
    if "skip" in found:
        pytest.skip(found["skip"])
    assert "breaches" not in found, f"the sandbox does not hold, so the battery was not run: {found['breaches']}"
    assert "refused" not in found, found["refused"]
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(report, name):
    """What is honest scores 1; all else passes no test, gets nothing out, and ends as it must."""
    program = PROGRAMS[name]
    assert name in report["programs"], "it was not run, since a milder program of its kind got through"
    done = report["programs"][name]
    assert "failure" not in done, done
    assert done["passed"] == (done["total"] if program.score else 0), done
    assert done["found"] == [], done
    assert not done["leaks"], done
    if program.status:
        assert done["status"] == program.status, done


def test_nothing_was_changed_or_reached(report):
    assert report["touched"] == []


def test_law_4_nothing_of_one_program_is_left_for_the_next(report):
    assert report["leak"] == {"left": "left-behind-by-the-first", "found": [], "error": None, "fresh": True}


def test_no_process_is_left(report):
    assert report["left"] == []


def test_at_least_twenty_programs_a_second(report):
    assert report["rate"] >= 20
