"""``slurm/rollout.sbatch`` on a real cluster: one node serves with vLLM, the other trains on what it samples."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from tests.objectives import rl
from tests.slurm.cluster import free_ports
from tests.slurm.jobs import rows_of

SERVE = (
    "--host 127.0.0.1 --dtype float32 --enforce-eager --kv-cache-memory-bytes 50000000 --max-model-len 128 "
    "--enable-lora --max-loras 1 --max-lora-rank 8"
)
STEPS = 4


def arguments(folder, run, *more):
    settings = {
        "model": "ptl.objectives.grpo.GRPO",
        "model.policy.name": f"{folder}/model",
        "model.rewards": json.dumps([{"class_path": "tests.objectives.rl.Vowels"}]),
        "model.rollout.group_size": 4,
        "model.rollout.max_new_tokens": 12,
        "model.rollout.minibatches": 1,
        "model.self_check.min_finished": 0,
        "data.train": json.dumps([{"path": f"{folder}/rows.jsonl"}]),
        "data.max_length": 64,
        "data.micro_batch_size": 8,
        "data.preparation.cache_dir": f"{folder}/cache",
        "data.preparation.num_proc": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": STEPS,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.num_sanity_val_steps": 0,
        "run.dir": run,
    }
    return [*(part for key, value in settings.items() for part in (f"--{key}", str(value))), *more]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make install-vllm")
@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize(("adapter", "lr"), [(True, 1e-2), (False, 3e-3)])
def test_law_3_a_trainer_learns_from_a_server_on_another_node(cluster, tmp_path, adapter, lr):
    """Weights of each step reach the server: what it says of its answers stays what the trainer says of them."""
    folder, run = tmp_path, tmp_path / "run"
    rl.make_folder(folder, hidden=128, intermediate_size=256)
    more = ["--model.optimizer.lr", str(lr), *(["--model.policy.adapter", "{rank: 4}"] if adapter else [])]
    job = cluster.submit(
        *("slurm/rollout.sbatch", "--server", SERVE, f"{folder}/model", *arguments(folder, run, *more)),
        PTL_SERVER_HOST="127.0.0.1",
        PTL_SERVER_PORT=str(free_ports(1)[0]),
        PTL_MAX_RESTARTS="0",
    )
    logs = run / "slurm/latest"
    state = cluster.wait(job, seconds=600)
    said = cluster.output(job) + "".join(path.read_text()[-3000:] for path in sorted(logs.glob("*.log")))
    assert state == "COMPLETED", said
    rows = [row for row in rows_of(run) if "train/mismatch" in row]
    assert len(rows) == STEPS
    assert "POST /inference/v1/generate" in (logs / "server0.log").read_text()
    assert all(row["train/mismatch"] < 1e-4 for row in rows)
    # The weights moved far: an old policy's answers would be scored otherwise.
    assert rows[-1]["train/entropy"] < 0.8 * rows[0]["train/entropy"] and rows[-1]["train/entropy"] > 0.1
