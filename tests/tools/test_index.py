import json

import pytest

from ptl.tools.index import PASSAGE, index_of, search


@pytest.fixture
def documents(tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "towers.md").write_text("# Towers\n\nThe Eiffel tower was built in 1889.\n\nIt is in Paris.")
    rows = [{"title": "Éclair", "text": "Un éclair est une pâtisserie."}, {"title": "Rome", "text": "Rome is old."}]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def test_the_best_passage_comes_first(documents):
    index = str(index_of(documents))
    assert search("when was the EIFFEL tower built?", index).splitlines()[0].startswith("[1] towers: The Eiffel")
    assert "pâtisserie" in search("eclair patisserie", index)  # accents do not matter
    assert search("zebra", index) == "No passage was found."


def test_an_index_is_made_once_and_again_when_a_document_changes(documents):
    first = index_of(documents)
    made = first.stat().st_mtime_ns
    assert index_of(documents) == first and first.stat().st_mtime_ns == made
    (documents / "towers.md").write_text("Now something else entirely.")
    assert index_of(documents) != first
    assert "something else" in search("entirely", str(index_of(documents)))


@pytest.mark.parametrize("query", ['"', "a AND", "NEAR(", "title:x", "x*", "'; DROP TABLE passages; --", "ok\x00"])
def test_signs_of_the_query_language_are_only_text(documents, query):
    index = str(index_of(documents))
    try:
        search(query, index)
    except ValueError as mistake:
        assert "no word" in str(mistake)
    assert "1889" in search("Eiffel", index)


def test_long_paragraphs_are_cut_between_sentences(documents):
    sentence = "This sentence is about nothing at all but it is quite long indeed. "
    (documents / "towers.md").write_text(sentence * 60 + "The needle is here.")
    found = search("needle", str(index_of(documents)))
    assert "The needle is here." in found and len(found.splitlines()[0]) <= PASSAGE + 20


def test_nothing_to_search_is_refused(tmp_path, documents):
    with pytest.raises(ValueError, match="there are no documents at"):
        index_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no documents"):
        index_of(tmp_path / "empty")
    (documents / "more.jsonl").write_text(json.dumps({"body": "x"}))
    with pytest.raises(ValueError, match=r"more.jsonl:1 has no text"):
        index_of(documents)
