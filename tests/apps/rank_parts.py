"""What the tests of the ranking page share: rows, and a real server in a process of its own."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from http.client import HTTPConnection

SHOWS = """Here is a **short** answer with `code`:

```python
def area(radius: float) -> float:
    return 3.14159 * radius**2  # a circle
```

| shape | area |
|-------|-----:|
| disc  | 3.14 |
"""


def row(number, answers=4, **more):
    """A row as ``ptl synth candidates`` writes it."""
    completions = [
        {
            "messages": [{"role": "assistant", "content": f"answer {i} to {number}"}],
            "rank": None,
            "meta": {"seed": i, "logprob": -1.5, "model": f"secret-model-{i}"},
        }
        for i in range(answers)
    ]
    return {"prompt": f"question {number}", "completions": completions, "annotator": None, "id": f"q{number}", **more}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path):
    """The rows of a file, each of which must be whole."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def ranks(row):
    return [answer["rank"] for answer in row["completions"]]


START = "import sys; from ptl.apps.rank import main; sys.exit(main(sys.argv[1:]))"


class Served:
    """A running ``ptl rank serve``."""

    def __init__(self, file, *options, port=0):
        command = [sys.executable, "-c", START, "serve", str(file), "--port", str(port), *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.said = ""
        self.url = self._url()
        self.host, _, rest = self.url.removeprefix("http://").partition(":")
        self.port = int(re.match(r"\d+", rest)[0])

    def _url(self):
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"open (http://\S+)", line):
                return found[1]
        raise AssertionError(f"the server did not start: {self.said}{self.process.stderr.read()}")

    def call(self, method, path, body=None, **headers):
        """One request on a connection of its own: (status, headers, parsed JSON or text)."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            return exchange(connection, method, path, body, **headers)
        finally:
            connection.close()

    def kill(self):
        self.process.kill()
        self.process.communicate(timeout=20)

    def stop(self):
        """Ctrl-C; returns the exit code and what was printed since."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            out, err = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, out, err


def exchange(connection, method, path, body=None, **headers):
    """One request on an open connection: (status, headers, parsed JSON or text)."""
    sent = None if body is None else json.dumps(body) if not isinstance(body, str) else body
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(
        method, path, sent, {**({"Content-Type": "application/json"} if body is not None else {}), **named}
    )
    answer = connection.getresponse()
    text = answer.read().decode()
    kind = answer.headers.get_content_type()
    return answer.status, answer.headers, json.loads(text) if kind == "application/json" else text


@contextmanager
def served(file, *options, port=0):
    """A server that is gone at the end, whatever happened."""
    server = Served(file, *options, port=port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


def until(what, seconds=20.0):
    """Waits for what() to be true, and returns it."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value
