"""W&B artifacts of a run: references to its data, export and checkpoints, which stay where they are.

A reference is a ``file://`` address with the size of each file; nothing is read, so that terabytes cost nothing, and
folders, as DeepSpeed's checkpoints are, are no exception.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptl.callbacks.run_identity import run_id

EXPORTS = ("export", "export_adapter")
MANIFEST, SUMMARY = "stage.json", "summary.json"
UPLOADS = {"export": "export", "adapter": "export_adapter"}


def log_data(run: Any, sources: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Logs a run's data as an artifact of the type ``dataset``, named by its first source.

    Args:
        run: W&B's.
        sources: path of each source by its label; what is no local path is named in the metadata alone.
        facts: the metadata.
    """
    name = Path(next(iter(sources.values()), "data").split("?")[0]).name
    artifact = _artifact(f"data-{name}", "dataset", {**facts, "sources": dict(sources)})
    for label, path in sources.items():
        if Path(path).exists():
            _refer(artifact, Path(path), _plain(label))
    run.log_artifact(artifact)


def log_outputs(run: Any, run_dir: Path, upload: str = "nothing") -> None:
    """Logs what a run has left: ``export-ID`` of the type ``model``, and ``checkpoints-ID``.

    Args:
        run: W&B's.
        run_dir: the run folder.
        upload: ``export`` or ``adapter`` for the folder whose files are uploaded, else ``nothing``.
    """
    ours = run_id(run_dir) or run.id
    manifest = _json(run_dir / MANIFEST)
    folders = [run_dir / name for name in EXPORTS if (run_dir / name).is_dir()]
    if folders:
        artifact = _artifact(f"export-{ours}", "model", manifest)
        for folder in folders:
            if folder.name == UPLOADS.get(upload):
                # Uploaded from where it lies: a copy would take its room twice.
                artifact.add_dir(str(folder), name=folder.name, policy="immutable", skip_cache=True)
            else:
                _refer(artifact, folder, folder.name)
        if (run_dir / MANIFEST).exists():
            # By its content, with the digests of the files, a new export in the old place is a new version.
            artifact.add_reference(_address(run_dir / MANIFEST), name=MANIFEST, checksum=True)
        run.log_artifact(artifact)
    saved = sorted((run_dir / "checkpoints").iterdir()) if (run_dir / "checkpoints").is_dir() else []
    saved = [path for path in saved if not path.name.startswith(".")]
    if saved:
        told = _json(run_dir / SUMMARY)
        facts = {key: told.get(key) for key in ("best_checkpoint", "last_checkpoint", "best", "global_step")}
        artifact = _artifact(f"checkpoints-{ours}", "checkpoints", facts)
        for path in saved:
            _refer(artifact, path, path.name)
        run.log_artifact(artifact)


def _artifact(name: str, kind: str, metadata: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.Artifact(_plain(name), type=kind, metadata=dict(metadata))


def _refer(artifact: Any, path: Path, name: str) -> None:
    artifact.add_reference(_address(path), name=name, checksum=False, max_objects=1_000_000)


def _address(path: Path) -> str:
    # Not as_uri(): W&B takes the path behind file:// as it is, without resolving %20.
    return f"file://{path.resolve()}"


def _plain(name: str) -> str:
    """A name of the characters that W&B takes, the end of a long one."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip("._-")[-100:] or "data"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
