"""Samples: training does not notice them, nothing is taken from the checkpoint's settings, answers are kept."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from transformers import GenerationConfig

from ptl.callbacks.jsonl import read_rows
from ptl.callbacks.record import RunRecord
from ptl.callbacks.samples import Samples, own_random_state
from ptl.data.render import Renderer
from ptl.models.modes import evaluating
from ptl.models.spec import LoRA
from ptl.rollout.sampling import greedy
from tests import tiny
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.callbacks.real import ANSWERS, QUESTIONS, chat, make_inputs, sft


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def fit(folder, inputs, callbacks, *, steps=6, module=None, **options):
    model, data = inputs
    module = module or sft(model, lora=LoRA(rank=4, dropout=0.3))
    runner = trainer(folder, callbacks, max_steps=steps, **options)
    torch.manual_seed(11)
    runner.fit(module, chat(model, data))
    return module


def test_training_is_bit_for_bit_the_same_with_and_without(tmp_path, inputs):
    """Dropout draws from the generator at every step: one number drawn by a sample would show."""
    results = []
    for name, callbacks in (("without", []), ("with", [Samples(QUESTIONS, every_n_steps=2, console=False)])):
        module = fit(tmp_path / name, inputs, callbacks)
        results.append({n: p.detach().clone() for n, p in module.named_parameters()})
        if name == "with":
            assert len(read_rows(tmp_path / name / "samples.jsonl")) == 4 * len(QUESTIONS)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    trained = [name for name in results[0] if "lora_B" in name]
    assert trained and any(results[0][name].abs().max() > 0 for name in trained)


def test_answers_are_kept_with_their_step(tmp_path, inputs, capsys):
    module = sft(inputs[0], lr=1e-2)
    callbacks = [RunRecord(tmp_path / "run"), Samples(QUESTIONS, every_n_steps=100, max_new_tokens=12)]
    fit(tmp_path, inputs, callbacks, steps=160, module=module)
    rows = read_rows(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 3 + [100] * 3 + [160] * 3
    last = [row for row in rows if row["step"] == 160]
    assert [(row["prompt"], row["answer"]) for row in last] == list(zip(QUESTIONS, ANSWERS, strict=True))
    assert all(row["ended"] and 1 < row["tokens"] <= 12 for row in last)
    shown = capsys.readouterr().out
    assert "samples, step 160" in shown and "before training" in shown and "In China." in shown


def test_a_resumed_run_does_not_ask_at_its_start_again(tmp_path, inputs):
    from ptl.callbacks.checkpoint import Checkpoint
    from ptl.callbacks.saved import latest_checkpoint

    fit(tmp_path, inputs, [Samples(["hello"], console=False), Checkpoint()], steps=2)
    model, data = inputs
    again = trainer(tmp_path, [Samples(["hello"], console=False), Checkpoint()], max_steps=3)
    again.fit(sft(model, lora=LoRA(rank=4, dropout=0.3)), chat(model, data), ckpt_path=latest_checkpoint(tmp_path))
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [0, 2, 3]


def test_every_sampling_setting_is_ours():
    """The checkpoint's own settings would change the answers."""
    model = tiny.make_model(hidden=64).eval()
    prompts = [[5, 6, 7, 8, 9], [5, 6]]
    plain = greedy(model, prompts, stop=(1,), max_new_tokens=8)
    strange = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, suppress_tokens=list(range(2, 300)), max_length=6
    )
    model.generation_config = strange
    assert greedy(model, prompts, stop=(1,), max_new_tokens=8) == plain
    assert model.generation_config is strange
    direct = model.generate(torch.tensor([prompts[0]]), generation_config=GenerationConfig(max_new_tokens=8))
    assert direct[0, 5:].tolist() != plain[0]  # they do matter


def test_prompts_of_unequal_lengths_do_not_change_each_other():
    model = tiny.make_model(hidden=64).eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    together = greedy(model, prompts, stop=(), max_new_tokens=6)
    assert together == [greedy(model, [p], stop=(), max_new_tokens=6)[0] for p in prompts]
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in answer:  # each token is the likeliest of a plain forward pass
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_an_answer_ends_at_any_stop_token():
    model = tiny.make_model(hidden=64).eval()
    free = greedy(model, [[5, 6, 7]], stop=(), max_new_tokens=8)[0]
    stop = free[3]
    assert greedy(model, [[5, 6, 7]], stop=(399, stop), max_new_tokens=8)[0] == free[: free.index(stop) + 1]


def test_modes_and_random_states_are_back_also_after_a_failure():
    model = tiny.make_model().train()
    model.model.layers[0].eval()  # a part that is kept frozen
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with (
        pytest.raises(RuntimeError),
        own_random_state(),
        evaluating(model),
    ):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        raise RuntimeError
    assert [module.training for module in model.modules()] == before and True in before and False in before
    assert torch.equal(torch.get_rng_state(), state)


def test_wandb_gets_a_table(tmp_path, inputs):
    logger = WandbLogger(project="test", save_dir=str(tmp_path), offline=True)
    fit(tmp_path, inputs, [Samples(["hello", "What is 2+2?"], console=False)], steps=2, logger=[logger])
    folder = logger.experiment.dir
    logger.experiment.finish()
    tables = [json.loads(p.read_text()) for p in sorted(Path(folder).rglob("samples*.table.json"))]
    assert tables[-1]["columns"] == ["step", "prompt", "answer"]
    assert [row[:2] for row in tables[-1]["data"]] == [
        [0, "hello"],
        [0, "What is 2+2?"],
        [2, "hello"],
        [2, "What is 2+2?"],
    ]


class Listening(Renderer):
    """A renderer that remembers what it was asked."""

    def prompt(self, messages, tools=()):
        self.asked = [*getattr(self, "asked", []), messages]
        return super().prompt(messages, tools)


def test_a_system_message_is_part_of_the_prompt(tmp_path, inputs):
    model, data = inputs
    module = chat(model, data)
    module.renderer = Listening(module.renderer.tokenizer)
    runner = trainer(tmp_path, [Samples(["hello", "bye"], system="Be brief.", console=False)], max_steps=1)
    runner.fit(sft(model), module)
    asked = [[(m.role, m.content) for m in messages] for messages in module.renderer.asked]
    expected = [[("system", "Be brief."), ("user", question)] for question in ("hello", "bye")]
    assert asked == expected * 2


def test_a_module_without_renderer_is_told(tmp_path):
    with pytest.raises(ValueError, match="needs a data module with a renderer"):
        trainer(tmp_path, [Samples(["hello"])]).fit(Toy(), loader([packed([4, 4], 2)]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": []}, "at least one question"),
        ({"prompts": ["a", " "]}, "none empty"),
        ({"prompts": ["a"], "every_n_steps": -1}, "every_n_steps must be 0 or more"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        Samples(**options)
