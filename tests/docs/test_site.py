"""The site builds with warnings as errors, is complete, and fetches nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, BuildError
from pymdownx.superfences import SuperFencesException

from docs.hooks import formula
from tests.ranks import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def test_every_page_is_built_and_in_the_menu(site):
    pages = {page.relative_to(ROOT / "docs").with_suffix("") for page in (ROOT / "docs").rglob("*.md")}
    home = (site / "index.html").read_text()
    for page in pages:
        built = page.with_name("index") if page.name == "README" else page
        assert (site / f"{built}.html").is_file(), built
        assert built.name == "index" or f'href="{built}.html"' in home, built
    assert not list(site.rglob("*.py"))


def test_nothing_is_fetched_from_elsewhere(site):
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+")
    for page in [*site.rglob("*.html")]:
        assert not loads.findall(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style


def test_formulas_are_mathml(site):
    for source in (ROOT / "docs").glob("maths*.md"):
        page, written = (site / source.with_suffix(".html").name).read_text(), source.read_text().count("```math")
        assert page.count("<math ") == written > 5 and "language-math" not in page, source.name


def test_a_formula_that_has_no_mathml_ends_the_build(tmp_path):
    assert "<mfrac>" in formula(r"\frac{a}{b}", "math", "math", {}, None)
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "README.md").write_text("# Home\n\n[b](../README.md)\n\n```math\na + \\nosuchcommand{b}\n```\n")
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(tmp_path / "site"))
    config.nav = ["README.md"]
    with pytest.raises(SuperFencesException, match="nosuchcommand"):
        build(config)


def test_a_file_of_the_repository_is_in_the_site(site):
    assert 'href="repository/README.md.txt"' in (site / "index.html").read_text()
    assert (site / "repository/README.md.txt").read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "wrong", ["[a](nowhere.md)", "[a](grpo.md#no-such-part)", "[a](../no-such-file.md)", "[a](/b.md)"]
)
def test_a_link_that_leads_nowhere_ends_the_build(wrong, tmp_path):
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "README.md").write_text(f"# Home\n\n{wrong} [b](../README.md)\n")
    (pages / "grpo.md").write_text("# GRPO\n")
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(tmp_path / "site"))
    config.nav = ["README.md", "grpo.md"]
    with pytest.raises((Abort, BuildError)):
        build(config)


def test_links_that_lead_somewhere_do_not(tmp_path):
    pages = tmp_path / "docs"
    (pages / "deep").mkdir(parents=True)
    (pages / "README.md").write_text("# Home\n\n[a](grpo.md#part) [b](../README.md) [c](deep/page.md)\n")
    (pages / "grpo.md").write_text("# GRPO\n\n## Part\n")
    (pages / "deep/page.md").write_text("# Page\n\n[c](../../configs/base.yaml) [d](../grpo.md)\n")
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(tmp_path / "site"))
    config.nav = ["README.md", "grpo.md", "deep/page.md"]
    build(config)
    assert 'href="../repository/configs/base.yaml.txt"' in (tmp_path / "site/deep/page.html").read_text()
    assert (tmp_path / "site/repository/configs/base.yaml.txt").is_file()
