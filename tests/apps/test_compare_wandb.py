"""``ptl compare`` over real runs: ``ptl fit`` with W&B offline, read as run folders, W&B files and from a server."""

import http.server
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.apps.compare_parts import RATES, ROOT, SEEDS, STEPS, compared, ptl, ptl_fresh, ptl_process, runs_by_name
from tests.objectives import law
from tests.ranks import run_ranks

RUNS = len(RATES) * SEEDS


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    tiny.save_folder(folder / "model", tiny.make_tokenizer(), hidden=32)
    law.write_rows(folder / "rows.jsonl", count=40)
    (folder / "resumed").mkdir()
    codes = run_ranks("tests.apps.compare_parts:make_real", 1, {"folder": str(folder)}, timeout=240)[0]
    assert codes == [0] * RUNS
    return folder


def inspected(path: Path) -> list[dict]:
    """The records of a W&B file, as W&B's own tool prints them."""
    tool = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def offline(real: Path) -> list[Path]:
    return sorted((real / "wandb").glob("offline-run-*"))


@pytest.fixture(scope="module")
def folders(real):
    return compared(real / "runs")


def test_six_real_runs_are_two_groups_of_three_seeds(real, folders):
    assert folders["keys"] == ["model.optimizer.lr"] and folders["seeds"] == ["seed_everything", "data.seed"]
    assert sorted(group["config"]["model.optimizer.lr"] for group in folders["groups"]) == [0.003, 0.01]
    assert all(group["status"] == {"finished": SEEDS} for group in folders["groups"])
    for group in folders["groups"]:
        told = [
            json.loads((real / "runs" / folders["runs"][i]["name"] / "summary.json").read_text()) for i in group["runs"]
        ]
        finals = [summary["final"]["value"] for summary in told]
        found = group["metrics"]["val/loss"]["final"]
        assert found["n"] == SEEDS and found["mean"] == pytest.approx(sum(finals) / SEEDS, rel=1e-12)
        spread = math.sqrt(sum((value - found["mean"]) ** 2 for value in finals) / (SEEDS - 1))
        assert found["deviation"] == pytest.approx(spread, rel=1e-9) and spread > 0
        hours = sum(summary["wall_seconds_all_attempts"] * summary["devices"] for summary in told) / 3600
        assert group["device_hours"] == pytest.approx(hours, rel=1e-12)


def test_folders_and_wandb_files_give_equal_numbers(real, folders):
    from_wandb = compared(*offline(real))
    one, other = runs_by_name(folders), runs_by_name(from_wandb)
    assert len(one) == RUNS and one.keys() == other.keys()
    for name, run in one.items():
        twin = other[name]
        assert twin["source"] == "wandb" and run["source"] == "folder"
        assert {"val/loss", "train/loss", "throughput/mfu"} - run["metrics"].keys() <= {"throughput/mfu"}
        for key in ("metrics", "facts", "seeds", "status", "attempts", "devices", "step"):
            assert run[key] == twin[key], (name, key)
    for key in ("metrics", "facts", "config", "status", "device_hours"):
        assert [group[key] for group in folders["groups"]] == [group[key] for group in from_wandb["groups"]]


def test_the_numbers_are_those_of_wandb_s_own_tool(real, folders):
    runs = runs_by_name(folders)
    for folder in offline(real)[:2]:
        records = inspected(folder)
        config = next(r["config"]["update"] for r in records if "run" in r.get("config", {}).get("update", {}))
        name = Path(config["run"]["dir"]).name
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        for metric, found in runs[name]["metrics"].items():
            points = [(row["trainer/global_step"], row[metric]) for row in rows if metric in row]
            assert found["points"] == len(points) > 0
            assert (found["final_step"], found["final"]) == points[-1]
            assert found["low"] == min(value for _, value in points)
            assert found["high"] == max(value for _, value in points)
        assert runs[name]["metrics"]["train/loss"]["points"] == STEPS


