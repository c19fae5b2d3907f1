"""Distillation: the student fits the teacher's whole distribution at every trained position.

The arithmetic is in ``functional``, realigned batches and caches in ``data``, a teacher that runs in ``live_teacher``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ptl.data.batches import sent
from ptl.data.cross_teacher import CrossTeacher
from ptl.data.fingerprints import open_cache
from ptl.data.on_policy import OnPolicy, rewritten
from ptl.data.teacher_cache import TeacherCache
from ptl.data.tokenizer import load_tokenizer
from ptl.functional.cross_tokenizer import MatchedIds, fused_cross_tokenizer_loss
from ptl.functional.cross_tokenizer import Side as CrossSide
from ptl.functional.divergence import Divergence
from ptl.functional.fused_divergence import FusedDivergence, Side, fused_divergence
from ptl.functional.hidden_match import hidden_match, teacher_layer
from ptl.models.compiled import is_compiled
from ptl.models.heads import (
    HeadLoss,
    block_outputs,
    causal_lm,
    chosen,
    head_side,
    hidden_states,
    shifted_targets,
)
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import ModelSpec
from ptl.models.teachers import Teacher
from ptl.models.vocabulary import compare_vocabularies, vocabulary_size
from ptl.objectives.base import Objective
from ptl.objectives.live_teacher import LiveTeacher
from ptl.types import LossOutput, SparseTargets, TokenBatch


@dataclass(frozen=True, kw_only=True)
class HiddenMatch:
    """Also match hidden states of some layers.

    Attributes:
        layers: blocks of the student, 1 to its depth; each is matched to the teacher's block at the same relative
            depth (``ptl.functional.hidden_match.teacher_layer``).
        weight: factor of the sum of distances beside the divergence.
        kind: ``cosine``, or ``mse``.
        project: learn a projection of the student's states for each layer; needed where the widths differ.

    Raises:
        ValueError: no layer, or a weight that is not positive.
    """

    layers: list[int]
    weight: float = 1.0
    kind: Literal["cosine", "mse"] = "cosine"
    project: bool = True

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"hidden.layers needs blocks of the student, each once, got {self.layers}")
        if not self.weight > 0:
            raise ValueError(f"hidden.weight must be above 0, got {self.weight}; leave hidden out for none")


class Distillation(Objective):
    """A student that learns a teacher's distribution over the vocabulary (Hinton et al., arXiv:1503.02531).

    The loss of a window is ``sum_t w_t [(1 - ce) T^2 D(p_t, q_t) + ce * -log q_t(token t)] / sum_t w_t`` over every
    trained token t of the window and all ranks: w the loss mask, p the teacher's and q the student's distribution at
    temperature T, D the divergence. Neither side's logits exist for all tokens at once. The teacher is frozen, in eval
    mode, in no optimizer and no checkpoint, and ``Trainer`` sees nothing of it.

    Arguments:
        policy: the student.
        teacher: where the distribution comes from.
        divergence: what is made small.
        ce: share of the plain cross-entropy with the data's tokens, in [0, 1).
        source_weights: factors on the loss of tokens by the name of their data source; 1 where a source is not named.
            They scale the numerator of the loss alone: a factor of 2 counts a source's tokens twice as much as now.
        on_policy: also learn on the student's own answers, for a share of the steps; None for none.
        hidden: also match hidden states; None for none.
        cross_tokenizer: for a teacher of another tokenizer: tokens are grouped where both sides' texts end at the same
            byte, and distributions are compared group by group, by ``uld`` (arXiv:2402.12030) or by ``hybrid``, the
            Jensen-Shannon divergence on the ids that both know and ULD on the others; see
            ``ptl.functional.cross_tokenizer``. ``divergence`` gives the temperature alone. None refuses such a teacher.
        optimizer: its optimizer.
        schedule: its learning rate over the run.

    Raises:
        ValueError: settings that exclude each other, with the keys to change.
    """

    metric_names = ("divergence", "nll", "agreement", "teacher_bad", "hidden", "unaligned")

    def __init__(
        self,
        policy: ModelSpec,
        teacher: Teacher,
        *,
        divergence: Divergence | None = None,
        ce: float = 0.0,
        source_weights: dict[str, float] | None = None,
        on_policy: OnPolicy | None = None,
        hidden: HiddenMatch | None = None,
        cross_tokenizer: Literal["uld", "hybrid"] | None = None,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(policy, optimizer=optimizer, schedule=schedule)
        if not 0 <= ce < 1:
            raise ValueError(f"model.ce must be at least 0 and below 1, got {ce}: 1 is plain SFT")
        for name, factor in (source_weights or {}).items():
            if not 0 <= factor < math.inf:
                raise ValueError(f"model.source_weights.{name} must be 0 or more, got {factor}")
        for key, value in (("on_policy", on_policy), ("hidden", hidden)):
            if value is not None and teacher.cache is not None:
                raise ValueError(f"model.{key} needs a live teacher: remove model.teacher.cache, or model.{key}")
        if hidden is not None and (policy.compile or (teacher.model is not None and teacher.model.compile)):
            raise ValueError(
                "model.hidden reads what is between layers, which a compiled model hides: set compile of "
                "model.policy and model.teacher.model to false"
            )
        if cross_tokenizer is not None and (teacher.cache is not None or hidden is not None):
            raise ValueError(
                "model.cross_tokenizer goes with neither model.teacher.cache nor model.hidden, whose tokens are the "
                "student's: remove one"
            )
        self.teacher = teacher
        self.cross_tokenizer: Literal["uld", "hybrid"] | None = cross_tokenizer
        self._cross: tuple[CrossTeacher, MatchedIds] | None = None
        self.divergence = divergence or Divergence()
        self.ce = ce
        self.source_weights = dict(source_weights or {})
        self.on_policy, self.hidden = on_policy, hidden
        self._live: LiveTeacher | None = None
        self._caches: dict[str, TeacherCache] = {}
        self._vocabulary: int | None = None

    # ---- building ----

    def configure_model(self) -> None:
        super().configure_model()
        if self.teacher.cache is None and self._live is None:
            self._live = LiveTeacher(self.teacher, beside=self.policy)
        if self.hidden is not None and not hasattr(self, "projections"):
            self.projections = self._make_projections(self.hidden, self._taught_by.model)

    def _make_projections(self, hidden: HiddenMatch, teacher: nn.Module) -> nn.ModuleDict:
        (ours, theirs) = (causal_lm(m).config.get_text_config() for m in (self.policy, teacher))
        made = nn.ModuleDict()
        for layer in hidden.layers:
            teacher_layer(layer, ours.num_hidden_layers, theirs.num_hidden_layers)
            if layer < 1:
                raise ValueError(f"hidden.layers holds {layer}; blocks are counted from 1")
            if hidden.project:
                projection = nn.Linear(ours.hidden_size, theirs.hidden_size, bias=False)
                if ours.hidden_size == theirs.hidden_size:
                    nn.init.eye_(projection.weight)
                made[str(layer)] = projection
        return made

    @property
    def vocabulary(self) -> int | None:
        """Ids that the divergence is over, a prefix of both sides' tables; None before a loop has started."""
        return self._vocabulary

    def teacher_model(self) -> nn.Module | None:
        """The frozen teacher, or None where only its cache is read."""
        return self._live.model if self._live is not None else None

    def whole_teacher(self) -> AbstractContextManager[None]:
        """``teacher_model`` may generate inside, on each rank by itself: a sharded one is made whole.

        All ranks enter and leave together, and each needs the memory: ask
        ``ptl.strategies.partition.has_room_for_whole`` first.
        """
        return self._live.whole() if self._live is not None else nullcontext()

    @property
    def _taught_by(self) -> LiveTeacher:
        assert self._live is not None  # configure_model has run, and there is no cache
        return self._live

    def shared_parameters(self) -> list[nn.Parameter]:
        projections = list(self.projections.parameters()) if self.hidden is not None else []
        return [*super().shared_parameters(), *projections]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._begin(("train", "val"))

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._begin(("val",))

    def on_test_start(self) -> None:
        super().on_test_start()
        self._begin(("val",))

    def _begin(self, parts: tuple[str, ...]) -> None:
        """Puts the teacher where it runs and holds both sides to one vocabulary; again for each loop, at no cost."""
        unknown = set(self.source_weights) - set(self.data.source_names("train"))
        if unknown:
            raise ValueError(
                f"model.source_weights names {sorted(unknown)[0]!r}; the sources are "
                f"{', '.join(self.data.source_names('train'))}"
            )
        if self._vocabulary is None:
            self._vocabulary = self._shared_vocabulary()
        if self.teacher.cache is not None:
            for part in parts:
                if part not in self._caches and self.data.source_names(part):
                    self._caches[part] = open_cache(
                        self.teacher.cache,
                        self.data.prepared_rows(part),
                        self.data.renderer,
                        temperature=self.divergence.temperature,
                        teacher=self.teacher.model,
                    )
                    plan = self._caches[part].plan
                    if plan.mode == "sample" and self.divergence.kind != "forward_kl":
                        raise ValueError(
                            f"model.divergence.kind is {self.divergence.kind}, and {self.teacher.cache} holds a sample "
                            "of the teacher, which is unbiased for forward_kl alone: set it to forward_kl, or make the "
                            "cache with `ptl synth teacher --mode topk`"
                        )
                    self._vocabulary = plan.vocab
            return
        self._taught_by.place(self.device)

    def _shared_vocabulary(self) -> int:
        student = self.data.renderer.tokenizer
        if self.teacher.model is None:
            return vocabulary_size(student)
        teacher = load_tokenizer(self.teacher.model.name)
        if self.cross_tokenizer is not None:
            cross = CrossTeacher(student, teacher)
            self._cross = (cross, cross.matched_ids(self.device))
            return cross.student_vocabulary
        return compare_vocabularies(student, teacher).size

    def teardown(self, stage: str) -> None:
        if self._live is not None and self.teacher.placement == "sharded":
            self._live.close()
            self._live = None  # its shards go with the process group; the next loop makes another

    # ---- the loss ----

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        """The batch, or in a step that is on policy the same prompts with the student's own answers."""
        if self.on_policy is None or not self.training or not self.on_policy.takes(self.trainer.global_step):
            return batch
        return rewritten(
            self.policy,
            batch,
            self.on_policy,
            step=self.trainer.global_step,
            data=self.data,
            strategy=self.trainer.strategy,
            vocabulary=self._vocabulary or 0,
        )

    def loss(self, batch: TokenBatch) -> LossOutput:
        if self._cross is not None:
            return self._cross_loss(batch, *self._cross)
        positions, targets, weights = shifted_targets(batch)
        documents = batch.document_ids.flatten()[positions]
        scaled = weights * self._factors(batch)[documents] if self.source_weights else weights
        with block_outputs(self.policy, self.hidden.layers if self.hidden is not None else []) as ours:
            hidden = chosen(hidden_states(self.policy, batch), positions)
        theirs: dict[int, Tensor] = {}
        with ExitStack() as stack:
            if self.teacher.cache is not None:
                teacher: Side | SparseTargets = self._kept(batch)
            else:
                states, theirs = self._taught_by.states(batch, positions, list(self._teacher_blocks().values()))
                teacher = stack.enter_context(self._taught_by.side(states))
            fused = fused_divergence(
                head_side(self.policy, hidden),
                teacher,
                targets,
                scaled,
                divergence=self.divergence,
                ce=self.ce,
                vocabulary=self._vocabulary,
                metrics=self.wants_details,
                compiled=is_compiled(self.policy),
            )
        total, match = fused.total, None
        if self.hidden is not None:
            match = self._matched(ours, theirs, positions, scaled)
            total = total + self.hidden.weight * match
        return LossOutput(total, weights.sum(), self._metrics(batch, fused, total, match, documents, weights))

    def _cross_loss(self, batch: TokenBatch, cross: CrossTeacher, matched_ids: MatchedIds) -> LossOutput:
        """The loss with a teacher of another tokenizer."""
        both = cross(batch)
        states = hidden_states(self.policy, batch)
        ours = head_side(self.policy, chosen(states, both.student_positions))
        seen, _ = self._taught_by.states(both.teacher, both.teacher_positions)
        weights = both.weights
        if self.source_weights:
            weights = weights * self._factors(batch)[both.documents]
        our_targets = batch.input_ids.flatten()[both.student_positions + 1]
        their_targets = both.teacher.input_ids.flatten()[both.teacher_positions + 1]
        with self._taught_by.side(seen) as theirs:
            crossed = fused_cross_tokenizer_loss(
                _cut(ours, cross.student_vocabulary, our_targets),
                _cut(theirs, cross.teacher_vocabulary, their_targets),
                both.groups,
                weights,
                matched_ids,
                kind=self.cross_tokenizer or "hybrid",
                temperature=self.divergence.temperature,
            )
        positions, targets, plain = shifted_targets(batch)
        total, weight = (1 - self.ce) * crossed.total, plain.sum()
        metrics = {
            "loss": (total.detach(), weight),
            "divergence": (crossed.total.detach(), crossed.weight),
            "unaligned": (both.unaligned, weight),
        }
        if self.ce or self.wants_details:
            # The fused loss makes its gradients on the way forward: none where it is only looked at.
            with torch.set_grad_enabled(bool(self.ce) and torch.is_grad_enabled()):
                nll = HeadLoss(self.policy)(chosen(states, positions), targets, plain, {})
            total = total + self.ce * nll.total
            metrics |= {"loss": (total.detach(), weight), "nll": (nll.nll.detach(), nll.weight)}
        return LossOutput(total, weight, metrics)

    def _kept(self, batch: TokenBatch) -> SparseTargets:
        """What the cache keeps of the teacher for the batch's trained tokens."""
        return self._caches["train" if self.training else "val"].lookup(batch)

    def _teacher_blocks(self) -> dict[int, int]:
        """The teacher's block for each block of the student that is matched."""
        if self.hidden is None:
            return {}
        models = (self.policy, self._taught_by.model)
        depths = [causal_lm(model).config.get_text_config().num_hidden_layers for model in models]
        return {layer: teacher_layer(layer, *depths) for layer in self.hidden.layers}

    def _matched(
        self, ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor], positions: Tensor, weights: Tensor
    ) -> Tensor:
        assert self.hidden is not None
        total = weights.new_zeros(())
        for layer, block in self._teacher_blocks().items():
            projection = self.projections[str(layer)].weight if self.hidden.project else None
            pair = chosen(ours[layer], positions), chosen(theirs[block], positions)
            total = total + hidden_match(*pair, weights, projection, self.hidden.kind)  # pyright: ignore[reportArgumentType]
        return total

    def _factors(self, batch: TokenBatch) -> Tensor:
        """The factor of each document of the batch."""
        names = self.data.source_names("train" if self.training else "val")
        factors = torch.tensor([self.source_weights.get(name, 1.0) for name in names])
        return sent([factors], batch.loss_mask.device)[0][batch.sources]

    def _metrics(
        self,
        batch: TokenBatch,
        fused: FusedDivergence,
        total: Tensor,
        match: Tensor | None,
        documents: Tensor,
        weights: Tensor,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        weight = weights.sum()
        metrics = {
            "loss": (total.detach(), weight),
            "divergence": (fused.divergence, fused.weight),
            "teacher_bad": (fused.bad, torch.full_like(fused.bad, len(weights))),
        }
        for name, value in (("nll", fused.nll), ("agreement", fused.agreement)):
            if value is not None:
                metrics[name] = (value, fused.weight)
        if match is not None:
            metrics["hidden"] = (match.detach(), weight)
        return metrics | self.loss_by_source(batch.sources[documents], fused.token_divergence, weights)


def _cut(side: Side, size: int, targets: Tensor) -> CrossSide:
    """A side of the cross-tokenizer loss: its true vocabulary, and its own tokens."""
    low_rank = None if side.low_rank is None else (side.low_rank[0], side.low_rank[1][:size])
    bias = None if side.bias is None else side.bias[:size]
    return CrossSide(side.hidden, side.weight[:size], targets, bias, low_rank, side.softcap, side.logit_scale)
