"""Muon for the hidden matrices and AdamW for the rest, as one optimizer object.

One object, because Lightning's schedule, clipping and checkpoints, and the exact resume, are about one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NEEDS_MATRICES = (
    "model.init_args.optimizer.kind muon needs whole matrices, and ZeRO gives the optimizer flat pieces of them: set "
    "it to adamw or adamw8bit, or use trainer.strategy ddp"
)


class MuonAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` (Jordan et al. 2024, kellerjordan.github.io/posts/muon) beside ``torch.optim.AdamW``.

    Muon's update is scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so
    that one learning rate and one weight decay suit both. Its momentum is 0.95, with Nesterov's look-ahead. It
    orthogonalises in bf16, which is slow on a CPU without bf16 matrix instructions.

    Both step on this object's groups and state, lent at each step: what a checkpoint holds, a schedule changes or a
    caller replaces is in one place.

    Arguments:
        hidden: groups for Muon, of 2-D parameters.
        rest: groups for AdamW.
        adamw: arguments of AdamW.

    Raises:
        ValueError: from ``step``: a strategy has put something else in the place of the matrices.
    """

    def __init__(self, hidden: list[dict[str, Any]], rest: list[dict[str, Any]], **adamw: Any) -> None:
        # Each fills in its own settings in the groups that this object then keeps.
        muon = torch.optim.Muon([{**group, "muon": True} for group in hidden], adjust_lr_fn="match_rms_adamw")
        groups = muon.param_groups
        self._parts: dict[bool, torch.optim.Optimizer] = {True: muon}
        if rest:
            self._parts[False] = torch.optim.AdamW([{**group, "muon": False} for group in rest], **adamw)
            groups = [*groups, *self._parts[False].param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.ndim != 2 for group in self.param_groups if group["muon"] for p in group["params"]):
            raise ValueError(NEEDS_MATRICES)
        for is_muon, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["muon"] is is_muon]
            part.state = self.state
            part.step()
        return loss


def hidden_matrices(module: nn.Module) -> set[int]:
    """``id`` of each 2-D parameter inside the stack of layers, embeddings and LoRA's factors left out.

    The stack is what the model keeps in an ``nn.ModuleList``, so that the embedding of tokens and every head, tied or
    not, are outside. LoRA's A and B are left out because it is their product, not each of them, that is added to a
    matrix. Experts kept as one 3-D parameter are no matrices either.

    Raises:
        ValueError: ZeRO-3 has cut the parameters.
    """
    found: set[int] = set()
    for stack in (part for part in module.modules() if isinstance(part, nn.ModuleList)):
        for part in stack.modules():
            if isinstance(part, nn.Embedding):
                continue
            for parameter in part.parameters(recurse=False):
                if hasattr(parameter, "ds_shape"):
                    raise ValueError(NEEDS_MATRICES)
                if parameter.ndim == 2:
                    found.add(id(parameter))
    factors = {id(parameter) for name, parameter in module.named_parameters() if "lora_" in name}
    return found - factors