def test_a_run_that_stands_in_two_places_counts_once(real, folders):
    both = compared(real / "runs", real / "wandb", real / "runs")
    assert [run["name"] for run in both["runs"]] == [run["name"] for run in folders["runs"]]
    assert len(both["notes"]) == RUNS and all("is the same run as" in note for note in both["notes"])
    assert both["groups"] == folders["groups"]


def test_attempts_of_one_offline_run_are_joined_by_their_own_step(real):
    found = compared(real / "resumed")
    assert len(found["runs"]) == 1
    run = found["runs"][0]
    loss = run["metrics"]["train/loss"]
    assert (run["attempts"], run["status"], run["step"]) == (2, "finished", 14)
    # Steps 0 to 5 of the first attempt and 6 to 13 of the second, whose last value is NaN.
    assert loss["points"] == 14 and (loss["low"], loss["high"]) == (0.0, 112.0)
    assert (loss["final"], loss["final_step"]) == ("nan", 13)
    assert run["metrics"]["train/reward"]["points"] == 14


def test_a_torn_wandb_file_is_read_up_to_the_tear(real, tmp_path):
    source = next(offline(real)[0].glob("*.wandb"))
    data = source.read_bytes()
    (tmp_path / source.name).write_bytes(data[: len(data) * 2 // 3])
    run = compared(tmp_path)["runs"][0]
    assert run["status"] == "unfinished" and 0 < run["metrics"]["train/loss"]["points"] <= STEPS
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    (tmp_path / source.name).write_bytes(damaged)
    assert compared(tmp_path)["runs"][0]["status"] == "unfinished"
    (tmp_path / source.name).write_bytes(b"not W&B's at all")
    shutil.copytree(real / "runs" / "lr1e-2-s0", tmp_path / "whole")
    runs = compared(tmp_path)["runs"]
    assert {run["status"] for run in runs} == {"finished", "unreadable"}


def path_without(package: str, folder: Path) -> str:
    """A PYTHONPATH under which a package is not there."""
    (folder / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name.split('.')[0] == '{package}' else real(name, *a)\n"
        f"import sys\nsys.modules['{package}'] = None\n"
    )
    return f"{folder}:{Path(__file__).resolve().parents[2]}"


def test_without_wandb_folders_work_and_wandb_files_are_refused(real, tmp_path):
    path = path_without("wandb", tmp_path)
    assert ptl_fresh("compare", real / "runs", PYTHONPATH=path).returncode == 0
    refused = ptl_fresh("compare", real / "wandb", PYTHONPATH=path)
    assert refused.returncode == 2 and "pip install wandb" in refused.stderr and "Traceback" not in refused.stderr


# ---- W&B's server ----


class Server(http.server.BaseHTTPRequestHandler):
    """Answers what ``wandb.Api`` asks by GraphQL with runs out of real offline files, filtered by group, serves what of
    their histories is exported as parquet files, and keeps the reports that are saved."""

    runs: ClassVar[list[dict]] = []
    asked: ClassVar[list[dict]] = []
    saved: ClassVar[list[dict]] = []
    downloaded: ClassVar[list[tuple[int, int]]] = []
    pages: ClassVar[list[tuple[int, int]]] = []
    read_only: ClassVar[bool] = False

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        refused = self.read_only and "mutation upsertView" in asked.get("query", "")
        answer = {"data": self.answer(asked) if self.path == "/graphql" and not refused else {}}
        data = json.dumps({"errors": [{"message": "permission denied"}]} if refused else answer).encode()
        self.send(data, 403 if refused else 200)

    def do_GET(self):
        name, index = Path(self.path).stem.split("-")
        [run] = [run for run in self.runs if run["name"] == name]
        first, last = run["exported"][int(index)]
        self.downloaded.append((first, last))
        columns = sorted({key for row in run["rows"] for key in row})
        rows = [row for row in run["rows"] if first <= row["_step"] < last]
        data = io.BytesIO()
        pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in columns}), data)
        self.send(data.getvalue())

    def send(self, data, code=200):
        self.send_response(code)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, asked):
        query, given = asked["query"], asked.get("variables") or {}
        named = [run for run in self.runs if run["name"] == given.get("name", given.get("runName", given.get("run")))]
        if "query Runs(" in query:
            self.asked.append(given)
            wanted = json.loads(given["filters"] or "{}")
            found = [run for run in self.runs if run["group"] == wanted.get("group", run["group"])]
            edges = [{"node": {k: v for k, v in run.items() if k != "rows"}, "cursor": run["name"]} for run in found]
            page = {"endCursor": None, "hasNextPage": False}
            return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False,
                                "runs": {"edges": edges, "pageInfo": page}}}  # fmt: skip
        if "RunHistoryKeys" in query:
            return {"project": {"run": {"historyKeys": named[0]["historyKeys"]}}}
        if "RunParquetHistory" in query:
            exported = named[0].get("exported", [])
            end = max((last for _, last in exported), default=0)
            here = f"http://{self.headers['host']}"
            urls = [f"{here}/files/{named[0]['name']}-{i}.parquet" for i in range(len(exported))]
            live = [{"_step": row["_step"]} for row in named[0]["rows"] if row["_step"] >= end]
            return {"project": {"run": {"parquetHistory": {"parquetUrls": urls, "liveData": live}}}}
        if "HistoryPage" in query:
            low, high = given["minStep"], given["maxStep"]
            self.pages.append((low, high))
            rows = [json.dumps(row) for row in named[0]["rows"] if low <= row["_step"] < high]
            return {"project": {"run": {"history": rows}}}
        if "query GetProjects(" in query:
            project = {"__typename": "Project", "id": "UHJvamVjdDox", "name": "p", "entityName": given["entity"]}
            project |= {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"models": {"edges": [{"node": project}], "pageInfo": page}}
        if "query ProjectInternalId(" in query:
            return {"project": {"id": "UHJvamVjdDox", "internalId": f"{given['entityName']}/{given['projectName']}"}}
        if "mutation upsertView(" in query:
            self.saved.append(given)
            project = {"id": "UHJvamVjdDox", "name": given["projectName"], "entityName": given["entityName"]}
            kept = {key: given[key] for key in ("type", "name", "displayName", "description", "spec")}
            view = {"id": "Vmlldzo3", **kept, "project": project, "updatedAt": "2026-01-01T00:00:00"}
            return {"upsertView": {"view": view, "inserted": True}}
        user = {"id": "1", "entity": "lab", "username": "ada", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": user}

    def log_message(self, *_):
        pass


def served_run(records: list[dict], group: str) -> dict:
    """A run as the server describes it, out of the records of its offline file."""
    config, summary, rows = {}, {}, []
    for record in records:
        if record["type"] == "config":
            config |= {key: {"value": value} for key, value in record["config"]["update"].items()}
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
        if record["type"] == "history":
            rows.append({k: v for k, v in record["history"]["item"].items() if not k.startswith("samples")})
    run_id = next(record["run"]["run_id"] for record in records if record["type"] == "run")
    return {
        "id": run_id, "projectId": 1, "name": run_id, "displayName": "", "state": "finished", "group": group,
        "jobType": "sft", "config": json.dumps(config), "summaryMetrics": json.dumps(summary), "tags": [],
        "systemMetrics": "{}", "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
        "user": {"name": "ada", "username": "ada"}, "sweepName": None, "notes": None, "description": None,
        "commit": None, "readOnly": False, "historyLineCount": len(rows), "rows": rows,
        "historyKeys": {"lastStep": rows[-1]["_step"], "sets": [], "keys": {}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def served(real):
    return [served_run(inspected(path), "study" if i else "other") for i, path in enumerate(offline(real))]


@pytest.fixture
def server(served):
    Server.runs = served
    Server.asked, Server.saved, Server.downloaded, Server.pages, Server.read_only = [], [], [], [], False
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def variables(server, tmp_path):
    """Those of a process that asks our small server: the client, wandb-core and HTTP are the real ones."""
    return {
        "WANDB_BASE_URL": server, "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path), "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


def test_runs_on_a_server_give_the_same_numbers(variables, real, folders):
    found = compared(
        "--project", "lab/p", "--filter", "group=study", "model.optimizer.lr=0.01", run=ptl_process, **variables
    )
    assert json.loads(Server.asked[0]["filters"]) == {"group": "study"}
    expected = {name: run for name, run in runs_by_name(folders).items() if name.startswith("lr1e-2")}
    online = runs_by_name(found)
    assert online.keys() == expected.keys()
    for name, run in online.items():
        assert run["source"] == "online" and run["metrics"] == expected[name]["metrics"]
        assert run["facts"] == expected[name]["facts"]
    both = compared(real / "runs", "--project", "lab/p", run=ptl_process, **variables)
    assert len(both["runs"]) == RUNS and len(both["notes"]) == RUNS
    none = ptl_process("compare", "--project", "lab/p", "--filter", "group=nobody", **variables)
    assert none.returncode == 2 and "there is none" in none.stderr


def long_run(count: int, exported: list[tuple[int, int]]) -> dict:
    """A run of so many rows as the server describes it, and the steps from and to which its export's files go."""
    rows = [
        {"_step": i, "_timestamp": 1.7e9 + i, "trainer/global_step": i, "train/loss": 2.0 - i / 3} for i in range(count)
    ]
    for row in rows[::100]:
        row["val/loss"] = row["_step"] / 7
    rows[1234]["train/loss"], rows[count - 1]["train/loss"] = float("nan"), float("inf")
    keys = {"lastStep": count - 1, "sets": [], "keys": {}}
    return {**Server.runs[-1], "rows": rows, "exported": exported, "historyLineCount": count, "historyKeys": keys}


def assert_all_read(found: dict, run: dict) -> None:
    [read] = found["runs"]
    for name in ("train/loss", "val/loss"):
        points = [(row["_step"], row[name]) for row in run["rows"] if name in row]
        finite = [value for _, value in points if math.isfinite(value)]
        metric = read["metrics"][name]
        assert metric["points"] == len(points) and float(metric["final"]) == points[-1][1]
        assert (metric["final_step"], metric["low"], metric["high"]) == (points[-1][0], min(finite), max(finite))


def test_a_long_history_is_read_out_of_its_parquet_files_and_pages(variables):
    """W&B names the files in any order, and its page across the end of the export has rows of both."""
    Server.runs = [long_run(3300, [(1500, 2800), (0, 1500)])]
    assert_all_read(compared("--project", "lab/p", run=ptl_process, **variables), Server.runs[0])
    assert Server.downloaded == [(1500, 2800), (0, 1500)] and Server.pages == [(2000, 3000), (3000, 3300)]
    # The run has gone on and its export is another one, under the same addresses.
    Server.runs = [long_run(4100, [(0, 1600), (1600, 4100)])]
    assert_all_read(compared("--project", "lab/p", run=ptl_process, **variables), Server.runs[0])
    assert Server.downloaded[2:] == [(0, 1600), (1600, 4100)] and len(Server.pages) == 2


def test_a_long_history_without_an_export_is_read_in_pages(variables):
    Server.runs = [long_run(2500, [])]
    assert_all_read(compared("--project", "lab/p", run=ptl_process, **variables), Server.runs[0])
    assert Server.pages == [(0, 1000), (1000, 2000), (2000, 2500)] and not Server.downloaded


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--project", "p"], "ENTITY/PROJECT"),
        (["--project", "a/b", "--filter", "group"], "KEY=VALUE"),
        (["--filter", "group=x", "."], "--project"),
        (["--report", "."], "--report got no online run, expected --project ENTITY/PROJECT"),
    ],
)
def test_what_is_asked_of_the_server_is_checked(arguments, told):
    done = ptl("compare", *arguments)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


# ---- the report ----


def report(index: int = 0) -> dict:
    """What W&B was sent, with the document as ``spec``, its blocks by type and its texts as Markdown."""
    sent = Server.saved[index]
    spec = json.loads(sent["spec"])
    [grid] = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    return {
        **sent,
        "spec": spec,
        "texts": [block["content"] for block in spec["blocks"] if block["type"] == "markdown-block"],
        "headings": [block["children"][0]["text"] for block in spec["blocks"] if block["type"] == "heading"],
        "sets": grid["runSets"],
        "panels": grid["panelBankSectionConfig"]["panels"],
        "colors": grid["customRunColors"],
    }


def served_id(name: str) -> str:
    """The id on the server of the run in a run folder."""
    folder = next(run for run in Server.runs if Path(json.loads(run["config"])["run"]["value"]["dir"]).name == name)
    return folder["name"]


def test_a_report_has_the_tables_and_the_curves_of_each_group(variables, real, tmp_path):
    away = json.loads(Server.runs[0]["config"])["run"]["value"]["dir"]
    out = tmp_path / "out"
    asked = ("--project", "lab/p", "--filter", "group=study", "--metric", "val/loss", "train/loss", "--out", out)
    done = ptl_process("compare", real / "runs", *asked, "--report", **variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (
        f"report: {variables['WANDB_BASE_URL']}/lab/p/reports/Comparison-of-6-runs-in-2-groups--Vmlldzo3" in done.stdout
    )
    found, comparison = report(), json.loads((out / "compare.json").read_text())
    assert len(Server.saved) == 1 and (found["entityName"], found["projectName"], found["type"]) == ("lab", "p", "runs")
    assert found["id"] is None and found["displayName"] == "Comparison of 6 runs in 2 groups"
    assert found["description"] == "What differs: model.optimizer.lr"
    assert found["headings"] == ["Groups", "Learning curves", "How to read it"]

    table, remarks = found["texts"]
    page = (out / "compare.md").read_text()
    assert table in page and len(table.splitlines()) == 2 + 2
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines())
    assert titles[:5] == ["group", "lr", "runs", "val/loss final", "val/loss best"] and "train/loss final" in titles
    for group, row in zip(comparison["groups"], rows, strict=True):
        final = group["metrics"]["val/loss"]["final"]
        assert row[:3] == [group["tag"], str(group["config"]["model.optimizer.lr"]), "3 finished"]
        mean, deviation = (float(part) for part in row[3].split(" ± "))
        assert mean == pytest.approx(final["mean"], abs=final["deviation"] / 10)
        assert deviation == pytest.approx(final["deviation"], rel=0.06)
    assert "1 of the 6 runs are not on this server" in remarks and str(real) not in json.dumps(found)

    assert [panel["viewType"] for panel in found["panels"]] == ["Run History Line Plot"] * 2
    for panel, metric in zip(found["panels"], ("val/loss", "train/loss"), strict=True):
        config = panel["config"]
        assert (config["chartTitle"], config["metrics"], config["limit"]) == (metric, [metric], 5)
        assert (config["xAxis"], config["xAxisTitle"]) == ("trainer/global_step", "optimizer step")
    assert [panel["layout"]["x"] for panel in found["panels"]] == [0, 12]  # side by side

    assert len(found["sets"]) == 2 and len({each["id"] for each in found["sets"]}) == 2
    for group, each in zip(comparison["groups"], found["sets"], strict=True):
        assert each["name"] == f"{group['tag']}  {group['label']}" and "lr=" in each["name"]
        assert each["project"] == {"name": "p", "entityName": "lab", "id": "lab/p"}
        names = [comparison["runs"][i]["name"] for i in group["runs"]]
        ids = [served_id(name) for name in names if name != Path(away).name]
        [condition] = each["filters"]["filters"]
        assert condition["key"] == {"section": "run", "name": "name"} and condition["op"] == "IN"
        assert condition["value"] == ids and len({found["colors"][run] for run in ids}) == 1
    assert len(found["colors"]) == 5 and len(set(found["colors"].values())) == 2


def test_a_report_of_many_groups_has_the_curves_of_the_best(variables):
    """Runs of another program, which count no optimizer steps."""
    first = Server.runs[1]
    Server.runs = []
    for i in range(10):
        config, summary = json.loads(first["config"]), json.loads(first["summaryMetrics"])
        config["model"]["value"]["init_args"]["optimizer"]["lr"] = i / 8
        summary["run/wall_seconds_all_attempts"] = 100.0 + i
        rows = [{k: v for k, v in row.items() if k != "trainer/global_step"} for row in first["rows"]]
        rows = [{**row, "val/loss": row["val/loss"] + i} if "val/loss" in row else row for row in rows]
        texts = {"config": json.dumps(config), "summaryMetrics": json.dumps(summary)}
        Server.runs.append({**first, **texts, "id": f"many{i}", "name": f"many{i}", "rows": rows})
    done = ptl_process("compare", "--project", "lab/p", "--metric", "val/loss", "--markdown", "--report", **variables)
    assert done.returncode == 0 and done.stdout.startswith("# Comparison of 10 runs in 10 groups")
    assert "/reports/" in done.stderr and "/reports/" not in done.stdout
    found = report()
    assert [each["filters"]["filters"][0]["value"] for each in found["sets"]] == [[f"many{i}"] for i in range(8)]
    assert len(set(found["colors"].values())) == 8
    assert len(found["texts"][0].splitlines()) == 2 + 10
    assert "the 8 best groups; 2 more are in the table alone" in found["texts"][1]
    assert found["panels"][0]["config"]["xAxis"] == "_step"


def test_where_a_report_is_refused_the_pages_are_written(variables, real, tmp_path):
    Server.read_only = True
    done = ptl_process("compare", "--project", "lab/p", "--report", "--out", tmp_path / "out", **variables)
    assert done.returncode == 1 and not Server.saved and "6 runs in 2 groups" in done.stdout
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".html", ".png", ".md", ".csv", ".json"}
    assert len(done.stderr.splitlines()) == 1
    assert "no report was written into lab/p on W&B" in done.stderr and "permission denied" in done.stderr


def test_without_a_server_run_folders_are_compared(variables, real, tmp_path):
    gone = {**variables, "WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_HTTP_TIMEOUT": "2"}  # read at W&B's import
    asked = ("--project", "lab/p", "--report", "--out", tmp_path / "out")
    done = ptl_fresh("compare", real / "runs", *asked, **gone)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "which cannot be read from W&B" in done.stderr and "no report is written" in done.stderr
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "Comparison of 6 runs in 2 groups" in page and "The runs of lab/p are missing" in page
    alone = ptl_fresh("compare", *asked, **gone)
    assert alone.returncode == 2 and len(alone.stderr.splitlines()) == 1 and not alone.stdout


STUCK = """
import os, signal, psutil
from ptl.apps.comparing.wandb_online import ServerError, read_project
try:
    read_project("lab/p", [])
except ServerError:
    [service] = psutil.Process().children()
    os.kill(service.pid, signal.SIGSTOP)
    print("stopped")
"""


def test_a_service_process_that_never_ends_does_not_keep_the_command(variables):
    env = {**os.environ, **variables, "WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_HTTP_TIMEOUT": "1"}
    words = [sys.executable, "-c", STUCK]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=env, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_without_the_package_a_report_is_refused_at_once(variables, tmp_path):
    path = path_without("wandb_workspaces", tmp_path)
    asked = ("--project", "lab/p", "--out", tmp_path / "out")
    refused = ptl_fresh("compare", *asked, "--report", **variables, PYTHONPATH=path)
    assert refused.returncode == 2 and "pip install 'ptl[report]'" in refused.stderr and not Server.asked
    assert len(refused.stderr.splitlines()) == 1
    assert ptl_fresh("compare", *asked, **variables, PYTHONPATH=path).returncode == 0
