"""The page under load: 20 annotators at once, 2,000 rankings, a SIGKILL of the server in the middle."""

import threading
import time
from http.client import HTTPConnection, HTTPException

import pytest

pytest.importorskip("uvicorn", reason="pip install -e '.[rank]'")

from tests.apps.rank_parts import exchange, ranks, read_rows, row, served, until, write_rows

ANNOTATORS, PROMPTS = 20, 100


class Annotator(threading.Thread):
    """Ranks every prompt. Sends a verdict again, with its key, until the server says that it is saved."""

    def __init__(self, number, port):
        super().__init__(daemon=True)
        self.number, self.port = number, port
        self.acknowledged, self.resent, self.failure = {}, 0, None
        self.connection = None

    def run(self):
        try:
            for place in range(PROMPTS):
                shown = self.insist("GET", f"/api/prompts/{place}?annotator=a{self.number}", None)
                shift = (self.number + place) % 4
                tiers = [[(shift + i) % 4] for i in range(4)]
                said = {"annotator": f"a{self.number}", "id": shown["id"], "key": f"key-{self.number:02}-{place:04}"}
                answer = self.insist("POST", "/api/rankings", {**said, "action": "rank", "tiers": tiers, "seconds": 1})
                self.acknowledged[shown["id"]] = (tiers, answer["revision"])
        except Exception as failure:  # shown by the test, which would otherwise see a missing row only
            self.failure = failure
        finally:
            if self.connection:
                self.connection.close()

    def insist(self, method, path, body):
        for _ in range(1000):
            try:
                self.connection = self.connection or HTTPConnection("127.0.0.1", self.port, timeout=20)
                status, _, answer = exchange(self.connection, method, path, body)
                assert status == 200, answer
                return answer
            except (OSError, HTTPException):
                self.connection.close()
                self.connection = None
                self.resent += 1
                time.sleep(0.02)
        raise AssertionError("the server did not come back")


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_the_server_is_killed_under_load(tmp_path):
    file = write_rows(tmp_path / "c.jsonl", [row(i) for i in range(PROMPTS)])
    out = tmp_path / "out.jsonl"
    with served(file, "--out", out) as first:
        people = [Annotator(number, first.port) for number in range(ANNOTATORS)]
        for person in people:
            person.start()
        until(lambda: sum(len(person.acknowledged) for person in people) >= ANNOTATORS * PROMPTS // 2, 60)
        first.kill()
        before = {(p.number, prompt) for p in people for prompt in list(p.acknowledged)}
        assert ANNOTATORS * PROMPTS // 2 <= len(before) < ANNOTATORS * PROMPTS  # it died in the middle
    with served(file, "--out", out, port=first.port) as second:
        for person in people:
            person.join(60)
        assert [person.failure for person in people] == [None] * ANNOTATORS
        assert sum(person.resent for person in people) >= ANNOTATORS / 2
        report = second.call("GET", "/api/agreement")[2]
        assert report["pairs"] == PROMPTS * ANNOTATORS * (ANNOTATORS - 1) // 2
        assert second.stop()[0] == 0
    rows = read_rows(out)  # refuses a torn line
    saved = {(line["annotator"], line["id"]): line for line in rows}
    assert len(rows) == len(saved) == len({line["key"] for line in rows}) == ANNOTATORS * PROMPTS
    for person in people:
        assert len(person.acknowledged) == PROMPTS
        for prompt, (tiers, revision) in person.acknowledged.items():
            line = saved[f"a{person.number}", prompt]
            assert (line["revision"], revision, line["status"]) == (1, 1, "ranked")
            assert [ranks(line)[line["order"][tier[0]]] for tier in tiers] == [1, 2, 3, 4]
