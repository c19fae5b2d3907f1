"""The reference of configuration is that of the code: nothing is behind, nothing is left out."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import lightning as L
import pytest

import ptl.callbacks
import ptl.objectives
import ptl.rewards
import ptl.rollout
from docs import signatures
from ptl.callbacks.pass_rates import PassRates
from ptl.callbacks.record import RunRecord
from ptl.objectives.base import Objective
from ptl.rewards.base import Reward
from ptl.rollout.engine import Engine
from tests.cli.test_configs import CONFIGS, parse

LISTED = {signatures.found(path): path for page in signatures.PAGES.values() for path in page.classes}
SILENT = {
    ("Checkpoint", "enable_version_counter"),  # Lightning's
    ("Checkpoint", "auto_insert_metric_name"),  # Lightning's
}


@pytest.mark.parametrize("name", signatures.PAGES)
def test_a_page_is_what_the_code_says(name):
    written = (signatures.FOLDER / name).read_text(encoding="utf-8")
    assert written == signatures.rendered(signatures.PAGES[name], name), "run `make docs` and commit docs/reference/"


def test_every_page_is_written_by_the_code_or_by_hand():
    pages = {page.name for page in signatures.FOLDER.glob("*.md")}
    assert pages == {*signatures.PAGES, "README.md"}


def test_every_key_of_fit_is_in_the_first_table():
    keys = set(vars(parse(CONFIGS / "recipes/lora.yaml")))
    assert keys > {"model", "data", "trainer"}
    named = set(re.findall(r"`(\w+)`", (signatures.FOLDER / "README.md").read_text(encoding="utf-8")))
    assert keys - {"config"} <= named


def test_every_class_that_a_key_takes_has_its_table():
    taken = {cls for owner in LISTED for key in signatures.keys_of(owner) for cls in signatures.classes_in(key.kind)}
    assert taken - set(LISTED) == {Reward, Engine}


@pytest.mark.parametrize(
    ("package", "base", "left_out"),
    [
        (ptl.objectives, Objective, set()),
        (ptl.rewards, Reward, set()),
        (ptl.rollout, Engine, set()),
        (ptl.callbacks, L.Callback, {RunRecord, PassRates}),  # which the command adds, and no key names
    ],
    ids=["objectives", "rewards", "engines", "callbacks"],
)
def test_every_class_that_a_configuration_may_name_is_there(package, base, left_out):
    found = set()
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, base) and cls.__module__ == module.name and not inspect.isabstract(cls):
                found.add(cls)
    assert len(found) > 2 and found - left_out <= set(LISTED)


@pytest.mark.parametrize("cls", LISTED, ids=lambda cls: cls.__name__)
def test_every_key_says_what_it_is(cls):
    silent = {(cls.__name__, key.name) for key in signatures.keys_of(cls) if not key.text}
    assert silent <= SILENT
