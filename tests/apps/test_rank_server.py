"""The page's server without a browser: what it shows, what it saves, whom and what it refuses."""

import json
import re
from importlib.resources import files

import pytest

pytest.importorskip("starlette", reason="pip install -e '.[rank]'")

from starlette.testclient import TestClient

from ptl.apps.guard import LARGEST, Door
from ptl.apps.ranking import server
from ptl.apps.ranking.prompts import read_items
from ptl.apps.ranking.server import Session, build_app
from ptl.apps.ranking.store import Store
from tests.apps.rank_parts import ranks, read_rows, row, write_rows

HOME = "http://127.0.0.1:8000"
TOKEN = "the-token-of-this-test"


class Page:
    """A client of an app over some rows."""

    def __init__(self, folder, rows, door=None, **session):
        self.out = folder / "out.jsonl"
        self.items = read_items(write_rows(folder / "c.jsonl", rows))
        self.store = Store(self.out, self.items)
        app = build_app(Session(self.items, self.store, **session), door)
        self.client = TestClient(app, base_url=HOME)

    def prompt(self, place=0, annotator="ada"):
        return self.client.get(f"/api/prompts/{place}", params={"annotator": annotator})

    def post(self, *, headers=None, **body):
        said = {"annotator": "ada", "id": "q0", "key": "key-12345", "action": "rank", "seconds": 3.25, **body}
        return self.client.post("/api/rankings", json=said, headers=headers)


@pytest.fixture
def page(tmp_path):
    return Page(tmp_path, [row(i) for i in range(3)])


# ---- what is shown ----


def test_answers_are_shown_shuffled_and_without_anything_that_tells_them_apart(page):
    shown = page.prompt().json()
    order = page.items[0].order(0, "ada")
    assert [answer[0]["html"] for answer in shown["answers"]] == [f"<p>answer {i} to 0</p>\n" for i in order]
    assert order != (0, 1, 2, 3)
    text = page.prompt().text
    assert "secret-model" not in text and "seed" not in text and "meta" not in text and "order" not in text


def test_a_rank_lands_on_the_answer_that_was_ranked(page):
    order = page.items[0].order(0, "ada")
    assert page.post(tiers=[[2], [0, 3]]).json()["revision"] == 1
    (line,) = read_rows(page.out)
    expected = [None] * 4
    expected[order[2]], expected[order[0]], expected[order[3]] = 1, 2, 2
    assert ranks(line) == expected and line["order"] == list(order) and line["seconds"] == 3.2
    assert page.prompt().json()["last"] == {"status": "ranked", "flag": None, "tiers": [[2], [0, 3]]}


def test_ranks_after_a_tie_count_the_answers_above(page):
    page.post(tiers=[[0, 1], [2], [3]])
    assert sorted(ranks(read_rows(page.out)[0])) == [1, 1, 3, 4]


def test_skips_and_flags_are_told_from_rankings(page):
    page.post(action="skip", tiers=[[0], [1]])
    page.post(action="flag", id="q1", key="key-23456", flag="unsafe", note="  see the end ", tiers=[[1], [0]])
    page.post(action="flag", id="q2", key="key-34567", flag="other")
    skipped, flagged, bare = read_rows(page.out)
    assert (skipped["status"], skipped["flag"], ranks(skipped)) == ("skipped", None, [None] * 4)
    assert (flagged["status"], flagged["flag"], bare["flag"]) == ("flagged", "unsafe: see the end", "other")
    assert sorted(rank for rank in ranks(flagged) if rank) == [1, 2]


def test_each_annotator_goes_on_where_they_stopped(page):
    def progress(name):
        return page.client.get("/api/session", params={"annotator": name}).json()["progress"]

    assert progress("ada") == {"done": 0, "next": 0, "seconds": None}
    first = page.post(tiers=[[0], [1]]).json()["progress"]
    assert first == {"done": 1, "next": 1, "seconds": 3.2}
    page.post(id="q2", key="key-2-of-ada", action="skip", seconds=5)
    assert progress("ada")["next"] == 1 and progress("bo")["next"] == 0
    last = page.post(id="q1", key="key-3-of-ada", action="skip", seconds=1).json()["progress"]
    assert (last["done"], last["next"]) == (3, None)


def test_one_name_however_it_was_typed(page):
    page.post(annotator=" e\u0301lodie ", tiers=[[0], [1]])
    assert read_rows(page.out)[0]["annotator"] == "\u00e9lodie"
    assert page.prompt(annotator="\u00e9lodie").json()["last"]["status"] == "ranked"


