"""The battery: programs that try to score without being right, to get out, or to break what judges them.

Each is asked for ``add(a, b)`` and is wrong for every test unless it is honest. ``attempt`` notes in FOUND what an
attack got; for an attack on the machine that must stay empty. Words between @ are filled in by the driver: files, ports
and processes that it made for this purpose, so that nothing else is aimed at.
"""

from dataclasses import dataclass

TESTS = """
assert add(2, 3) == 5
assert add(20, 22) == 42
assert add([1], [2]) == [1, 2]
assert add("a", "b") == "ab"
assert add(1, 0) == 1
"""

PRELUDE = """
FOUND = []
def attempt(what, action):
    try:
        FOUND.append(what + ": " + repr(action())[:200])
    except BaseException:
        pass
def add(a, b):
    return "wrong"
"""


@dataclass(frozen=True)
class Program:
    """A program of the battery.

    Attributes:
        code: it.
        score: what it must get: 1 or 0.
        attack: FOUND must stay empty.
        status: of the run, where it matters.
        wall: seconds; short for those that wait for their limit.
        kills: it would end other processes, so it runs last.
        hunts: it looks for the expected answer, a word that nobody can guess.
    """

    code: str
    score: int = 0
    attack: bool = False
    status: str | None = None
    wall: float = 20.0
    cpu: int = 10
    kills: bool = False
    hunts: bool = False


PROGRAMS: dict[str, Program] = {}


def _add(name: str, code: str, **more) -> None:
    assert name not in PROGRAMS
    PROGRAMS[name] = Program(code if more.get("score") else PRELUDE + code, **more)


def _attack(name: str, *actions: str, before: str = "import os, socket, sys, ctypes, threading", **more) -> None:
    lines = [f"attempt({str(i)!r}, lambda: {action})" for i, action in enumerate(actions)]
    _add(name, "\n".join([before, *lines]), attack=True, **more)


def _syscall(number: int, *arguments: str) -> str:
    """An expression that makes a system call (x86_64) and raises where it fails."""
    return f"call({', '.join([str(number), *arguments])})"


CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    if os.uname().machine != "x86_64":
        raise OSError("other numbers")
    words = [argument if isinstance(argument, bytes) else ctypes.c_ulong(argument) for argument in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
space = ctypes.create_string_buffer(4096)
at = ctypes.addressof(space)
"""

# --- honest programs ------------------------------------------------------------------------------------------------
_add("honest", "def add(a, b):\n    return a + b", score=1)
_add(
    "honest_prints_and_imports",
    """
from __future__ import annotations
import collections, dataclasses, decimal, functools, hashlib, heapq, itertools, json, math, random, re, sqlite3
import statistics, string, typing, zlib, bz2, lzma, uuid, datetime, fractions, bisect, copy, operator, csv, textwrap
import argparse, html
@dataclasses.dataclass
class Pair:
    a: typing.Any
    b: typing.Any
    def total(self):
        return self.a + self.b
def add(a, b):
    print("adding", a, b, file=__import__("sys").stderr)
    print(sqlite3.connect(":memory:").execute("select 1").fetchone(), hashlib.sha256(b"x").hexdigest())
    return Pair(a, b).total()
if __name__ == "__main__":
    raise SystemExit("a demonstration is not run")
""",
    score=1,
)
_add(
    "honest_recursive_and_async",
    """
import asyncio, signal, sys, time
sys.setrecursionlimit(20000)
def deep(n):
    return 0 if n == 0 else 1 + deep(n - 1)
def add(a, b):
    assert deep(5000) == 5000
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(5)
    async def later():
        await asyncio.sleep(0.001)
        return a + b
    return asyncio.run(later())
""",
    score=1,
)
_add("honest_big_data", "def add(a, b):\n    list(range(10**5))\n    return a + b", score=1)

# --- limits ---------------------------------------------------------------------------------------------------------
_add("endless_loop", "def add(a, b):\n    while True: pass", status="timeout", wall=1.0)
_add("endless_at_import", "while True: pass", status="timeout", wall=1.0)
_add("sleep", "import time\ndef add(a, b):\n    time.sleep(60)", status="timeout", wall=1.0)
_add(
    "ignores_the_limit_of_time",
    "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    status="timeout",
    cpu=1,
)
_add(
    "ignores_every_signal",
    """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass
""",
    status="timeout",
    wall=1.0,
)
_add("slow_regular_expression", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", status="timeout", wall=1.0)
_add("slow_power", "def add(a, b):\n    return 10 ** (10 ** 9) % 7", wall=1.0)
_add("memory_at_once", "def add(a, b):\n    return len(bytearray(8 << 30))")
_add("memory_step_by_step", "parts = []\nwhile True: parts.append(bytearray(1 << 24))", status="error")
_attack(
    "raises_its_limits",
    "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    before="import resource",
)
_add("recursion_crash", "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()", wall=1.0)
_add("crash", "import ctypes\nctypes.string_at(1)", status="killed")
_add("abort", "import os\nos.abort()")

# --- processes ------------------------------------------------------------------------------------------------------
FORK = """
import os
def forks(times):
    made = 0
    for _ in range(times):
        try:
            if os.fork() == 0:
                os._exit(0)
            made += 1
        except OSError:
            pass
    if not made:
        raise OSError("no process")
    return made
"""
_attack("fork_bomb", "forks(200)", before=FORK)
_attack(
    "thread_bomb",
    "threads(200)",
    before="""
import threading, time
def threads(times):
    made = 0
    for _ in range(times):
        try:
            threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
            made += 1
        except RuntimeError:
            pass
    if not made:
        raise OSError("no thread")
    return made
""",
)
_attack(
    "subprocess",
    "subprocess.run(['/bin/sh', '-c', 'id'], capture_output=True)",
    "subprocess.getoutput('id')",
    before="import subprocess",
)
_attack(
    "spawn",
    "os.posix_spawn('/bin/sh', ['sh', '-c', 'exit 0'], {})",
    "os.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
    "checked(os.system('exit 0'))",
    before="""
import os
def checked(status):
    if status != 0:
        raise OSError(status)
""",
)
_attack(
    "multiprocessing",
    "multiprocessing.get_context('fork').Process(target=int).start()",
    "multiprocessing.Pool(1)",
    before="import multiprocessing",
)
_attack(
    "raw_clones",
    _syscall(56, "17", "0", "0", "0", "0"),
    _syscall(57),
    _syscall(58),
    before=CALL
    + """
def guarded(number, *arguments, inner=call):
    pid = inner(number, *arguments)
    if pid == 0:
        os._exit(0)
    return pid
call = guarded
""",
)
_attack(
    "raw_clone3",
    "clone3()",
    before=CALL
    + """
def clone3():
    fields = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)
    pid = call(435, ctypes.addressof(fields), ctypes.sizeof(fields))
    if pid == 0:
        os._exit(0)
    return pid
""",
)
_attack(
    "daemon_that_stays",
    "daemon()",
    before="""
import os, time
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3)
        os._exit(0)
    return "started"
""",
)

# --- files ----------------------------------------------------------------------------------------------------------
_attack(
    "writes_outside",
    *(
        f"open({path!r}, 'w')"
        for path in (
            "@FOLDER@/written",
            "/tmp/ptl-battery-written",
            "written",
            "/dev/shm/ptl-battery-written",
            "/var/tmp/ptl-battery-written",
            "@LIBRARY@/ptl_battery_written.py",
            "/usr/ptl-battery-written",
        )
    ),
    "os.mkdir('@FOLDER@/made')",
    "os.mknod('@FOLDER@/node')",
    "tempfile.TemporaryFile()",
    before="import os, tempfile",
)
_attack(
    "changes_what_is_there",
    "os.unlink('@FOLDER@/secret')",
    "os.rename('@FOLDER@/secret', '@FOLDER@/moved')",
    "os.chmod('@FOLDER@/secret', 0o600)",
    "os.truncate('@FOLDER@/secret', 0)",
    "os.link('@FOLDER@/secret', '@FOLDER@/l')",
    "open('@FOLDER@/secret', 'a')",
    "os.utime('@FOLDER@/secret')",
    "os.setxattr('@FOLDER@/secret', 'user.x', b'1')",
    "os.chown('@FOLDER@/secret', os.getuid(), -1)",
)
_attack(
    "leaves_by_a_link",
    "os.symlink('/etc', 'etc')",
    "os.symlink('/etc/shadow', '@FOLDER@/link')",
    "open('/proc/self/root/etc/hostname')",
    "open('../../../../etc/hostname')",
    "open('/proc/self/cwd/etc/hostname')",
    "os.listdir('/etc')",
)
_attack("fills_the_disk", "[open(f'/tmp/ptl-battery-written-{i}', 'wb').write(bytes(1 << 20)) for i in range(8)]")
_attack(
    "reads_secrets",
    *(
        f"open({path!r}, 'rb').read(100)"
        for path in (
            "@FOLDER@/secret",
            "@FOLDER@/home/.netrc",
            "@FOLDER@/home/.cache/huggingface/token",
            "/etc/shadow",
            "/etc/passwd",
            "/root/.bashrc",
            "/root/.ssh/id_rsa",
            "/var/log/dpkg.log",
            "/dev/mem",
            "/dev/vda",
            "@SITE@/README.txt",
        )
    ),
    "open_by_handle()",
    before="""
