"""W&B beside a run: one id for all attempts, what is told, what is never told, and training that W&B cannot stop."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptl import cli
from ptl.callbacks.exit_codes import REQUEUE
from ptl.callbacks.facts import run_tags
from ptl.callbacks.jsonl import read_metrics, read_rows
from ptl.callbacks.record import RunRecord
from ptl.callbacks.rewind import RewindError
from ptl.callbacks.run_identity import make_run_id, run_id
from ptl.callbacks.throughput import Throughput
from ptl.callbacks.wandb_run import WandbRun
from ptl.models.spec import LoRA, ModelSpec
from ptl.trainer_cli import Run, run_dir
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.callbacks.wandb_parts import ROOT, SECRET, STEPS, STOP
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    [told] = run_ranks("tests.callbacks.wandb_parts:make_all", 1, {"folder": str(folder)}, timeout=280)
    return folder, told


def inspected(folder: Path) -> list[dict[str, Any]]:
    """The records of an offline attempt, as W&B's own tool prints them."""
    tool = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    env = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=True, env=env)
    return [json.loads(line) for line in done.stdout.splitlines()]


def merged(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for record in records:
        if record["type"] == kind:
            out |= record[kind].get("update", {})
    return out


def one(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [record] = [record[kind] for record in records if record["type"] == kind]
    return record


@pytest.fixture(scope="module")
def fragments(made):
    """The records of the two attempts, in order."""
    return [inspected(path) for path in sorted((made[0] / "study/first/wandb").glob("offline-run-*"))]


def test_law_6_two_attempts_are_one_run_with_one_count_of_steps(made, fragments):
    folder, told = made
    assert told["attempts"]["codes"] == [REQUEUE, 0] and len(fragments) == 2
    for records in fragments:
        run = one(records, "run")
        assert run["run_id"] == run_id(folder / "study/first")
        assert (run["project"], run["run_group"], run["job_type"]) == ("ptl", "study", "lora")
        assert run["display_name"] == "first"
        assert run["tags"] == ["mine", "model", "rows.jsonl", "singledevice", "lora", "alps"]
    steps = []
    for records in fragments:
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        steps.append([row["trainer/global_step"] for row in rows if "train/loss" in row])
        axis = {
            record["metric"]["name"] for record in records if record["type"] == "metric" if "name" in record["metric"]
        }
        assert {"trainer/global_step", "trainer/tokens_seen", "val/loss"} <= axis
        seen = [row["trainer/tokens_seen"] for row in rows if "trainer/tokens_seen" in row]
        assert seen == sorted(seen) and len(seen) > 3
    assert steps == [list(range(STOP)), list(range(STOP, STEPS))]
    assert [one(records, "exit").get("exit_code", 0) for records in fragments] == [REQUEUE, 0]
    assert [sum(r["type"] == "preempting" for r in records) for records in fragments] == [1, 0]


def test_the_configuration_is_nested_and_attempts_are_listed(made, fragments):
    first, second = (merged(records, "config") for records in fragments)
    assert first["model"]["init_args"]["policy"]["name"] == f"{made[0]}/model" and first["seed_everything"] == 0
    assert first["trainer"]["max_steps"] == STEPS and "config" not in first
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {"trainer", "facts"}  # the callback that stops the first
    # The configuration itself is told once an attempt; the facts are completed.
    for records in fragments:
        assert sum("model" in r["config"].get("update", {}) for r in records if r["type"] == "config") == 1
    assert [attempt["variables"]["SLURM_JOB_ID"] for attempt in second["facts"]["attempts"]] == ["7", "8"]
    facts = second["facts"]
    assert "fit -c" in facts["command"] and facts["git"]["dirty"] and len(facts["git"]["commit"]) == 40
    assert facts["versions"]["lightning"].startswith("2.") and facts["environment"]["world_size"] == 1
    assert facts["model"]["parameters"] > facts["model"]["trainable_parameters"] > 0
    assert len(facts["data"]["fingerprints"]["train"]) == 32 and len(facts["data"]["template_sha256"]) == 64
    assert facts["data"] == json.loads((made[0] / "study/first/data.json").read_text())


def test_the_summary_adds_up_over_attempts(made, fragments):
    told = json.loads((made[0] / "study/first/summary.json").read_text())
    first, summary = (merged(records, "summary") for records in fragments)
    assert (first["run/status"], summary["run/status"]) == ("preempted", "finished")
    assert summary["run/restarts"] == 1 and summary["run/mode"] == "min"
    assert summary["run/device_hours"] == told["device_hours"] > first["run/device_hours"] > 0
    assert summary["run/cost"] == pytest.approx(2.5 * told["device_hours"])
    assert summary["run/best/value"] == told["best"]["value"] and summary["run/final/step"] == STEPS
    assert summary["run/throughput/tokens_per_second_per_device"] > 0
    assert summary["run/throughput/tokens_per_second_per_device_deviation"] > 0
    rows = read_metrics(made[0] / "study/first/metrics.jsonl")
    losses = [row["val/loss"] for row in rows if "val/loss" in row and row["step"] >= STOP]
    assert summary["val/loss"] == {"min": pytest.approx(min(losses)), "last": pytest.approx(losses[-1])}


def test_artifacts_refer_to_files_where_they_lie(made, fragments):
    run = made[0] / "study/first"
    found = {r["artifact"]["type"]: r["artifact"] for r in fragments[1] if r["type"] == "artifact"}
    assert found.keys() == {"dataset", "model", "checkpoints"}
    refs = {kind: {e["path"]: e for e in artifact["manifest"]["contents"]} for kind, artifact in found.items()}
    [data] = refs["dataset"].values()
    assert data["ref"] == f"file://{made[0]}/rows.jsonl"
    assert int(data["size"]) == (made[0] / "rows.jsonl").stat().st_size
    assert json.loads(found["dataset"]["metadata"])["fingerprints"]
    weights = refs["model"]["export/model.safetensors"]
    assert weights["ref"] == f"file://{run}/export/model.safetensors" and "stage.json" in refs["model"]
    assert "export_adapter/adapter_model.safetensors" in refs["model"]
    assert list(refs["checkpoints"]) == [path.name for path in (run / "checkpoints").iterdir()]
    assert not [r for r in fragments[0] if r["type"] == "artifact" and r["artifact"]["type"] != "dataset"]


def test_secrets_never_reach_wandb(made, fragments):
    """In the notes, the command, a scheduler's variable, an uncommitted change."""
    for records in fragments:
        assert SECRET not in json.dumps(records)
        assert one(records, "run")["notes"] == "used [redacted]"
    written = [path for path in (made[0] / "study").rglob("*") if path.is_file()]
    sent = [path.name for path in (made[0] / "study/first/wandb").rglob("files/*")]
    assert {"git.diff", "versions.json"} <= set(sent) and "wandb-metadata.json" not in sent
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path


def test_csv_stands_beside(made):
    run = made[0] / "study/first"
    tables = [path.read_text() for path in sorted(run.glob("csv/version_*/metrics.csv"))]
    assert len(tables) == 2 and all("train/loss" in table for table in tables)


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Name, step and value of each scalar in TensorBoard's files, as its own reader gives them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # all of them, not a sample
    events.Reload()
    return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def test_tensorboard_is_told_what_metrics_jsonl_is(made):
    run = made[0] / "study/first"
    attempts: list[dict[tuple[str, int], float]] = []
    for row in read_rows(run / "metrics.jsonl"):
        if row.get("event") == "start":
            attempts.append({})
            continue
        values = {name: value for name, value in row.items() if name not in ("step", "time")}
        attempts[-1] |= {(name, row["step"]): float(value) for name, value in values.items()}
    boards = [scalars(path) for path in sorted((run / "board").glob("version_*"))]
    assert len(boards) == len(attempts) == 2
    for board, rows in zip(boards, attempts, strict=True):
        board.pop(("hp_metric", 0))  # a placeholder of Lightning's
        assert board == pytest.approx(rows, rel=1e-6, nan_ok=True)  # 32 bits in TensorBoard's files
    losses = [[step for name, step in board if name == "train/loss"] for board in boards]
    assert losses == [list(range(STOP)), list(range(STOP, STEPS))]


def test_folders_of_deepspeed_and_its_config(made):
    run = made[0] / "zero"
    [records] = [inspected(path) for path in (run / "wandb").glob("offline-run-*")]
    named = one(records, "run")
    assert (named["run_id"], named["project"], named["run_group"]) == ("given123", "mine", "ours")
    assert named["display_name"] == "other"
    config = merged(records, "config")["facts"]["deepspeed"]
    assert config == json.loads((run / "deepspeed.json").read_text()) == made[1]["deepspeed"]["config"]
    assert config["zero_optimization"]["stage"] == 2
    found = {r["artifact"]["type"]: r["artifact"] for r in records if r["type"] == "artifact"}
    entries = [entry["path"] for entry in found["checkpoints"]["manifest"]["contents"]]
    assert len(entries) > 2 and all((run / "checkpoints" / path).is_file() for path in entries)


@pytest.mark.parametrize("trouble", ["killed", "full", "unwritable", "lost", "unreachable"])
def test_wandb_never_stops_a_run(made, trouble):
    folder, told = made
    rows = read_metrics(folder / trouble / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(STEPS))
    assert json.loads((folder / trouble / "summary.json").read_text())["status"] == "finished"
    warned = [line for line in told["stderr"][trouble].splitlines() if line.startswith("ptl: warning: W&B")]
    # A full disk and a lost network are the trouble of W&B's process, which says what it has to say.
    assert len(warned) == (trouble not in ("full", "lost"))
    assert SECRET not in told["stderr"][trouble]


def test_an_attempt_without_a_server_is_kept_for_a_sync(made):
    folder, told = made
    [path] = (folder / "unreachable/wandb").glob("offline-run-*")
    assert f"written offline: wandb sync {path}" in told["stderr"]["unreachable"]
    records = inspected(path)
    assert one(records, "run")["run_id"] == run_id(folder / "unreachable")
    losses = [r for r in records if r["type"] == "history" and "train/loss" in r["history"]["item"]]
    assert len(losses) == STEPS


def test_rows_behind_a_lost_network_are_kept_for_a_sync(made):
    folder, told = made
    assert "Timed out finishing run" in told["stderr"]["lost"]
    [path] = (folder / "lost/wandb").glob("run-*")
    losses = [r for r in inspected(path) if r["type"] == "history" and "train/loss" in r["history"]["item"]]
    assert len(losses) == STEPS


def test_a_trial_of_a_sweep_never_goes_on_in_the_folder_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "trialone")
    assert run_dir(Run(), "sft") == Path("runs/sweep123/trialone")
    monkeypatch.setenv("PTL_SWEEP_DIR", str(tmp_path / "study"))
    assert run_dir(Run(), "sft") == tmp_path / "study/trialone"
    assert make_run_id(tmp_path / "shared") == "trialone"
    monkeypatch.setenv("WANDB_RUN_ID", "trialtwo")
    command = [
        "fit",
        "-c",
        f"{ROOT}/configs/objective/sft.yaml",
        "--model.policy.name",
        "never",
        "--data.train.path",
        "x",
    ]
    command += ["--trainer.accelerator", "cpu", "--run.dir", f"{tmp_path}/shared", "--run.resume", "auto"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "is that of run trialone, and this is trial trialtwo of a sweep: leave --run.dir out" in said


def test_tags(monkeypatch):
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "alps")
    spec = ModelSpec(name="Qwen/Qwen2.5-1.5B", adapter=LoRA(rank=4), quantize="nf4")
    tags = run_tags(spec, ["/data/a.jsonl", "gym://sums?size=2", "owner/set", "/data/a.jsonl"], object())
    assert tags == ["Qwen/Qwen2.5-1.5B", "a.jsonl", "sums", "owner/set", "object", "lora", "nf4", "alps"]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="init_timeout must be above 0"):
        WandbRun(init_timeout=0)
    with pytest.raises(ValueError, match="upload must be nothing, adapter or export, got 'all'"):
        WandbRun(upload="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="settings got {'consol': 'off'}, expected fields of wandb.Settings"):
        WandbRun(settings={"consol": "off"})
    with pytest.raises(ValueError, match="price_per_device_hour must be 0 or more, got -1"):
        Throughput(price_per_device_hour=-1)


def test_without_wandb_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        WandbRun()


def test_a_rewound_run_says_so(tmp_path):
    class Diverge(Toy):
        def training_step(self, batch, batch_idx):
            raise RewindError("the loss is not finite")

    fit = trainer(tmp_path, [RunRecord(tmp_path)])
    with pytest.raises(RewindError):
        fit.fit(Diverge(), loader([packed([8], trained=4)]))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["mode"], summary["cost"]) == ("rewound", "min", None)
