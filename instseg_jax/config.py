"""Reads config files and overrides: `--config=FILE[:ARGUMENT] --config.section.field=value`.

A config file is Python with `get_config(argument)` that returns an ml_collections ConfigDict. Files beside it,
and in the folders above it up to `configs`, can be imported by name.
"""

import ast
import difflib
import functools
import importlib.util
import math
import operator
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from instseg_jax.messages import quote, shorten

PACKAGED = pathlib.Path(__file__).parent / "configs"  # where a wheel has them
CHECKOUT = pathlib.Path(__file__).parent.parent / "configs"
SIZE_MULTIPLE = 32  # of the sides of the network's input, in pixels: its coarsest stride


def load_config(spec: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Run a config file and change fields of what it gives.

    Args:
      spec: `FILE` or `FILE:ARGUMENT`, FILE a path or the name of one of the project's configs: `finetune:n`. A file
        `configs/NAME.py` that is not below the current folder is taken from the installation.
      overrides: dotted field -> value, or its text as on the command line. Where data.image_size is given and
        data.train_sizes is not, these are scaled alike.

    Returns: the config, locked: an unknown field cannot be set or read.

    Raises: FileNotFoundError, or ValueError that names the field and the nearest known one.
    """
    name, _, argument = os.fspath(spec).partition(":")
    path = find_config(name)
    get_config = _load_module(path).get_config
    config = get_config(argument) if argument else get_config()
    overrides = overrides or {}
    size_before = config.data.image_size if "data.image_size" in overrides and "data" in config else None
    for field, value in overrides.items():
        override(config, field, value)
    if size_before is not None and "data.train_sizes" not in overrides:
        _scale_train_sizes(config.data, size_before)
    return config.lock()


def as_config(config: ConfigDict | str | os.PathLike[str]) -> ConfigDict:
    """The config itself, or that of the name or path that is given for it."""
    return load_config(config) if isinstance(config, str | os.PathLike) else config


def check_sizes(data: ConfigDict, fields: Sequence[str] = ("image_size", "train_sizes")) -> None:
    """Raise ValueError that names the field and the nearest right values, for sizes that the network can't take.

    `data` is a config's section; a size is a number of pixels, or a pair (height, width).
    """
    multiple = math.lcm(SIZE_MULTIPLE, max(1, data.mask_stride))
    for field in fields:
        sizes = data.train_sizes if field == "train_sizes" else (data.image_size,)
        if not sizes:
            raise ValueError(f"data.{field} is empty, it must name at least one size in pixels")
        for size in sizes:
            sides = tuple(size) if isinstance(size, list | tuple) else (size,)
            if len(sides) not in (1, 2) or not all(type(side) is int for side in sides):
                raise ValueError(f"data.{field} has {quote(size)}, a size must be a whole number of pixels")
            for side in sides:
                check_side(
                    "a size in data.train_sizes" if field == "train_sizes" else "data.image_size", side, multiple
                )


def check_side(name: str, side: int, multiple: int = SIZE_MULTIPLE) -> None:
    """Raise ValueError, with the nearest right values, for a side of the network's input that is no multiple."""
    if side >= 1 and side % multiple == 0:
        return
    below = max(side, 0) // multiple * multiple
    nearest = f"{below} and {below + multiple} are" if below else f"{multiple} is"
    raise ValueError(f"{name} is {side}, it must be a multiple of {multiple} pixels; {nearest} nearest")


def _scale_train_sizes(data: ConfigDict, size_before: int) -> None:
    """Keep the ratio of the training sizes to data.image_size, in multiples of what the network takes."""
    if not all(isinstance(size, int) for size in (size_before, data.image_size, *data.train_sizes)):
        return  # pairs: no one ratio
    ratio = data.image_size / size_before / SIZE_MULTIPLE
    data.train_sizes = tuple(max(1, round(size * ratio)) * SIZE_MULTIPLE for size in data.train_sizes)


def load_function(spec: str, name: str) -> Callable | None:
    """Another function of the config file that `spec` names, such as `sweep`; None where it has none."""
    return getattr(_load_module(find_config(spec.partition(":")[0])), name, None)


def add_missing_fields(config: ConfigDict, defaults: ConfigDict) -> ConfigDict:
    """Give `config`, in place, the fields of `defaults` that it lacks: a checkpoint may be older than a field."""
    with config.unlocked():
        for name, value in defaults.items():
            if name not in config:
                config[name] = value
            elif isinstance(value, ConfigDict) and isinstance(config[name], ConfigDict):
                add_missing_fields(config[name], value)
    return config


def find_config(name: str) -> pathlib.Path:
    """Return the config file that `name` means: that path, else a file of this name in the project's `configs`.

    Without its `.py` a name is one of the project's first, and a path only after that.

    Raises: FileNotFoundError that lists the files of the project.
    """
    path = pathlib.Path(name)
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    candidates = [path, *(root.joinpath(*parts) for root in (CHECKOUT, PACKAGED))]
    if name and path.suffix != ".py":
        whole = path.with_name(f"{path.name}.py")
        candidates += [*(root.joinpath(*parts[:-1], whole.name) for root in (CHECKOUT, PACKAGED)), whole]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    known = sorted(p.stem for root in (CHECKOUT, PACKAGED) if root.is_dir() for p in root.glob("*.py"))
    near = difflib.get_close_matches(path.stem, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ";"
    raise FileNotFoundError(
        f"there is no config file {quote(name)}{hint} The project has configs/{{{','.join(known)}}}.py"
    )


def _load_module(path: pathlib.Path):
    """Import a file by path, its neighbours importable while it runs."""
    folders = [str(path.parent)]
    for parent in path.parents:
        if str(parent) not in folders:
            folders.append(str(parent))
        if parent.name == "configs":
            break
    else:
        folders = folders[:1]
    spec = importlib.util.spec_from_file_location(f"instseg_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{str(path)!r} is no config: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    before, known = list(sys.path), set(sys.modules)
    sys.path[:0] = folders
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - known:  # neighbours of one config must not pass for those of the next
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and str(pathlib.Path(origin).parent) in folders:
                del sys.modules[name]
    return module


def override(config: ConfigDict, field: str, text: Any) -> None:
    """Set a dotted field from text: numbers, True/False/None, tuples and names as in Python, else a string.

    What is no text is taken as the value itself.

    Raises: ValueError when the field is unknown or the value has another type than the field.
    """
    node, parts = config, field.split(".")
    for depth, part in enumerate(parts):
        known = list(node.keys()) if isinstance(node, ConfigDict) else []
        if part not in known:
            raise ValueError(_unknown_field(config, field, ".".join(parts[:depth]), part, known))
        if depth < len(parts) - 1:
            node = node[part]
    old = node[parts[-1]]
    if isinstance(old, ConfigDict):
        raise ValueError(f"config.{field} is a section with the fields {', '.join(old.keys())}; set one of them")
    value = _parse(text, old) if isinstance(text, str) else _fitted(text, old)
    try:
        with node.unlocked():
            node[parts[-1]] = value
    except (TypeError, ValueError) as error:
        expected = node.get_type(parts[-1]).__name__
        raise ValueError(f"config.{field}={shorten(text)}: {quote(text)} is not of type {expected}") from error


def _unknown_field(config: ConfigDict, field: str, section: str, part: str, known: list[str]) -> str:
    where = f"config.{section}" if section else "config"
    everywhere = list_fields(config)
    same_name = [name for name in everywhere if name.split(".")[-1] == field.split(".")[-1]]
    near = difflib.get_close_matches(part, known, 1, 0.5)
    nearest = [f"{section}.{near[0]}".lstrip(".")] if near else same_name
    nearest = nearest or difflib.get_close_matches(field, everywhere, 1, 0.0)
    hint = f"; did you mean config.{nearest[0]}?" if nearest else ""
    return f"unknown field config.{shorten(field)}: {where} has no {quote(part)}{hint}"


def list_fields(config: ConfigDict, prefix: str = "") -> list[str]:
    """Every field of a config, dotted, by the alphabet."""
    names = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        names += list_fields(value, f"{name}.") if isinstance(value, ConfigDict) else [name]
    return names


def field_values(config: ConfigDict) -> dict[str, Any]:
    """Every field of a config, dotted, with its value."""
    return {name: functools.reduce(operator.getitem, name.split("."), config) for name in list_fields(config)}


def _parse(text: str, old: object) -> object:
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
        return tuple(text.split(",")) if value == text and isinstance(old, tuple) else value
    return _fitted(value, old)


def _fitted(value: Any, old: object) -> Any:
    """The value in the type of the field's present one, where Python has several for the same thing."""
    if isinstance(old, tuple) and value is not None and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return value


def find_fields(spec: str, name: str) -> tuple[list[str], list[str]]:
    """Fields of a config with the name (epochs, batch-size, data.dir; data for data.dir), and with nearly this one."""
    wanted = name.replace("-", "_")
    try:
        fields = list_fields(load_config(spec))
    except (ValueError, OSError):  # the config itself is wrong: that is told once the options are right
        return [], []
    exact = [field for field in fields if wanted in (field, field.rpartition(".")[2])]
    exact = exact or [field for field in fields if field in (f"{wanted}.dir", f"{wanted}.name")]
    near = difflib.get_close_matches(wanted, {field.rpartition(".")[2] for field in fields}, 1, 0.75)
    return exact, [field for field in fields if field.rpartition(".")[2] in near]