def open_by_handle():
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.open_by_handle_at(-100, ctypes.create_string_buffer(256), 0) < 0:
        raise OSError(ctypes.get_errno())
""",
)
_attack(
    "reads_files_by_other_doors",
    "io.open('@FOLDER@/secret').read()",
    "_io.FileIO('@FOLDER@/secret').read()",
    "posix.read(posix.open('@FOLDER@/secret', 0), 100)",
    "pathlib.Path('@FOLDER@/secret').read_text()",
    "mmap.mmap(os.open('@FOLDER@/secret', 0), 10)[:]",
    "linecache.getlines('@FOLDER@/secret')[0]",
    "importlib.machinery.SourceFileLoader('s', '@FOLDER@/secret').get_data('@FOLDER@/secret')",
    "sqlite3.connect('@FOLDER@/data.db').execute('select * from sqlite_master')",
    "ctypes.CDLL('@FOLDER@/secret')",
    "os.open(f'/proc/self/fd/{os.open(chr(47), os.O_PATH)}/etc/hostname', 0)",
    before="import io, _io, posix, pathlib, mmap, os, linecache, importlib.machinery, sqlite3, ctypes",
)
_attack(
    "reads_processes",
    *(
        f"open({path!r}, 'rb').read(200)"
        for path in (
            "/proc/@PARENT@/environ",
            "/proc/@PARENT@/mem",
            "/proc/@PARENT@/cmdline",
            "/proc/1/environ",
            "/proc/self/environ",
            "/proc/self/maps",
            "/proc/self/mem",
            "/proc/self/status",
        )
    ),
    "open(f'/proc/{os.getppid()}/environ').read()",
    "os.readlink('/proc/@PARENT@/cwd')",
    "os.listdir('/proc/@PARENT@/fd')",
)
_attack(
    "environment",
    "os.environ[list(os.environ)[0]]",
    "value(ctypes.c_char_p.in_dll(ctypes.CDLL(None), 'environ'))",
    "value(os.getenv('PTL_BATTERY_SECRET'))",
    "value(os.path.expanduser('~').strip('~'))",
    before="""
import os, ctypes
def value(found):
    found = getattr(found, "value", found)
    if not found:
        raise LookupError
    return found
""",
)
_attack(
    "open_files",
    "others()",
    before="""
import os
def others():
    found = []
    for number in range(3, 1024):
        try:
            found.append((number, os.fstat(number).st_mode))
        except OSError:
            pass
    found = [number for number, mode in found if number != 4]  # 4 is where results go
    found += [os.read(4, 10)] if readable(4) else []
    if not found:
        raise LookupError
    return found
def readable(number):
    try:
        os.set_blocking(number, False)
        os.read(number, 1)
        return True
    except OSError:
        return False
    finally:
        os.set_blocking(number, True)
