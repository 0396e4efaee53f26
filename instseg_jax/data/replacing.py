"""Annotation files that take the place of others, all of them or none: half of a split would lose pictures, or have
some in two parts at once.

Before the first file is moved a mark beside them says what is to be moved where. Whoever finds it knows that somebody
was killed meanwhile: readers refuse such a folder, and the next command that writes there begins with `take_back`.
"""

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from instseg_jax import files

MARK = ".replacing.json"
Step = dict[str, Path | None]  # a file, where what was there goes (None: nothing was), and what comes (None: nothing)


def replace_files(contents: dict[Path, dict[str, Any]], gone: Iterable[Path] = ()) -> None:
    """Write annotation files of one folder; what stood there before stays beside them as .bak, as do those `gone`.

    All are written aside before the first one is moved into place, so that a full disk leaves everything as it was.
    """
    folder = next(iter(contents)).parent
    aside: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            aside[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
            files.write_json(aside[path], {"info": {}} | content, durable=True)
        moved = [*contents, *gone]
        backups = {path: _backup_name(path) for path in moved if path.exists()}
        steps = [{"file": path, "backup": backups.get(path), "new": aside.get(path)} for path in moved]
        files.write_json(folder / MARK, {"steps": [_relative(step, folder) for step in steps]}, durable=True)
        try:
            for path in moved:
                if path in backups:
                    path.rename(backups[path])
                if path in aside:
                    aside[path].rename(path)
        except Exception:
            take_back(folder)
            raise
        files.sync(folder)
        (folder / MARK).unlink()
    finally:
        for new in aside.values():
            new.unlink(missing_ok=True)


def take_back(folder: Path) -> None:
    """Bring a folder whose files were being replaced when somebody was killed to what it was before.

    Raises ValueError for a mark that is none of ours, or that leads out of the data set.
    """
    if not (folder / MARK).is_file():
        return
    for step in _read_steps(folder):
        file, backup, new = step["file"], step["backup"], step["new"]
        assert file is not None
        if backup is None:
            file.unlink(missing_ok=True)  # there was none
        elif backup.exists():
            backup.replace(file)
        if new is not None:
            new.unlink(missing_ok=True)
    files.sync(folder)
    (folder / MARK).unlink()


def check_whole(folder: Path) -> None:
    """Raise ValueError where files of a folder were being replaced when somebody was killed."""
    if (folder / MARK).exists():
        raise ValueError(
            f"The annotation files in {str(folder)!r} are half replaced, split or convert was cut off; give that "
            "command again, it begins with what was there before."
        )


def _relative(step: Step, folder: Path) -> dict[str, str | None]:
    return {name: None if path is None else os.path.relpath(path, folder) for name, path in step.items()}


def _read_steps(folder: Path) -> list[Step]:
    try:
        steps = [
            {name: None if step[name] is None else folder / step[name] for name in ("file", "backup", "new")}
            for step in files.read_json(folder / MARK)["steps"]
        ]
        paths = [path for step in steps for path in step.values() if path is not None]
        is_ours = all(step["file"] is not None for step in steps)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / MARK} is none of ours; look at the files beside it, then remove it.") from error
    if not is_ours or not all(files.is_inside(folder.parent, path.absolute()) for path in paths):
        raise ValueError(f"{folder / MARK} is none of ours; look at the files beside it, then remove it.")
    return steps


def _backup_name(path: Path) -> Path:
    number = 1
    while (backup := path.with_name(f"{path.name}.bak{number if number > 1 else ''}")).exists():
        number += 1
    return backup
