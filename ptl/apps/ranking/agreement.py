"""How far annotators agree, and how long they take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Any

from ptl.apps.ranking.store import STATUSES, Verdict

Pair = tuple[str, str]


def kendall_tau_b(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Kendall's tau-b of two rankings of the same answers: 1 the same order, -1 the reverse, ties accounted for.

    Args:
        first: K ranks; None for an answer that was not ranked.
        second: K ranks. Only answers that both ranked count.

    Returns:
        The coefficient in [-1, 1]; None where it does not exist: fewer than two answers in common, or all of them tied
        in one of the rankings.
    """
    common = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    concordant = discordant = tied_first = tied_second = 0
    for (a, b), (c, d) in combinations(common, 2):
        tied_first += a == c
        tied_second += b == d
        if a != c and b != d:
            if (a < c) == (b < d):
                concordant += 1
            else:
                discordant += 1
    pairs = math.comb(len(common), 2)
    untied = (pairs - tied_first) * (pairs - tied_second)
    return (concordant - discordant) / math.sqrt(untied) if untied else None


def pair_taus(given: Mapping[str, Verdict]) -> dict[Pair, float]:
    """tau-b of each two annotators who ranked one prompt, where it exists. Names of a pair are in order."""
    ranked = {name: verdict.ranks for name, verdict in given.items() if verdict.status == "ranked"}
    taus = {pair: kendall_tau_b(ranked[pair[0]], ranked[pair[1]]) for pair in combinations(sorted(ranked), 2)}
    return {pair: tau for pair, tau in taus.items() if tau is not None}


class Agreement:
    """Means of ``pair_taus`` over prompts. Only prompts with a new verdict are computed again."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[frozenset[tuple[str, int]], dict[Pair, float]]] = {}

    def report(self, verdicts: Mapping[str, Mapping[str, Verdict]]) -> dict[str, Any]:
        """What the page shows: an entry for each annotator, and the agreement of all.

        Args:
            verdicts: last verdicts by prompt and annotator.

        Returns:
            ``annotators``: ``[{name, ranked, skipped, flagged, seconds, tau}]``, by name, ``seconds`` their median of a
            prompt and ``tau`` the mean over pairs with this annotator; ``tau``: mean over all pairs and prompts, or
            None; ``pairs`` and ``prompts`` it was taken over.
        """
        by_prompt = [taus for prompt, given in verdicts.items() if (taus := self._taus(prompt, given))]
        of: dict[str, list[Verdict]] = {}
        for given in verdicts.values():
            for name, verdict in given.items():
                of.setdefault(name, []).append(verdict)
        own: dict[str, list[float]] = {name: [] for name in of}
        for taus in by_prompt:
            for pair, tau in taus.items():
                for name in pair:
                    own[name].append(tau)
        everything = [tau for taus in by_prompt for tau in taus.values()]
        return {
            "annotators": [
                {
                    "name": name,
                    **{status: sum(verdict.status == status for verdict in of[name]) for status in STATUSES},
                    "seconds": median(verdict.seconds for verdict in of[name]),
                    "tau": fmean(own[name]) if own[name] else None,
                }
                for name in sorted(of)
            ],
            "tau": fmean(everything) if everything else None,
            "pairs": len(everything),
            "prompts": len(by_prompt),
        }

    def _taus(self, prompt: str, given: Mapping[str, Verdict]) -> dict[Pair, float]:
        version = frozenset((name, verdict.revision) for name, verdict in given.items())
        if prompt not in self._seen or self._seen[prompt][0] != version:
            self._seen[prompt] = (version, pair_taus(given))
        return self._seen[prompt][1]