""",
)

# --- network: loopback listeners of the driver only -----------------------------------------------------------------
_attack(
    "tcp",
    "socket.create_connection(('127.0.0.1', @TCP@), 2)",
    "socket.socket().connect(('127.0.0.1', @TCP@))",
    "urllib.request.urlopen('http://127.0.0.1:@TCP@/', timeout=2)",
    "socket.create_server(('127.0.0.1', 0))",
    before="import socket, urllib.request",
)
_attack(
    "udp",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @UDP@))",
    "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
)
_attack(
    "unix_sockets",
    "socket.socket(socket.AF_UNIX).connect('@FOLDER@/stream')",
    "socket.socket(socket.AF_UNIX).connect(chr(0) + '@ABSTRACT@')",
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '@FOLDER@/datagram')",
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, '@FOLDER@/datagram')",
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].connect('@FOLDER@/datagram')",
)

# --- the kernel -----------------------------------------------------------------------------------------------------
_attack(
    "debuggers",
    _syscall(101, "16", "@PARENT@", "0", "0"),
    _syscall(101, "16", "os.getppid()", "0", "0"),
    _syscall(101, "0", "0", "0", "0"),
    _syscall(310, "@PARENT@", "at", "1", "at", "1", "0"),
    _syscall(311, "os.getppid()", "at", "1", "at", "1", "0"),
    _syscall(312, "os.getpid()", "@PARENT@", "0", "0", "0"),
    _syscall(438, "0", "0", "0"),
    before=CALL,
)
_attack("io_uring", _syscall(425, "8", "at"), before=CALL)
_attack(
    "namespaces",
    _syscall(272, "0x10000000"),
    _syscall(272, "0x10020000"),
    _syscall(308, "1", "0"),
    _syscall(165, "at", "at", "at", "0", "0"),
    _syscall(161, "b'/'"),
    _syscall(155, "at", "at"),
    _syscall(430, "b'proc'", "0"),
    before=CALL,
)
_attack(
    "rare_calls",
    _syscall(321, "0", "at", "64"),
    _syscall(298, "at", "0", "1", "1", "0"),
    _syscall(250, "0", "0", "0"),
    _syscall(323, "1"),
    _syscall(29, "0", "4096", "0x380"),
    _syscall(240, "b'/q'", "66", "384", "0"),
    _syscall(319, "b'x'", "0"),
    _syscall(135, "0x0040000"),
    _syscall(105, "0"),
    _syscall(157, "4", "1", "0", "0", "0"),
    _syscall(317, "1", "0", "at"),
    _syscall(444, "0", "0", "0"),
    _syscall(167, "b'/'", "0"),
    _syscall(169, "0", "0", "0", "0"),
    _syscall(222, "1", "0", "at"),
    before=CALL,
)
_attack("old_numbers", _syscall("0x40000000 + 39"), before=CALL)

# --- the judge ------------------------------------------------------------------------------------------------------
_add("sys_exit", "import sys\nsys.exit(0)", status="error")
_add("sys_exit_in_the_call", "def add(a, b):\n    raise SystemExit(0)", status="ok")
_add("os_exit", "import os\nos._exit(0)", status="exited")
_add("os_exit_in_the_call", "import os\ndef add(a, b):\n    os._exit(0)", status="exited")
_add("keyboard_interrupt", "raise KeyboardInterrupt")
_add("no_program", "")
_add("no_python", "def add(a, b: return")
_add("null_byte", "add = '\x00'")
_add(
    "always_equal",
    """
class Always:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __len__(self): return 2
    def __hash__(self): return 0
    def __bool__(self): return True
    def __iter__(self): return iter([1, 2])
    def __reduce__(self): return (int, (5,))
def add(a, b): return Always()
""",
)
for kind, value in (("int", "0"), ("str", "''"), ("list", "[]"), ("float", "0.0"), ("dict", "{}"), ("tuple", "()")):
    _add(
        f"subclass_of_{kind}",
        f"""
