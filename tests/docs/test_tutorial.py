"""Every command of the tutorial runs, in both languages, with a tiny model in the real one's place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.ranks import EXTENSIONS, ROOT, compile_extensions

PAGES = [ROOT / "docs/tutorial.md", ROOT / "docs/tutorial.fr.md"]
LAYERS = 12
"""Of the tiny model: as many as the recipe of distillation keeps, and one more."""


def commands(page: Path) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_both_languages_have_the_same_commands():
    english, french = map(commands, PAGES)
    assert len(english) == 9 and english == french


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs(tmp_path):
    compile_extensions()
    tiny.save_folder(tmp_path / "assets/smollm2-135m-instruct", tiny.make_tokenizer(), layers=LAYERS + 1, hidden=64)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = tmp_path / "tutorial.sh"
    script.write_text("set -euxo pipefail\n" + "\n".join(commands(PAGES[0])))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "PTL"))}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PTL_CACHE": str(tmp_path / "cache")}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", str(script)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=1500,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    for made in ("sft/export", "assistant/export", "student/export", "reward/export", "grpo/export", "bf16", "int8"):
        assert (tmp_path / "story" / made / "config.json").is_file(), made
    assert "Traceback" not in done.stderr
