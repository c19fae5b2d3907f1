"""What PPO's critic says of a state: a head on the policy's own trunk, or a model of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ptl.data.tokenizer import load_tokenizer
from ptl.models.heads import causal_lm, chosen, hidden_states
from ptl.models.logprobs import TokenLogprobs
from ptl.models.names import resolve_model
from ptl.models.scoring import group_scores
from ptl.models.spec import ModelSpec
from ptl.models.vocabulary import token_table
from ptl.types import GroupBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Said(NamedTuple):
    """What policy and critic say of D answers with M trained tokens.

    Attributes:
        logprobs: [M], of the trained tokens at the temperature of the sampling.
        values: [M], of the state before each trained token.
        after: [D], of the state after each answer's last token.
        entropy: [M] in nats, of the distribution that each trained token was drawn from; None where nobody asked.
    """

    logprobs: Tensor
    values: Tensor
    after: Tensor
    entropy: Tensor | None


class ValueHead(nn.Linear):
    """The value of a state from the policy's hidden state, [*, H] -> [*], 0 for any state before training.

    It is computed in fp32 whatever the dtype of states and weights, as a reward model's score is.

    Args:
        policy: whose hidden states it reads.
    """

    def __init__(self, policy: nn.Module) -> None:
        lm = causal_lm(policy)
        # ZeRO-3 takes parameters of one dtype alone; its optimizer holds fp32 ones.
        dtype = lm.get_input_embeddings().weight.dtype if is_deepspeed_zero3_enabled() else torch.float32
        super().__init__(lm.config.get_text_config().hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.to(wide), self.weight.to(wide), self.bias.to(wide))[..., 0]


def said(
    policy: nn.Module,
    critic: nn.Module,
    answers: GroupBatch,
    temperature: float,
    *,
    entropy: bool = False,
    critic_alone: bool = False,
) -> Said:
    """Log-probabilities and values, with their graph and in the modes that the models are in.

    Args:
        policy: the model that is trained.
        critic: a ``ValueHead``, for which the policy's states are computed once; or a model with a scalar head.
        answers: on the device of both.
        temperature: of the sampling.
        entropy: also the entropy.
        critic_alone: let no gradient of the values into the policy.
    """
    hidden = hidden_states(policy, answers.tokens, parents=answers.parents)
    states, head, spread = chosen(hidden, answers.predicted_from), TokenLogprobs(policy), None
    if entropy:
        logprobs, spread = head.with_entropy(states, answers.targets, temperature)
    else:
        logprobs = head(states, answers.targets, temperature)
    places = torch.cat([answers.predicted_from, answers.last])
    if isinstance(critic, ValueHead):
        values = critic(chosen(hidden.detach() if critic_alone else hidden, places))
    else:
        values = group_scores(critic, answers._replace(last=places))
    before, after = values.split([len(answers.predicted_from), len(answers.last)])
    return Said(logprobs, before, after, spread)


# ---- a model of its own ----


def critic_of(spec: ModelSpec) -> ModelSpec:
    """What to build a critic from: of a run folder its export, with a scalar head.

    Raises:
        ValueError: no model is there, or it could not be trained.
    """
    found = resolve_model(spec.name)
    if found.adapter:
        raise ValueError(
            f"model.critic.name {spec.name} is an adapter: merge it with `ptl export {spec.name} --out FOLDER` and "
            "name that folder"
        )
    if spec.quantize is not None and spec.adapter is None:
        raise ValueError(
            f"model.critic.quantize {spec.quantize} without an adapter trains nothing: set model.critic.adapter, or "
            "remove quantize"
        )
    if spec.adapter is not None and spec.adapter.dropout:
        raise ValueError(
            f"model.critic.adapter.dropout is {spec.adapter.dropout}: a critic that drops out in training does not say "
            "what it said at the rollout. Set it to 0"
        )
    return replace(spec, name=found.name, head="scalar")


def check_vocabulary(critic: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses a critic that would read other words into the policy's ids; no number would show it.

    Raises:
        ValueError: with the first id that differs, or that the critic does not know.
    """
    own = token_table(tokenizer)
    its = token_table(load_tokenizer(critic.name, trust_remote_code=critic.trust_remote_code))
    for number, token in enumerate(own):
        other = its[number] if number < len(its) else None
        if token is not None and token != other:
            raise ValueError(
                f"model.critic.name {critic.name} has another vocabulary than the policy: id {number} is {token!r} to "
                f"the policy and {'unknown' if other is None else repr(other)} to the critic. Name a reward model that "
                "was trained from the policy's family, or remove model.critic for a value head on the policy"
            )
