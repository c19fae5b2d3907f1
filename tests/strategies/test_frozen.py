"""A frozen model cut over two ranks: its passes are those of the whole one, and nothing grows with their number."""

from tests.ranks import run_ranks


def test_passes_are_those_of_the_whole_model_and_the_order_is_kept_once(model_folder):
    args = {"folder": str(model_folder), "count": 5}
    for seen in run_ranks("tests.strategies.frozen_parts:passes", 2, args):
        assert max(seen["worst"]) < 1e-6
        assert len(set(seen["noted"])) == 1 and seen["noted"][0] > 5
        assert seen["held"] == 0 < seen["whole"]  # between passes a rank holds its shards alone
