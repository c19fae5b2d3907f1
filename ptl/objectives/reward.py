"""Reward modelling: a language model with one number in the place of its last layer learns to order answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ptl.data.groups import RankingView
from ptl.data.reward_facts import FILE, reward_facts
from ptl.functional.preference import by_prompt, pair_loss, plackett_luce
from ptl.functional.ranking_measures import measures_of, pair_metrics
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.scoring import group_scores
from ptl.models.spec import ModelSpec
from ptl.objectives.base import Objective
from ptl.objectives.metrics import RankingMeasures, batch_sums
from ptl.types import GroupBatch, LossOutput

Loss = Literal["bradley_terry", "plackett_luce", "margin"]


class RewardModeling(Objective):
    """A reward model from rankings of two or more answers to each prompt (Christiano et al., arXiv:1706.03741).

    The score r of an answer is an fp32 linear map of the hidden state at its last token, which is found by length and
    never by a padding id. Each answer is computed once, whatever the number of its pairs. The loss of a window is the
    sum over its prompts of the prompt's loss, over the number of prompts: for ``bradley_terry`` the mean over the
    prompt's C pairs of ``-log sigmoid(r_better - r_worse)``, ties as half a win for either side (InstructGPT,
    arXiv:2203.02155, equation 1). It is positive, goes to 0 as the difference grows, and is minimised.

    Arguments:
        policy: the backbone; its head becomes ``scalar``. With an adapter the score is trained whole beside it.
        loss: ``bradley_terry``; ``plackett_luce``, the likelihood of the whole order; or ``margin``, Bradley-Terry
            where the better answer should win by the difference of the row's ``scores``.
        margin_scale: factor on the scores' difference, above 0; with loss ``margin``.
        label_smoothing: share of pairs whose order is taken to be wrong, in [0, 0.5); not with ``plackett_luce``.
        center: weight of the mean over a prompt's pairs of ``(r_better + r_worse)^2``, which keeps scores around 0
            (Eisenstein et al., arXiv:2312.09244, section 4); 0 for none.
        share_prompt: compute what a prompt's answers have in common once. The scores are the same; needs
            ``policy.attention: packed`` and ``data.layout: packed``, and is left out in the padded layout.
        optimizer: its optimizer.
        schedule: its learning rate over the run.

    Raises:
        ValueError: a number out of its range, or settings that exclude each other.
    """

    view = RankingView()
    metric_names = ("accuracy", "margin", "reward", "centering")
    has_perplexity = False

    def __init__(
        self,
        policy: ModelSpec,
        *,
        loss: Loss = "bradley_terry",
        margin_scale: float = 1.0,
        label_smoothing: float = 0.0,
        center: float = 0.0,
        share_prompt: bool = True,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(replace(policy, head="scalar"), optimizer=optimizer, schedule=schedule)
        if loss not in ("bradley_terry", "plackett_luce", "margin"):
            raise ValueError(f"model.loss must be bradley_terry, plackett_luce or margin, got {loss!r}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"model.label_smoothing must be at least 0 and below 0.5, got {label_smoothing}")
        if label_smoothing and loss == "plackett_luce":
            raise ValueError("model.label_smoothing is of pairs: set it to 0, or model.loss to bradley_terry")
        if not margin_scale > 0:
            raise ValueError(f"model.margin_scale must be above 0, got {margin_scale}")
        if center < 0:
            raise ValueError(f"model.center must be 0 or more, got {center}")
        self.kind, self.margin_scale = loss, margin_scale
        self.label_smoothing, self.center = label_smoothing, center
        self.view = RankingView(share_prompt=share_prompt, need_scores=loss == "margin")
        self._measures: dict[str, RankingMeasures] = {}
        self.measured: dict[str, dict[str, Any]] = {}
        """What was measured last, by stage; see ``ptl.functional.ranking_measures.measures_of``."""

    @classmethod
    def view_of(cls, arguments: Mapping[str, Any]) -> RankingView:
        return RankingView(need_scores=arguments.get("loss") == "margin")

    # ---- the loss ----

    def scores(self, batch: GroupBatch) -> Tensor:
        """The score of each answer, float32 [D]."""
        return group_scores(self.policy, batch)

    def loss(self, batch: GroupBatch) -> LossOutput:
        rewards = self.scores(batch)
        self._check(rewards, batch)
        better, worse = batch.pairs
        prompts, weights = len(batch.prompt_weights), batch.prompt_weights
        if self.kind == "plackett_luce":
            losses = plackett_luce(rewards, batch.ranks, batch.groups, prompts)
        else:
            margins = None
            if self.kind == "margin":
                margins = self.margin_scale * (batch.scores[better] - batch.scores[worse])
            pairs = pair_loss(
                rewards[better] - rewards[worse], batch.tied, margins=margins, label_smoothing=self.label_smoothing
            )
            losses = by_prompt(pairs, batch.pair_shares, batch.pair_prompts, prompts)
        plain = (losses * weights).sum()
        squares = by_prompt((rewards[better] + rewards[worse]).square(), batch.pair_shares, batch.pair_prompts, prompts)
        centering = (squares * weights).sum()
        total = plain + self.center * centering if self.center else plain
        sums = batch_sums(rewards, batch)
        self._measures.setdefault(self._stage, RankingMeasures().to(rewards.device)).update(sums)
        metrics = {
            "loss": (plain.detach(), weights.sum()),
            "centering": (centering.detach(), weights.sum()),
            **pair_metrics(sums),
            **self.loss_by_source(batch.prompt_sources, losses.detach(), weights),
        }
        return LossOutput(total, weights.sum(), metrics)

    def _check(self, rewards: Tensor, batch: GroupBatch) -> None:
        """Names the row of a score that is not finite; looked at where a wait for the device is paid anyway."""
        if not self.wants_details or bool(torch.isfinite(rewards).all()):
            return
        answer = int((~torch.isfinite(rewards)).nonzero()[0, 0])
        where = f"answer {answer} of the batch"
        owner = batch.tokens.document_ids.flatten()[batch.last[answer]]
        if batch.tokens.rows is not None:
            prepared = self.data.prepared_rows("train" if self.training else "val")
            row = prepared.rows[int(batch.tokens.rows[owner])]
            place = int((batch.groups[:answer] == batch.groups[answer]).sum())
            where = f"answer {place} of line {row['line']} of {prepared.sources[row['source']]}"
        raise ValueError(
            f"the score of {where} is {rewards[answer].item()}: the model's weights or its input are not finite; lower "
            "model.optimizer.lr, or look at the row"
        )

    # ---- measures ----

    @property
    def _stage(self) -> str:
        return "train" if self.training else "test" if self.trainer.testing else "val"

    def _log_means(self, stage: str) -> None:
        super()._log_means(stage)
        if stage != "train" and stage in self._measures:
            measured = self._measure(stage)
            names = ("tau", "ece", "reward_std")
            values = {f"{stage}/{name}": measured[name] for name in names if measured[name] is not None}
            self.log_dict(values, sync_dist=False)

    def _measure(self, stage: str) -> dict[str, Any]:
        """Reduces over ranks; every rank calls it."""
        measures = self._measures[stage]
        self.measured[stage] = measures_of(measures.compute())
        measures.reset()
        return self.measured[stage]

    def on_train_epoch_end(self) -> None:
        if "train" in self._measures:
            self._measure("train")

    # ---- what is saved ----

    def export_files(self) -> dict[str, str]:
        """``ptl_reward.json`` with the scores' mean and deviation, on held-out rows where there are any."""
        stage = next((stage for stage in ("val", "train") if stage in self.measured), None)
        facts = reward_facts(self.data.renderer, self.measured[stage] if stage else None, stage)
        return {FILE: json.dumps(facts, indent=2) + "\n"}
