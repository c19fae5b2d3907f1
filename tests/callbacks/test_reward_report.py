"""The reward report and the export of a reward model at the end of a real run."""

import json

import lightning as L
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.export import Export
from ptl.callbacks.jsonl import read_rows
from ptl.callbacks.reward_report import RewardReport
from ptl.data.module import ChatDataModule
from ptl.data.parts import Preparation
from ptl.data.reward_facts import FILE
from ptl.data.sources import Source
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.scoring import document_scores
from ptl.models.spec import ModelSpec
from ptl.objectives.reward import RewardModeling
from tests import reward_parts
from tests.callbacks.parts import Toy, trainer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward-report")
    reward_parts.save_base(folder / "base")
    reward_parts.write_jsonl(folder / "rows.jsonl", reward_parts.ranking_rows(24))
    return folder


def fit(run, inputs, callbacks, *, val=0.3, module=None, lora=False, **options):
    torch.manual_seed(0)
    spec = ModelSpec(name=str(inputs / "base"), **(reward_parts.LORA if lora else {}))
    schedule = Schedule(kind="constant", warmup=0)
    objective = module or RewardModeling(spec, optimizer=Optimizer(lr=1e-2), schedule=schedule)
    data = ChatDataModule(
        [Source(path=str(inputs / "rows.jsonl"))],
        val_fraction=val,
        max_length=256,
        micro_batch_size=4,
        preparation=Preparation(cache_dir=str(inputs / "cache"), num_proc=1),
    )
    data.bind(view=RewardModeling.view, tokenizer=spec.name)
    trainer(run, callbacks, max_steps=-1, max_epochs=1, **options).fit(objective, datamodule=data)
    return objective, data


def test_the_report_holds_what_the_objective_measured(inputs, tmp_path, capsys):
    objective, _ = fit(tmp_path, inputs, [RewardReport()])
    folder = tmp_path / "reward_report"
    assert sorted(path.name for path in folder.iterdir()) == ["reliability.png", "report.json", "report.md"]
    report = json.loads((folder / "report.json").read_text())
    assert report["stages"] == json.loads(json.dumps(objective.measured)) and list(report["stages"]) == ["val", "train"]
    assert report["step"] > 2 and report["stages"]["val"]["pairs"] > 0
    page = (folder / "report.md").read_text()
    table = next(line for line in page.splitlines() if line.startswith("| val "))
    assert f"{100 * objective.measured['val']['accuracy']:.1f} %" in table
    assert "| best of K |" not in page and table in capsys.readouterr().out
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    logged = [row for row in read_rows(tmp_path / "metrics.jsonl") if "reward_report/val/accuracy" in row]
    assert logged[-1]["reward_report/val/accuracy"] == pytest.approx(objective.measured["val"]["accuracy"])


def test_without_validation_the_training_rows_are_reported(inputs, tmp_path):
    fit(tmp_path, inputs, [RewardReport(console=False)], val=0.0)
    report = json.loads((tmp_path / "reward_report" / "report.json").read_text())
    assert list(report["stages"]) == ["train"]


def test_another_objective_is_told_at_the_start(inputs, tmp_path):
    with pytest.raises(ValueError, match="RewardReport needs an objective that measures rankings, got Toy"):
        fit(tmp_path, inputs, [RewardReport()], module=Toy())


def test_wandb_gets_the_numbers_and_the_plot(inputs, tmp_path, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True)
    images = []
    monkeypatch.setattr(logger, "log_image", lambda key, images_, step=None: images.append((key, images_)))
    objective, _ = fit(tmp_path, inputs, [RewardReport(console=False)], logger=logger)
    summary = logger.experiment.summary
    assert summary["reward_report/val/ece"] == pytest.approx(objective.measured["val"]["ece"])
    assert images[0][0] == "reward_report/plot" and images[0][1][0].endswith("reliability.png")
    logger.experiment.finish()


# ---- export ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_law_9_a_trained_reward_model_loads_elsewhere_to_the_same_scores(lora, inputs, tmp_path):
    objective, data = fit(tmp_path, inputs, [Export(console=False)], lora=lora)
    documents = reward_parts.documents(reward_parts.examples(data.renderer, reward_parts.ranking_rows(4)))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert torch.allclose(document_scores(plain, documents), document_scores(objective.policy, documents), atol=1e-5)
    assert plain.config.pad_token_id not in {ids[-1] for ids in documents} | set(data.renderer.terminators)
    folders = ["export", "export_adapter"] if lora else ["export"]
    for folder in folders:
        facts = json.loads((tmp_path / folder / FILE).read_text())
        assert facts["mean"] == objective.measured["val"]["reward_mean"] and facts["measured_on"] == "val"


def test_the_best_checkpoint_is_exported_with_its_own_mean_and_deviation(inputs, tmp_path):
    """The head is thrown away after step 2, so that the best is not the last."""
    means = {}

    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step >= 2:
                torch.nn.init.normal_(pl_module.policy.score.weight, std=100.0)

    class Spy(Checkpoint):
        def on_validation_end(self, trainer, pl_module):
            means[trainer.global_step] = pl_module.measured["val"]["reward_mean"]
            super().on_validation_end(trainer, pl_module)

    callbacks = [Spy(monitor="val/loss"), Spoil(), Export(which="best", console=False)]
    fit(tmp_path, inputs, callbacks, val_check_interval=2)
    saved = torch.load(callbacks[0].best_model_path, weights_only=True)
    last = max(means)
    assert saved["global_step"] == 2 < last and len(set(means.values())) == len(means) > 1
    facts = json.loads((tmp_path / "export" / FILE).read_text())
    assert facts["mean"] == means[saved["global_step"]] != means[last]
    fresh = Export(which="best")
    fresh.load_state_dict(saved["callbacks"]["Export"])  # what a resumed run finds
    assert json.loads(fresh.state_dict()["files"][saved["global_step"]][FILE])["mean"] == facts["mean"]
