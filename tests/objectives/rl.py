"""Tiny tasks for the tests of GRPO and PPO: real fits, with real rewards, on models that learn in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptl.rewards.base import Completion, Outcome, Reward
from tests import tiny
from tests.objectives import law

LETTERS = "abcdefghijklmnopqrst"


def word_tokenizer(words: Sequence[str]):
    """A word, a token; a question is followed by ``?``, and an answer ends with ``<|im_end|>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|im_end|>", "?", *words, "..."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="..."))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '? ' }}{% endif %}"
    )
    return tokenizer


class Echo(Reward):
    """The share of an answer's places that hold the prompt's letter, of four; nothing else counts."""

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [
            sum(word == completion.prompt.answer for word in completion.text.split()[:4]) / 4
            for completion in completions
        ]


def echo_folder(folder: Path) -> Path:
    """A folder with the tokenizer, a tiny model's configuration and the prompts."""
    tokenizer = word_tokenizer([*LETTERS, "u"])
    tiny.save_folder(folder / "model", tokenizer, tie=False)
    rows = [{"prompt": letter, "answer": letter} for letter in LETTERS[:16]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_rows(path: Path, count: int = 8 * law.STEPS, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged prompts of one or more turns, each with an answer."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(law.WORDS, k=rng.randint(least, most)))

    rows = []
    for index in range(count):
        prompt: list[dict[str, Any]] = []
        if index % 3 == 0:
            prompt = [{"role": "user", "content": words(1, 6)}, {"role": "assistant", "content": words(1, 6)}]
        prompt.append({"role": "user", "content": words(1, 8)})
        rows.append({"prompt": prompt, "answer": rng.choice(law.WORDS)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


class Vowels(Reward):
    """A reward that any answer has and that differs: the share of an answer's bytes that are vowels."""

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [sum(c in "aeiou" for c in one.text) / max(1, len(one.text)) for one in completions]


class Coarse(Reward):
    """1 for answers of an even number of words, so that many groups agree."""

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [float(len(one.text.split()) % 2 == 0) for one in completions]


def data_of(folder: str, view: Any, *, micro: int, rows: str = "rows.jsonl", layout: str = "packed", **options: Any):
    from ptl.data.module import ChatDataModule, Preparation
    from ptl.data.sources import Source

    data = ChatDataModule(
        [Source(path=f"{folder}/{rows}")],
        max_length=options.pop("max_length", 256),
        layout=layout,  # pyright: ignore
        micro_batch_size=micro,
        preparation=Preparation(cache_dir=f"{folder}/cache", num_proc=1),
        **options,
    )
    data.bind(view=view, tokenizer=f"{folder}/model")
    return data


def flat_weights(module: Any) -> np.ndarray:
    """All trained weights as one vector."""
    return law.flat({k: v.detach() for k, v in module.state_dict(keep_vars=True).items() if v.requires_grad})


def make_folder(folder: Path, **shape: int) -> Path:
    """A tiny language model whose answers differ in length, another model as a reference, and prompts."""
    # Of so few words the one that ends an answer is drawn often, so that lengths are ragged and some answers are cut.
    tokenizer = word_tokenizer([*law.WORDS, "a", "e", "io"])
    for name, seed in (("model", 0), ("reference", 3)):
        tiny.save_folder(folder / name, tokenizer, seed=seed, tie=False, initializer_range=0.2, **shape)
    rows = write_rows(folder / "rows.jsonl")
    (folder / "partial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-3]))
    return folder


def build(
    folder: str,
    *,
    micro: int = 1,
    lora: bool = False,
    kind: str = "dapo",
    kl: float = 0.0,
    reference: str | None = None,
    placement: str = "replica",
    layout: str = "packed",
    share: bool = True,
    minibatches: int = 1,
    epochs: int = 1,
    rows: str = "rows.jsonl",
    lr: float = 0.5,
    rollout: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    sgd: bool = True,
    coarse: bool = False,
    data: dict[str, Any] | None = None,
    **options: Any,
):
    """GRPO and its data module, with SGD and four ragged answers to a prompt."""
    from ptl.functional.policy_loss import PolicyLoss
    from ptl.models.optimizer import Optimizer, Schedule
    from ptl.models.spec import LoRA, ModelSpec
    from ptl.models.teachers import Teacher
    from ptl.objectives.grpo import GRPO
    from ptl.rollout.selfcheck import SelfCheck
    from ptl.rollout.settings import Rollout

    adapter = LoRA(rank=4, alpha=8) if lora else None
    held_to = Teacher(model=ModelSpec(name=f"{folder}/{reference}"), placement=placement) if reference else None  # pyright: ignore
    settings: dict[str, Any] = {"group_size": 4, "max_new_tokens": 12, "share_prompt": share, **(rollout or {})}
    objective = GRPO(
        ModelSpec(name=f"{folder}/model", adapter=adapter),
        options.pop("rewards", None) or [Coarse() if coarse else Vowels()],
        rollout=Rollout(minibatches=minibatches, epochs=epochs, **settings),
        loss=PolicyLoss(kind=kind, kl=kl, **(loss or {})),  # pyright: ignore
        reference=held_to,
        optimizer=Optimizer(kind="sgd" if sgd else "adamw", lr=lr),
        schedule=Schedule(kind="constant", warmup=0),
        self_check=options.pop("self_check", SelfCheck(min_finished=0.0)),
        **options,
    )
    module = data_of(folder, objective.view, micro=micro, rows=rows, layout=layout, **(data or {}))
    return objective, module


class Recorder:
    """Writes every rollout that a rank samples: one JSON line of groups."""

    def __new__(cls, path: Path) -> Any:
        import lightning as L

        class Recording(L.Callback):
            def __init__(self) -> None:
                self.seen: set[tuple[int, int]] = set()

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                buffer = pl_module.rollouts.buffer
                if buffer.key in self.seen:
                    return
                self.seen.add(buffer.key)
                groups = [
                    {
                        "position": group.position,
                        "window": group.window,
                        "prompt": group.prompt.tolist(),
                        "answers": [answer.ids.tolist() for answer in group.answers],
                        "finished": [answer.finished for answer in group.answers],
                        "rewards": [answer.reward for answer in group.answers],
                    }
                    for group in sorted(buffer.groups, key=lambda group: group.position)
                ]
                with path.open("a") as stream:
                    stream.write(json.dumps({"key": buffer.key, "count": buffer.count, "groups": groups}) + "\n")

        return Recording()


def watch(*names: str) -> Any:
    """A callback whose ``rows`` hold the logged metrics of each step: a module logs after callbacks have looked."""
    import lightning as L

    class Watch(L.Callback):
        def __init__(self) -> None:
            self.rows: list[tuple[float, ...]] = []

        def _look(self, trainer: Any) -> None:
            if trainer.global_step > len(self.rows):
                self.rows.append(tuple(float(trainer.callback_metrics[name]) for name in names))

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            self._look(trainer)

        def on_train_end(self, trainer: Any, *args: Any) -> None:
            self._look(trainer)

    return Watch()


def trained(folder: str, *args: Any, record: str | None = None, **options: Any) -> np.ndarray:
    """The trainable weights after an epoch; what was sampled goes to the file ``record``. See ``law.trained``."""
    callbacks = [Recorder(Path(record))] if record else []
    return law.trained(folder, *args, make=build, callbacks=callbacks, **options)


def run(folder: str, out: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Entry point of a rank; see ``law.run``."""
    return law.run(folder, out, cases, train=trained)
