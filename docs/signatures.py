"""The reference of configuration, out of the typed signatures that are its schema.

``python -m docs.signatures`` writes the pages of docs/reference/ that begin with ``NOTE``. They are committed, so that
they read on a code host too; tests/docs/test_reference.py says when they are behind the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import docstring_parser

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by `python -m docs.signatures` from the code. -->"


class Page(NamedTuple):
    """A page of the reference.

    Attributes:
        title: of the page.
        text: what stands above the classes.
        classes: dotted path -> its keys in a configuration, with ``of`` the objectives that have them.
    """

    title: str
    text: str
    classes: Mapping[str, str]


PAGES = {
    "objectives.md": Page(
        "Objectives",
        "`model.class_path` names one of these, `model.init_args` has its keys. On the command line `init_args` is "
        "left out: `--model.optimizer.lr 1e-4`.",
        {
            "ptl.objectives.sft.SFT": "model",
            "ptl.objectives.lora.LoRASFT": "model",
            "ptl.objectives.distillation.Distillation": "model",
            "ptl.objectives.reward.RewardModeling": "model",
            "ptl.objectives.dpo.DPO": "model",
            "ptl.objectives.grpo.GRPO": "model",
            "ptl.objectives.ppo.PPO": "model",
        },
    ),
    "models.md": Page(
        "Models, adapters, optimizers",
        "What every objective takes: the model, what of it is trained, and how. `ModelSpec` is also what a teacher, a "
        "reference or a critic is.",
        {
            "ptl.models.spec.ModelSpec": "model.policy",
            "ptl.models.spec.LoRA": "model.policy.adapter",
            "ptl.models.spec.Shrink": "model.policy.shrink",
            "ptl.models.teachers.Teacher": "model.teacher, model.reference",
            "ptl.models.optimizer.Optimizer": "model.optimizer",
            "ptl.models.optimizer.Schedule": "model.schedule",
        },
    ),
    "losses.md": Page(
        "Parts of losses",
        "The formulas behind these keys: [supervised and distilled](../maths.md), [rankings](../maths-rankings.md), "
        "[reinforcement learning](../maths-rl.md).",
        {
            "ptl.functional.divergence.Divergence": "model.divergence of Distillation",
            "ptl.data.on_policy.OnPolicy": "model.on_policy of Distillation",
            "ptl.objectives.distillation.HiddenMatch": "model.hidden of Distillation",
            "ptl.functional.policy_loss.PolicyLoss": "model.loss of GRPO and PPO",
            "ptl.functional.importance.Importance": "model.importance of GRPO and PPO",
            "ptl.functional.kl.FixedKL": "model.kl of PPO",
            "ptl.functional.kl.AdaptiveKL": "model.kl of PPO",
            "ptl.objectives.ptx.PTX": "model.ptx of PPO",
        },
    ),
    "data.md": Page(
        "Data",
        "One data module for every objective: sources of rows, what of them is trained, and how they become batches.",
        {
            "ptl.data.module.ChatDataModule": "data",
            "ptl.data.sources.Source": "data.train[], data.val[]",
            "ptl.data.render.RenderPolicy": "data.policy",
            "ptl.data.audit.Thresholds": "data.thresholds",
            "ptl.data.parts.Preparation": "data.preparation",
        },
    ),
    "rollouts.md": Page(
        "Rollouts",
        "How GRPO and PPO sample answers, check themselves and evaluate.",
        {
            "ptl.rollout.settings.Rollout": "model.rollout",
            "ptl.rollout.evaluation.Evaluation": "model.evaluation",
            "ptl.rollout.selfcheck.SelfCheck": "model.self_check",
            "ptl.rollout.tool_turns.ToolUse": "model.tools",
            "ptl.rollout.hf.HF": "model.engine",
            "ptl.rollout.hf_cb.HFContinuous": "model.engine",
            "ptl.rollout.vllm.VLLM": "model.engine",
        },
    ),
    "rewards.md": Page(
        "Rewards",
        "Entries of `model.rewards` of GRPO and PPO, each with a `class_path` and `init_args`; see "
        "[GRPO](../grpo.md#rewards).",
        {
            "ptl.rewards.think.ThinkFormat": "model.rewards[]",
            "ptl.rewards.maths.ExactMatch": "model.rewards[]",
            "ptl.rewards.maths.MathVerify": "model.rewards[]",
            "ptl.rewards.code.CodeTests": "model.rewards[]",
            "ptl.rewards.gym.GymScore": "model.rewards[]",
            "ptl.rewards.reward_model.RewardModel": "model.rewards[]",
            "ptl.rewards.length.LengthPenalty": "model.rewards[]",
            "ptl.rewards.function.PythonFunction": "model.rewards[]",
        },
    ),
    "run.md": Page(
        "A run and what watches it",
        "Top-level keys of every run. Each of these is there without being asked for; a key changes it.",
        {
            "ptl.trainer_cli.Run": "run",
            "ptl.callbacks.checkpoint.Checkpoint": "checkpoint",
            "ptl.callbacks.preemption.Preemption": "preemption",
            "ptl.callbacks.throughput.Throughput": "throughput",
            "ptl.callbacks.health.Health": "health",
            "ptl.callbacks.guard.Spike": "health.spike",
            "ptl.callbacks.watchdog.Watchdog": "watchdog",
            "ptl.callbacks.stragglers.Stragglers": "stragglers",
            "ptl.callbacks.export.Export": "export",
        },
    ),
    "trainer.md": Page(
        "Strategies, loggers and callbacks",
        "What goes into Lightning's own `trainer` keys, each with a `class_path` and `init_args`. The other keys of "
        "`trainer` are those of Lightning's `Trainer`.",
        {
            "ptl.strategies.deepspeed.ZeROStrategy": "trainer.strategy",
            "ptl.callbacks.wandb_run.WandbRun": "trainer.logger",
            "ptl.callbacks.samples.Samples": "trainer.callbacks[]",
            "ptl.callbacks.completions.Completions": "trainer.callbacks[]",
            "ptl.callbacks.baseline.Baseline": "trainer.callbacks[]",
            "ptl.callbacks.reward_report.RewardReport": "trainer.callbacks[]",
            "ptl.callbacks.distill_report.DistillReport": "trainer.callbacks[]",
        },
    ),
}


class Key(NamedTuple):
    """A parameter of a class.

    Attributes:
        name: as a configuration writes it.
        kind: its type, resolved.
        default: Markdown.
        text: Markdown; empty where no docstring has it.
    """

    name: str
    kind: Any
    default: str
    text: str


def main() -> None:
    """Writes the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(rendered(page, name), encoding="utf-8")