def test_a_fixed_annotator_is_the_only_one(tmp_path):
    page = Page(tmp_path, [row(0)], annotator="Ada", lang="fr")
    session = page.client.get("/api/session").json()
    assert (session["annotator"], session["lang"], session["progress"]["next"]) == ("Ada", "fr", 0)
    page.post(annotator="bo", tiers=[[0], [1]])
    assert read_rows(page.out)[0]["annotator"] == "Ada"


def test_agreement_of_those_who_ranked_the_same(page):
    for number, (name, best) in enumerate({"ada": 0, "bo": 0, "cy": 1}.items()):
        order = page.items[0].order(0, name)
        tiers = [[order.index(best)], [order.index(1 - best)]]
        page.post(annotator=name, key=f"key-1234{number}", tiers=tiers)
    report = page.client.get("/api/agreement").json()
    assert (report["pairs"], report["prompts"], report["tau"]) == (3, 1, pytest.approx(-1 / 3))


# ---- a request sent twice, a disk that is full ----


def test_a_post_that_is_sent_again_is_one_row(page):
    answers = [page.post(tiers=[[0], [1]]) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3 and len(read_rows(page.out)) == 1
    reused = page.post(id="q1", tiers=[[0], [1]])
    assert reused.status_code == 409 and len(read_rows(page.out)) == 1


def test_a_disk_that_refuses_is_told_and_nothing_is_acknowledged(page, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(page.store, "_append", refuse)
        answer = page.post(tiers=[[0], [1]])
        assert answer.status_code == 507 and "No space left" in answer.json()["error"]
    assert page.post(tiers=[[0], [1]]).status_code == 200 and len(read_rows(page.out)) == 1


# ---- who says what ----


def test_turns_reasoning_and_calls_are_shown_escaped(tmp_path):
    call = {"type": "function", "function": {"name": "<b>", "arguments": {"q": "</code>"}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "<i>"},
        {"role": "assistant", "content": "done", "reasoning_content": "<u>hm</u>"},
    ]
    page = Page(tmp_path, [{"prompt": "q", "system": "be kind", "completions": [turns, turns]}])
    shown = page.prompt().json()
    assert [turn["role"] for turn in shown["prompt"]] == ["system", "user"]
    called, tool, said = shown["answers"][0]
    assert "&lt;b&gt;" in called["html"] and "&lt;/code&gt;" in called["html"]
    assert tool["html"] == "<p>&lt;i&gt;</p>\n" and said["reasoning"] == "<p>&lt;u&gt;hm&lt;/u&gt;</p>\n"


# ---- who may talk to it ----


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/session", "/api/prompts/0?annotator=a", "/nothing"])
def test_every_answer_has_the_headers_that_keep_a_page_safe(path, page):
    headers = page.client.get(path).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" == policy["style-src"]
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"] and "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:8000", True),
        ("localhost:9999", True),  # an SSH tunnel
        ("[::1]:8000", True),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("192.168.0.7:8000", False),
        ("", False),
        ("[::1", False),
    ],
)
def test_only_the_names_of_the_loopback_address_are_answered(host, allowed, page):
    for path in ("/", "/api/session"):
        assert page.client.get(path, headers={"host": host}).status_code == (200 if allowed else 403)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": HOME}, 200),
        ({"origin": HOME, "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_another_site_cannot_post(headers, status, page):
    assert page.post(headers=headers, tiers=[[0], [1]]).status_code == status
    assert len(read_rows(page.out)) == (status == 200)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(method, page):
    assert page.client.request(method, "/api/rankings").status_code == 405


def test_the_token_opens_every_path_and_nothing_opens_without_it(tmp_path):
    door = Door(loopback=False, names=frozenset({"rank.lab"}), token=TOKEN, cookie="ptl_rank_8000")
    page = Page(tmp_path, [row(0)], door)
    for path in ("/", "/app.js", "/api/session", "/api/prompts/0?annotator=a", "/nothing"):
        for wrong in ("", "token=", "token=wrong", f"token={TOKEN}x", f"token={TOKEN[:-1]}", "token=%ff"):
            answer = page.client.get(path + ("&" if "?" in path else "?") + wrong)
            assert answer.status_code == 403 and "set-cookie" not in answer.headers and TOKEN not in answer.text
    assert page.post(tiers=[[0], [1]]).status_code == 403
    opened = page.client.get(f"/?token={TOKEN}", headers={"host": "rank.lab:8000"})
    cookie = opened.headers["set-cookie"]
    assert opened.status_code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    brought = {"cookie": cookie.partition(";")[0]}
    assert page.client.get("/api/session", headers=brought).status_code == 200
    assert page.post(tiers=[[0], [1]], headers=brought).status_code == 200
    assert page.client.get("/", headers={**brought, "host": "evil.example"}).status_code == 403
    assert page.client.get("/", headers={"cookie": "ptl_rank_8000=wrong"}).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/../../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/server.py",
        "/page/app.js",
        "//etc/passwd",
        "/c.jsonl",
        "/out.jsonl",
        "/api/prompts/../../server.py",
        "/api/prompts/-1",
        "/api/prompts/3?annotator=a",
        "/api/prompts/99999999999999999999?annotator=a",
    ],
)
def test_no_path_of_the_disk_is_reachable(path, page):
    answer = page.client.get(path)
    assert answer.status_code == 404 and "root:" not in answer.text and "import" not in answer.text


