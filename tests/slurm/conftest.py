"""One cluster for the tests of a file's process, and a tiny model with rows."""

from __future__ import annotations

import os

import pytest

from tests.objectives import law
from tests.slurm import cluster as real


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running cluster; where none can be started the tests are skipped, or fail with ``PTL_REQUIRE_SLURM=1``."""
    if reason := real.missing():
        if os.environ.get("PTL_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with real.running(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return law.make_folder(tmp_path_factory.mktemp("slurm-model"))
