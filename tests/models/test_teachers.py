"""A teacher that cannot fit is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest

from ptl.models.spec import ModelSpec
from ptl.models.teachers import Teacher, check_room

GIB = 2**30
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return str(tmp_path)


def test_a_teacher_larger_than_the_memory_is_refused_with_what_helps(name):
    teacher = Teacher(model=ModelSpec(name=name, dtype="bf16"))
    with pytest.raises(ValueError, match=r"70\.6B parameters, which take 131\.4 GiB .*`ptl plan -c RUN --teacher"):
        check_room(teacher, ranks=8, device_bytes=80 * GIB)


@pytest.mark.parametrize(
    ("options", "spec", "ranks"),
    [({"placement": "sharded"}, {"dtype": "bf16"}, 8), ({}, {"dtype": "bf16", "quantize": "nf4"}, 1)],
    ids=["sharded", "quantised"],
)
def test_what_fits_is_let_pass(name, options, spec, ranks):
    check_room(Teacher(model=ModelSpec(name=name, **spec), **options), ranks=ranks, device_bytes=80 * GIB)


def test_a_kind_of_model_whose_size_is_not_known_is_let_pass(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "layers": 3}))
    check_room(Teacher(model=ModelSpec(name=str(tmp_path))), ranks=1, device_bytes=1)
