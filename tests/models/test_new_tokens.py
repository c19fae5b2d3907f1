"""Rows of new tokens: where they start, what is left alone, and that they train, merge and load like any other."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ptl.models.adapters import load_adapter
from ptl.models.build import load_base
from ptl.models.export import export, largest_logit_change
from ptl.models.new_tokens import NewRow, add_rows, first_values
from ptl.models.spec import LoRA, ModelSpec
from tests import tiny
from tests.models.zero_build import alone
from tests.ranks import run_ranks

NEW = [NewRow(400, "<a>"), NewRow(401, "<b>", like=(5, 9)), NewRow(403, "<c>")]
KNOWN = list(range(400))
IDS = [[400, 9, 401, 33, 403, 7], [100, 403, 3, 401, 400, 8]]
KINDS = {"full": {}, "rows": {"adapter": True}, "qlora rows": {"adapter": True, "quantize": "nf4"}}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tie(request):
    return request.param


def weights(model) -> dict[str, torch.Tensor]:
    return {"embedding": model.get_input_embeddings().weight.detach(), "head": model.lm_head.weight.detach()}


# ---- first values ----


def test_trap_sft_9_new_rows_start_near_a_mean_and_old_rows_are_bit_equal(tie):
    model, before = tiny.make_model(tie=tie), weights(tiny.make_model(tie=tie))
    add_rows(model, NEW, KNOWN, noise=0.0)
    after = weights(model)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    assert len(after["embedding"]) == len(after["head"]) == model.config.vocab_size == 448
    for name, old in before.items():
        new = after[name]
        assert torch.equal(new[:400], old)
        assert torch.allclose(new[401], old[[5, 9]].mean(0), atol=1e-7)
        for row in (400, 403, 402, 447):  # two tokens, and two rows without one
            assert torch.allclose(new[row], old.mean(0), atol=1e-7)


def test_noise_sets_rows_of_one_mean_apart_by_a_share_of_the_spread():
    matrix = torch.randn(400, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 0, 256)
    rows = [NewRow(i, f"<{i}>") for i in range(200)]
    values = first_values(matrix, rows, torch.arange(400), noise=0.1)
    away = (values - matrix.mean(0)) / matrix.std(0)
    assert away.std().item() == pytest.approx(0.1, rel=0.02) and abs(away.mean().item()) < 2e-3


def test_noise_depends_on_the_seed_the_matrix_and_the_token_alone():
    def rows(*new, seed=0):
        model = tiny.make_model(tie=False)
        add_rows(model, new, KNOWN, seed=seed)
        return weights(model)

    first, other = rows(*NEW), rows(NEW[2], NEW[0], NewRow(404, "<b>", like=(5, 9)))
    for name in first:
        assert torch.equal(first[name][[400, 403]], other[name][[400, 403]])
        assert torch.equal(first[name][401], other[name][404])
        assert not torch.equal(first[name][400], rows(*NEW, seed=1)[name][400])
    noise = [m[400] - m[:400].mean(0) for m in first.values()]
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)


def test_trap_sft_9_a_padded_embedding_neither_shrinks_nor_loses_its_other_rows(tie):
    """As Qwen's: more rows than tokens. New tokens take the first rows of the padding."""
    model, before = tiny.make_model(512, tie=tie), weights(tiny.make_model(512, tie=tie))
    add_rows(model, NEW, KNOWN)
    for name, new in weights(model).items():
        changed = (new != before[name]).any(1).nonzero()[:, 0].tolist()
        assert len(new) == 512 and changed == [400, 401, 403]
        assert (new[400] - before[name][:400].mean(0)).norm() < 0.5 * before[name].norm(dim=1).mean()


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(400, 64, 448), (400, 1, 404), (404, 64, 404), (405, 8, 405)])
def test_rows_grow_to_a_multiple_and_only_where_they_are_missing(vocab, multiple, rows):
    model = tiny.make_model(vocab)
    add_rows(model, NEW, KNOWN, multiple=multiple)
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == rows


