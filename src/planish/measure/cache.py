"""JSON files of measured figures, in the user's cache folder: read leniently, written atomically."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where figures are kept: `PLANISH_CACHE`, or the user's cache folder of this system."""
    given = os.environ.get("PLANISH_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("planish", appauthor=False))


def read(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is none, and with a warning where it is not what was written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        log.warning("cache: %s cannot be read (%s); measuring again", path, err)
        return {}
    if not isinstance(found, dict):
        log.warning("cache: %s holds no object; measuring again", path)
        return {}
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` at once; a folder that cannot be written to costs a warning, since only time is lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=0, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as err:
        log.warning("cache: %s cannot be written (%s); its figures are kept for this run only", path, err)
