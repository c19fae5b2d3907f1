"""``ptl rank serve`` as a person starts it: refusals on one line, a clean end, what it prints, what it loads."""

import socket
import subprocess
import sys

import pytest

pytest.importorskip("uvicorn", reason="pip install -e '.[rank]'")

from ptl.apps import rank
from tests.apps.rank_parts import START, read_rows, row, served, write_rows


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "candidates.jsonl", [row(i) for i in range(2)])


def refused(capsys, *arguments):
    assert rank.main(["serve", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("ptl rank: error: ") and told.count("\n") == 1
    return told


def test_a_bad_line_is_named(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "q", "completions": ["a", "b"]}\n{"prompt": "q"}\n')
    assert f"{path}:2: missing_key: the row has no completions" in refused(capsys, path)
    assert not (tmp_path / "c.rankings.jsonl").exists()


def test_wrong_arguments_are_named(file, tmp_path, capsys):
    assert "No such file" in refused(capsys, tmp_path / "none.jsonl")
    assert "is the file that is ranked" in refused(capsys, file, "--out", file)
    assert "--annotator ' '" in refused(capsys, file, "--annotator", " ")
    assert "--port 70000" in refused(capsys, file, "--port", 70000)
    assert "--host no.such.host.invalid" in refused(capsys, file, "--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port 0 takes a free one" in refused(capsys, file, "--port", taken.getsockname()[1])
    assert rank.main(["serve", str(file), "--frobnicate"]) == 2 and rank.main([]) == 2


def test_a_missing_package_is_named_with_the_line_that_installs_it(file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'ptl[rank]'" in refused(capsys, file)


def test_it_serves_says_where_and_ends_cleanly_on_ctrl_c(file, tmp_path):
    with served(file) as server:
        out = tmp_path / "candidates.rankings.jsonl"
        assert f"rankings go to {out} (0 there" in server.said and server.url == f"http://127.0.0.1:{server.port}/"
        said = {"annotator": "ada", "id": "q1", "key": "key-12345", "action": "rank", "tiers": [[0], [1]], "seconds": 1}
        assert server.call("POST", "/api/rankings", said)[0] == 200
        code, told, errors = server.stop()
        assert (code, errors) == (0, "") and "rankings of 1 prompts" in told
        assert [line["id"] for line in read_rows(out)] == ["q1"]
    with served(file, "--out", tmp_path / "new" / "r.jsonl", "--annotator", "Ada") as server:
        assert server.call("GET", "/api/session")[2]["annotator"] == "Ada"
        for path in ("/../../../../etc/passwd", "/app.js/../../store.py", "//etc/passwd", "/page.css%00.jsonl"):
            assert server.call("GET", path)[0] == 404
    with served(file) as server:
        assert "1 there, of 1 annotators" in server.said
        again = [sys.executable, "-c", START, "serve", str(file), "--port", "0"]
        taken = subprocess.run(again, capture_output=True, text=True, timeout=60)
        assert taken.returncode == 2 and "another ptl rank serve" in taken.stderr


def test_an_address_that_others_reach_needs_the_token_that_is_printed(file):
    with served(file, "--host", "0.0.0.0") as server:
        token = server.url.partition("?token=")[2]
        assert len(token) >= 32 and server.said.count(token) == 1
        assert server.call("GET", "/api/session")[0] == 403
        assert server.call("GET", f"/api/session?token={token}")[0] == 200
        status, headers, _ = server.call("GET", f"/?token={token}")
        assert status == 200
        cookie = headers["set-cookie"].partition(";")[0]
        assert server.call("GET", "/app.js", Cookie=cookie)[0] == 200
        other = server.call("GET", "/", Cookie=cookie, Host="evil.example")
        assert other[0] == 403
    with served(file, "--host", "0.0.0.0") as server:
        assert token not in server.url


def test_the_command_does_not_load_torch_and_its_help_no_server(file):
    check = (
        "import sys; from ptl.apps.rank import main; main(['serve', '--help']); "
        "assert not {'starlette', 'uvicorn', 'markdown_it', 'torch', 'numpy'} & set(sys.modules); "
        "import ptl.apps.ranking.server; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--annotator" in done.stdout and "--seed" in done.stdout
