"""The types that flow from a row of data to a number.

``row: dict -> Conversation | Ranking | Prompt -> Tokens -> TokenBatch -> LossOutput``

Shape letters: B rows of a batch, T tokens of a row, D documents of a batch.
Records are frozen dataclasses that live on the CPU. Batches are NamedTuples, because Lightning moves those between
devices and refuses frozen dataclasses. torch and numpy are imported for typing alone, so that light commands may use
the records without loading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have. Other names are mapped to these when a row is read, or the row is refused."""


@dataclass(frozen=True)
class Origin:
    """Where a record came from, for every message about it.

    Attributes:
        file: path or hub name as the user wrote it.
        line: 1-based line of a text file, or 1-based row of a table.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: the text; empty only beside ``tool_calls``.
        reasoning: the text of the turn's think block where the row keeps it apart from the content.
        tool_calls: OpenAI form, ``{"type": "function", "function": {"name": str, "arguments": dict}}``.
        tool_call_id: the call that a tool message answers.
        name: speaker or tool name, where the template prints it.
        train: weight of this turn's tokens in the loss; None follows the policy, 0 masks the turn.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The message as a chat template sees it; absent fields are left out."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            out["name"] = self.name
        return out


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A dialogue to learn from, or, with ``text``, plain text of which every token is trained.

    Attributes:
        messages: the turns, oldest first; empty when ``text`` is given.
        tools: JSON schemas of the tools the assistant may call, as the template's ``tools`` variable.
        text: continued pre-training text.
        origin: file and line.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Several answers to one prompt and their order of preference.

    Attributes:
        prompt: the turns before the answers.
        completions: K answers of one or more turns each.
        ranks: K numbers, lower is better, equal is a tie; NaN for an answer that was not ranked. At least two are.
        scores: K numbers, higher is better, where the row has them: how much better, for a margin; NaN as above.
        annotator: who ranked them, where the row says it.
        tools: as in ``Conversation``.
        origin: file and line.
    """

    prompt: tuple[Message, ...]
    completions: tuple[tuple[Message, ...], ...]
    ranks: tuple[float, ...]
    scores: tuple[float, ...] | None = None
    annotator: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question whose answer can be verified.

    Attributes:
        messages: the turns up to the one that asks.
        answer: the expected answer, where there is one.
        tests: unit tests of a programming task.
        meta: what else a reward needs.
        tools: as in ``Conversation``.
        origin: file and line.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    tests: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    origin: Origin


Record = Conversation | Ranking | Prompt


@dataclass(frozen=True)
class Tokens:
    """A rendered document. After this nothing is tokenised again.

    Attributes:
        ids: int32 [T].
        loss_mask: float32 [T]; weight of ``ids[t]`` as a target. ``loss_mask[0]`` is 0: nothing precedes it.
        truncated: tokens or turns were cut to fit ``max_length``.
        lost_end: a trained answer lost its end-of-turn to the cut; that end is not trained.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    truncated: bool = False
    lost_end: bool = False


class Documents(NamedTuple):
    """The documents of a batch as arrays on the host, where they stay: L tokens end to end, without padding.

    Attributes:
        ids: int64 [L].
        weights: float32 [L], loss weights, 0 at the first token of each document.
        bounds: int64 [D + 1], where each document begins, and the end of the last.
        rows: int64 [D], as ``TokenBatch.rows``, or None.
    """

    ids: np.ndarray
    weights: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray | None


class TokenBatch(NamedTuple):
    """Documents ready for a forward pass, either packed (no padding) or padded on the right.

    Packed: B is 1, documents follow each other, ``cu_seqlens`` bounds them and ``attention_mask`` is None.
    Padded: a document a row, ``attention_mask`` is 1 on real tokens and ``cu_seqlens`` is None.

    Attributes:
        input_ids: int64 [B, T].
        loss_mask: float32 [B, T]; weight of ``input_ids[b, t]`` as a target, predicted from position t - 1 of the same
            document; 0 at the first token of each document and on padding.
        position_ids: int64 [B, T], from 0 in each document.
        document_ids: int64 [B, T], index of the token's document in ``sources``; -1 on padding.
        sources: int64 [D], index of each document's data source.
        window_weight: float64 [], sum of the weights over the whole optimizer window and all ranks; what the loss is
            divided by.
        cu_seqlens: int32 [D + 1] or None.
        attention_mask: int64 [B, T] or None.
        rows: int64 [D], index of each document in the prepared rows, or None where the batch was not read from them:
            with ``position_ids`` it names a token whatever the order, the packs and the micro-batches.
        trained: int64 [N], flat positions in [B * T] of the N trained tokens, ascending: those of a weight that is not
            0 and of a position that is not 0. None where it is unknown: who needs it then waits for the device once.
            Whoever changes ``loss_mask`` sets it, ``host_trained`` and ``documents`` to None.
        host_trained: the same as an array on the host, which stays there.
        host_lengths: int64 [D], the documents' lengths, on the host too; as ``trained`` it goes with ``cu_seqlens``.
        documents: what the batch was made of, for who reads tokens on the host, or None where it is unknown
            (``ptl.data.batches.documents_of`` reads the device then). Whoever changes ids, rows or documents sets it to
            None.
    """

    input_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor
    sources: Tensor
    window_weight: Tensor
    cu_seqlens: Tensor | None = None
    attention_mask: Tensor | None = None
    rows: Tensor | None = None
    trained: Tensor | None = None
    host_trained: np.ndarray | None = None
    host_lengths: np.ndarray | None = None
    documents: Documents | None = None

    def on(self, device: torch.device | str) -> TokenBatch:
        """The batch on a device, but for what is the host's."""
        fields: list[Any] = list(self)
        return TokenBatch(*(field.to(device) if hasattr(field, "to") else field for field in fields))