class Same({kind}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __len__(self): return 2
    def __hash__(self): return 0
def add(a, b): return Same({value})
""",
    )
_add(
    "says_it_is_an_int",
    """
class Liar:
    __class__ = int
    def __eq__(self, other): return True
    def __index__(self): return 5
def add(a, b): return Liar()
""",
)
_add(
    "metaclass",
    """
class Meta(type):
    def __eq__(cls, other): return True
    def __hash__(cls): return hash(int)
class X(metaclass=Meta):
    def __eq__(self, other): return True
def add(a, b): return X()
""",
)
_add("true_for_one", "def add(a, b):\n    return True")
_add("nan", "def add(a, b):\n    return float('nan')")
_add("infinity", "def add(a, b):\n    return float('inf')")
_add("prints_the_first_answer", "print(5)\ndef add(a, b):\n    print(5)\n    return print(42)")
_add(
    "prints_what_passing_looks_like",
    """
import os, sys
for text in ("PASSED", "OK", "1.0", '[0, "value", ["i", "0x5"]]', "all tests passed"):
    print(text)
    print(text, file=sys.stderr)
    os.write(1, text.encode())
""",
    status="ok",
)
FORGED = """
import os
def forge(*lines):
    for line in lines:
        data = line if isinstance(line, bytes) else line.encode()
        while data:
            data = data[os.write(4, data):]
"""
_add(
    "forges_lines",
    FORGED
    + """
values = ("true", '["i", "0x0"]', '"passed"', '["o", "pickle"]')
forge(*(f'[{i}, "value", {value}]\\n' for value in values for i in range(-5, 9)))
""",
)
_add(
    "forges_numbers",
    FORGED
    + """
forge('[0, "value", 5]\\n', '[0.0, "value", ["i", "0x5"]]\\n', '["0", "value", ["i", "0x5"]]\\n',
      '[true, "value", ["i", "0x5"]]\\n', '[0, "value", NaN]\\n', '[1e0, "value", Infinity]\\n', '{"0": 5}\\n',
      '[0, "value", ["i", "5"]]\\n', '[0, "passed", true]\\n',
      '[0, "value", ["f", "5"]]\\n', '[0, "value", ["i", "0x5", "0x5"]]\\n', '[0, "value", ["d", [[["l"], 1]]]]\\n')
""",
)
_add("forges_again_the_first_line", FORGED + "forge('locked\\n', 'locked\\n', 'failed because\\n')")
_add("invalid_utf8", FORGED + "forge(b'\\xff\\xfe\\x00[0, \"value\", true]\\n', bytes(range(256)), b'\\n')")
_add("deep_json", FORGED + "forge('[0, \"value\", ' + '[' * 100000 + ']' * 100000 + ']\\n')")
_add(
    "pickled_result",
    FORGED
    + """
import pickle
class Run:
    def __reduce__(self): return (open, ("@FOLDER@/unpickled", "w"))
forge(pickle.dumps(Run()), b"\\n")
def add(a, b): return Run()
""",
)
_add("endless_results", FORGED + "while True: forge('x' * 65536)", status="output")
_add("huge_result", "def add(a, b):\n    return 'x' * (10 << 20)", status="output")
_add("huge_print", "import sys\nfor _ in range(1000): print('x' * 100000)\nsys.stderr.write('y' * 10**7)", status="ok")
_add("huge_error", "def add(a, b):\n    raise ValueError('x' * (5 << 20))", status="ok")
_add(
    "error_that_cannot_be_shown",
    """
class Shy(Exception):
    def __str__(self): raise self
def add(a, b): raise Shy
""",
    status="ok",
)
_add("surrogates", "def add(a, b):\n    return chr(0xd800) + chr(0)")
_add("huge_integer", "def add(a, b):\n    return 1 << 100000", status="ok")
_add("larger_integer", "def add(a, b):\n    return 1 << (1 << 23)", status="output")
_add("recursive_list", "def add(a, b):\n    a = []\n    a.append(a)\n    return a")
_add("deep_list", "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x")
_add("colliding_integers", "def add(a, b):\n    return {i * ((1 << 61) - 1) for i in range(1500)}")
_add(
    "patches_the_judge",
    """
import builtins, json, os, sys, unittest
json.dumps = lambda *a, **k: '[0, "value", true]'
json.loads = lambda *a, **k: True
builtins.compile = builtins.eval = builtins.exec = lambda *a, **k: True
builtins.isinstance = lambda *a: True
builtins.type = lambda *a: int
sys.stdout = sys.stderr = None
unittest.TestCase.assertEqual = lambda *a: None
for name, module in list(sys.modules.items()):
    if name.startswith("inside"):
        for key in list(vars(module)):
            if callable(vars(module)[key]) and key not in ("_write", "line"):
                setattr(module, key, lambda *a, **k: True)
""",
)
_add(
    "walks_the_frames_and_writes",
    """
import sys
frame = sys._getframe()
while frame:
    for space in (frame.f_locals, frame.f_globals):
        for key in list(space):
            if key in ("calls", "job", "tests", "expected", "result", "results_array", "passed"):
                try:
                    value = space[key]
                    if isinstance(value, list):
                        value[:] = [True] * len(value)
                    elif isinstance(value, dict):
                        value["calls"] = ["7"] * 5
                except Exception:
                    pass
    frame = frame.f_back
""",
)
_add(
    "at_the_end",
    FORGED
    + """
import atexit, threading
atexit.register(forge, '[0, "value", ["i", "0x5"]]\\n')
class Last:
    def __del__(self): forge('[0, "value", ["i", "0x5"]]\\n')
keep = Last()
""",
)
_add(
    "edits_the_tests",
    """
import os
for path in ("test.py", "tests/test_add.py", "@FOLDER@/test_add.py"):
    attempt(path, lambda: open(path, "w").write("def test(): pass"))
""",
    attack=True,
)

# --- hunts for the expected answer, a word that the driver draws ------------------------------------------------------
HUNT = """
import re
def word_in(texts):
    for text in texts:
        try:
            found = re.search("expected-[0-9a-f]{16}", text if isinstance(text, str) else repr(text))
        except Exception:
            continue
        if found:
            return found[0]
"""
_add(
    "hunts_in_the_frames",
    HUNT
    + """
import sys
def add(a, b):
    frame, texts = sys._getframe(), []
    while frame:
        texts += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    return word_in(texts)
""",
    hunts=True,
)
_add(
    "hunts_in_the_objects",
    HUNT
    + """
import gc, sys
gc.unfreeze()
def add(a, b):
    known = [o for o in gc.get_objects() if isinstance(o, (str, bytes, list, tuple, dict)) and len(o) < 1000]
    return word_in(known) or word_in(vars(m) for m in list(sys.modules.values()))
""",
    hunts=True,
)
_add(
    "hunts_in_memory",
    HUNT
    + """
import ctypes
def add(a, b):
    places = [id(object()), id("x" * 5000), id([]), id(add)]
    data = b"".join(ctypes.string_at(place & ~0xfff, 4096) for place in places)
    return word_in([data.decode("latin-1")])
""",
    hunts=True,
)
_add(
    "hunts_in_files",
    HUNT
    + """
import os, sys
def add(a, b):
    texts = [str(sys.argv), str(sys.orig_argv), str(dict(os.environ)), str(add.__doc__)]
    for number in range(1024):
        try:
            os.lseek(number, 0, 0)
            texts.append(os.read(number, 1 << 20).decode("latin-1"))
        except OSError:
            pass
    return word_in(texts)
""",
    hunts=True,
)

# --- programs that would end others: last -----------------------------------------------------------------------------
_attack(
    "signals_without_effect",
    "os.kill(@PARENT@, 0)",
    "os.kill(os.getppid(), 0)",
    "os.kill(1, 0)",
    "os.kill(-1, 0)",
    "os.killpg(0, 0)",
    "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
    "fcntl.fcntl(0, fcntl.F_SETOWN, @PARENT@)",
    "fcntl.fcntl(4, fcntl.F_SETOWN, os.getppid())",
    "os.setpriority(os.PRIO_PROCESS, @PARENT@, 19)",
    "resource.prlimit(@PARENT@, resource.RLIMIT_CPU, (1, 1))",
    "os.sched_setaffinity(@PARENT@, {0})",
    before="import fcntl, os, resource, signal",
    kills=True,
)
_attack("kills_the_server", "os.kill(os.getppid(), 9)", before="import os", kills=True)
_attack("kills_the_parent", "os.kill(@PARENT@, 9)", before="import os", kills=True)
_attack("kills_everything", "os.kill(-1, 9)", "os.killpg(0, 9)", before="import os", kills=True)
