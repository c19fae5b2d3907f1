"""How a run that stopped early tells its starter what to do with it: exit codes, and what is raised for them."""

from __future__ import annotations

REQUEUE = 85
"""Exit code of a run that was stopped with a checkpoint and wants to go on; batch scripts requeue it."""
HUNG = 86
"""Exit code of a rank that got on with nothing for too long and has left its stacks; batch scripts requeue it."""
REWIND = 87
"""Exit code of a run that diverged and has chosen an earlier checkpoint and later data; batch scripts requeue it."""


class PreemptedError(BaseException):
    """The run was asked to leave, has saved a checkpoint and left.

    It is no ``Exception``, as ``KeyboardInterrupt`` is none: nothing went wrong, and nobody should swallow it.

    Attributes:
        step: optimizer steps done.
        reason: why, in words.
        checkpoint: the path of what was saved.
    """

    def __init__(self, step: int, reason: str, checkpoint: str) -> None:
        super().__init__(f"stopped after optimizer step {step} ({reason}); saved {checkpoint}")
        self.step, self.reason, self.checkpoint = step, reason, checkpoint
