"""``srun ptl doctor --distributed`` over the two nodes of a real cluster."""

from __future__ import annotations

import json

import pytest

from tests.ranks import ROOT


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_both_nodes_of_a_job_are_compared(cluster, tmp_path):
    script, path = tmp_path / "doctor.sbatch", tmp_path / "report.json"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\n"
        f"cd {ROOT}\nsrun --mpi=none $PTL_PYTHON -m ptl.cli doctor --distributed --quick --json {path}\n"
    )
    job = cluster.submit(script)
    state = cluster.wait(job)
    found = json.loads(path.read_text())
    assert state == ("COMPLETED" if found["healthy"] else "FAILED"), cluster.output(job)
    assert [report["rank"] for report in found["reports"]] == [0, 1]
    assert all(report["all_reduce"]["all"] > 1e6 for report in found["reports"])
    assert "all GB/s" in cluster.output(job)
