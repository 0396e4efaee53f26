"""Which runs a sweep consists of: axes of the command line, or the function `sweep(add)` of a config file.

Nothing is run here. A variant is a config that differs from the base in some fields; a run is a variant with a seed.
The same variant asked for twice, by two axes for instance, is run once.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from instseg_jax.config import find_config, load_config, load_function
from instseg_jax.messages import quote

MODES = ("one_at_a_time", "grid")
BASE = "base"  # name of the variant that changes nothing
MAX_NAME = 100  # letters of a folder's name; longer ones are cut and told apart by a hash


@dataclasses.dataclass(frozen=True)
class Axis:
    """A field that is varied, with its values."""

    field: str  # dotted
    texts: tuple[str, ...]  # the values, as on the command line


@dataclasses.dataclass(frozen=True, eq=False)  # a plan has each once
class Variant:
    """A config that differs from the base in some fields."""

    name: str  # of its runs' folders: what it changes of the base
    overrides: dict[str, str]  # all fields to set, those of the command line included
    config: ConfigDict  # with the first seed


@dataclasses.dataclass(frozen=True, eq=False)  # a plan has each once
class Run:
    """A variant with a seed, and a fold of a cross-validation: one training in one folder."""

    name: str  # of its folder
    variant: Variant
    seed: int
    overrides: dict[str, str]  # all fields to set, the seed included
    config: ConfigDict


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: one value of an axis."""

    label: str
    variants: tuple[Variant, ...]  # one; in a grid's tables of one axis all that share the value


