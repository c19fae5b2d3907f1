"""What a distillation came to: teacher, student before, student after, on rows that none of them was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from torch import nn

from ptl.callbacks import report_page
from ptl.callbacks.comparison import is_whole, weight_bytes
from ptl.callbacks.held_rows import HeldRows, Task, held_rows
from ptl.callbacks.loaded_models import check_tokenizer, loaded, model_folder
from ptl.callbacks.model_meter import ModelMeter
from ptl.callbacks.record import run_folder
from ptl.callbacks.redact import redact_tree
from ptl.callbacks.report_numbers import flat, from_json, json_ready, with_gaps
from ptl.callbacks.samples import own_random_state
from ptl.callbacks.throughput import excluded, log_metrics, logged_step
from ptl.data.durable import replacing, write_text
from ptl.data.sources import Source
from ptl.models.spec import ModelSpec
from ptl.strategies.partition import gathered_forward, has_room_for_whole

if TYPE_CHECKING:
    from ptl.data.module import ChatDataModule

NAME = "distill_report"


class DistillReport(L.Callback):
    """Compares a student with its teacher before and after training, on held-out rows, and writes the report.

    ``RUN/distill_report.json`` holds all numbers, ``distill_report.md`` the tables, ``distill_report.png`` the plot;
    with W&B, the same is in the run. By model: token KL(teacher || model) per trained token in nats, the share of the
    student's first KL that is gone (``gap closed``), perplexity, top-1 agreement with the teacher, accuracy of the
    answers, parameters, bytes of weights and tokens a second of greedy generation. Means are over loss weight, exact
    over all ranks, and by source too.

    "Before" is measured before step 0 and kept in the JSON file, where a resumed run finds it. Training does not
    notice: weights, modes, random states, metrics and the throughput clock are as without the report. All ranks measure
    together; under ZeRO-3 whole models are gathered on each device for it, a sharded teacher only to generate, and
    only where all devices have room for it: its answers and speed are left out, with a note, where one has not.

    Arguments:
        general: sources beside the special data, all of whose rows are held out: what was forgotten.
        max_rows: held-out rows (packs, with ``data.pack_to``) of each kind that are measured; a seeded choice of more.
        task: how a greedy answer is held against the row's own last answer: ``exact``, the same text apart from case,
            white space and marks at its ends; ``number``, the same last number; ``none`` asks nothing.
        task_questions: questions of each kind.
        max_new_tokens: longest answer to a question.
        speed_tokens: tokens that are generated to measure the speed, 4 times a model; 0 does not measure it.
        baselines: ``{name: folder}`` of other models of the same tokenizer, plain Hugging Face folders or run folders
            with an ``export``, to be measured beside the student.
        teacher: where the objective has a cached teacher alone: ``load`` builds it on each rank's device while the
            report is made; ``skip`` leaves out what needs it.
        console: print the tables.

    Raises:
        ValueError: a number out of its range, or a baseline that is not there or has one of the report's own names.
    """

    def __init__(
        self,
        *,
        general: list[Source] | None = None,
        max_rows: int = 512,
        task: Task = "none",
        task_questions: int = 64,
        max_new_tokens: int = 128,
        speed_tokens: int = 64,
        baselines: dict[str, str] | None = None,
        teacher: Literal["load", "skip"] = "load",
        console: bool = True,
    ) -> None:
        for name, value, known in (("task", task, ("none", "exact", "number")), ("teacher", teacher, ("load", "skip"))):
            if value not in known:
                raise ValueError(f"DistillReport.{name} must be one of {', '.join(known)}, got {value!r}")
        sizes = {"max_rows": max_rows, "task_questions": task_questions, "max_new_tokens": max_new_tokens}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"DistillReport.{name} must be 1 or more, got {value}")
        if speed_tokens < 0:
            raise ValueError(f"DistillReport.speed_tokens must be 0 or more, got {speed_tokens}")
        self.general = list(general or [])
        self.max_rows, self.task_questions = max_rows, task_questions
        self.task: Task = task
        self.max_new_tokens, self.speed_tokens = max_new_tokens, speed_tokens
        self.baselines = {name: model_folder(name, folder) for name, folder in (baselines or {}).items()}
        self.teacher, self.console = teacher, console
        self._rows: dict[str, HeldRows] = {}
        self._before: dict[str, Any] | None = None
        self._notes: list[str] = []

    # ---- hooks ----

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepares the rows, and tells at the start what would fail at the end.

        Raises:
            ValueError: an objective without a teacher, a data module without held-out rows, a baseline of another
                tokenizer.
        """
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        if not callable(getattr(pl_module, "teacher_model", None)):
            raise ValueError(
                f"DistillReport needs an objective with a teacher, got {type(pl_module).__name__}: use "
                "ptl.objectives.distillation.Distillation, or remove the callback"
            )
        data: Any = getattr(trainer, "datamodule", None)
        if getattr(data, "renderer", None) is None:
            raise ValueError("DistillReport needs a data module with a renderer: ptl.data.module.ChatDataModule")
        self._notes, self._before = [], None
        self._rows = {"special": held_rows(data, None, self.max_rows)}
        if self.general:
            self._rows["general"] = held_rows(data, self.general, self.max_rows)
        for name, folder in self.baselines.items():
            check_tokenizer(name, folder, data.renderer.tokenizer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._rows or trainer.global_step:
            return
        with self._measuring(trainer):
            with self._teacher(trainer, pl_module) as teacher, gathered_forward(trainer.strategy):
                meter = self._meter(trainer, pl_module)
                self._before, _ = meter.measure("before", _policy(pl_module), teacher)
            self._keep(trainer, {"status": "started", "models": [self._before]}, pages=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._rows:
            return
        with self._measuring(trainer):
            models = self._models(trainer, pl_module)
            before = self._before or self._read_before(trainer)
            self._keep(trainer, {"status": "finished", "models": with_gaps(models, before, self._notes)}, pages=True)

    @contextmanager
    def _measuring(self, trainer: L.Trainer) -> Iterator[None]:
        with excluded(trainer), own_random_state():
            yield
            trainer.strategy.barrier(NAME)

    # ---- measuring; all ranks ----

    def _meter(self, trainer: L.Trainer, pl_module: L.LightningModule) -> ModelMeter:
        shared = getattr(pl_module, "vocabulary", None)
        return ModelMeter(
            trainer=trainer,
            rows=self._rows,
            vocabulary=shared if isinstance(shared, int) else None,
            task=self.task,
            task_questions=self.task_questions,
            max_new_tokens=self.max_new_tokens,
            speed_tokens=self.speed_tokens,
            notes=self._notes,
        )

    def _models(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        """The teacher where there is one, the student after training, and the baselines."""
        meter, policy = self._meter(trainer, pl_module), _policy(pl_module)
        with self._teacher(trainer, pl_module) as teacher, gathered_forward(trainer.strategy):
            after, seen = meter.measure("after", policy, teacher)
            models = [after]
            if teacher is not None:
                own = {part: comparison.of_teacher() for part, comparison in seen.items()}
                with self._whole(trainer, pl_module, teacher):
                    models.insert(0, meter.entry("teacher", teacher, own))
            for name, folder in self.baselines.items():
                model = loaded(ModelSpec(name=folder, dtype="auto"), trainer.strategy.root_device, policy)
                models.append(meter.measure(name, model, teacher)[0])
                del model
        return models

    @contextmanager
    def _teacher(self, trainer: L.Trainer, pl_module: Any) -> Iterator[nn.Module | None]:
        """The live teacher; else one that is built for the time of the report, or None with a note."""
        note = None
        live = pl_module.teacher_model()
        if getattr(pl_module, "cross_tokenizer", None):
            live, note = None, "The teacher has another tokenizer, so there is no token KL to give."
        elif live is None and self.teacher == "skip":
            note = "The teacher is cached and was not loaded (teacher: skip): nothing that needs it was measured."
        if live is not None or note is not None:
            self._notes += [note] if note and note not in self._notes else []
            yield live
            return
        spec = getattr(getattr(pl_module, "teacher", None), "model", None)
        if not isinstance(spec, ModelSpec):
            raise ValueError(
                f"{type(pl_module).__name__} has neither a live teacher nor teacher.model, a ModelSpec, to load one "
                "from: set DistillReport.teacher to skip"
            )
        yield loaded(spec, trainer.strategy.root_device, _policy(pl_module))

    def _whole(self, trainer: L.Trainer, pl_module: Any, teacher: nn.Module) -> AbstractContextManager[Any]:
        """A sharded teacher is whole inside, where every rank has room for it; else it stays as it is, with a note."""
        generates = self.task != "none" or self.speed_tokens > 0
        if not generates or is_whole(teacher) or not hasattr(pl_module, "whole_teacher"):
            return nullcontext()
        if has_room_for_whole(teacher, trainer.strategy):
            return pl_module.whole_teacher()
        self._notes.append(
            f"The teacher was not made whole: a rank has too little memory free for its "
            f"{weight_bytes(teacher) / 2**30:.1f} GiB and what generating takes besides."
        )
        return nullcontext()

    # ---- keeping; rank 0 ----

    def _read_before(self, trainer: L.Trainer) -> dict[str, Any] | None:
        """The student before training as an earlier attempt of this run measured it."""
        path = run_folder(trainer) / f"{NAME}.json"
        try:
            models = json.loads(path.read_text(encoding="utf-8"))["models"]
            return next(from_json(model) for model in models if model["name"] == "before")
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            self._notes.append(f"The student before training is not in {path.name}, so no gap could be computed.")
            return None

    def _keep(self, trainer: L.Trainer, what: dict[str, Any], *, pages: bool) -> None:
        problem: Exception | None = None
        if trainer.is_global_zero:
            report = redact_tree(json_ready({**what, **self._facts(trainer)}))
            try:
                self._write(run_folder(trainer), report, pages=pages)
                if pages:
                    self._publish(trainer, report)
            except (ValueError, OSError) as error:
                problem = error
        # Rank 0's mistake is every rank's: none waits for one that has left.
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise problem

    def _facts(self, trainer: L.Trainer) -> dict[str, Any]:
        data: ChatDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        unit = "packs" if data.pack_to else "rows"
        rows = {
            part: {"unit": unit, "measured": len(r.units), "held_out": len(r.part.units), "sources": list(r.sources)}
            for part, r in self._rows.items()
        }
        return {"step": trainer.global_step, "rows": rows, "notes": list(self._notes), "method": self._method(trainer)}

    def _method(self, trainer: L.Trainer) -> list[str]:
        lines = [
            "Token KL is KL(teacher || model), the mean over loss weight of all trained tokens, in nats; both "
            "distributions are over the tokenizer's own ids, in float32.",
            "Gap closed is (KL before - KL) / KL before. Perplexity is of the rows' own tokens.",
            "Weights are counted as this run holds them, tied matrices once.",
        ]
        if self.speed_tokens:
            device = trainer.strategy.root_device.type
            lines.append(
                f"Tokens/s is greedy generation of {self.speed_tokens} tokens for one prompt on one device ({device}), "
                "the median of three runs after a warm-up."
            )
        if self.task != "none":
            lines.append(f"Task accuracy compares greedy answers with the rows' last answer by `{self.task}` match.")
        return lines

    def _write(self, folder: Path, report: dict[str, Any], *, pages: bool) -> None:
        write_text(folder / f"{NAME}.json", json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        if pages:
            write_text(folder / f"{NAME}.md", report_page.markdown(report))
            with replacing(folder / f"{NAME}.png") as temporary:
                report_page.draw(report, temporary)

    def _publish(self, trainer: L.Trainer, report: dict[str, Any]) -> None:
        numbers = flat(report["models"])
        log_metrics(trainer, numbers)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                step = logged_step(trainer)
                logger.experiment.summary.update(numbers)
                for part in report_page.parts_of(report):
                    table = report_page.cells(report, part)
                    logger.log_table(f"{NAME}/{part}", list(report_page.COLUMNS), table, step=step)
                logger.log_image(f"{NAME}/plot", [str(run_folder(trainer) / f"{NAME}.png")], step=step)
        if self.console:
            for part in report_page.parts_of(report):
                Console().print(report_page.rich_table(report, part))
            if line := report_page.gap_line(report):
                Console().print(line, highlight=False)


def _policy(pl_module: L.LightningModule) -> nn.Module:
    policy = getattr(pl_module, "policy", None)
    if not isinstance(policy, nn.Module):
        raise ValueError(f"DistillReport needs a module with a policy, got {type(pl_module).__name__}")
    return policy
