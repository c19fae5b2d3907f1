"""Reward modelling: what it learns, what it measures, and the traps of its page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objectives import law, ranking

WORDS = ["quick", "brown", "jumps", "over", "lazy", "dog", "answer", "world", "Chine", "know"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ranking.make_folder(tmp_path_factory.mktemp("reward"))


def fitted(folder, *, epochs=1, micro=8, accumulate=1, **options):
    """A trained objective, with its trainer."""
    import lightning as L

    L.seed_everything(11, verbose=False)
    objective, data = ranking.build(str(folder), micro=micro, **options)
    trainer = law.trainer_of(str(folder), "auto", 1, accumulate, max_epochs=epochs)
    trainer.fit(objective, datamodule=data)
    return objective, data, trainer


# ---- what it learns ----


def planted(kind: str, rng: random.Random) -> tuple[str, float]:
    """An answer and its quality under a simple preference."""
    words = rng.choices(WORDS, k=rng.randint(2, 12))
    if kind == "length":
        return " ".join(words), len(words)
    mark = {"keyword": "fox", "politeness": "hello"}[kind]
    if rng.random() < 0.5:
        words.insert(0 if kind == "politeness" else rng.randrange(len(words) + 1), mark)
    return " ".join(words), float(mark in words)


def write_planted(path: Path, kind: str, count: int, flipped: float, seed: int) -> int:
    """Prompts with two to four answers, each pair of whose order may be flipped; returns how many of how many were."""
    rng = random.Random(seed)
    rows, wrong = [], 0
    while len(rows) < count:
        answers = [planted(kind, rng) for _ in range(2 if flipped else rng.randint(2, 4))]
        qualities = [quality for _, quality in answers]
        if len(set(qualities)) == 1:
            continue
        if flipped and rng.random() < flipped:
            qualities.reverse()
            wrong += 1
        scores = {"completions": [text for text, _ in answers], "scores": qualities}
        rows.append({"prompt": " ".join(rng.choices(WORDS, k=3)), **scores})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return wrong


def held_out(objective, data, folder, name: str) -> dict[str, Any]:
    """Measures of a trained objective on another file."""
    _, rows = ranking.build(str(folder), rows=name, micro=16)
    rows.prepare()
    from ptl.functional.ranking_measures import measures_of
    from ptl.objectives.metrics import RankingMeasures, batch_sums

    metric = RankingMeasures()
    with torch.no_grad():
        for batch in rows.train_dataloader():
            metric.update(batch_sums(objective.scores(batch), batch))
    return measures_of(metric.compute())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["length", "keyword", "politeness"])
def test_a_planted_preference_is_recovered(folder, kind):
    write_planted(folder / f"{kind}.jsonl", kind, 480, 0.0, seed=1)
    write_planted(folder / f"{kind}-held.jsonl", kind, 120, 0.0, seed=2)
    objective, data, _ = fitted(folder, rows=f"{kind}.jsonl", epochs=4, lr=3e-3, sgd=False)
    assert held_out(objective, data, folder, f"{kind}-held.jsonl")["accuracy"] >= 0.95


@pytest.mark.slow
def test_a_planted_preference_is_recovered_from_pairs_a_fifth_of_which_are_flipped(folder):
    write_planted(folder / "noisy.jsonl", "keyword", 800, 0.2, seed=3)
    write_planted(folder / "clean-held.jsonl", "keyword", 200, 0.0, seed=4)
    wrong = write_planted(folder / "noisy-held.jsonl", "keyword", 400, 0.2, seed=5)
    objective, data, _ = fitted(folder, rows="noisy.jsonl", epochs=3, lr=2e-3, sgd=False)
    assert held_out(objective, data, folder, "clean-held.jsonl")["accuracy"] >= 0.98
    noisy = held_out(objective, data, folder, "noisy-held.jsonl")
    assert noisy["accuracy"] >= (1 - wrong / 400) - 0.02


# ---- scores ----


def loaded(folder, objective="reward", **options):
    """An objective with its model, and its batches of eight prompts."""
    made, data = ranking.build(str(folder), objective=objective, micro=8, **options)
    made.configure_model()
    made.policy.eval()
    data.prepare()
    return made, list(data.train_dataloader())


def alone(folder, batches) -> dict[tuple[int, int], float]:
    """The score of each answer by the library's own model, one at a time and unpadded: (row, place) -> score."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "scored", num_labels=1).eval()
    scores = {}
    for number, line in enumerate((folder / "rows.jsonl").read_text().splitlines()):
        row = json.loads(line)
        for place, answer in enumerate(row["completions"]):
            chat = [*row["prompt"], {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            with torch.no_grad():
                state = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
                scores[number, place] = float(model.score(state))
    return scores


def named(batch, rewards) -> dict[tuple[int, int], float]:
    """Scores of a batch by (row, place)."""
    out, seen = {}, {}
    rows = batch.tokens.rows[batch.tokens.document_ids.flatten()[batch.last]].tolist()
    for row, reward in zip(rows, rewards.tolist()):
        place = seen[row] = seen.get(row, -1) + 1
        out[row, place] = reward
    return out


@pytest.mark.parametrize("layout, share", [("packed", True), ("packed", False), ("padded", True)])
def test_trap_rm_kd_2_scores_do_not_depend_on_batch_padding_or_packing(folder, layout, share):
    objective, batches = loaded(folder, layout=layout, share=share)
    expected = alone(folder, batches)
    found: dict[tuple[int, int], float] = {}
    with torch.no_grad():
        for batch in batches:
            found |= named(batch, objective.scores(batch))
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


def test_trap_rm_kd_1_the_score_is_the_same_whatever_pads(folder):
    objective, _ = loaded(folder, layout="padded")
    values = []
    for pad in (0, 1, 5):
        _, data = ranking.build(str(folder), layout="padded", micro=8)
        data.renderer.tokenizer.pad_token_id = pad
        data.prepare()
        with torch.no_grad():
            values.append(torch.cat([objective.scores(batch) for batch in data.train_dataloader()]))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(values[0], values[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [True, False])
def test_trap_rm_kd_3_packed_answers_do_not_see_each_other(folder, share):
    """The gradient of one answer's score reaches its own tokens and its prompt's, and no other's."""
    objective, (batch, *_) = loaded(folder, share=share)
    embedded = objective.policy.get_input_embeddings()
    seen: list[torch.Tensor] = []
    handle = embedded.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_()) or out)
    score = objective.scores(batch)[1]
    handle.remove()
    gradient = torch.autograd.grad(score, seen[0])[0][0].abs().sum(-1)
    segment = int(batch.tokens.document_ids.flatten()[batch.last[1]])
    own = {segment} if batch.parents is None else {segment, int(batch.parents[segment])}
    reached = set(batch.tokens.document_ids.flatten()[gradient > 0].tolist())
    assert reached == own


def test_trap_rm_kd_3_the_order_in_the_pack_does_not_matter(folder):
    from ptl.data.groups import RankingView
    from ptl.data.loader import table_rows

    objective, data = ranking.build(str(folder))
    objective.configure_model()
    data.prepare()
    rows = table_rows(data.prepared_rows("train").rows.with_format("arrow")[:6])
    examples = [{**row, "row": number} for number, row in enumerate(rows)]
    found = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0]):
        batch = RankingView().collate([examples[i] for i in order], layout="packed", pad_id=0, window_weight=6.0)
        with torch.no_grad():
            found.append(named(batch, objective.scores(batch)))
    assert found[0].keys() == found[1].keys()
    assert max(abs(found[0][key] - found[1][key]) for key in found[0]) < 1e-5


