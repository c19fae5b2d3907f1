"""A teacher's cache: what is read back is what the teacher says, for that data and that teacher alone."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ptl.data.contents import contents, row_digest, trained_positions
from ptl.data.fingerprints import open_cache, teacher_digest
from ptl.data.teacher_cache import TeacherCache, rescaled
from ptl.data.teacher_plan import shard_bounds
from ptl.models.heads import shifted_targets
from ptl.models.spec import ModelSpec
from tests import forks, tiny
from tests.ranks import ROOT, run_ranks
from tests.synth import parts

T = parts.TEMPERATURE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parts.make_folder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def data(folder):
    return parts.data_of(folder)


@pytest.fixture(scope="module")
def teacher(folder):
    return parts.teacher_of(folder)


@pytest.fixture(scope="module")
def made(folder, data, teacher):
    writer, manifest = parts.write(folder, folder / "kd", model=teacher, data=data)
    assert len(writer) > 4 and manifest["tokens"] == writer.rows.offsets[-1]
    return folder / "kd"


def opened(made, data, **changes):
    return open_cache(made, data.prepared_rows("train"), data.renderer, temperature=T, **changes)


def live(teacher, batch, temperature=T):
    """The whole distribution in fp64 of the model's own forward, of each document alone."""
    rows, vocab = [], len(tiny.make_tokenizer())
    flat, owner = batch.input_ids.flatten(), batch.document_ids.flatten()
    mask = (batch.loss_mask * (batch.position_ids > 0)).flatten()
    for document in range(len(batch.sources)):
        here = owner == document
        with torch.no_grad():
            logits = teacher(input_ids=flat[here][None]).logits[0, :, :vocab].double()
        logp = torch.log_softmax(logits / temperature, -1)
        rows += [logp[at - 1] for at in mask[here].nonzero()[:, 0].tolist()]
    return torch.stack(rows) if rows else torch.zeros(0, vocab, dtype=torch.float64)


def check(kept, logp, k=8):
    """Exact ids, log-probabilities to float16, tail and entropy to float32."""
    values, ids = logp.topk(k, -1)
    assert torch.equal(kept.ids, ids)
    assert torch.allclose(kept.logprobs.double(), values, rtol=2**-10, atol=1e-3)
    rest = torch.logsumexp(logp.scatter(-1, ids, float("-inf")), -1)
    assert torch.allclose(kept.tail.double(), rest, atol=1e-5)
    assert torch.allclose(kept.entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-5)
    assert torch.allclose(kept.logprobs.exp().sum(-1) + kept.tail.exp(), torch.ones(len(logp)), atol=1e-6)


def test_round_trip_against_the_dense_teacher(made, data, teacher):
    cache = opened(made, data)
    seen = 0
    for batch in data.train_dataloader():
        kept = cache.lookup(batch)
        check(kept, live(teacher, batch))
        assert kept.whole is False
        asked = cache.lookup(batch._replace(documents=None))
        assert all(torch.equal(one, other) for one, other in zip(kept[:4], asked[:4]))
        seen += len(kept.ids)
    assert seen == len(cache) == cache.manifest["tokens"]


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "padded", "micro_batch_size": 4, "seed": 1},
        {"layout": "packed", "micro_batch_size": 5, "seed": 2},
        {"pack_to": 512, "micro_batch_size": 2, "seed": 3},
        {"shuffle": False, "micro_batch_size": 7},
        {"val_fraction": 0.3, "micro_batch_size": 3},
    ],
    ids=["padded", "packed", "packs", "in order, fillers", "held out"],
)
def test_trap_rm_kd_8_cached_top_k_at_t_equals_the_live_teacher_at_t(made, folder, teacher, options):
    data = parts.data_of(folder, **options)
    data.prepare()
    cache = opened(made, data)
    batches = list(data.train_dataloader())
    if options.get("val_fraction"):
        batches += list(data.val_dataloader())
    fillers = 0
    for batch in batches:
        positions, _, _ = shifted_targets(batch)
        kept = cache.lookup(batch)
        assert len(kept.ids) == len(positions)
        check(kept, live(teacher, batch))
        fillers += sum(not batch.loss_mask[batch.document_ids == d].any() for d in range(len(batch.sources)))
    if options.get("micro_batch_size") == 7:
        assert fillers == 4  # 24 rows in 4 micro-batches of 7


