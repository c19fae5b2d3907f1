"""A bare step of a model of a well-known shape."""

from __future__ import annotations

import json

import pytest

from benchmarks import step
from benchmarks.peer_tools import shapes


def test_a_step_is_measured_and_kept(tmp_path, monkeypatch):
    tiny = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    tiny |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "135M", tiny)
    words = ["--shape", "135M", "--layers", "2", "--documents", "3", "--tokens", "90", "--dtype", "fp32"]
    step.main([*words, "--device", "cpu", "--steps", "4", "--results", str(tmp_path)])
    line = json.loads((tmp_path / "step.json").read_text())
    assert (line["layers"], line["documents"], line["tokens"]) == (2, 3, 90 + 53 + 16)
    assert line["loss"] == pytest.approx(5.7, abs=0.3)  # log 300, of weights that know nothing
    assert line["mfu"] is None and 0 < line["share_of_matmul"] < 1 and line["tokens_per_second"] > 0


def test_shapes_are_those_of_their_names(tmp_path):
    for name, parameters in (("135M", 134.5e6), ("0.5B", 494e6), ("1.5B", 1543.7e6)):
        from ptl.functional.model_size import model_size

        config = {**shapes.SHAPES[name], "tie_word_embeddings": True}
        assert model_size(config).parameters == pytest.approx(parameters, rel=2e-3)


def test_the_shortest_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        step.main(["--steps", "2"])
    assert "--steps must be 3 or more, got 2" in capsys.readouterr().err