def test_trap_rm_kd_5_each_answer_goes_through_the_model_once(folder):
    """Five answers have ten pairs, and five rows of a forward pass."""
    objective, batches = loaded(folder, layout="padded")
    shapes = []
    objective.policy.get_decoder().register_forward_hook(lambda module, args, out: shapes.append(out[0].shape[0]))
    with torch.no_grad():
        for batch in batches:
            objective.scores(batch)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert sum(shapes) == sum(len(row["completions"]) for row in rows) and len(shapes) == len(batches)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_trap_rm_kd_14_scores_are_float32_whatever_the_backbone(folder, dtype):
    from dataclasses import replace

    objective, data = ranking.build(str(folder), micro=4)
    objective.spec = replace(objective.spec, dtype=dtype)
    objective.configure_model()
    data.prepare()
    batch = next(iter(data.train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "fp32"):
        rewards = objective.scores(batch)
    assert rewards.dtype == torch.float32 and objective.policy.score.weight.dtype == torch.float32
    # A sum in bfloat16 would leave scores on its coarse grid.
    assert (rewards != rewards.to(torch.bfloat16).float()).any()


def test_trap_rm_kd_4_a_score_that_is_not_finite_names_its_row(folder):
    objective, data = ranking.build(str(folder), micro=8)

    def broken(batch):
        rewards = torch.zeros(len(batch.last), requires_grad=True)
        return torch.where(torch.arange(len(rewards)) == 2, float("nan"), rewards)

    objective.scores = broken
    trainer = law.trainer_of(str(folder), "auto", 1, 1)
    with pytest.raises(ValueError, match=r"answer \d of line \d+ of .*rows.jsonl is nan"):
        trainer.fit(objective, datamodule=data)


# ---- the run ----


def test_losses_learn_and_measures_are_logged(folder):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    scored = [{**row, "scores": [None if r is None else 4.0 - r for r in row["ranks"]]} for row in rows]
    for row in scored:
        del row["ranks"]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    for options in ({"loss": "plackett_luce"}, {"loss": "margin", "margin_scale": 0.2}, {"center": 0.5}):
        objective, _, trainer = fitted(folder, rows="scored.jsonl", val_fraction=0.25, **options)
        metrics = trainer.callback_metrics
        for name in ("train/loss", "val/loss", "val/accuracy", "val/tau", "val/ece", "val/reward_std", "val/centering"):
            assert torch.isfinite(metrics[name]), (options, name)
        assert "val/perplexity" not in metrics
        assert objective.measured["val"]["answers"] > 0 and objective.measured["train"]["answers"] > 0


def test_centering_pulls_the_sum_of_a_pair_to_zero(folder):
    objective, data = ranking.build(str(folder), micro=8, center=0.5)
    objective.configure_model()
    data.prepare()
    batch = next(iter(data.train_dataloader()))
    rewards = torch.arange(len(batch.last), dtype=torch.float32) / 10 + 0.3
    objective.scores = lambda batch: rewards
    objective.trainer = law.trainer_of(str(folder), "auto", 1, 1)
    objective.trainer.datamodule = data
    out = objective.loss(batch)
    plain = out.metrics["loss"][0]
    by_hand = sum(
        float(share) * float(rewards[i] + rewards[j]) ** 2
        for share, (i, j) in zip(batch.pair_shares, batch.pairs.T.tolist())
    )
    assert float(out.total - plain) == pytest.approx(0.5 * by_hand, rel=1e-5)


def test_metrics_are_of_pairs_and_not_means_of_batches(folder):
    """The honourable mention of the page: accuracy averaged per batch. Here micro-batches do not change it."""
    values = []
    for micro in (1, 8):
        _, _, trainer = fitted(folder, val_fraction=0.4, micro=micro, accumulate=8 // micro, lr=1e-6)
        values.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_held_out_prompts_are_not_trained(folder):
    """The honourable mention of the page: an evaluation on a slice of the training rows."""
    _, data = ranking.build(str(folder), val_fraction=0.25)
    data.prepare()
    train = {int(row) for batch in data.train_dataloader() for row in batch.tokens.rows}
    val = {int(row) for batch in data.val_dataloader() for row in batch.tokens.rows}
    assert train and val and not train & val and len(train | val) == 8 * law.STEPS


def test_law_8_every_row_is_trained_or_counted_under_a_reason(folder):
    from ptl.data.audit import Thresholds

    good = (folder / "rows.jsonl").read_text().splitlines()
    bad = [
        '{"prompt": "hello", "completions": ["a", "b"], "ranks": [1]}',
        '{"prompt": "hello", "completions": ["a", "b"], "ranks": [1, null]}',
        '{"prompt": "hello", "chosen": "", "rejected": "fox"}',
        '{"prompt": "hello", "completions": ["a", "b"], "ranks": [1, 2',
    ]
    (folder / "bad.jsonl").write_text("\n".join([*good, *bad]) + "\n")
    _, data = ranking.build(str(folder), rows="bad.jsonl")
    data.thresholds = Thresholds(max_bad_fraction=0.5)
    data.prepare()
    source = data.audits["train"].sources[0]
    assert source.rows == len(good) + len(bad) == source.kept + source.refused_rows + source.dropped_rows
    assert source.kept == len(good) and source.refused_rows == len(bad)
    examples = [example for reason in source.refused.values() for example in reason.examples]
    assert all(f"bad.jsonl:{len(good) + 1 + i}" in " ".join(examples) for i in range(len(bad)))


def test_law_5_the_head_is_trained_with_an_adapter_and_the_base_is_not(folder):
    objective, _, trainer = fitted(folder, lora=True)
    names = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert any("score" in name for name in names)
    assert all("lora_" in name or "score" in name for name in names)
    trainer.save_checkpoint(folder / "adapter.ckpt")
    state = torch.load(folder / "adapter.ckpt", weights_only=True)["state_dict"]
    assert set(state) == names


def test_trap_rm_kd_9_a_place_without_a_prompt_adds_nothing(folder):
    """A last, partial window is filled with copies that carry no weight."""
    fitted_ones = []
    lines = (folder / "rows.jsonl").read_text().splitlines()[:11]
    (folder / "eleven.jsonl").write_text("\n".join(lines) + "\n")
    for micro, accumulate in ((8, 1), (2, 4)):
        objective, _, _ = fitted(folder, rows="eleven.jsonl", micro=micro, accumulate=accumulate)
        fitted_ones.append(law.flat(dict(objective.policy.state_dict())))
    assert float(abs(fitted_ones[0] - fitted_ones[1]).max()) < 1e-6


@pytest.mark.parametrize(
    "options, told",
    [
        ({"loss": "hinge"}, "model.loss must be"),
        ({"label_smoothing": 0.5}, "model.label_smoothing"),
        ({"label_smoothing": 0.1, "loss": "plackett_luce"}, "of pairs"),
        ({"margin_scale": 0.0}, "model.margin_scale"),
        ({"center": -1.0}, "model.center"),
    ],
)
def test_refuses_what_cannot_be(folder, options, told):
    with pytest.raises(ValueError, match=told):
        ranking.build(str(folder), **options)


# ---- texts ----


def test_one_beginning_of_sequence_token(tokenizer):
    """The honourable mention of the page: a template that prints BOS, and a tokenizer that adds another."""
    import copy

    from tokenizers import processors

    from ptl.data.groups import RankingView
    from ptl.data.render import Renderer
    from ptl.types import Message, Origin, Ranking

    doubled = copy.deepcopy(tokenizer)
    doubled.add_special_tokens({"bos_token": "<s>"})
    doubled.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", doubled.bos_token_id)]
    )
    answers = tuple((Message(role="assistant", content=text),) for text in ("fox", "dog"))
    record = Ranking(
        prompt=(Message(role="user", content="hello"),), completions=answers, ranks=(1, 2), origin=Origin("f", 1)
    )
    renderer = Renderer(doubled, "{{ bos_token }}" + tokenizer.chat_template)
    (example,) = RankingView().encode([record], renderer, 100, "error")[0]
    assert example["ids"].tolist().count(doubled.bos_token_id) == 1 and example["ids"][0] == doubled.bos_token_id


def test_the_date_in_a_template_is_the_recipes_and_not_todays(tokenizer):
    """The honourable mention of the page: Llama 3's system prompt carries today's date, and the score with it."""
    from ptl.data.render import Renderer, RenderPolicy
    from ptl.types import Message

    dated = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    ids = Renderer(tokenizer, dated, RenderPolicy(date="2020-02-29")).prompt([Message(role="user", content="hello")])
    assert tokenizer.decode(ids).startswith("29 Feb 2020")