class GroupBatch(NamedTuple):
    """Ranked answers to P prompts, each of the D answers once, ready for one forward pass.

    ``tokens`` holds segments. Padded, or packed without a shared prompt, a segment is a whole document: prompt and
    answer. With a shared prompt a segment is either what a prompt's answers have in common, or the rest of one answer,
    which goes on at the next position and sees the segment that ``parents`` names.

    Attributes:
        tokens: the segments; its ``document_ids`` and ``rows`` are by segment.
        parents: int64 [S], the segment that a segment goes on from, or -1; None where there is none. On the host, where
            the attention is told of it.
        last: int64 [D], flat position in [B * T] of each answer's last token, padding never.
        groups: int64 [D], the prompt of each answer, ascending.
        ranks: float32 [D], lower is better, equal is a tie; NaN where the answer was not ranked.
        scores: float32 [D], higher is better; NaN where the row has none.
        lengths: int64 [D], tokens of each answer.
        prompt_weights: float32 [P], 1, or 0 for a prompt that only fills a place.
        prompt_sources: int64 [P], index of each prompt's data source.
        pairs: int64 [2, N], the better and the worse answer of each pair of ranked answers of one prompt, tied pairs
            too.
        pair_shares: float32 [N], 1 / number of pairs of the prompt.
        tied: bool [N].
        targets: int64 [M], ids of the answers' trained tokens, answer after answer.
        predicted_from: int64 [M], flat position of the hidden state that predicts each.
        owners: int64 [M], the answer each belongs to.
        target_weights: float32 [M], its loss weight.
    """

    tokens: TokenBatch
    parents: np.ndarray | None
    last: Tensor
    groups: Tensor
    ranks: Tensor
    scores: Tensor
    lengths: Tensor
    prompt_weights: Tensor
    prompt_sources: Tensor
    pairs: Tensor
    pair_shares: Tensor
    tied: Tensor
    targets: Tensor
    predicted_from: Tensor
    owners: Tensor
    target_weights: Tensor

    @property
    def window_weight(self) -> Tensor:
        """float64 [], prompts of the whole optimizer window over all ranks; what the loss is divided by."""
        return self.tokens.window_weight

    @property
    def pair_prompts(self) -> Tensor:
        """int64 [N], the prompt of each pair."""
        return self.groups[self.pairs[0]]


class Turn(NamedTuple):
    """Which micro-batch of which rollout.

    Attributes:
        epoch, start: name the rollout: the epoch, and the first of its positions in the epoch's order.
        count: windows of the rollout, an optimizer step each.
        windows: int64 [P], the window of each prompt.
        window: the micro-batch's own, in [0, count).
        micro: its place among the rank's micro-batches of the step, in [0, accumulate).
        accumulate: micro-batches of a step.
    """

    epoch: int
    start: int
    count: int
    windows: np.ndarray
    window: int
    micro: int
    accumulate: int


class PromptBatch(NamedTuple):
    """Prompts to answer, by their numbers; arrays on the host, since they are looked up and not computed with.

    Attributes:
        rows: int64 [P], prepared rows.
        positions: int64 [P], place of each in its epoch's order, which names its draws on any number of ranks.
        real: bool [P], False for a prompt that only fills a place.
        turn: in training: the prompts are all that the rank answers in a rollout, and this micro-batch's is one part.
    """

    rows: np.ndarray
    positions: np.ndarray
    real: np.ndarray
    turn: Turn | None = None


class RolloutBatch(NamedTuple):
    """Sampled answers to P prompts, whole groups, ready for a forward pass.

    Shape letters as in ``GroupBatch``: D answers, M trained tokens.

    Attributes:
        answers: the tokens; ``targets``, ``predicted_from`` and ``owners`` are those of the trained tokens alone:
            neither prompts nor what a tool wrote are among them, and nothing of an answer that is left out.
        rewards: float32 [D], NaN where an answer has none.
        truncated: bool [D], answers that reached their limit before their end.
        group_tokens: int64 [D], trained tokens of all answers to the same prompt.
        tokens: name -> float32 [M], what is known of each trained token: ``behaviour``, the log-probability it was
            drawn with; ``advantages``; ``old``, ``reference``, ``values``, ``returns`` once they have been computed.
        window, micro: which micro-batch of the rollout.
    """

    answers: GroupBatch
    rewards: Tensor
    truncated: Tensor
    group_tokens: Tensor
    tokens: dict[str, Tensor]
    window: int = 0
    micro: int = 0

    @property
    def window_weight(self) -> Tensor:
        """float64 [], what the step's loss is divided by."""
        return self.answers.tokens.window_weight


class SparseTargets(NamedTuple):
    """What a teacher said about N tokens, kept in part: some entries of its distribution and what they leave out.

    Attributes:
        ids: int64 [N, K], distinct vocabulary ids of a row; -1 where a row has fewer than K.
        logprobs: float32 [N, K], their log-probabilities; of a sample, the logs of their shares of the draws. -inf
            where ``ids`` is -1.
        tail: float32 [N], log of the probability of all other ids together; -inf where nothing is left out, as in a
            sample.
        entropy: float32 [N], entropy in nats of the whole distribution at the temperature of the log-probabilities.
        whole: whether ``tail`` is -inf in every row; None where it is unknown: who needs it waits for the device.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    entropy: Tensor
    whole: bool | None = None


class LossOutput(NamedTuple):
    """What an objective's ``loss`` returns: a sum and its weight, never a mean. Only the base divides.

    Attributes:
        total: float32 [], weighted sum over this micro-batch, with its graph.
        weight: float32 [], sum of the weights of this micro-batch.
        metrics: name -> (sum, weight), detached; the base adds them up over micro-batches and ranks and divides once.
    """

    total: Tensor
    weight: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]
