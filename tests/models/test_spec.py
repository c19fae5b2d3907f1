"""The values of a model spec: what is refused and in which words, and that reading them loads nothing heavy."""

import subprocess
import sys

import pytest
from jsonargparse import ArgumentParser

from ptl.models.spec import LoRA, ModelSpec

LORA = LoRA()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "adapter.rank"),
        ({"alpha": 0.0}, "adapter.alpha"),
        ({"dropout": 1.0}, "adapter.dropout"),
        ({"targets": []}, "adapter.targets"),
        ({"targets": "q_proj"}, "all-linear or a list"),
        ({"plus_ratio": 0.0}, "adapter.plus_ratio"),
        ({"init": "svd"}, "adapter.init must be one of default, gaussian"),
        ({"init": "orthogonal", "rank": 5}, "even adapter.rank, got 5"),
        ({"dtype": "bf16"}, "adapter.dtype must be one of auto, base, fp32"),
        ({"train_tokens": [3, -1]}, "holds -1"),
    ],
)
def test_a_wrong_adapter_names_its_key(values, words):
    with pytest.raises(ValueError, match=words):
        LoRA(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": ""}, "policy.name is empty"),
        ({"dtype": "float32"}, "dtype must be one of bf16, fp32, fp16, auto, got 'float32'"),
        ({"attention": "flash"}, "attention must be one of"),
        ({"quantize": "int4", "adapter": LORA}, "quantize must be one of None, nf4, int8"),
        ({"head": "value"}, "head must be one of lm, scalar"),
        ({"attention": "flash_attention_2"}, "set dtype bf16 or fp16"),
        ({"quantize": "nf4", "adapter": LORA, "random_init": True}, "needs trained weights"),
        ({"quantize": "nf4", "adapter": LoRA(init="pissa")}, "use default or gaussian"),
        ({"quantize": "int8", "adapter": LoRA(init="orthogonal")}, "use default or gaussian"),
        ({"quantize": "int8", "adapter": LoRA(dora=True)}, "use quantize nf4, or no dora"),
    ],
)
def test_a_wrong_spec_names_its_key(values, words):
    with pytest.raises(ValueError, match=words):
        ModelSpec(**{"name": "x", **values})


def test_a_yaml_spec_is_read_and_written_back():
    parser = ArgumentParser()
    parser.add_argument("--policy", type=ModelSpec)
    given = {"name": "x", "quantize": "nf4", "adapter": {"targets": ["q_proj"], "train_tokens": [3, "<a>"]}}
    read = parser.parse_object({"policy": given})
    spec = parser.instantiate(read).policy
    assert spec == ModelSpec(name="x", quantize="nf4", adapter=LoRA(targets=["q_proj"], train_tokens=[3, "<a>"]))
    again = parser.instantiate(parser.parse_string(parser.dump(read))).policy
    assert again == spec


def test_reading_a_spec_loads_no_torch():
    code = "import sys; from ptl.models.spec import LoRA, ModelSpec; ModelSpec(name='x', adapter=LoRA()); "
    done = subprocess.run(
        [sys.executable, "-c", code + "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"], timeout=60
    )
    assert done.returncode == 0
