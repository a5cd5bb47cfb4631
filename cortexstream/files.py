"""Files that a user asks for: refused before the work that fills them, and written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from cortexstream.errors import InvalidRequestError, shown


def check_path(field: str, path: str | Path) -> Path:
    """Where to write, symbolic links followed. Raises InvalidRequestError, which names `field`, if no file can be made
    there."""
    if not isinstance(path, str | Path):
        raise InvalidRequestError(field, f"is {shown(path)}; it must be a str or a Path")
    if not str(path) or Path(path).name in ("", ".."):
        raise InvalidRequestError(field, f"is {str(path)!r}; it must name a file")
    try:
        place = Path(path).resolve()
        if place.is_dir():
            raise InvalidRequestError(field, f"{path} is a folder; name a file in it")
        if place.exists() and not place.is_file():
            raise InvalidRequestError(field, f"{path} is a device or a pipe; name a file")
        if not place.parent.is_dir():
            raise InvalidRequestError(
                field, f"{path} cannot be written: the folder {place.parent} does not exist; make it, or name another"
            )
    except InvalidRequestError:
        raise
    except OSError as error:
        raise InvalidRequestError(
            field, f"{shown(str(path))} cannot be written: {error.strerror}; name another file"
        ) from error
    except (ValueError, RuntimeError) as error:  # the last for a ring of links, before Python 3.13
        raise InvalidRequestError(field, f"is {shown(str(path))}, which cannot name a file: {error}") from error
    if not os.access(place.parent, os.W_OK):
        raise InvalidRequestError(field, f"{path} cannot be written: the folder {place.parent} may not be written to")
    return place


def write_whole(field: str, path: str | Path, data: bytes) -> None:
    """Write a file, whole or not at all, whoever else writes it. Raises InvalidRequestError as `check_path` does, and
    if the system refuses."""
    place = check_path(field, path)
    partial = place.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        try:
            partial.write_bytes(data)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidRequestError(
            field, f"{path} cannot be written: {error.strerror or error}; name another file"
        ) from error
