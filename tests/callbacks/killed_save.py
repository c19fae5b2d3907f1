"""A process that saves over a checkpoint until it is killed; started by the tests.

Arguments: path of the checkpoint, megabytes, and optionally the largest file size in bytes that the system allows.
"""

import resource
import sys
from pathlib import Path

import torch

from ptl.callbacks.single_file import AtomicCheckpointIO
from ptl.strategies.checkpoints import CheckpointError


def main() -> None:
    path, megabytes = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        limit = int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    step = 1
    while True:
        tensors = {f"w{i}": torch.full((2**18,), float(step)) for i in range(megabytes)}
        try:
            AtomicCheckpointIO().save_checkpoint({"global_step": step, "state_dict": tensors}, path)
        except CheckpointError as error:
            print(f"REFUSED {error}", flush=True)
            sys.exit(3)
        print(f"saved {step}", flush=True)
        step += 1


if __name__ == "__main__":
    main()
