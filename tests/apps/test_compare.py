"""``ptl compare`` over run folders: grouping, exact numbers, runs that failed, damaged logs, all its outputs, speed."""

import csv
import io
import json
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from ptl.apps.comparing import configs, rows, runs, summary, tables
from ptl.apps.comparing.curves import band
from ptl.apps.comparing.gather import find, read
from tests.apps.compare_parts import compared, ptl, runs_by_name, write_lines, write_run

HOUR = 3600


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two learning rates with two and three seeds, one of which failed."""
    top = tmp_path_factory.mktemp("study")
    write_run(top / "a0", lr=0.1, seed=0, losses=[1.0, 0.4])
    write_run(top / "a1", lr=0.1, seed=1, losses=[1.0, 0.6])
    write_run(top / "b0", lr=0.2, seed=0, losses=[2.0, 0.7, 0.9])
    write_run(top / "b1", lr=0.2, seed=1, losses=[2.0, 0.9, 1.1])
    write_run(top / "b2", lr=0.2, seed=2, losses=[2.0, "nan"], status="failed", error="DivergedError: loss is nan")
    return top


@pytest.fixture(scope="module")
def found(study):
    return compared(study, "--price", "3")


# ---- groups and numbers ----


def test_only_keys_that_differ_are_shown_and_seeds_make_a_group(found):
    assert found["keys"] == ["model.optimizer.lr"] and found["seeds"] == ["seed_everything"]
    assert [(group["tag"], group["config"]) for group in found["groups"]] == [
        ("A", {"model.optimizer.lr": 0.1}),
        ("B", {"model.optimizer.lr": 0.2}),
    ]


def test_means_and_deviations_are_over_runs_that_ended(found):
    first, second = (group["metrics"]["val/loss"] for group in found["groups"])
    assert first["final"] == {"mean": 0.5, "deviation": pytest.approx(math.sqrt(0.02)), "n": 2}
    assert second["final"] == {"mean": 1.0, "deviation": pytest.approx(math.sqrt(0.02)), "n": 2}
    assert second["best"] == {"mean": pytest.approx(0.8), "deviation": pytest.approx(math.sqrt(0.02)), "n": 2}


def test_a_failed_run_is_shown_with_its_reason_and_paid_for(found, study):
    group = found["groups"][1]
    assert group["status"] == {"finished": 2, "failed": 1} and group["complete"] == 2
    assert group["device_hours"] == pytest.approx(3 * 2 * 4) and group["cost"] == pytest.approx(72)
    failed = runs_by_name(found)["b2"]
    assert failed["metrics"]["val/loss"]["final"] == "nan" and failed["metrics"]["val/loss"]["low"] == 2.0
    printed = ptl("compare", study).stdout
    assert "2 finished, 1 failed" in printed and "b2 (group B): failed: DivergedError: loss is nan" in printed


def test_an_unfinished_run_is_told_and_its_time_counts_up_to_its_last_row(tmp_path):
    write_run(tmp_path / "going", status=None, devices=2)
    found = compared(tmp_path)
    run = found["runs"][0]
    assert (run["status"], run["step"], run["devices"]) == ("unfinished", 2, 2)
    assert run["facts"]["device_hours"] == pytest.approx(2 * 2 / HOUR)
    # Nothing of its group has ended: what there is is shown.
    assert found["groups"][0]["metrics"]["val/loss"]["final"]["mean"] == 0.5 and found["groups"][0]["complete"] == 0


def test_a_newer_attempt_that_goes_on_makes_a_finished_run_unfinished(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"event": "start", "attempt": 2, "time": 1000.0 + 10 * HOUR, "world_size": 4}) + "\n")
    run = compared(tmp_path)["runs"][0]
    assert run["status"] == "unfinished" and run["attempts"] == 2


def test_metrics_that_only_some_runs_have_show_a_dash(tmp_path):
    one = write_run(tmp_path / "one", lr=0.1)
    write_run(tmp_path / "two", lr=0.2)
    write_lines(one / "metrics.jsonl", [{"step": 0, "val/accuracy": 0.25}])
    table = ptl("compare", tmp_path, "--metric", "val/loss", "val/accuracy", "--markdown").stdout
    first, second = (line.split(" | ") for line in table.splitlines() if line.startswith(("| A |", "| B |")))
    assert first[3:7] == ["0.5000", "0.5000", "–", "–"] and second[3:7] == ["–", "–", "0.2500", "0.2500"]


def test_by_groups_by_one_key_and_says_what_varies_inside(study, tmp_path):
    for i in range(4):
        write_run(tmp_path / f"r{i}", lr=0.1 * (1 + i // 2), config={"data": {"max_length": 8 * (1 + i % 2)}})
    found = compared(tmp_path, "--by", "data.max_length")
    assert [group["config"] for group in found["groups"]] == [{"data.max_length": 8}, {"data.max_length": 16}]
    assert any("model.optimizer.lr" in note for note in found["notes"])
    wrong = ptl("compare", tmp_path, "--by", "data.max_lenght")
    assert wrong.returncode == 2 and "near it: data.max_length" in wrong.stderr


def test_runs_without_a_configuration_are_not_a_group_of_others(tmp_path):
    for name in ("a", "b", "c"):
        folder = write_run(tmp_path / name)
        if name != "c":
            (folder / "config.yaml").unlink()
    found = compared(tmp_path)
    assert len(found["groups"]) == 3 and found["keys"] == []
    assert any("Without a configuration" in note and "a, b" in note for note in found["notes"])


def test_flat_keys_are_those_of_the_command_line():
    tree = {"model": {"class_path": "a.SFT", "init_args": {"lr": 1.0, "betas": [1, 2]}}, "data": {"train": [{"p": 1}]}}
    flat = configs.flatten(tree)
    assert flat == {"model": "a.SFT", "model.lr": 1.0, "model.betas": [1, 2], "data.train.0.p": 1}
    text = "# note\na: 1\nmodel:\n  class_path: x\n  init_args:\n    p:\n    - q: 'w\n\n        e'\nb: [1, 2]\n"
    assert configs.parse_config(text) == {"a": 1, "model": "x", "model.p.0.q": "w\ne", "b": [1, 2]}
    assert configs.parse_config("a: &x {b: 1}\nc: *x\n") == {"a.b": 1, "c.b": 1}
    assert configs.parse_config("a: [\n") == {}


def test_numbers_of_one_value_are_equal_and_absent_keys_differ():
    assert configs.differing([{"a": 1, "b": 1}, {"a": 1.0, "b": 1, "c": 0}]) == ["c"]
    assert configs.differing([{"run.dir": "a", "x.cache_dir": 1}, {"run.dir": "b", "x.cache_dir": 2}]) == []


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("val/loss", "min"),
        ("val/accuracy", "max"),
        ("val/reward/mean", "max"),
        ("val/pass@1", "max"),
        ("val/reward_std", None),
        ("train/reward_loss", "min"),
        ("throughput/tokens_per_second", None),
    ],
)
def test_which_value_is_better_is_read_from_the_name(name, better):
    assert summary.direction(name) == better


def test_short_keys_tell_keys_apart():
    keys = ["model.optimizer.lr", "model.critic.lr", "data.train.0.weight", "data.train.1.weight", "x.seed"]
    assert list(summary.short_keys(keys).values()) == [
        "optimizer.lr",
        "critic.lr",
        "train.0.weight",
        "train.1.weight",
        "seed",
    ]


# ---- logs ----


def log_of(path):
    return rows.metrics_of(rows.read_log(path))


def test_numbers_that_json_lacks_keep_their_meaning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = [1.5, "inf", "nan", "-inf", 2, 1e300]
    write_lines(path, [{"step": i, "a": value, "note": "nan of words"} for i, value in enumerate(values)])
    steps, found = rows.read_log(path)["a"]
    np.testing.assert_array_equal(found, [1.5, math.inf, math.nan, -math.inf, 2, 1e300])
    np.testing.assert_array_equal(steps, range(6))
    metric = log_of(path)["a"]
    assert (metric.low, metric.high, metric.final, metric.points) == (1.5, 1e300, 1e300, 6)
    assert list(metric.curve.bucket) == [0, 4, 5]


@pytest.mark.parametrize("newline", [True, False])
@pytest.mark.parametrize("torn", ['{"step": 5, "val/lo', '"step": 5}', "\x00\x00\x00", "[1]", "{}"])
def test_a_torn_line_is_left_out_wherever_it_is(tmp_path, torn, newline):
    whole = [json.dumps({"step": i, "val/loss": float(i)}) for i in range(5)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*whole, torn]) + "\n" * newline)
    assert list(rows.read_log(path)["val/loss"][1]) == [0, 1, 2, 3, 4]
    path.write_text("\n".join([*whole[:2], torn, *whole[2:]]) + "\n" * newline)
    assert list(rows.read_log(path)["val/loss"][1]) == [0, 1, 2, 3, 4]


def test_rows_are_those_of_read_metrics(tmp_path):
    """Random logs of killed and resumed runs, with words among the numbers, against the slow reader."""
    from ptl.callbacks.jsonl import read_metrics

    random = np.random.default_rng(0)
    for number in range(20):
        lines, step = [], 0
        for _ in range(4):
            lines.append({"event": "start", "step": step, "time": 1.0})
            for done in range(step, step + int(random.integers(1, 30))):
                row = {"step": done, "epoch": None, "time": 2.0, "a": ("nan", "inf", "-inf", 2)[random.integers(4)]}
                lines.append({**row, "a": float(random.random())} if random.random() < 0.8 else row)
                if random.random() < 0.2:
                    lines.append({"step": done, "b": int(random.integers(9)), **({"w": "x"} if number % 2 else {})})
            step = int(random.integers(0, done + 1))
        path = tmp_path / "metrics.jsonl"
        write_lines(path, lines)
        points = rows.read_log(path)
        for name in ("a", "b"):
            kept = [(row["step"], float(row[name])) for row in read_metrics(path) if name in row]
            found = list(zip(*(part.tolist() for part in points[name]))) if name in points else []
            np.testing.assert_equal(found, kept)


def test_a_file_in_many_blocks_is_one_log(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "a": i / 7, **({"b": "long " * 90_000} if i == 50 else {})} for i in range(200)]
    lines.insert(150, {"event": "start", "step": 100})
    write_lines(path, lines)
    whole = rows.read_log(path)["a"]
    assert len(whole[0]) == 150 and whole[0][100] == 150  # the first attempt's steps 0 to 99, and 150 to 199
    monkeypatch.setattr(rows, "_BLOCK", 1000)
    for one, other in zip(whole, rows.read_log(path)["a"]):
        np.testing.assert_array_equal(one, other)


# ---- curves ----


def test_buckets_nest_and_means_are_exact():
    steps = np.arange(10_000)
    values = np.random.default_rng(0).random(10_000)
    fine = runs.metric(steps, values, runs.bucket_width(9_999)).curve
    assert fine.width == 64 and len(fine.bucket) == 157
    np.testing.assert_allclose(fine.mean[3], values[192:256].mean(), rtol=1e-12)
    coarse = runs.coarser(fine, 512)
    np.testing.assert_allclose(coarse.mean, [values[i : i + 512].mean() for i in range(0, 10_000, 512)], rtol=1e-12)
    np.testing.assert_allclose(coarse.step[0], 255.5)


def test_a_band_is_mean_and_deviation_over_runs_of_different_lengths():
    short = runs.metric(np.arange(4), np.array([1.0, 2, 3, 4]), 1).curve
    long = runs.metric(np.arange(6), np.array([3.0, 2, 5, 4, 9, 9]), 1).curve
    found = band([short, long])
    np.testing.assert_allclose(found.mean, [2, 2, 4, 4, 9, 9])
    np.testing.assert_allclose(found.deviation, [math.sqrt(2), 0, math.sqrt(2), 0, 0, 0])
    assert list(found.runs) == [2, 2, 2, 2, 1, 1]
    nothing = runs.metric(np.arange(2), np.array([math.nan, math.inf]), 1).curve
    assert band([nothing]) is None and band([]) is None


# ---- outputs ----


def test_all_pages_are_written_and_agree(study, tmp_path):
    done = ptl("compare", study, "--out", tmp_path / "out", "--price", "3")
    assert done.returncode == 0 and "compare.html" in done.stdout
    out = tmp_path / "out"
    names = {"compare.html", "compare.png", "compare.md", "compare.csv", "compare.json"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((out / "compare.json").read_text())
    lines = list(csv.DictReader(io.StringIO((out / "compare.csv").read_text())))
    assert [line["run"] for line in lines] == ["a0", "a1", "b0", "b1", "b2"]
    for line in lines:
        run = runs_by_name(told)[line["run"]]
        assert float(line["val/loss low"]) == run["metrics"]["val/loss"]["low"]
        assert float(line["cost"]) == pytest.approx(run["cost"]) and line["mfu"] == ""
    assert "| A | 0.1 | 2 finished | 0.50 ± 0.14 |" in (out / "compare.md").read_text()
    page = (out / "compare.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://(?!www\.w3\.org)|@import|url\(""", page)


