"""The benchmark of saves: every save is timed, and both sides save the same."""

from __future__ import annotations

from benchmarks import checkpoint_stall


def test_each_side_times_every_save_and_keeps_one_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_stall, "PAUSE", 0.0)
    sizes = []
    for side in ("plain", "staged"):
        found = checkpoint_stall.measure(1000, tmp_path / side, tmp_path / "node" if side == "staged" else None)
        assert len(found["seconds"]) == checkpoint_stall.SAVES and found["whole"] >= sum(found["seconds"])
        sizes.append(found["bytes"])
    assert 3 * 4000 < sizes[0] < 2 * sizes[1] and abs(sizes[0] - sizes[1]) < 1000
