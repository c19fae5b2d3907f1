"""Rows that reasoning-gym makes instead of a file: ``gym://NAME?size=2000&seed=0&PARAMETER=VALUE``.

A row is a data set of the package, its parameters and an index, and is made where it is needed: by the processes that
tokenise, and again by the one that judges its answers. The package is imported when the first row is made.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote

from ptl.data.sources import BadRow, Source

SCHEME = "gym://"
MISSING = "reasoning-gym is not installed: pip install 'ptl[gym]'"
MOST_ROWS = 1000
"""A data set that is told no size has up to so many rows."""
ROWS = 64
"""Rows of a part: some data sets take half a second for one."""
ROW_BYTES = 256
"""What a row is taken for where progress is told in bytes."""
UNSTEADY = (
    *("codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note"),
    "word_ladder",
)
"""Data sets that walk Python sets, whose order differs from process to process, and so their rows."""


@dataclass(frozen=True)
class GymRange:
    """``count`` rows of a data set from index ``start``, made when they are read.

    Attributes:
        name: of the data set.
        config: its parameters as JSON.
    """

    name: str
    config: str
    start: int
    count: int

    @property
    def nbytes(self) -> int:
        return ROW_BYTES * self.count

    def rows(self) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        """``(index + 1, row)``: ``question``, ``answer`` where the data set gives one, and ``gym``, what makes it."""
        for index in range(self.start, self.start + self.count):
            yield index + 1, self._row(index)

    def _row(self, index: int) -> Mapping[str, Any] | BadRow:
        try:
            entry = dataset_of(self.name, self.config)[index]
        except Exception as error:
            return BadRow("not_made", f"reasoning-gym raised {type(error).__name__}: {error}")
        row = {"question": entry["question"], "answer": entry["answer"]}
        row = {key: value for key, value in row.items() if value is not None}
        return {**row, "gym": {"dataset": self.name, "config": json.loads(self.config), "index": index}}


@dataclass(frozen=True)
class GymData:
    """A data set of reasoning-gym, as a file of rows.

    Attributes:
        shown: the path as the user wrote it.
        name: of the data set.
        config: its parameters as JSON, with a seed.
    """

    shown: str
    name: str
    config: str

    @property
    def nbytes(self) -> int:
        return ROW_BYTES * self.num_rows()

    @cached_property
    def _size(self) -> int:
        try:
            return len(dataset_of(self.name, self.config))
        except ValueError as error:
            raise ValueError(f"source {self.shown}: {error}") from None

    def num_rows(self) -> int:
        """Raises ``ValueError`` where there is no such data set, or it does not take the parameters."""
        return self._size

    def parts(self, count: int) -> Iterator[GymRange]:
        """The first ``count`` rows, ``ROWS`` at a time."""
        for start in range(0, count, ROWS):
            yield GymRange(self.name, self.config, start, min(ROWS, count - start))

    def identity(self) -> list[Any]:
        """What changes when the rows do. The size is among the parameters, or is the version's."""
        return ["reasoning-gym", metadata.version("reasoning-gym"), self.name, self.config]


def gym_data(path: str) -> GymData:
    """The data set behind ``gym://NAME?PARAMETER=VALUE&...``. Without ``seed`` the seed is 0.

    Values are JSON or Python literals, else text; ``%26`` is an ampersand.

    Raises:
        ValueError: the path is written otherwise, or the package is not installed.
    """
    name, _, query = path.removeprefix(SCHEME).partition("?")
    config: dict[str, Any] = {"seed": 0}
    given: set[str] = set()
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not (key and equals) or key in given:
            raise ValueError(
                f"source {path}: got {part!r}; expected each parameter once, as in gym://chain_sum?size=2000&seed=0"
            )
        given.add(key)
        config[key] = _value(unquote(value))
    try:
        text = json.dumps(config, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"source {path}: a parameter is no JSON value ({error})") from None
    if isinstance(config["seed"], bool) or not isinstance(config["seed"], int):
        raise ValueError(f"source {path}: seed is {config['seed']!r}; expected an integer, or no seed for 0")
    if find_spec("reasoning_gym") is None:
        raise ValueError(f"source {path}: {MISSING}")
    return GymData(path, name, text)


def check_apart(train: Sequence[Source], val: Sequence[Source]) -> None:
    """Refuses validation on rows that are trained on.

    reasoning-gym adds a row's index to the seed: row 1 of seed 0 is row 0 of seed 1.

    Raises:
        ValueError: two sources of one data set with the same parameters have seeds less than their rows apart.
    """
    spans = [(source.path, *_span(source)) for source in train if source.path.startswith(SCHEME)]
    for held in val:
        if not held.path.startswith(SCHEME):
            continue
        wanted, first, last = _span(held)
        for path, learned, start, end in spans:
            if wanted == learned and first < end and start < last:
                raise ValueError(
                    f"source {held.path}: rows of it are rows of {path} too, since reasoning-gym adds a row's index to "
                    f"the seed: set its seed to {max(entry[-1] for entry in spans)} or more"
                )


def _span(source: Source) -> tuple[list[Any], int, int]:
    """The data set with its parameters, and the seeds of its rows: the first, and the one after the last."""
    data = gym_data(source.path)
    config = json.loads(data.config)
    seed, size = config.pop("seed"), config.pop("size", MOST_ROWS)
    rows = size if isinstance(size, int) else MOST_ROWS
    return [data.name, config], seed, seed + (rows if source.limit is None else min(rows, source.limit))


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError):
            return read(text)
    return text


@lru_cache(32)
def dataset_of(name: str, config: str) -> Any:
    """The data set of reasoning-gym itself.

    Args:
        name: of the data set.
        config: its parameters as JSON.

    Raises:
        ValueError: no such data set, one whose rows are not the same in every process, or a parameter that it refuses.
    """
    if find_spec("reasoning_gym") is None:
        raise ValueError(MISSING)
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name == "composite":
        raise ValueError("composite is a mixture; give each of its data sets as a source of its own, with a weight")
    if name in UNSTEADY:
        raise ValueError(f"the rows of {name} differ from process to process, so that no run can be repeated")
    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no data set {name!r}; {_nearest(name, DATASETS)}")
    parameters = json.loads(config)
    known = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    for key in parameters:
        if key not in known:
            raise ValueError(f"the data set {name} has no parameter {key!r}; {_nearest(key, known)}")
    try:
        dataset = reasoning_gym.create_dataset(name, **parameters)
        len(dataset)
    except Exception as error:  # its checks are assertions, and comparisons of whatever type was given
        raise ValueError(f"reasoning-gym refuses the parameters of {name}: {error or type(error).__name__}") from None
    return dataset


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    return f"the nearest are {near}" if near else f"it has {sorted(known)}"
