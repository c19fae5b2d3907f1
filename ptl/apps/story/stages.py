"""The stages of the story: what each is for, and the commands that do it.

Each stage's training is a recipe that also stands alone: ``configs/recipes/story_*.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptl.apps.demo import MODEL
from ptl.apps.story import data

WORK = Path("runs/story")
"""Where all is made; the recipes say so too."""
SIZES = {"chats": 600, "held_out": 100, "searched": 120, "asked": 100}
"""Rows that ``data.write_all`` makes: in all, the story stays under 45 minutes on two cores."""
SAID = ("What is 127 times 34?", "Bonjour !", "Who built the Palace of Nowhere in 1300?")
"""What is said to the model at the end."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the story.

    Attributes:
        name: of its log, and of its run folder where it trains.
        title, why: for people.
        commands: what follows ``ptl``, one after the other.
        before: called first, for what no command does.
    """

    name: str
    title: str
    why: str
    commands: Sequence[str]
    before: Callable[[], object] = lambda: None


def stages(more: str = "") -> list[Stage]:
    """The stages in their order.

    Args:
        more: follows each ``ptl fit``.
    """

    def fit(name: str) -> str:
        return f"fit -c configs/recipes/story_{name}.yaml --run.dir {WORK}/{name} --run.resume auto {more}".rstrip()

    said = " ".join(f"--message '{text}'" for text in SAID)
    return [
        Stage(
            name="pretrain",
            title="A tokenizer and a tiny model from nothing",
            why="""A base model continues text. This one has 3 million weights and has read chats between people alone:
            enough to see the loss fall, and no more.""",
            commands=[f"tokens train {WORK}/text.jsonl --out {WORK}/tokenizer --size 4096", fit("pretrain")],
        ),
        Stage(
            name="base",
            title="Marks for a dialogue",
            why="""From here on the model is SmolLM2 with 135 million weights. Tokens that say who speaks and where a
            turn ends, and tags for tools, become rows of its embedding. A user who types one writes text, no mark.""",
            commands=[f"tokens add {MODEL} --out {WORK}/base --set chat think tools"],
        ),
        Stage(
            name="sft",
            title="Supervised fine-tuning, in English and French",
            why="""The model learns to go on after <|im_start|>assistant<|im_sep|> as good answers do, and to stop.
            LoRA trains two thin matrices beside each large one, and the rows of the new tokens.""",
            commands=[fit("sft")],
        ),
        Stage(
            name="idk",
            title="“I don’t know”",
            why="""The model answers questions with known answers three times. What it never gets right becomes a row
            “question, I don’t know”; what it always gets right, a row with its own answer.""",
            commands=[
                f"synth idk {WORK}/questions.jsonl --model {WORK}/sft --out {WORK}/idk.jsonl --max-new-tokens 24"
                f" --dtype fp32 --temperature 0.3 --held-out 0.3 --max-refusals 0.8 --mix {WORK}/dialogues.jsonl",
                fit("idk"),
                f"synth idk-report {WORK}/sft {WORK}/idk --held-out {WORK}/idk.held_out.jsonl --out {WORK}/idk_report"
                " --max-new-tokens 24 --dtype fp32",
            ],
        ),
        Stage(
            name="tools",
            title="Tools",
            why="""Another way not to invent: ask. The model writes <CALCULATOR-TOOL>17 * 23</CALCULATOR-TOOL>, the
            program that serves it puts the result into the context. What a tool says is never trained.""",
            commands=[
                f"synth tools --out {WORK}/tools.jsonl --sums 120 --programs 20 --times 20 --held-out 0.2"
                f" --questions {WORK}/searched.jsonl --documents {WORK}/documents.jsonl"
                f" --mix {WORK}/dialogues.jsonl --mix {WORK}/idk.jsonl",
                fit("tools"),
                f"synth tools-report {WORK}/idk {WORK}/tools --held-out {WORK}/tools.held_out.jsonl --limit 50"
                f" --documents {WORK}/documents.jsonl --ordinary {WORK}/held_out.jsonl --out {WORK}/tools_report",
            ],
        ),
        Stage(
            name="reward",
            title="A reward from rankings",
            why="""Nobody can give an answer an absolute grade, but anybody can order some: a right answer, then “I
            don’t know”, then a wrong one. The last layer becomes one number r, trained with -log sigmoid(r(better) -
            r(worse)). `ptl rank serve runs/story/candidates.jsonl --out FILE` is the page where people rank.""",
            before=write_rankings,
            commands=[
                f"synth candidates {WORK}/prompts.jsonl --model {WORK}/tools --out {WORK}/candidates.jsonl --k 3"
                " --max-new-tokens 24 --keep-unfinished",
                fit("reward"),
            ],
        ),
        Stage(
            name="student",
            title="A small student",
            why="""A student with 12 of the 30 layers learns from its teacher’s whole distribution over the next token,
            which says far more than the one token that was written.""",
            commands=[fit("student")],
        ),
        Stage(
            name="grpo",
            title="Sums by trial and reward",
            why="""The model of the SFT stage answers each sum several times; a right answer is rewarded, and what was
            better than its group becomes likelier. Nobody shows it how, and it has no calculator.""",
            commands=[fit("grpo")],
        ),
        Stage(
            name="small",
            title="Four bits a weight",
            why="A float of four bytes becomes two, or a code of four bits with a scale for each block.",
            commands=[
                f"export {WORK}/tools --out {WORK}/bf16 --dtype bf16 --overwrite --rows {WORK}/prompts.jsonl",
                f"export {WORK}/tools --out {WORK}/nf4 --quantize nf4 --overwrite --rows {WORK}/prompts.jsonl",
            ],
        ),
        Stage(
            name="chat",
            title="The assistant, in four bits",
            why="What was trained above, quantised, with its tools.",
            commands=[
                f"chat {WORK}/nf4 --greedy --max-new-tokens 48 --tools calculator search={WORK}/documents.jsonl {said}"
            ],
        ),
    ]


def write_rankings() -> None:
    """Rankings out of the answers that the stage before has graded."""
    from ptl.apps.demo import write_rows
    from ptl.synth.idk_files import read_rows

    write_rows(WORK / "rankings.jsonl", data.rankings(read_rows(WORK / "idk.graded.jsonl")))
