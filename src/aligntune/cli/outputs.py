"""Where do verbs write what they found?"""

from __future__ import annotations

from pathlib import Path


def check_output(path: Path) -> None:
    """Make the folder of `path`; `ConfigError` where the file cannot be written: before the work is done, not after it."""
    from aligntune.errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a", encoding="utf-8").close()
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror or error}") from error
