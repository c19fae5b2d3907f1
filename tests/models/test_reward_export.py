"""A reward model that was exported scores as the trained one does, in plain transformers, however it is fed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ptl.data.render import Renderer
from ptl.models.export import export
from ptl.models.padding import last_tokens, safe_pad_id
from ptl.models.scoring import answer_scores, document_scores
from tests import reward_parts, tiny

ROWS = reward_parts.ranking_rows()
KINDS = {"full": {}, "lora": reward_parts.LORA, "qlora": {**reward_parts.LORA, "quantize": "nf4"}}
LAYOUTS = [("packed", True), ("packed", False), ("padded", True)]


def tokenizer_with(pad: str | None):
    tokenizer = tiny.make_tokenizer()
    tokenizer.pad_token = pad
    return tokenizer


def exported(folder, kind="full", pad="<|im_end|>", tokenizer=None, **options):
    """The objective, its renderer, and the folder that its model was exported to."""
    tokenizer = tokenizer or tokenizer_with(pad)
    reward_parts.save_base(folder / "base", tokenizer, hidden=64)
    objective = reward_parts.reward_policy(folder / "base", **KINDS[kind])
    renderer = Renderer(tokenizer)
    export(objective.policy, tokenizer, folder / "out", generation_eos=renderer.terminators, **options)
    return objective, renderer, folder / "out"


@torch.no_grad()
def plain_scores(folder, documents, size, side) -> torch.Tensor:
    """As a user of transformers has them: nothing but ``from_pretrained`` and the tokenizer's own padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    found = []
    for at in range(0, len(documents), size):
        batch = tokenizer.pad({"input_ids": documents[at : at + size]}, return_tensors="pt")
        found.append(model(**batch).logits[:, 0])
    return torch.cat(found)


def close(one, other, atol=1e-5):
    assert one.shape == other.shape and one.std() > 0.05
    assert torch.allclose(one, other, atol=atol, rtol=1e-5), (one - other).abs().max()


@pytest.mark.parametrize("pad", [None, "<|im_end|>"], ids=["unset", "eos"])
@pytest.mark.parametrize("kind", KINDS)
def test_trap_rm_kd_1_the_score_is_that_of_the_last_token_whatever_the_pad(kind, pad, tmp_path):
    objective, renderer, folder = exported(tmp_path, kind, pad)
    found = reward_parts.examples(renderer, ROWS)
    documents = reward_parts.documents(found)
    own = reward_parts.own_scores(objective, found, layout="packed", share=True)
    for size, side in ((1, "right"), (8, "right"), (8, "left")):
        close(plain_scores(folder, documents, size, side), own)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    close(document_scores(again, documents), own)


