"""What is planned: a model, how it is trained, on how many devices. Plain values that the arithmetic reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ptl.functional.flops import Work
from ptl.functional.model_size import ModelSize

Precision = Literal["fp32", "bf16-mixed", "bf16-true"]
Objective = Literal["sft", "distillation", "reward", "dpo", "grpo", "ppo"]
Checkpointing = Literal["none", "selective", "full"]


class Strategy(NamedTuple):
    """How the state is cut over the ranks.

    Attributes:
        name: as ``ptl plan`` prints it.
        stage: of ZeRO; 0 is DDP, or one device alone.
        offload_optimizer, offload_parameters: kept in the host's memory.
        hooks: weights are fetched and released by hooks of Python, as DeepSpeed does.
    """

    name: str
    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    hooks: bool = False


STRATEGIES = (
    Strategy("ddp"),
    Strategy("zero1", 1),
    Strategy("zero2", 2),
    Strategy("zero3", 3, hooks=True),
    Strategy("zero2-offload", 2, True),
    Strategy("zero3-offload", 3, True, True, hooks=True),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run.

    Attributes:
        model: what is trained; ``teacher`` the frozen model beside it: teacher, reference or reward model.
        sequence: tokens of a row: of a pack, or of a document.
        micro_batch: rows of a micro-batch on a device; ``accumulate`` micro-batches make a step.
        document: tokens of a document, to which attention is confined; None is the whole row.
        rank: of LoRA on every linear layer but the head; None trains every weight.
        quantize: the frozen linear layers are kept in nf4 (QLoRA).
        weights: dtype of the weights as they are loaded (``policy.dtype``): that of a frozen base.
        precision: of the trainer.
        world: devices; ``per_node`` of them share a node.
        cuda: a GPU; otherwise a CPU process.
        checkpointing: what is recomputed in the backward pass: nothing, every layer, or (``selective``, which other
            frameworks have) every second product of a layer.
        teacher_sharded: the frozen model is cut over the ranks.
        objective: what is trained for.
        fused: the element-wise work of a layer runs in few kernels (compiled or written so); transformers' own eager
            layers do not.
        critic: PPO's second trained model, of the policy's size.
    """

    model: ModelSize
    sequence: int
    micro_batch: int = 1
    accumulate: int = 1
    document: int | None = None
    rank: int | None = None
    quantize: bool = False
    weights: Literal["fp32", "bf16"] = "bf16"
    precision: Precision = "bf16-mixed"
    world: int = 1
    per_node: int = 8
    cuda: bool = True
    checkpointing: Checkpointing = "none"
    teacher: ModelSize | None = None
    teacher_sharded: bool = False
    objective: Objective = "sft"
    fused: bool = False

    @property
    def critic(self) -> bool:
        return self.objective == "ppo"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a device."""
        return self.sequence * self.micro_batch

    @property
    def nodes(self) -> int:
        return -(-self.world // self.per_node)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that the products are computed in."""
        return 4 if self.precision == "fp32" else 2

    @property
    def work(self) -> Work:
        """Of a micro-batch. Every token is taken to be trained; a prompt's tokens need no head, so this is the most."""
        pairs = float(self.tokens) * min(self.document or self.sequence, self.sequence)
        return Work(tokens=self.tokens, head_tokens=0 if self.objective == "reward" else self.tokens, pairs=pairs)

    def trained(self) -> int:
        """Parameters of the policy that are trained."""
        return self.model.parameters if self.rank is None else self.model.lora(self.rank)
