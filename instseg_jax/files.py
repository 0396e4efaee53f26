"""Writing files so that a reader never finds half of one: aside first, then moved into place."""

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` whole or not at all, making its folder if need be; return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a move is only atomic within a file system; hidden, and a name of its own for
    # each writer, so that two of them never share it.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path` whole or not at all; return the path."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, obj: Any, *, indent: int | None = None, ensure_ascii: bool = False) -> Path:
    """Write `obj` as JSON to `path` whole or not at all; return the path.

    numpy scalars and arrays become numbers and lists, paths become strings. Raises ValueError for NaN and
    infinity, which JSON does not have: use None.
    """
    text = json.dumps(obj, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False, default=_plain)
    return write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    """Make a value that JSON does not know a plain one."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"Cannot write {type(value).__name__} as JSON: {value!r}.")