def test_words_of_a_run_cannot_break_a_page(tmp_path):
    evil = "</script><script>alert(1)</script>|`\n"
    write_run(tmp_path / "in/x", status="failed", error=evil, config={"data": {"name": evil}})
    write_run(tmp_path / "in/y", config={"data": {"name": "z"}})
    assert ptl("compare", tmp_path / "in", "--out", tmp_path / "out").returncode == 0
    page = (tmp_path / "out/compare.html").read_text()
    assert page.count("</script>") == 3 and "alert(1)" in page
    tables = [line for line in (tmp_path / "out/compare.md").read_text().splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert len(set(cells[:4])) == len(set(cells[4:])) == 1 and any("alert" in line for line in tables)


def test_one_run_without_any_metric_is_compared(tmp_path):
    folder = write_run(tmp_path / "in/only")
    (folder / "metrics.jsonl").write_text("")
    done = ptl("compare", folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out/compare.png").exists() and "only" in (tmp_path / "out/compare.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "got no run"),
        (["nowhere"], "it is not there"),
        (["empty"], "it holds no run"),
        (["none-*"], "it is not there"),
        (["ok", "--metric", "val/los"], "such as val/loss"),
        (["ok", "--price", "-1"], "0 or more"),
        (["ok", "--price", "nan"], "0 or more"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, told):
    write_run(tmp_path / "ok")
    (tmp_path / "empty").mkdir()
    done = ptl("compare", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ptl compare: error: ") and told in done.stderr


def test_patterns_parents_and_repeats_name_each_run_once(tmp_path):
    for name in ("g/a", "g/b", "h/a"):
        write_run(tmp_path / name)
    (tmp_path / "g/a/checkpoints").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "g")
    found = compared("g/*", "g", "h/a", ".", cwd=tmp_path)
    assert sorted(run["name"] for run in found["runs"]) == ["b", "g/a", "h/a"]


def test_an_unreadable_run_stands_beside_the_others(tmp_path):
    write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad")
    (bad / "metrics.jsonl").unlink()
    (bad / "metrics.jsonl").mkdir()
    found = compared(tmp_path)
    assert runs_by_name(found)["bad"]["status"] == "unreadable" and len(found["runs"]) == 2


def test_text_of_numbers_can_be_read_beside_each_other():
    assert tables.with_deviation(5.584001, 0.00062478) == "5.58400 ± 0.00062"
    assert tables.with_deviation(4422.1, 1787.7) == "4,422 ± 1,788"
    assert tables.with_deviation(1.0, 0.0) == "1.000 ± 0.000"
    assert [tables.number(value) for value in (None, math.nan, 0.0, 1.23456, 12345.6, 1e-9)] == [
        "–", "nan", "0.000", "1.235", "12,346", "1.000e-09",
    ]  # fmt: skip


def test_a_narrow_terminal_keeps_the_first_metric(study, monkeypatch):
    monkeypatch.setenv("PTL_TEST_COLUMNS", "70")
    lines = ptl("compare", study).stdout.splitlines()
    assert max(map(len, lines[:6])) <= 70 and "val/loss final" in lines[2] and "more columns" in "".join(lines)


def test_unlike_runs_fit_a_terminal_with_as_much_of_what_differs_as_there_is_room_for():
    keys = [f"key_{i}" for i in range(40)]
    titles = ["group", *keys, "runs", "val/loss final", "val/loss best", "tokens/s/device"]
    rows = [[tag, "x" * 60, *map(str, range(39)), "1 finished", "1.622", "1.621", "300"] for tag in "AB"]
    table, left_out = tables.fitting(tables.Table(titles, rows, 42), 100)
    assert table.titles == ["group", *keys[:3], "runs", "val/loss final", "val/loss best"]
    assert left_out == 38 and table.words == 5
    assert table.rows[0] == ["A", "x" * 60, "0", "1", "1 finished", "1.622", "1.621"]


def test_a_wide_terminal_has_all_columns(study, monkeypatch):
    monkeypatch.setenv("PTL_TEST_COLUMNS", "300")
    said = ptl("compare", study).stdout
    assert "more columns" not in said and "device-hours" in said


def test_help_needs_neither_numpy_nor_wandb():
    code = "import sys; from ptl import cli; cli.main(['compare', '--help']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "--price" in out
    for name in ("numpy", "torch", "wandb", "matplotlib", "pyarrow", "yaml"):
        assert f"'{name}'" not in out


# ---- speed ----


def test_reading_is_several_times_faster_than_json_line_by_line(tmp_path):
    """The same rows, the same machine, the same process: 40 runs of 1,000 points."""
    random = np.random.default_rng(0)
    for number in range(40):
        folder = write_run(tmp_path / f"r{number}", lr=number // 3, seed=number % 3)
        values = random.random((1000, 3)).tolist()
        names = ("train/loss", "health/grad_norm", "lr-AdamW")
        write_lines(folder / "metrics.jsonl", [{"step": i, "time": 1e9 + i, **dict(zip(names, row))}
                                               for i, row in enumerate(values)])  # fmt: skip
    began = time.process_time()
    found = read(find([str(tmp_path)]))
    whole = time.process_time() - began
    began = time.process_time()
    for number in range(40):
        [json.loads(line) for line in (tmp_path / f"r{number}/metrics.jsonl").read_text().splitlines()]
    plain = time.process_time() - began
    assert len(found) == 40 and all(run.metrics["train/loss"].points == 1000 for run in found)
    # Configurations, groups of attempts and curves included; json alone takes longer.
    assert whole < 1.5 * plain
