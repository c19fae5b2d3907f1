"""The DeepSpeed config that the strategy makes out of its arguments, a user's config, the trainer and the model."""

from __future__ import annotations

import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from ptl.strategies.zero_config import (
    FP32_BUFFERS,
    RunFacts,
    ZeROOptions,
    for_loading,
    merge,
    read_config,
    resolve_model,
    resolve_run,
)
from ptl.strategies.zero_keys import check_keys, known_keys

HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "auto", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The ZeRO-3 config of transformers' documentation, less its optimizer and scheduler."""


def facts(**changes) -> RunFacts:
    plain = {"precision": "bf16-true", "gradient_clip_val": 1.0, "accumulate_grad_batches": 4, "world_size": 2}
    return RunFacts(**{**plain, **changes})


def resolved(config=None, options=None, run=None, hidden=512):
    return resolve_model(resolve_run(merge(config, options or ZeROOptions()), run or facts()), hidden)


def test_autos_of_a_hugging_face_config_are_resolved():
    config = resolved(HUGGING_FACE, ZeROOptions(offload_optimizer=True), hidden=4096)
    assert "auto" not in json.dumps(config)
    assert config["bf16"] == {"enabled": True}
    assert "fp16" not in config
    assert config["gradient_clipping"] == 1.0
    assert config["train_micro_batch_size_per_gpu"] == 1
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["reduce_bucket_size"] == 4096 * 4096
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 4096 * 4096)
    assert zero["stage3_param_persistence_threshold"] == 10 * 4096
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    # Lightning adds the accumulation and refuses a config that has it; DeepSpeed works the total out.
    assert not {"gradient_accumulation_steps", "train_batch_size"} & config.keys()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_what_is_made_is_a_config_for_deepspeed(stage, precision):
    config = resolved(None, ZeROOptions(stage=stage), facts(precision=precision))
    parsed = DeepSpeedConfig({**config, "gradient_accumulation_steps": 4})
    assert parsed.zero_optimization_stage == stage
    assert parsed.bfloat16_config.enabled == precision.startswith("bf16")
    assert parsed.gradient_clipping == 1.0
    assert parsed.zero_allow_untested_optimizer is True


def test_the_stage_is_2_unless_said_otherwise():
    assert merge(None, ZeROOptions())["zero_optimization"]["stage"] == 2
    assert merge({"zero_optimization": {"stage": 1}}, ZeROOptions())["zero_optimization"]["stage"] == 1
    assert merge({"zero_optimization": {"stage": "auto"}}, ZeROOptions(stage=3))["zero_optimization"]["stage"] == 3


def test_a_small_model_has_no_tiny_buckets_and_an_unknown_one_deepspeeds_own():
    assert resolved(hidden=64)["zero_optimization"]["reduce_bucket_size"] == 10_000_000
    assert "reduce_bucket_size" not in resolved(hidden=None)["zero_optimization"]


