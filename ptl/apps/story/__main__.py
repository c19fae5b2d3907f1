"""``python -m ptl.apps.story``, which is what ``make story`` runs."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

from ptl.apps.demo import unpack
from ptl.apps.story import data, page
from ptl.apps.story.running import StoryError, run_all
from ptl.apps.story.stages import SIZES, WORK, stages


def main() -> int:
    """Runs the story; returns 0, or 2 after a message on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the command that runs, as Ctrl-C does
    try:
        unpack()
        if not (WORK / "prompts.jsonl").exists():  # the last file of the data
            data.write_all(WORK, data.WHEELS, SIZES)
        parts = stages(shlex.join(sys.argv[1:]))
        ledger = run_all(parts, WORK)
        shown = page.write(parts, ledger, WORK, WORK / "report")
    except (ValueError, OSError, StoryError) as mistake:
        print(f"ptl story: error: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    minutes = sum(command["seconds"] for done in ledger.values() for command in done) / 60
    print(f"\nthe story:      {Path(shown)} ({minutes:.0f} minutes in all)")
    print(f"talk to it:     .venv/bin/ptl chat {WORK / 'nf4'} --tools calculator search={WORK / 'documents.jsonl'}")
    print(f"begin again:    rm -r {WORK}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
