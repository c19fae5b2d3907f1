"""Each file's W&B runs have a W&B process of their own."""

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def own_wandb_process():
    """Ends the process that the file's runs have started, so that no later file depends on it."""
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()
