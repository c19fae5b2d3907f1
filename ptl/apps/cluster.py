"""A cluster's profile for the scripts in ``slurm/``: one YAML file read, checked and given to them as shell text.

A profile says what is the cluster's and not the experiment's: partition, account, form of GPU requests, modules,
container, network. ``python -m ptl.apps.cluster FILE`` prints arrays and exports that a batch script sources. No
package but YAML is loaded, since login nodes are slow.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEYS = {
    "sbatch": "options of sbatch by their long names; true for a flag",
    "srun": "options of srun by their long names; true for a flag",
    "modules": "modules to load in the job",
    "setup": "shell lines to run in the job before srun",
    "environment": "variables of the job",
    "container": "runtime (pyxis or apptainer), image and mounts",
}
CONTAINER = ("runtime", "image", "mounts", "options")


def read_profile(path: Path) -> dict[str, Any]:
    """A profile's contents.

    Raises:
        ValueError: it cannot be read, or holds a key or value that is not a profile's; the message names it.
    """
    import yaml

    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the profile {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(profile, dict):
        raise ValueError(f"{path} must hold keys ({', '.join(KEYS)}), got {type(profile).__name__}")
    _check_names(path, profile, KEYS, "")
    for key in ("sbatch", "srun", "environment", "container"):
        if not isinstance(profile.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must hold keys, got {profile[key]!r}")
    for key in ("modules", "setup"):
        if not isinstance(profile.get(key, []), list):
            raise ValueError(f"{path}: {key} must be a list, got {profile[key]!r}")
    container = profile.get("container") or {}
    _check_names(path, container, CONTAINER, "container.")
    if container and (container.get("runtime") not in ("pyxis", "apptainer") or not container.get("image")):
        raise ValueError(
            f"{path}: container needs a runtime, pyxis or apptainer, and an image; got "
            f"{container.get('runtime')!r} and {container.get('image')!r}"
        )
    return profile


def shell_text(profile: Mapping[str, Any]) -> str:
    """The profile as bash: ``sbatch_options``, ``srun_options``, ``container_command``, exports, and set-up lines."""
    srun, prefix = _options(profile.get("srun") or {}), []
    container = profile.get("container") or {}
    mounts = ",".join(map(str, container.get("mounts") or []))
    if container.get("runtime") == "pyxis":
        srun += [f"--container-image={container['image']}", "--no-container-mount-home"]
        srun += [f"--container-mounts={mounts}"] if mounts else []
        srun += map(str, container.get("options") or [])
    elif container:
        prefix = ["apptainer", "exec", "--nv", *(["--bind", mounts] if mounts else [])]
        prefix += [*map(str, container.get("options") or []), str(container["image"])]
    lines = [
        f"sbatch_options=({_words(_options(profile.get('sbatch') or {}))})",
        f"srun_options=({_words(srun)})",
        f"container_command=({_words(prefix)})",
        *(f"export {name}={shlex.quote(str(value))}" for name, value in (profile.get("environment") or {}).items()),
        "job_setup() {",
        *(f"  module load {shlex.quote(str(name))}" for name in profile.get("modules") or []),
        *(f"  {line}" for line in profile.get("setup") or []),
        "  :",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _check_names(path: Path, given: Mapping[str, Any], known: Sequence[str] | Mapping[str, str], prefix: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"expected {', '.join(known)}"
            raise ValueError(f"{path}: unknown key {prefix}{key}; {hint}")


def _options(given: Mapping[str, Any]) -> list[str]:
    """``--name=value``; a flag for true, nothing for false and null."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value not in (False, None)
    ]


def _words(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a profile as shell text; 2 for a mistake in it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1:
        print("usage: python -m ptl.apps.cluster configs/cluster/NAME.yaml", file=sys.stderr)
        return 2
    try:
        print(shell_text(read_profile(Path(arguments[0]))), end="")
    except ValueError as mistake:
        print(f"ptl cluster profile: error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