def test_the_files_served_are_those_of_the_page():
    folder = {entry.name for entry in files("ptl.apps.ranking").joinpath("page").iterdir()}
    assert folder == {name for name, _ in server.PAGES.values()}


def test_the_page_asks_nothing_of_another_machine():
    for entry in files("ptl.apps.ranking").joinpath("page").iterdir():
        text = entry.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, entry.name
        if entry.name.endswith(".html"):  # inline code would be refused by the page's own policy
            assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text), entry.name


def test_both_languages_have_the_same_words():
    text = files("ptl.apps.ranking").joinpath("page", "words.js").read_text(encoding="utf-8")
    english, french = (re.findall(r"^    (\w+): (?:\((.*?)\) =>)?", part, re.M) for part in text.split("\n  fr: {"))
    assert english == french and len(english) > 50


# ---- what a request may hold ----


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"tiers": [[0]]}, 400, "rank two answers"),
        ({"tiers": []}, 400, "rank two answers"),
        ({"tiers": [[0], [0]]}, 400, "at most once"),
        ({"tiers": [[0, 4]]}, 400, "0 to 3"),
        ({"tiers": [[0, -1]]}, 400, "0 to 3"),
        ({"tiers": [[0, True]]}, 400, "0 to 3"),
        ({"tiers": [[0], []]}, 400, "list of lists"),
        ({"tiers": "01"}, 400, "list of lists"),
        ({"tiers": [["0", "1"]]}, 400, "0 to 3"),
        ({"tiers": [[0], [1]], "action": "erase"}, 400, "action is 'erase'"),
        ({"tiers": [[0], [1]], "action": ["rank"]}, 400, "action is"),
        ({"tiers": [[0], [1]], "id": "q9"}, 404, "no prompt"),
        ({"tiers": [[0], [1]], "id": 0}, 404, "no prompt"),
        ({"tiers": [[0], [1]], "id": ["q0"]}, 404, "no prompt"),
        ({"tiers": [[0], [1]], "key": "short"}, 400, "key"),
        ({"tiers": [[0], [1]], "key": None}, 400, "key"),
        ({"tiers": [[0], [1]], "annotator": " "}, 400, "annotator"),
        ({"tiers": [[0], [1]], "annotator": "a" * 61}, 400, "annotator"),
        ({"tiers": [[0], [1]], "annotator": "a\nb"}, 400, "annotator"),
        ({"tiers": [[0], [1]], "annotator": None}, 400, "annotator"),
        ({"tiers": [[0], [1]], "seconds": -1}, 400, "seconds"),
        ({"tiers": [[0], [1]], "seconds": "1"}, 400, "seconds"),
        ({"action": "flag", "flag": "dislike"}, 400, "flag is 'dislike'"),
        ({"action": "flag", "flag": ["other"]}, 400, "flag is"),
        ({"action": "flag", "flag": "other", "note": "n" * 301}, 400, "note"),
    ],
)
def test_a_bad_verdict_is_refused_with_its_reason_and_not_saved(body, status, told, page):
    answer = page.post(**body)
    assert answer.status_code == status and told in answer.json()["error"]
    assert read_rows(page.out) == []


@pytest.mark.parametrize("body", ["", "{", "[1]", '"x"', "[" * 20_000, '{"annotator": "\\ud800"}', '{"seconds": NaN}'])
def test_a_body_that_is_no_verdict_is_refused(body, page):
    answer = page.client.post("/api/rankings", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404) and answer.json()["error"]


def test_a_body_that_is_too_large_is_not_read(page):
    assert page.post(tiers=[[0], [1]], pad="x" * (LARGEST - 500)).status_code == 200
    assert page.post(id="q1", tiers=[[0], [1]], pad="x" * LARGEST).status_code == 413
    taken = []

    def endless():
        for _ in range(10_000):
            taken.append(1)
            yield b"x" * 10_000

    headers = {"content-type": "application/json"}
    assert page.client.post("/api/rankings", content=endless(), headers=headers).status_code == 413
    assert json.loads(page.out.read_text())["id"] == "q0"