# ---- from a class to its keys ----


def found(path: str) -> type:
    """The class at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def keys_of(cls: type) -> list[Key]:
    """The keys of a class, in the order of its signature."""
    texts, hints = _texts(cls), get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
    keys = []
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            keys.append(Key("...", None, "", texts.get(name, "")))
        else:
            keys.append(Key(name, hints.get(name, Any), _default(cls, parameter), texts.get(name, "")))
    return keys


def classes_in(kind: Any) -> Iterator[type]:
    """The classes of ``ptl`` that a type speaks of."""
    for part in get_args(kind):
        yield from classes_in(part)
    if inspect.isclass(kind) and kind.__module__.startswith("ptl."):
        yield kind


@cache
def _texts(cls: type) -> dict[str, str]:
    """The sentence of each parameter, also of those that a base class or another documented class describes."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if base.__module__.startswith("ptl.") and base.__dict__.get("__doc__"):
            for entry in _parsed(base).params:
                texts |= {name.strip(): entry.description or "" for name in entry.arg_name.split(",")}
    for name, text in texts.items():
        other = re.match(r"as in ``(\w+)``", text)
        if other and other[1] in _by_name() and other[1] != cls.__name__:
            texts[name] = _texts(found(_by_name()[other[1]]))[name]
    return texts


def _parsed(cls: type) -> docstring_parser.Docstring:
    return docstring_parser.parse(inspect.getdoc(cls) or "", docstring_parser.DocstringStyle.GOOGLE)


@cache
def _by_name() -> dict[str, str]:
    paths = [path for page in PAGES.values() for path in page.classes]
    return {path.rpartition(".")[2]: path for path in [*paths, "ptl.rewards.base.Reward"]}


def _default(cls: type, parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is parameter.empty:
        return "**required**"
    if dataclasses.is_dataclass(cls):
        field = next(f for f in dataclasses.fields(cls) if f.name == parameter.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(default):
        return "its defaults"
    return f"`{_value(default)}`"


def _value(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)


# ---- from keys to Markdown ----


def rendered(page: Page, name: str) -> str:
    """The text of a page."""
    parts = [NOTE, f"# {page.title}", page.text]
    for path, place in page.classes.items():
        parts += _section(found(path), path, place, name)
    return "\n\n".join(parts) + "\n"


def _section(cls: type, path: str, place: str, page: str) -> list[str]:
    doc = _parsed(cls)
    rows = [
        f"| `{key.name}` | {_cell(_kind(key.kind, page))} | {key.default} | {_cell(key.text)} |" for key in keys_of(cls)
    ]
    table = ["\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])] if rows else ["It has no keys."]
    about = [_text(part) for part in (doc.short_description, doc.long_description) if part]
    keys, _, owner = place.partition(" of ")
    where = " or ".join(f"`{key}`" for key in keys.split(", ")) + (f" of {owner}" if owner else "")
    return [f"## {cls.__name__}", f"`{path}`, at {where}", *about, *table]


def _kind(kind: Any, page: str) -> str:
    """A type in words, with links to the classes that the reference has."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is None:
        return ""
    if kind is type(None):
        return "`null`"
    if origin in (Literal, Union, types.UnionType):
        choices = [choice for part in parts for choice in (get_args(part) if get_origin(part) is Literal else [part])]
        shown = [f"`{_value(c)}`" if c is None or isinstance(c, (str, int)) else _kind(c, page) for c in choices]
        return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
    if origin in (list, Sequence) or parts[1:] == (...,):
        return f"list of {_kind(parts[0], page)}"
    if origin in (dict, Mapping):
        return f"map of {_kind(parts[0], page)} to {_kind(parts[1], page)}"
    if origin is tuple:
        return f"[{', '.join(_kind(part, page) for part in parts)}]"
    home = next((name for name, other in PAGES.items() if any(found(path) is kind for path in other.classes)), None)
    if home:
        return f"[{kind.__name__}]({'' if home == page else home}#{kind.__name__.lower()})"
    if kind is Any:
        return "any"
    named = {"Reward": "[rewards](rewards.md)", "Engine": "[engine](rollouts.md#hf)"}
    return named.get(kind.__name__, f"`{kind.__name__}`")


def _text(text: str) -> str:
    """Markdown of a docstring's paragraphs: code in single ticks, and what it indents as code."""
    return text.replace("::\n", ":\n").replace("``", "`").replace("\\|", "|")


def _cell(text: str) -> str:
    return " ".join(_text(text).split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
