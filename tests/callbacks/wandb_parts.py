"""Real runs with W&B for its tests, several in one process; the tests read what they leave."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.export import Export
from ptl.callbacks.jsonl import JsonlLogger
from ptl.callbacks.record import RunRecord
from ptl.callbacks.wandb_run import WandbRun
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.callbacks.real import chat, make_inputs, sft
from tests.callbacks.wandb_server import Server

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a-secret-of-mine-42"
STEPS, STOP, TRIES = 6, 3, 60


class SignalAt(L.Callback):
    """Signals its own process inside an optimizer step, as a cluster does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def fit(folder: str, *more: str) -> tuple[int, str]:
    """``ptl fit`` of the tiny model with the layers of W&B; its exit code and what it wrote to stderr."""
    from ptl import cli

    layers = ("base", "objective/lora", "data/chat", "trainer/cpu", "overlay/wandb")
    stack = [word for name in layers for word in ("-c", f"{ROOT}/configs/{name}.yaml")]
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = cli.main(
            ["fit", *stack, "--model.policy.name", f"{folder}/model",
             "--data.train", f"[{{path: {folder}/rows.jsonl}}]", "--data.val", "null", "--data.val_fraction", "0.2",
             "--data.max_length", "256", "--data.pack_to", "256",
             "--data.preparation.num_proc", "1", "--trainer.devices", "1", "--trainer.max_epochs", "-1",
             "--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1", "--trainer.callbacks", "null",
             "--trainer.accumulate_grad_batches", "1", "--trainer.check_val_every_n_epoch", "null",
             "--trainer.val_check_interval", "2", "--trainer.enable_progress_bar", "false",
             "--throughput.warmup", "1", "--throughput.price_per_device_hour", "2.5", *more]
        )  # fmt: skip
    return code, told.getvalue()


def attempts(folder: str) -> dict[str, Any]:
    """A run that is asked to leave after step 3 and goes on, with CSV and TensorBoard beside W&B."""
    os.environ.update(SLURM_CLUSTER_NAME="alps", SLURM_JOB_ID="7", SLURM_JOB_NAME=f"job {SECRET}", MY_API_KEY=SECRET)
    os.chdir(folder)
    make_dirty_tree()
    run = f"{folder}/study/first"
    wandb = f"{{class_path: ptl.callbacks.wandb_run.WandbRun, init_args: {{notes: used {SECRET}, tags: [mine]}}}}"
    csv = f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {run}, name: csv}}}}"
    board = f"{{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {{save_dir: {run}, name: board}}}}"
    loggers = f"[{wandb}, {csv}, {board}]"
    stop = f"[{{class_path: tests.callbacks.wandb_parts.SignalAt, init_args: {{step: {STOP}}}}}]"
    common = ("--run.dir", run, "--run.resume", "auto", "--trainer.logger", loggers)
    first = fit(folder, *common, "--trainer.callbacks", stop)
    os.environ["SLURM_JOB_ID"] = "8"
    second = fit(folder, *common)
    return {"codes": [first[0], second[0]], "stderr": first[1] + second[1]}


def make_dirty_tree() -> None:
    """A git work tree in the present folder, with a secret in an uncommitted change."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    Path("code.py").write_text("x = 1\n")
    for arguments in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True, timeout=60)
    Path("code.py").write_text(f"x = 2\nkey = '{SECRET}'\n")


# ---- what goes wrong ----


class Harm(L.Callback):
    """Does something to W&B's process after the second step."""

    def __init__(self, do: Callable[[int], Any]) -> None:
        self.do = do

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.do(wandb_process())
            for logger in trainer.loggers:  # more than W&B's buffers hold
                for i in range(TRIES if isinstance(logger, WandbRun) else 0):
                    row: dict[str, Any] = {"text": "x" * 4000, "i": i}
                    logger.log_metrics(row, step=1)


def wandb_process() -> int:
    """Process id of the one W&B process that this one has started."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and "wandb-core" in (folder / "cmdline").read_text():
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                found += [int(folder.name)] if parent == os.getpid() else []
    (process,) = found
    return process


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def fill(process: int) -> None:
    """What a full disk does to a process that appends to a file: each write fails."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (10_000, 10_000))


def troubles(folder: str) -> dict[str, str]:
    """Runs whose W&B fails, each in its own folder; what each wrote to stderr."""
    import wandb

    out = {}
    os.environ.update(WANDB_API_KEY="a" * 40, no_proxy="127.0.0.1", NO_PROXY="127.0.0.1")
    with Server.running() as server:
        wandb.teardown()  # it reads its variables once
        os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
        logger = WandbRun(mode="online", init_timeout=30, finish_timeout=1)
        out["lost"] = troubled(Path(folder, "lost"), logger, Harm(lambda process: server.close()))
    wandb.teardown()
    os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:1"
    out["unreachable"] = troubled(Path(folder, "unreachable"), WandbRun(mode="online", init_timeout=2))
    Path(folder, "unwritable").mkdir()
    Path(folder, "unwritable", "wandb").write_text("in the way")
    out["unwritable"] = troubled(Path(folder, "unwritable"), WandbRun(mode="offline"))
    for name, harm in (("full", fill), ("killed", kill)):
        out[name] = troubled(Path(folder, name), WandbRun(mode="offline"), Harm(harm))
    return out


def troubled(folder: Path, logger: WandbRun, *callbacks: L.Callback) -> str:
    """A fit with W&B that goes wrong beside our own metrics; its stderr."""
    logger.bind(folder, job_type="toy")
    told = io.StringIO()
    batches = [packed([8, 8], trained=4, seed=i) for i in range(STEPS)]
    with contextlib.redirect_stderr(told):
        loggers = [JsonlLogger(folder), logger]
        fit = trainer(folder, [RunRecord(folder), *callbacks], logger=loggers, max_steps=STEPS)
        fit.fit(Toy(), loader(batches), loader(batches[:1]))
    return told.getvalue()


def deepspeed(folder: str) -> dict[str, Any]:
    """A run under ZeRO-2 with its folders as checkpoints, under an id that the user gives."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    from ptl.strategies.deepspeed import ZeROStrategy
    from ptl.strategies.extensions import load_extension

    load_extension(ShareMemCommBuilder())  # as the strategy does where there are several ranks
    os.environ["WANDB_RUN_ID"] = "given123"
    model, data = make_inputs(Path(folder, "inputs"))
    run = Path(folder, "zero")
    logger = WandbRun(mode="offline", project="mine", group="ours", name="other")
    logger.bind(run, job_type="sft")
    callbacks = [RunRecord(run), Checkpoint(dirpath=str(run / "checkpoints")), Export(console=False)]
    strategy: Any = ZeROStrategy(stage=2)
    fit = trainer(run, callbacks, logger=[JsonlLogger(run), logger], strategy=strategy, max_steps=2)
    fit.fit(sft(model), chat(model, data))
    del os.environ["WANDB_RUN_ID"]
    return {"config": strategy.config}


def make_all(folder: str) -> dict[str, Any]:
    """Everything, in one process; those with a server that is gone last."""
    from tests import tiny
    from tests.objectives import law

    tiny.save_folder(Path(folder, "model"), tiny.make_tokenizer(), hidden=32)
    law.write_rows(Path(folder, "rows.jsonl"), count=40)
    os.environ.update(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false", PTL_CACHE=f"{folder}/cache")
    return {"attempts": attempts(folder), "deepspeed": deepspeed(folder), "stderr": troubles(folder)}
