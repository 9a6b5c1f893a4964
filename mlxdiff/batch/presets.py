"""Presets: options under a name, in a TOML file of a table ``option = value``.

``{prompt}`` in a preset's prompt or negative prompt stands for what is given beside the preset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdiff.batch import words
from mlxdiff.errors import UsageError, one_line
from mlxdiff.machine.disk import read_document

PLACE = "{prompt}"
TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
"""Options that hold a prompt."""


def config_folder() -> Path:
    """Return the folder of presets and wildcards.

    It is ``$MLXDIFF_CONFIG``, else mlxdiff in ``$XDG_CONFIG_HOME`` or ``~/.config``.
    """
    own = os.environ.get("MLXDIFF_CONFIG")
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.path.expanduser(own or os.path.join(base, "mlxdiff"))).absolute()


def read_preset(name: str) -> dict[str, Any]:
    """Read the options of a preset.

    Args:
        name: of a file in ``presets`` of the folder of settings, without .toml; or a path.
    Raises: UsageError.
    """
    path = _path(name)
    try:
        text = read_document(path).decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not a UTF-8 text file") from None
    try:
        return words.all_accepted(_toml(text), machine=True)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not TOML ({one_line(error)})") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _path(name: str) -> Path:
    if name.endswith(".toml") or os.path.dirname(name):
        return Path(name).expanduser()
    folder = config_folder() / "presets"
    path = folder / f"{name}.toml"
    if not path.is_file():
        there = sorted(one.stem for one in folder.glob("*.toml"))
        said = f"there are {', '.join(there)}" if there else "there is none"
        raise UsageError(f"preset {name!r}: no {path}; {said}. A path works, too")
    return path


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise UsageError(
                "presets are TOML, which Python 3.10 cannot read: pip install tomli, or use a "
                "newer Python"
            ) from None
    return tomllib.loads(text)


def styled(preset: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Join a preset and the options given beside it, which come first."""
    joined = {**preset, **options}
    for name in TEXTS:
        style, own = preset.get(name), options.get(name)
        if isinstance(style, str) and PLACE in style:
            joined[name] = style.replace(PLACE, own if isinstance(own, str) else "")
    return joined