@dataclasses.dataclass(frozen=True)
class Table:
    """A result to tell: a heading and a line for each value."""

    title: str
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs of a sweep, and what is to be told of them."""

    name: str  # of the files that tell the result
    spec: str  # of the config
    base: Variant  # not necessarily among the variants
    variants: tuple[Variant, ...]
    runs: tuple[Run, ...]  # seed by seed, so that every variant has a result early
    tables: tuple[Table, ...]
    mode: str
    num_folds: int = 0  # of a cross-validation; 0: there is none

    def runs_of(self, row: Row) -> list[Run]:
        """The runs, of all seeds, that a line of a table sums up."""
        return [run for run in self.runs if run.variant in row.variants]


def build_plan(
    spec: str,
    overrides: Mapping[str, str],
    axes: Sequence[str],
    *,
    mode: str = MODES[0],
    num_seeds: int = 1,
    folds: Sequence[Mapping[str, str]] = (),
    fixed_fields: Sequence[str] = (),
) -> Plan:
    """Work out the runs of a sweep.

    Args:
      spec: FILE[:ARGUMENT] of the config.
      overrides: fields set for all runs, dotted field to text.
      axes: `FIELD=VALUE,VALUE,...` each; commas inside brackets or quotes part nothing. None: the file's `sweep(add)`,
        which calls `add({field: value, ...}, name=...)` for each variant, `add({})` for the base itself.
      mode: one_at_a_time varies each axis with the other fields as the config has them, grid takes all combinations.
      num_seeds: runs of a variant, with the config's seed and the ones after it.
      folds: of a cross-validation the fields that name the splits of each; all runs are done on every one.
      fixed_fields: fields, or sections, that must not be varied because they change nothing of what is computed.

    Raises: ValueError that names the axis, field or value that can't be, or that stands there twice.
    """
    if mode not in MODES:
        raise ValueError(f"--mode is {quote(mode)}, it must be one of {', '.join(MODES)}")
    if num_seeds < 1:
        raise ValueError(f"--seeds is {num_seeds}, it must be at least 1")
    maker = _VariantMaker(spec, dict(overrides), fixed_fields)
    parsed = [parse_axis(axis) for axis in axes]
    if not parsed and folds and load_function(spec, "sweep") is None:  # the config alone, on each fold
        name = "folds"
        tables: tuple[Table, ...] = (Table(name, (Row(BASE, (maker.make({}, "--folds"),)),)),)
    elif parsed:
        name = "sweep"
        tables = _tables_of_axes(maker, parsed, mode)
    else:
        name = find_config(spec.partition(":")[0]).stem
        tables = (_table_of_function(maker, spec, name),)
    variants = maker.made()
    seeds = range(maker.base.config.seed, maker.base.config.seed + num_seeds)
    numbered: list[tuple[int | None, Mapping[str, str]]] = [*enumerate(folds, start=1)] or [(None, {})]
    runs = tuple(
        maker.make_run(variant, seed, number, fold)
        for number, fold in numbered
        for seed in seeds
        for variant in variants
    )
    return Plan(name, spec, maker.base, variants, runs, tables, mode if parsed else MODES[0], len(folds))


def parse_axis(text: str) -> Axis:
    """Part `FIELD=VALUE,VALUE,...`; commas inside brackets or quotes belong to a value.

    Raises: ValueError for an axis without field or values, or with a bracket that is not closed.
    """
    field, equals, values = text.partition("=")
    if not field or not equals:
        raise ValueError(f"--axis {quote(text)} must be FIELD=VALUE,VALUE,...")
    texts = [part.strip() for part in _split_outside_brackets(values, text)]
    if not all(texts):
        raise ValueError(f"--axis {quote(text)} has an empty value; write {field}=VALUE,VALUE,...")
    return Axis(field.removeprefix("config."), tuple(texts))


def _split_outside_brackets(values: str, axis: str) -> list[str]:
    parts, depth, opened = [""], 0, ""
    for letter in values:
        if opened:
            opened = "" if letter == opened else opened
        elif letter in "'\"":
            opened = letter
        depth += (letter in "([{") - (letter in ")]}") if not opened else 0
        if letter == "," and depth == 0 and not opened:
            parts.append("")
        else:
            parts[-1] += letter
    if depth or opened:
        raise ValueError(f"--axis {quote(axis)} has a bracket or quote without its partner")
    return parts


class _VariantMaker:
    """Makes variants of one base, each once."""

    def __init__(self, spec: str, overrides: dict[str, str], fixed_fields: Sequence[str]):
        self._spec, self._overrides, self._fixed = spec, overrides, fixed_fields
        self._made: dict[str, Variant] = {}
        self.base = Variant(BASE, overrides, load_config(spec, overrides))
        self._names = {BASE: _identity(self.base.config)}

    def made(self) -> tuple[Variant, ...]:
        return tuple(self._made.values())

    def load(self, changes: Mapping[str, str], where: str) -> ConfigDict:
        """The config with these fields set, dotted field to text; `where` begins the message of an error."""
        for field in changes:
            if field == "seed":
                raise ValueError(f"{where}: config.seed is varied by --seeds=N")
            if any(field == fixed or field.startswith(f"{fixed}.") for fixed in self._fixed):
                raise ValueError(f"{where}: config.{field} changes nothing of what is computed, so it can't be varied")
        try:
            return load_config(self._spec, self._overrides | dict(changes))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def make(self, changes: Mapping[str, str], where: str) -> Variant:
        """The variant with these fields set; the same object for the same values."""
        config = self.load(changes, where)
        differing = {
            field: text
            for field, text in changes.items()
            if get_field(config, field) != get_field(self.base.config, field)
        }
        identity = _identity(config)
        if identity not in self._made:
            name = self._name(config, differing, identity)
            self._made[identity] = Variant(name, self._overrides | differing, config)
        return self._made[identity]

    def make_run(self, variant: Variant, seed: int, number: int | None, fold: Mapping[str, str]) -> Run:
        overrides = variant.overrides | dict(fold) | {"seed": str(seed)}
        name = f"{variant.name},seed={seed}" if number is None else f"{variant.name},fold={number},seed={seed}"
        return Run(name, variant, seed, overrides, load_config(self._spec, overrides))

    def _name(self, config: ConfigDict, differing: Mapping[str, str], identity: str) -> str:
        last = [field.rpartition(".")[2] for field in differing]
        parts = []
        for field, short in zip(differing, last, strict=True):
            shown = short if last.count(short) == 1 else field
            value = re.sub(r"[^A-Za-z0-9.+-]+", "_", _shown(get_field(config, field))).strip("_")
            parts.append(f"{shown}={value}")
        name = ",".join(parts) or BASE
        if len(name) > MAX_NAME or self._names.get(name, identity) != identity:
            name = f"{name[:MAX_NAME]},{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        self._names[name] = identity
        return name


def _tables_of_axes(maker: _VariantMaker, axes: Sequence[Axis], mode: str) -> tuple[Table, ...]:
    for axis in axes:
        if [other.field for other in axes].count(axis.field) > 1:
            raise ValueError(f"--axis {axis.field} is given twice; write all its values in one")
        _check_values(maker, axis)
    if mode == "one_at_a_time":
        return tuple(
            Table(axis.field, tuple(Row(text, (maker.make({axis.field: text}, _option(axis)),)) for text in axis.texts))
            for axis in axes
        )
    combinations = {}
    for texts in itertools.product(*(axis.texts for axis in axes)):
        changes = {axis.field: text for axis, text in zip(axes, texts, strict=True)}
        combinations[texts] = maker.make(changes, f"--axis {', '.join(changes)}")
    tables = []
    for i, axis in enumerate(axes):
        rows = [
            Row(text, tuple(variant for texts, variant in combinations.items() if texts[i] == text))
            for text in axis.texts
        ]
        tables.append(Table(axis.field, tuple(rows)))
    if len(axes) > 1:
        rows = [
            Row(", ".join(f"{axis.field}={text}" for axis, text in zip(axes, texts, strict=True)), (variant,))
            for texts, variant in combinations.items()
        ]
        tables.append(Table("all combinations", tuple(rows)))
    return tuple(tables)


def _check_values(maker: _VariantMaker, axis: Axis) -> None:
    """Raise ValueError for an unknown field, a value of another type, or one that stands there twice."""
    seen: dict[str, str] = {}
    for text in axis.texts:
        value = repr(get_field(maker.load({axis.field: text}, _option(axis)), axis.field))
        if value in seen:
            raise ValueError(f"{_option(axis)}: the value {text} appears twice (as {seen[value]} and {text})")
        seen[value] = text


def _option(axis: Axis) -> str:
    return f"--axis {axis.field}={','.join(axis.texts)}"


def _table_of_function(maker: _VariantMaker, spec: str, name: str) -> Table:
    function: Callable | None = load_function(spec, "sweep")
    if function is None:
        raise ValueError(f"there is nothing to vary: give --axis FIELD=VALUE,VALUE or define sweep(add) in {spec}")
    rows: list[Row] = []

    def add(changes: Mapping[str, object], name: str | None = None) -> None:
        where = f"sweep(add) of {spec}"
        texts = {field: value if isinstance(value, str) else repr(value) for field, value in changes.items()}
        variant = maker.make(texts, where)
        for field, value in changes.items():
            kept = get_field(variant.config, field)
            if kept != value:
                raise ValueError(f"{where}: config.{field} can't be {quote(value)}, it becomes {quote(kept)}")
        label = name or ", ".join(f"{field}={text}" for field, text in texts.items()) or BASE
        if any(variant in row.variants or label == row.label for row in rows):
            raise ValueError(f"{where}: the variant {label} appears twice")
        rows.append(Row(label, (variant,)))

    function(add)
    if not rows:
        raise ValueError(f"sweep(add) of {spec} adds no variant")
    return Table(name, tuple(rows))


def get_field(config: ConfigDict, field: str) -> object:
    """The value of a dotted field."""
    node: object = config
    for part in field.split("."):
        node = node[part]  # type: ignore[index]
    return node


def _shown(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _identity(config: ConfigDict) -> str:
    return config.to_json_best_effort(sort_keys=True)
