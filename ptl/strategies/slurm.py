"""A job of SLURM seen from one of its ranks: whether it was started rightly."""

from __future__ import annotations

import os
from collections.abc import Mapping


def check_job(devices: object, nodes: int, environment: Mapping[str, str] | None = None) -> None:
    """Refuses a start that would wait for ranks that nobody starts.

    Arguments:
        devices: devices of a node, as the trainer is given them: a number, ``auto`` or -1.
        nodes: nodes, as the trainer is given them.
        environment: variables of the process; its own by default.

    Raises:
        ValueError: a job of several tasks in which this process was not started by ``srun``; other numbers of tasks or
            nodes than the trainer's.
    """
    env = os.environ if environment is None else environment
    tasks = int(env.get("SLURM_NTASKS", "1"))
    if "SLURM_JOB_ID" not in env or env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return
    if "SLURM_STEP_ID" not in env and "TORCHELASTIC_RUN_ID" not in env:
        if tasks > 1:
            raise ValueError(
                f"the job {env['SLURM_JOB_ID']} has {tasks} tasks, but this process was started without srun, so the "
                "other ranks are missing: write `srun ptl fit ...` in the batch script, or use slurm/train.sbatch"
            )
        return
    if "SLURM_STEP_ID" not in env:
        return
    here = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", "1")
    if nodes != int(here):
        raise ValueError(
            f"trainer.num_nodes is {nodes} and the job step has {here} nodes: pass --trainer.num_nodes={here}, or ask "
            f"for --nodes={nodes}"
        )
    a_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(tasks)
    per_node = a_node.split("(")[0].split(",")[0]
    given = str(devices)
    if given.isdigit() and given != per_node:
        raise ValueError(
            f"trainer.devices is {given} and srun starts {per_node} tasks a node, but it takes one task a device: pass "
            f"--trainer.devices={per_node}, or ask for --ntasks-per-node={given}"
        )
