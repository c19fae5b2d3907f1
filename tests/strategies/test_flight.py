"""torch's flight recorder is set up without touching what the user has set; what it holds is readable."""

import pickle

import torch

from ptl.strategies.flight import set_flight_recorder, write_flight_record


def test_the_flight_recorder_keeps_what_the_user_has_set(tmp_path):
    environment: dict[str, str] = {}
    set_flight_recorder(tmp_path / "flight", environment)
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(tmp_path / "flight" / "rank_"),
    }
    own = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "10",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/x/y_",
    }
    kept = dict(own)
    set_flight_recorder(tmp_path / "other", kept)
    assert kept == own and not (tmp_path / "other").exists()


def test_without_a_process_group_there_is_nothing_to_write(tmp_path):
    assert not write_flight_record(tmp_path / "stacks", 0)
    assert not (tmp_path / "stacks").exists()


def test_the_last_collectives_of_a_group_of_one(tmp_path):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.distributed.all_reduce(torch.ones(3))
        assert write_flight_record(tmp_path, 0)
    finally:
        torch.distributed.destroy_process_group()
    entries = pickle.loads((tmp_path / "rank_0").read_bytes())["entries"]
    assert "gloo:all_reduce" in [entry["profiling_name"] for entry in entries]
    assert "gloo:all_reduce [[3]]" in (tmp_path / "collectives0.txt").read_text()
    assert "test_flight.py" in (tmp_path / "collectives0.txt").read_text()