def test_zeropp_and_parameter_offload_reach_the_config():
    options = ZeROOptions(
        stage=3, offload_parameters=True, hpz_partition_size=8, quantized_weights=True, quantized_gradients=True
    )
    zero = resolved(None, options)["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 8
    assert zero["zero_quantized_weights"] is zero["zero_quantized_gradients"] is True
    assert zero["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("stage", "accumulate", "precision", "expected"),
    [
        (2, 4, "bf16-true", "fp32"),
        (3, 4, "bf16-mixed", "fp32"),
        (2, 1, "bf16-true", None),
        (1, 4, "bf16-true", None),
        (2, 4, "32-true", None),
    ],
)
def test_many_bf16_micro_batches_are_summed_in_fp32(stage, accumulate, precision, expected):
    run = facts(precision=precision, accumulate_grad_batches=accumulate)
    config = resolved(None, ZeROOptions(stage=stage), run)
    assert config.get("data_types", {}).get("grad_accum_dtype") == expected


def test_the_users_choice_of_sums_stays():
    config = resolved({"data_types": {"grad_accum_dtype": "bf16"}})
    assert config["data_types"]["grad_accum_dtype"] == "bf16"


def test_loading_keeps_the_buffers_that_bf16_would_spoil():
    config = for_loading(resolve_run(merge(None, ZeROOptions(stage=3)), facts()))
    assert config["data_types"]["keep_in_fp32_modules"] == list(FP32_BUFFERS)
    assert "auto" not in json.dumps(config)


def test_the_given_config_is_not_changed():
    given = json.loads(json.dumps(HUGGING_FACE))
    resolved(given, ZeROOptions(offload_optimizer=True))
    assert given == HUGGING_FACE


def test_a_config_can_be_a_file(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(HUGGING_FACE))
    assert read_config(path) == read_config(str(path)) == HUGGING_FACE


@pytest.mark.parametrize("text", ['{"a": 1,\n "b": }', "[1]"])
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "zero3.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"zero3\.json:2: not JSON|zero3\.json must hold a JSON object, got list"):
        read_config(path)
    with pytest.raises(ValueError, match=r"no such file '.*other\.json'"):
        read_config(tmp_path / "other.json")


UNKNOWN = [
    ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean gradient_clipping?"),
    ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
    ({"stage": 2}, "unknown key 'stage'; did you mean zero_optimization.stage?"),
    ({"offload_optimizer": {"device": "cpu"}}, "did you mean zero_optimization.offload_optimizer?"),
    (
        {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
        "unknown key 'zero_optimization.offload_optimizer.devise'; "
        "did you mean zero_optimization.offload_optimizer.device?",
    ),
    ({"bf16": {"enable": True}}, "unknown key 'bf16.enable'; did you mean bf16.enabled?"),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean data_types.grad_accum_dtype?"),
    ({"zero_optimization": True}, "zero_optimization must hold keys"),
    ({"zero_optimization": {"reduce_bucket_size": -4}}, "zero_optimization.reduce_bucket_size: got -4"),
    ({"zero_optimization": {"stage": "two"}}, "strategy.stage must be 0, 1, 2 or 3, got 'two'"),
]


@pytest.mark.parametrize(("config", "message"), UNKNOWN, ids=[str(case[0]) for case in UNKNOWN])
def test_trap_scale_1_1_unknown_keys_are_refused_at_every_level(config, message):
    """DeepSpeed ignores unknown keys at the top level."""
    with pytest.raises(ValueError) as error:
        merge(config, ZeROOptions())
    assert message in str(error.value)


UNSUPPORTED = [
    ({"optimizer": {"type": "AdamW"}}, "'optimizer' is not supported: the objective makes the optimizer"),
    ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is not supported: the objective makes the schedule"),
    ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation: False is not supported"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: 'sum' is not supported"),
    ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal: True is not supported"),
    ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
    ({"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel' is not supported"),
    ({"elasticity": {}}, "'elasticity' is not supported: DeepSpeed 0.19 has removed it"),
]


@pytest.mark.parametrize(("config", "message"), UNSUPPORTED, ids=[str(case[0]) for case in UNSUPPORTED])
def test_what_cannot_be_honoured_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError) as error:
        merge(config, ZeROOptions())
    assert message in str(error.value)


CONFLICTS = [
    ({"zero_optimization": {"stage": 1}}, {"stage": 2}, {}, "zero_optimization.stage=1 contradicts strategy.stage=2"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
        {"offload_optimizer": True},
        {},
        "zero_optimization.offload_optimizer.device='none' contradicts strategy.offload_optimizer=True",
    ),
    ({"gradient_clipping": 0.5}, {}, {}, "gradient_clipping=0.5 contradicts trainer.gradient_clip_val=1.0"),
    (
        {"gradient_accumulation_steps": 2},
        {},
        {},
        "gradient_accumulation_steps=2 contradicts trainer.accumulate_grad_batches=4",
    ),
    ({"bf16": {"enabled": False}}, {}, {}, "bf16.enabled=False contradicts trainer.precision='bf16-true'"),
    (
        {"fp16": {"enabled": True}},
        {},
        {"precision": "32-true"},
        "fp16.enabled=True contradicts trainer.precision='32-true'",
    ),
    ({"torch_autocast": {"enabled": True}}, {}, {}, "torch_autocast needs trainer.precision 32-true"),
    ({"train_batch_size": 64}, {}, {}, "train_batch_size=64 is not decided here"),
    ({"steps_per_print": "auto"}, {}, {}, 'steps_per_print: "auto" has no meaning here'),
    (None, {"stage": 2, "offload_parameters": True}, {}, "offload_parameters needs strategy.stage 3, got 2"),
    (None, {"stage": 0, "offload_optimizer": True}, {}, "offload_optimizer needs strategy.stage 1 or more, got 0"),
    (None, {"stage": 2, "hpz_partition_size": 8}, {}, "hpz_partition_size needs strategy.stage 3, got 2"),
    (None, {"stage": 1, "quantized_weights": True}, {}, "quantized_weights needs strategy.stage 3, got 1"),
]


@pytest.mark.parametrize(("config", "options", "run", "message"), CONFLICTS, ids=[case[3][:40] for case in CONFLICTS])
def test_two_answers_to_one_question_are_an_error_that_names_both(config, options, run, message):
    with pytest.raises(ValueError) as error:
        resolved(config, ZeROOptions(**options), facts(**run))
    assert message in str(error.value)


def test_equal_answers_are_no_conflict():
    config = {
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 8,
        "train_batch_size": 64,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "zero_optimization": {"stage": 2},
    }
    out = resolved(config, ZeROOptions(stage=2))
    assert out["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert out["train_micro_batch_size_per_gpu"] == 8


def test_a_config_may_clip_where_the_trainer_does_not():
    assert resolved({"gradient_clipping": 0.5}, run=facts(gradient_clip_val=None))["gradient_clipping"] == 0.5


def test_every_section_that_deepspeed_describes_is_known():
    keys = known_keys()
    zero = keys["zero_optimization"]
    assert zero is not None and zero["offload_param"] is not None
    assert {"stage3_prefetch_bucket_size", "prefetch_bucket_size", "leaf_module"} <= zero.keys()
    check_keys(
        {"zero_optimization": {"leaf_module": {"classes": ["a.B"]}}, "timers": {"throughput": {"enabled": False}}}
    )
