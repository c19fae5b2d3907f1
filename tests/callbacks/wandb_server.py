"""What of W&B's server runs and a sweep's agents need, on this machine: the client, W&B's process and HTTP are real."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Told:
    """What the server has been told of a run.

    Attributes:
        upserts: the variables of each mutation that made or changed it.
        rows: of its history, from the first step on.
        summary: the last.
        files: names of those that were uploaded.
        exits: exit code of each attempt.
        preempting: whether the present attempt has said that its machine is being taken away.
    """

    upserts: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    preempting: bool = False


class Server(http.server.ThreadingHTTPServer):
    """Takes runs, and gives the trials of a sweep to its agents.

    Attributes:
        sweep: the sweep's configuration as YAML.
        trials: commands that agents have not been given yet, the next one first.
        hosts: of the agents.
        runs: what is told, by the run's id.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.sweep = ""
        self.trials: list[dict[str, Any]] = []
        self.hosts: list[str] = []
        self.runs: dict[str, Told] = defaultdict(Told)
        self.lock = threading.Lock()
        self._given: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Server]:
        server = cls()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.close()

    @property
    def variables(self) -> dict[str, str]:
        """Of a process that talks to this server."""
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def add_trial(self, name: str, **parameters: Any) -> None:
        """Puts a trial behind those that wait."""
        args = {key: {"value": value} for key, value in parameters.items()}
        self.trials.append({"type": "run", "run_id": name, "program": None, "args": args})

    def commands(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        """What an agent is to do that tells which of its trials run."""
        if running:
            return []
        if not self.trials:
            return [{"type": "exit"}]
        command = self.trials.pop(0)
        self._given[command["run_id"]] = command
        return [command]

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Takes a piece of a run's history; a trial that ends while it is being preempted is given out again."""
        run = self.runs[name]
        files = sent.get("files") or {}
        rows = files.get("wandb-history.jsonl")
        if rows:
            run.rows[rows["offset"] :] = [json.loads(line) for line in rows["content"]]
        for line in (files.get("wandb-summary.json") or {}).get("content", []):
            run.summary = json.loads(line)
        run.preempting |= sent.get("preempting", False)
        if sent.get("complete"):
            run.exits.append(sent["exitcode"])
            if run.preempting and sent["exitcode"] and name in self._given:
                self.trials.insert(0, {**self._given[name], "type": "resume"})
            run.preempting = False


class Answers(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        asked = json.loads(body or "{}")
        answer: dict[str, Any] = {}
        with self.server.lock:
            if self.path == "/graphql":
                answer = {"data": self.answer(asked["query"], asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                self.server.stream(self.path.split("/")[-2], asked)
        self.send(json.dumps(answer).encode())

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        _, name, file = self.path.strip("/").split("/", 2)
        self.server.runs[name].files.append(file)
        self.send(b"")

    def send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "2", "name": "ptl", "entity": {"id": "3", "name": "lab"}}
        if "upsertBucket" in query:
            return {"upsertBucket": self.upserted(given, project)}
        if "RunResumeStatus" in query:
            return {"model": {**project, "bucket": self.resumed(given["name"])}}
        if "SweepWithRuns" in query:
            return {"project": {"sweep": {"id": "4", "config": self.server.sweep, "runs": {"edges": []}}}}
        if "createAgent" in query:
            self.server.hosts.append(given["host"])
            return {"createAgent": {"agent": {"id": f"agent{len(self.server.hosts)}"}}}
        if "agentHeartbeat" in query:
            commands = self.server.commands(json.loads(given["runState"]))
            return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}
        if "createRunFiles" in query:
            base = f"http://127.0.0.1:{self.server.server_port}/put/{given['run']}/"
            files = [{"name": name, "uploadUrl": base + name} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "1", "entity": "lab", "username": "ada", "flags": "{}", "teams": {"edges": []}}}

    def upserted(self, given: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs[given["name"]]
        run.upserts.append(given)
        bucket = {"id": given["name"], "name": given["name"], "displayName": given["displayName"]}
        bucket |= {"config": given["config"], "sweepName": given.get("sweep"), "description": None}
        return {
            "bucket": {**bucket, "historyLineCount": len(run.rows), "project": project},
            "inserted": len(run.upserts) == 1,
        }

    def resumed(self, name: str) -> dict[str, Any] | None:
        """What a run that goes on wants to know of its past; None where it has none."""
        if name not in self.server.runs:
            return None
        run = self.server.runs[name]
        last = [json.dumps(row) for row in run.rows[-1:]]
        return {
            "id": name, "name": name, "displayName": run.upserts[0]["displayName"], "config": run.upserts[-1]["config"],
            "summaryMetrics": json.dumps(run.summary), "historyTail": json.dumps(last), "wandbConfig": "{}",
            "historyLineCount": len(run.rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
            "tags": run.upserts[0]["tags"], "notes": None,
        }  # fmt: skip

    def log_message(self, *_: Any) -> None:
        pass
