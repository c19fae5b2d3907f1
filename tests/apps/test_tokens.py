"""``ptl tokens add``: a base model in, a plain folder with more tokens out; mistakes in one line."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.apps import tokens
from ptl.data.render import Renderer
from ptl.models.export import export
from ptl.models.quantized_export import export_quantized
from ptl.models.spec import LoRA, ModelSpec
from tests import tiny
from tests.data.chat_cases import say

SETS = ["--set", "chat", "think", "tools"]


@pytest.fixture(scope="module")
def plain():
    return tiny.make_tokenizer(special=("<|endoftext|>",), eos="<|endoftext|>", template=None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, plain):
    """Base models without a chat template: tied, untied, and with rows to spare as Qwen's."""
    root = tmp_path_factory.mktemp("bases")
    for name, vocab, tie in (("tied", len(plain), True), ("untied", len(plain), False), ("padded", 512, True)):
        model = tiny.make_model(vocab, tie=tie, hidden=128)
        model.generation_config.eos_token_id = 0
        model.save_pretrained(root / name)
        plain.save_pretrained(root / name)
    return root


def add(*args) -> int:
    return tokens.main(["add", *map(str, args)])


@pytest.mark.parametrize("kind", ["tied", "untied", "padded"])
def test_law_9_the_folder_loads_with_old_logits_and_new_tokens(kind, bases, plain, tmp_path, capsys):
    out = tmp_path / "out"
    assert add(bases / kind, "--out", out, *SETS) == 0
    said = capsys.readouterr().out
    rows = 512 if kind == "padded" else 384
    assert f"13 new tokens, {'512 rows' if kind == 'padded' else f'365 rows became {rows}'}" in said
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (bases / kind, out))
    ids = torch.tensor([[5, 9, 20, 33]])
    with torch.no_grad():
        assert torch.equal(old(ids).logits[..., : len(plain)], new(ids).logits[..., : len(plain)])
    assert new.get_input_embeddings().weight.shape[0] == new.config.vocab_size == rows
    assert (new.lm_head.weight is new.get_input_embeddings().weight) == (kind != "untied")
    tokenizer = AutoTokenizer.from_pretrained(out)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, end]
    prompt = Renderer(tokenizer).prompt([say("user", "what is 2+2 ?")])
    text = "<|im_start|>user<|im_sep|>what is 2+2 ?<|im_end|><|im_start|>assistant<|im_sep|>"
    assert tokenizer.decode(prompt) == text
    facts = json.loads((out / "ptl_tokens.json").read_text())
    assert [fact["id"] for fact in facts] == list(range(365, 378)) and str([365, 366])[:-1] in said


def test_two_runs_write_the_same_weights_and_another_seed_others(bases, tmp_path):
    def rows(name, *more):
        assert add(bases / "untied", "--out", tmp_path / name, *SETS, *more) == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        return torch.cat([model.get_input_embeddings().weight, model.lm_head.weight]).detach()

    first = rows("a")
    assert torch.equal(first, rows("b")) and not torch.equal(first, rows("c", "--seed", "1"))


def test_a_description_gives_the_mean_of_its_words(bases, plain, tmp_path):
    describe = ["--describe", "<|x|>=hello world", "--noise", "0"]
    assert add(bases / "untied", "--out", tmp_path / "out", "--token", "<|x|>", "--token", "<|y|>", *describe) == 0
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (bases / "untied", tmp_path / "out"))
    words = plain("hello world")["input_ids"]
    for pick in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, pick)().weight, getattr(new, pick)().weight
        assert torch.allclose(after[365], before[words].mean(0), atol=1e-6)
        assert torch.allclose(after[366], before[: len(plain)].mean(0), atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


def test_a_person_sees_the_tokens_and_a_dialogue(bases, tmp_path, capsys):
    given = ["--token", "<|im_start|>=464", "--token", "<|im_end|>=465", "--token", "<|im_sep|>=466"]
    assert add(bases / "tied", "--out", tmp_path / "out", *SETS, *given, "--init", "description", "--show") == 0
    said = capsys.readouterr().out
    assert "and 99 reserved tokens between them" in said
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    stream = [(int(words[0]), words[1].strip()) for words in lines if len(words) == 2 and words[0].isdigit()]
    assert stream[0] == (464, "'<|im_start|>'") and stream[-1] == (465, "* '<|im_end|>'")
    assert (469, "* '<SEARCH-TOOL>'") in stream
    assert [number for number, _ in stream].count(464) == 2  # the one that the user typed is text


def test_a_model_that_has_the_tokens_keeps_them(model_folder, tmp_path, capsys):
    assert add(model_folder, "--out", tmp_path / "out", "--set", "chat") == 0
    said = capsys.readouterr().out
    assert "1 new token," in said and "<|im_start|>, <|im_end|> were there already" in said
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (model_folder, tmp_path / "out"))
    count = len(old.get_input_embeddings().weight)
    assert torch.equal(new.get_input_embeddings().weight[:count], old.get_input_embeddings().weight)


