"""``python -m tests.slurm COMMAND [ARGUMENT ...]`` runs a command beside a real cluster of two nodes on this machine.

    python -m tests.slurm python -m benchmarks.throughput scaling --nodes 1 2 --kind weak

The cluster lasts as long as the command, whose exit code is this one's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.slurm import cluster


def main(command: list[str]) -> int:
    if not command or command[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    if reason := cluster.missing():
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster.running(Path(folder) / "cluster") as nodes:
        return subprocess.run(command, env=nodes.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
