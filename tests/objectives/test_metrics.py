import pytest
import torch

from ptl.objectives.metrics import WeightedMeans


def one(value: float, weight: float):
    return torch.tensor(value), torch.tensor(weight)


def test_the_mean_is_weighted_by_tokens_not_by_batches():
    means = WeightedMeans(("loss", "accuracy"))
    means.update({"loss": one(6.0, 3.0), "accuracy": one(1.0, 3.0)})
    means.update({"loss": one(4.0, 1.0)})
    values = means.compute()
    assert float(values["loss"]) == pytest.approx(2.5)
    assert float(values["accuracy"]) == pytest.approx(1 / 3)


def test_a_name_without_weight_is_left_out_rather_than_nan():
    means = WeightedMeans(("loss", "loss_french"))
    means.update({"loss": one(1.0, 1.0), "loss_french": one(0.0, 0.0)})
    assert set(means.compute()) == {"loss"}


def test_an_undeclared_name_is_an_error():
    with pytest.raises(KeyError):
        WeightedMeans(("loss",)).update({"other": one(1.0, 1.0)})


def test_small_terms_are_not_lost_in_a_large_sum():
    means = WeightedMeans(("loss",))
    for _ in range(10):
        means.update({"loss": one(2.0**24, 2.0**24)})
    means.update({"loss": one(1.0, 0.0)})
    assert float(means.values[0, 0]) == 10 * 2.0**24 + 1