def test_the_printed_rows_train_alone(bases, tmp_path, capsys):
    assert add(bases / "untied", "--out", tmp_path / "out", "--set", "chat") == 0
    ids = json.loads(capsys.readouterr().out.rpartition("train_tokens '")[2].split("'")[0])
    model = ModelSpec(name=str(tmp_path / "out"), adapter=LoRA(rank=4, train_tokens=ids), attention="sdpa").build()
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert shapes == [(3, 128), (3, 128)]


# ---- mistakes ----


def refused(capsys, *args) -> str:
    assert add(*args) == 2
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "error" in line)
    assert "Traceback" not in said
    return line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "no token is given: name a ready set"),
        (["--token", "<a>=5"], "id 5 is taken by"),
        (["--token", "<a>=-5"], "an id is 0 or more"),
        (["--token", "<a>", "--describe", "<b>=word"], "expected TOKEN=TEXT of a token among <a>"),
        (["--token", "<a>", "--init", "description"], "give --describe '<a>=WHAT IT STANDS FOR'"),
        (["--token", "<a>", "--noise", "-1"], "--noise must be 0 or more"),
        (["--token", "<a>", "--multiple", "0"], "--multiple must be 1 or more"),
        (["--token", "<a>", "--template", "chatlm"], "expected one of chatml"),
        (["--token", "<a>", "--template", "chatml"], "no_end_token"),
    ],
)
def test_a_mistake_is_one_line(args, words, bases, tmp_path, capsys):
    assert words in refused(capsys, bases / "tied", "--out", tmp_path / "out", *args)
    assert not (tmp_path / "out").exists()


def test_what_is_no_base_model_is_refused(bases, plain, tmp_path, capsys):
    token = ["--out", tmp_path / "out", "--token", "<a>"]
    assert "no folder" in refused(capsys, tmp_path / "nothing", *token)
    spec = ModelSpec(name=str(bases / "tied"), adapter=LoRA(rank=4), attention="sdpa")
    model = spec.build()
    export(model, plain, tmp_path / "adapter", merged=False, spec=spec)
    assert "is an adapter: merge it first (ptl export" in refused(capsys, tmp_path / "adapter", *token)
    export_quantized(ModelSpec(name=str(bases / "tied"), attention="sdpa").build(), plain, tmp_path / "codes", "nf4")
    assert "is quantised: add the tokens to the model" in refused(capsys, tmp_path / "codes", *token)
    export(ModelSpec(name=str(bases / "tied"), head="scalar", attention="sdpa").build(), plain, tmp_path / "scores")
    assert "gives scores, not tokens" in refused(capsys, tmp_path / "scores", *token)
    tiny.make_model(100).save_pretrained(tmp_path / "small")
    plain.save_pretrained(tmp_path / "small")
    assert "has id 364, and the embedding 100 rows" in refused(capsys, tmp_path / "small", *token)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in refused(capsys, bases / "tied", *token)


def test_help_loads_no_torch():
    code = "import sys; from ptl import cli\ntry: cli.main(['tokens', 'add', '--help'])\nexcept SystemExit: pass\n"
    run = subprocess.run(
        [sys.executable, "-c", code + "print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert "<SEARCH-TOOL>" in run.stdout
    assert not {"torch", "transformers", "tokenizers"} & set(run.stdout.split())


# ---- training a tokenizer ----


def test_a_tokenizer_is_trained_on_files_and_replaced_on_demand(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(tiny.CORPUS))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "hello hello world"}) + "\n[1]\n")
    out = tmp_path / "tokenizer"
    command = ["train", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "--out", str(out), "--size", "320"]
    assert tokens.main([*command, "--set", "chat", "--tag", "<SEARCH-TOOL>"]) == 0
    said = capsys.readouterr()
    assert "320 tokens, byte-level BPE" in said.out and "1 rows could not be read (first: " in said.err
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_sep|>", "<|im_end|>"]) == [316, 317, 318]
    assert "<|im_sep|>" in tokenizer.chat_template and tokenizer.decode([319], skip_special_tokens=True)
    assert tokens.main(command) == 2 and "is not empty" in capsys.readouterr().err
    assert tokens.main([*command, "--overwrite", "--size", "100000"]) == 0
    assert "no pair left that occurs twice" in capsys.readouterr().out
    (out / "mine.txt").write_text("mine")
    assert tokens.main([*command, "--overwrite"]) == 2
    assert "mine.txt, which is no file of a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing.jsonl"], "nothing.jsonl"),
        (["nothing.txt"], "nothing.txt"),
        (["{corpus}", "--size", "10"], "--size is 10, below the 257"),
        (["{corpus}", "--token", "<a>=9"], "'<a>' is given an id"),
        (["{corpus}", "--template", "chatlm"], "expected one of chatml"),
    ],
)
def test_a_mistake_in_training_is_one_line(args, words, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello")
    given = [arg.format(corpus=tmp_path / "a.txt") for arg in args]
    assert tokens.main(["train", *given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not (tmp_path / "out").exists()