def test_trap_rm_kd_1_a_template_that_ends_with_the_pad_was_read_one_token_early(tmp_path):
    """The trap itself: without a pad of its own, transformers reads the token before the end."""
    template = tiny.CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
    tokenizer = tiny.make_tokenizer(template=template)
    objective, renderer, folder = exported(tmp_path, tokenizer=tokenizer)
    found = reward_parts.examples(renderer, ROWS)
    documents = reward_parts.documents(found)
    assert {ids[-1] for ids in documents} == {tokenizer.pad_token_id} == {tokenizer.eos_token_id}
    own = reward_parts.own_scores(objective, found, layout="packed", share=True)
    close(plain_scores(folder, documents, 8, "right"), own)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.pad_token_id}))
    assert not torch.allclose(plain_scores(folder, documents, 8, "right"), own, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_trap_rm_kd_2_scores_do_not_depend_on_batch_side_or_layout(kind, tmp_path):
    objective, renderer, folder = exported(tmp_path, kind)
    found = reward_parts.examples(renderer, ROWS)
    documents = reward_parts.documents(found)
    scores = [reward_parts.own_scores(objective, found, layout=layout, share=share) for layout, share in LAYOUTS]
    for one in scores[1:]:
        close(one, scores[0])
    alone = torch.cat([reward_parts.own_scores(objective, [one], layout="packed", share=True) for one in found])
    close(alone, scores[0])
    for size in (1, 8):
        for side in ("right", "left"):
            close(plain_scores(folder, documents, size, side), scores[0])


def test_trap_rm_kd_2_a_fresh_process_with_transformers_alone_agrees(tmp_path):
    objective, renderer, folder = exported(tmp_path, "lora")
    found = reward_parts.examples(renderer, ROWS)
    (tmp_path / "ids.json").write_text(json.dumps(reward_parts.documents(found)))
    program = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForSequenceClassification as Model, AutoTokenizer\n"
        "folder, ids = sys.argv[1], json.load(open(sys.argv[2]))\n"
        "model, tokenizer = Model.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)\n"
        "with torch.no_grad():\n"
        "    batch = tokenizer.pad({'input_ids': ids}, return_tensors='pt')\n"
        "    print('scores', json.dumps(model(**batch).logits[:, 0].tolist()))\n"
        "assert 'ptl' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "ids.json")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    line = next(line for line in out.stdout.splitlines() if line.startswith("scores "))
    own = reward_parts.own_scores(objective, found, layout="packed", share=True)
    close(torch.tensor(json.loads(line.removeprefix("scores "))), own)


# ---- the head ----


def moved_head(objective) -> torch.Tensor:
    """The trained head; that of the base, which nobody trained, is another."""
    names = dict(objective.policy.named_parameters())
    trained = [p for name, p in names.items() if "score" in name and p.requires_grad]
    assert len(trained) == 1 and trained[0].dtype == torch.float32
    for name, parameter in names.items():
        if "score" in name and not parameter.requires_grad:
            assert not torch.allclose(parameter, trained[0], atol=1e-2)
    return trained[0].detach()


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_trap_rm_kd_15_the_trained_head_is_in_the_adapter_and_in_the_merged_model(kind, tmp_path):
    objective, renderer, folder = exported(tmp_path, kind, files={"ptl_reward.json": "{}\n"})
    head = moved_head(objective)
    assert torch.equal(load_file(folder / "model.safetensors")["score.weight"], head)
    alone = export(
        objective.policy, renderer.tokenizer, tmp_path / "alone", merged=False, spec=objective.spec,
        generation_eos=renderer.terminators, files={"ptl_reward.json": "{}\n"},
    )  # fmt: skip
    saved = load_file(alone / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.score.weight"], head)
    for one in (folder, alone):
        assert (one / "ptl_reward.json").read_text() == "{}\n" and not (one / "generation_config.json").exists()
        assert AutoTokenizer.from_pretrained(one).pad_token_id == safe_pad_id(renderer.tokenizer, renderer.terminators)


def test_trap_rm_kd_15_the_adapter_loads_with_peft_to_the_same_scores(tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    objective, renderer, _ = exported(tmp_path, "lora")
    alone = export(objective.policy, renderer.tokenizer, tmp_path / "alone", merged=False, spec=objective.spec)
    found = reward_parts.examples(renderer, ROWS)
    again = AutoPeftModelForSequenceClassification.from_pretrained(alone, num_labels=1)
    own = reward_parts.own_scores(objective, found, layout="packed", share=True)
    close(document_scores(again, reward_parts.documents(found)), own)


def test_trap_rm_kd_4_under_bf16_weights_the_score_is_fp32_in_the_file(tmp_path):
    objective, _, folder = exported(tmp_path, "lora", dtype="bf16")
    kinds = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    assert kinds.pop("score.weight") == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    assert torch.equal(load_file(folder / "model.safetensors")["score.weight"], moved_head(objective))


def test_our_scorer_gives_the_objectives_scores_and_leaves_the_mode(tmp_path):
    objective, renderer, _ = exported(tmp_path, "lora")
    found = reward_parts.examples(renderer, ROWS)
    own = reward_parts.own_scores(objective, found, layout="packed", share=True)
    objective.policy.train()
    batch = objective.view.collate(found, layout="packed", pad_id=0, window_weight=1.0)
    scores = answer_scores(objective.policy, batch)
    assert torch.equal(scores, own) and objective.policy.training and not scores.requires_grad


# ---- the pad ----


def test_the_pad_is_the_tokenizers_own_where_nothing_ends_with_it(tmp_path):
    special = ("<|im_start|>", "<|im_end|>", "<pad>", "<unk>")
    tokenizer = tiny.make_tokenizer(special)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    tokenizer.pad_token = "<pad>"
    assert safe_pad_id(tokenizer, [end]) == ids["<pad>"]
    tokenizer.pad_token, tokenizer.unk_token = "<|im_end|>", "<unk>"
    assert safe_pad_id(tokenizer, [end]) == ids["<unk>"]
    tokenizer.unk_token, tokenizer.bos_token = None, "<|im_start|>"
    assert safe_pad_id(tokenizer, [end]) == ids["<|im_start|>"]
    tokenizer.bos_token = None
    assert safe_pad_id(tokenizer, [end]) in {ids["<|im_start|>"], ids["<pad>"], ids["<unk>"]}


def test_the_pad_is_a_token_that_no_text_spells_where_there_is_no_other_special_one():
    template = "{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
    tokenizer = tiny.make_tokenizer(("<end>",), eos="<end>", template=template)
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert last_tokens(tokenizer) == {end}
    pad = safe_pad_id(tokenizer)
    token = tokenizer.convert_ids_to_tokens(pad)
    assert pad != end and tokenizer(token)["input_ids"] != [pad]


def test_the_runs_tokenizer_is_not_changed_and_text_is_read_as_before(tmp_path):
    tokenizer = tokenizer_with("<|im_end|>")
    _, renderer, folder = exported(tmp_path, tokenizer=tokenizer)
    assert tokenizer.pad_token == "<|im_end|>" == renderer.tokenizer.pad_token
    again = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert again.pad_token_id == config["pad_token_id"] != tokenizer.eos_token_id
    assert again.chat_template == tokenizer.chat_template and again.get_vocab() == tokenizer.get_vocab()
    text = "hello <|im_end|> world <|im_start|>\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_language_model_keeps_its_own_pad(tmp_path):
    tokenizer = tokenizer_with("<|im_end|>")
    export(tiny.make_model(len(tokenizer)), tokenizer, tmp_path / "out", generation_eos=[tokenizer.eos_token_id])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<|im_end|>"