def test_accumulated_micro_batches_ask_for_the_same_as_one_batch(made, folder):
    small, large = parts.data_of(folder, shuffle=False), parts.data_of(folder, shuffle=False, micro_batch_size=24)
    small.prepare(), large.prepare()
    cache = opened(made, small)
    pieces = [cache.lookup(batch) for batch in small.train_dataloader()]
    whole = [cache.lookup(batch) for batch in large.train_dataloader()]
    assert len(pieces) == 24 and len(whole) == 1
    # The units of a step are dealt by their size: compare as sets of rows.
    a = torch.cat([torch.cat([p.ids.double(), p.logprobs.double(), p.tail[:, None].double()], 1) for p in pieces])
    b = torch.cat([whole[0].ids.double(), whole[0].logprobs.double(), whole[0].tail[:, None].double()], 1)
    assert sorted(map(tuple, a.tolist())) == sorted(map(tuple, b.tolist()))


def test_another_temperature_is_another_distribution(folder, data, teacher, tmp_path):
    parts.write(folder, tmp_path / "kd", model=teacher, data=data, temperature=1.0)
    batch = next(iter(data.train_dataloader()))
    cache = open_cache(tmp_path / "kd", data.prepared_rows("train"), data.renderer, temperature=1.0)
    check(cache.lookup(batch), live(teacher, batch, temperature=1.0))


def test_a_batch_without_a_trained_token_asks_for_nothing(made, data):
    batch = next(iter(data.train_dataloader()))
    kept = opened(made, data).lookup(batch._replace(loss_mask=torch.zeros_like(batch.loss_mask), documents=None))
    assert kept.ids.shape == (0, 8) and kept.tail.shape == (0,)


def test_a_wrong_row_is_refused(made, data):
    cache, batch = opened(made, data), next(iter(data.train_dataloader()))._replace(documents=None)
    with pytest.raises(ValueError, match="is not row"):
        cache.lookup(batch._replace(rows=(batch.rows + 1) % 24))
    with pytest.raises(ValueError, match="is not row 99"):
        cache.lookup(batch._replace(rows=torch.full_like(batch.rows, 99)))
    ids = batch.input_ids.clone()
    ids[0, 0] += 1
    with pytest.raises(ValueError, match="its ids"):
        cache.lookup(batch._replace(input_ids=ids))
    mask = batch.loss_mask.clone()
    mask[0, int(mask[0].nonzero()[0, 0])] = 0
    with pytest.raises(ValueError, match="its trained tokens"):
        cache.lookup(batch._replace(loss_mask=mask))
    with pytest.raises(ValueError, match="live teacher"):
        cache.lookup(batch._replace(rows=None))


# ---- what it was made with ----


def test_each_mismatch_is_refused_with_both_hashes(made, data, tmp_path, folder):
    cache = opened(made, data)
    good = {
        "data_hash": cache.plan.data,
        "tokenizer": cache.plan.tokenizer,
        "template": cache.plan.template,
        "teacher": cache.plan.teacher,
        "temperature": T,
    }
    assert TeacherCache.open(made, **good).plan == cache.plan
    for key, value in {**dict.fromkeys(good, "f" * 32), "temperature": 1.0}.items():
        with pytest.raises(ValueError) as refusal:
            TeacherCache.open(made, **{**good, key: value})
        assert str(good[key]) in str(refusal.value) and str(value) in str(refusal.value)
        assert "ptl synth teacher -c RECIPE --out" in str(refusal.value)