def test_a_bias_of_the_head_grows_too():
    model = tiny.make_model(tie=False)
    model.lm_head.bias = nn.Parameter(torch.randn(400))
    old = model.lm_head.bias.detach().clone()
    add_rows(model, NEW, KNOWN)
    assert torch.equal(model.lm_head.bias[:400], old)
    assert torch.allclose(model.lm_head.bias[400:], old.mean().expand(48))


def test_matrices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="has id 500, and the embedding 400 rows"):
        add_rows(tiny.make_model(), NEW, [*KNOWN, 500])
    model = tiny.make_model(tie=False)
    model.lm_head = nn.Linear(32, 500, bias=False)
    with pytest.raises(ValueError, match="400 rows and the head 500"):
        add_rows(model, NEW, KNOWN)


def test_a_quantised_base_is_refused(tmp_path, tokenizer):
    tiny.save_folder(tmp_path, tokenizer, hidden=128)
    model = load_base(ModelSpec(name=str(tmp_path), quantize="nf4", attention="sdpa"))
    with pytest.raises(ValueError, match="is quantised: add the tokens to the model it was made of"):
        add_rows(model, [NewRow(400, "<a>")], list(range(366)))


# ---- the matrix: training, reloading, merging ----


@pytest.fixture(scope="module")
def grown(tmp_path_factory, tokenizer):
    return grow(tmp_path_factory.mktemp("grown"), tokenizer)


def grow(root, tokenizer):
    """Folders of models that were given new tokens, tied and untied."""
    for tied in (True, False):
        model = tiny.make_model(tie=tied, hidden=128)
        add_rows(model, NEW, KNOWN)
        export(model, tokenizer, root / str(tied))
    return root


def spec_of(folder, kind: str) -> ModelSpec:
    options = dict(KINDS[kind])
    if options.pop("adapter", False):
        options["adapter"] = LoRA(rank=4, train_tokens=[row.id for row in NEW])
    return ModelSpec(name=str(folder), attention="sdpa", **options)


def check_rows(base, merged, tie: bool) -> None:
    """The listed rows alone differ, in both matrices, and the tie is as it was."""
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tie
    for name, old in weights(base).items():
        changed = (weights(merged)[name] != old).any(1).nonzero()[:, 0].tolist()
        assert changed == [row.id for row in NEW], name


@pytest.mark.parametrize("kind", KINDS)
def test_trap_sft_10_11_new_rows_train_reload_and_merge(kind, tie, grown, tokenizer, tmp_path):
    folder = grown / str(tie)
    spec = spec_of(folder, kind)
    losses, model = alone(spec, torch.tensor(IDS))
    assert losses[-1] < losses[0]
    export(model, tokenizer, tmp_path / "merged", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert largest_logit_change(model, merged, IDS) < 1e-4
    base = AutoModelForCausalLM.from_pretrained(folder)
    if spec.adapter is not None:
        check_rows(base, merged, tie)
        export(model, tokenizer, tmp_path / "adapter", merged=False, spec=spec)
        again = load_adapter(load_base(ModelSpec(name=str(folder), quantize=spec.quantize)), tmp_path / "adapter")
        assert largest_logit_change(model, again, IDS) < 1e-4


def test_trap_sft_10_11_new_rows_under_zero_3(grown, tmp_path):
    """Two ranks that hold half of each matrix end with the weights of one process, and so do their exports."""
    results = run_ranks(
        "tests.models.zero_new_tokens:matrix", 2, {"folder": str(grown), "out": str(tmp_path)}, timeout=200
    )
    for name, found in results[0].items():
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-4), name
        assert results[1][name]["losses"] == pytest.approx(found["losses"], rel=1e-6), name
        assert found["merged"] < 1e-4 and found.get("adapter", 0.0) < 1e-4, name
        tied, _, kind = name.partition(" ")
        if kind != "full":
            base = AutoModelForCausalLM.from_pretrained(grown / tied)
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / name / "merged")
            check_rows(base, merged, tied == "True")
