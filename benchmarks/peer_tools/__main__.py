"""One measured run in a process of its own: ``python -m benchmarks.peer_tools STAGE ptl|peer IN.json OUT.json``."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.peer_tools.compare import write


def main() -> None:
    stage, side, inputs, output = sys.argv[1:]
    module = importlib.import_module(f"benchmarks.peer_stages.{stage}")
    run = {"ptl": module.run_ptl, "peer": module.run_peer}[side]
    write(run(json.loads(Path(inputs).read_text(encoding="utf-8"))), Path(output))


if __name__ == "__main__":
    main()