def test_what_is_really_different_has_another_hash(made, data, folder, tmp_path):
    cache = opened(made, data)
    # The rows: one more, or the same with other turns trained.
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:-1]))
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    fewer = parts.data_of(tmp_path)
    with pytest.raises(ValueError, match=cache.plan.data):
        opened(made, fewer)
    from ptl.data.render import RenderPolicy

    with pytest.raises(ValueError, match="trained turns"):
        opened(made, parts.data_of(folder, policy=RenderPolicy(last_turn_only=True)))
    # The teacher: one weight, or its dtype.
    assert opened(made, data, teacher=ModelSpec(name=f"{folder}/teacher")).plan.teacher == cache.plan.teacher
    assert opened(made, data, teacher=ModelSpec(name=f"{tmp_path}/teacher")).plan == cache.plan  # a copy is the same
    with pytest.raises(ValueError, match="teacher"):
        opened(made, data, teacher=ModelSpec(name=f"{folder}/teacher", dtype="bf16"))
    path = tmp_path / "teacher" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=cache.plan.teacher):
        opened(made, data, teacher=ModelSpec(name=f"{tmp_path}/teacher"))


def test_a_teacher_is_hashed_again_only_where_a_file_changed(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    spec = ModelSpec(name=f"{tmp_path}/teacher")
    digest, stamps = teacher_digest(spec)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it was read again"))
    assert teacher_digest(spec, stamps)[0] == digest


def test_the_data_hash_is_of_content_and_not_of_paths(folder, data, tmp_path):
    shutil.copy(folder / "rows.jsonl", tmp_path / "rows.jsonl")
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    twin = parts.data_of(tmp_path)
    assert contents(twin.prepared_rows("train")).hash == contents(data.prepared_rows("train")).hash


def test_digests_tell_ids_positions_and_their_border():
    one = row_digest(np.array([1, 2, 3]), np.array([2]))
    assert one != row_digest(np.array([1, 2, 4]), np.array([2]))
    assert one != row_digest(np.array([1, 2, 3]), np.array([1]))
    assert row_digest(np.array([1, 2]), np.array([3])) != row_digest(np.array([1]), np.array([2, 3]))
    assert trained_positions(np.array([0, 3, 5, 6])).tolist() == [1, 2, 5]


def test_shards_hold_whole_rows():
    offsets = np.array([0, 3, 10, 11, 30, 31, 31, 40])
    bounds = shard_bounds(offsets, 10)
    assert bounds.tolist() == [0, 2, 4, 7]
    assert shard_bounds(np.array([0, 0, 4]), 100).tolist() == [0, 2]


def test_no_cache_an_unfinished_and_a_damaged_one(made, data, tmp_path, folder, teacher):
    with pytest.raises(ValueError, match="no teacher cache"):
        opened(tmp_path / "nothing", data)
    copy = tmp_path / "kd"
    shutil.copytree(made, copy)
    part = next(copy.iterdir())
    shard = part / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged: shard-00001\.safetensors"):
        opened(copy, data)
    (part / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        opened(copy, data)
    shard.unlink()
    parts.write(folder, copy, model=teacher, data=data)  # what the message says to do
    assert shard.read_bytes() == (made / part.name / shard.name).read_bytes()
    with pytest.raises(ValueError, match=r"temperature 2\.0 against 1\.0.*--out"):
        parts.write(folder, copy, model=teacher, data=data, temperature=1.0)


def test_several_data_sets_share_a_folder(made, data, teacher, tmp_path, folder):
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[3:9]))
    both = tmp_path / "kd"
    shutil.copytree(made, both)
    other = parts.data_of(tmp_path)
    parts.write(tmp_path, both, model=teacher, data=other)
    assert len(opened(both, other)) < len(opened(both, data))


def test_it_can_be_pickled(made, data):
    cache, batch = opened(made, data), next(iter(data.train_dataloader()))
    copy = pickle.loads(pickle.dumps(cache))
    assert all(torch.equal(a, b) for a, b in zip(cache.lookup(batch)[:4], copy.lookup(batch)[:4]))


