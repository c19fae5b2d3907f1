"""Whether this machine can lock programs in; where it cannot, tests that need it are skipped and say why."""

import os

import pytest

from ptl.rewards.sandbox import SandboxUnavailableError
from ptl.rewards.sandbox.canaries import choose

REQUIRED = bool(os.environ.get("PTL_REQUIRE_SANDBOX"))
"""Set where every way must work, as in continuous integration: then nothing is skipped."""


@pytest.fixture(scope="module", autouse=True)
def sandbox_holds():
    """To be imported by a test module, all of which then needs a sandbox."""
    try:
        choose()
    except SandboxUnavailableError as refusal:
        if REQUIRED:
            raise
        pytest.skip(str(refusal))