def test_rescaled_gives_the_head_what_the_tail_leaves():
    logprobs = torch.tensor([[-0.1, -3.0], [-1.0, float("-inf")], [float("-inf")] * 2])
    out = rescaled(logprobs, torch.tensor([-3.0, float("-inf"), float("-inf")]))
    assert torch.allclose(out.exp().sum(-1), torch.tensor([1 - np.exp(-3.0), 1.0, 0.0]).float())
    assert torch.allclose(out[0, 0] - out[0, 1], torch.tensor(2.9)) and not out.isnan().any()


# ---- killed, shared ----


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def test_killed_and_restarted_gives_the_same_bytes(made, folder, data, teacher, tmp_path):
    code = f"from tests.synth.parts import killed; killed({str(folder)!r}, {str(tmp_path / 'kd')!r}, 2)"
    run = forks.run(["-c", code], cwd=ROOT)
    assert run.returncode == -9, run.stderr
    part = next((tmp_path / "kd").iterdir())
    assert len(list(part.glob("shard-*"))) == 2 and not (part / "manifest.json").exists()
    assert len(list(part.glob(".*.partial-*"))) == 1
    parts.write(folder, tmp_path / "kd", model=teacher, data=data)
    assert files(tmp_path / "kd") == files(made)


def test_two_processes_share_the_work(made, folder, tmp_path):
    results = run_ranks("tests.synth.parts:in_process", 2, {"folder": str(folder), "out": str(tmp_path / "kd")})
    assert all(result["own"] >= 2 for result in results) and any(result["sealed"] for result in results)
    assert files(tmp_path / "kd") == files(made)


# ---- tokens without numbers ----


def test_nan_rows_have_no_mass_and_are_counted(folder, data, tmp_path):
    rows = data.prepared_rows("train").rows
    victim = next(i for i in (rows[0]["ids"][-3:]) if i > 2)
    model = parts.teacher_of(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[victim] = float("nan")
    for mode in ("topk", "sample"):
        _, manifest = parts.write(folder, tmp_path / mode, model=model, data=data, mode=mode)
        assert 0 < manifest["skipped"] < manifest["tokens"]
        cache = open_cache(tmp_path / mode, data.prepared_rows("train"), data.renderer, temperature=T)
        bad = 0
        for batch in data.train_dataloader():
            kept = cache.lookup(batch)
            assert not any(tensor.isnan().any() for tensor in kept[:4])
            empty = (kept.ids < 0).all(-1)
            assert torch.equal(empty, live(model, batch).isnan().any(-1))
            assert kept.tail[empty].eq(float("-inf")).all() and kept.entropy[empty].eq(0).all()
            bad += int(empty.sum())
        assert bad == manifest["skipped"]


def test_sample_is_kept_as_drawn(folder, data, teacher, tmp_path):
    _, manifest = parts.write(folder, tmp_path / "a", model=teacher, data=data, mode="sample", k=50, seed=5)
    cache = open_cache(tmp_path / "a", data.prepared_rows("train"), data.renderer, temperature=T)
    for batch in data.train_dataloader():
        kept = cache.lookup(batch)
        logp = live(teacher, batch)
        shares = kept.logprobs.exp()
        used = kept.ids >= 0
        assert torch.allclose(shares.sum(-1), torch.ones(len(shares))) and kept.tail.eq(float("-inf")).all()
        assert kept.whole is True
        assert torch.equal(used, shares > 0) and torch.allclose(shares * 50, (shares * 50).round(), atol=1e-4)
        assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in kept.ids)
        assert torch.allclose(kept.entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-5)
    assert manifest["skipped"] == 0


def test_draws_do_not_depend_on_batches(folder, data, teacher, tmp_path):
    kept, batches = {}, list(data.train_dataloader())
    for name, tokens in (("a", 64), ("b", 100_000)):
        parts.write(folder, tmp_path / name, model=teacher, data=data, mode="sample", seed=5, shard_tokens=tokens)
        cache = open_cache(tmp_path / name, data.prepared_rows("train"), data.renderer, temperature=T)
        kept[name] = [cache.lookup(batch) for batch in batches]
    for a, b in zip(kept["a"], kept["b"]):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs)
