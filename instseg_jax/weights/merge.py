"""Merge loaded variables into a freshly initialised model, strictly: every tensor is accounted for on both sides.

Trees are {"params": ..., "batch_stats": ...}. Tensors are named here without the collection, by their path
("backbone/stem/stem1/conv/kernel"), and patterns are shell patterns on such paths ("transformer/score_head/*").
Nothing depends on the number of queries or on the input size, so both are free. The number of classes is not: rows
of the tensors in `CLASS_AXES` are copied by the name of their class.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instseg_jax.messages import MOST, quote, shorten
from instseg_jax.weights.names import flatten_tree, official_to_flax, unflatten_tree

CLASS_AXES = {
    "transformer/score_head/kernel": 1,  # [hidden_dim, K]
    "transformer/score_head/bias": 0,  # [K]
    "transformer/denoising_class_embed/embedding": 0,  # [K, hidden_dim]
}
"""The axis of each tensor that counts classes."""

STEMS = ("params/backbone/stem/stem1/conv/kernel", "params/backbone/stem/conv/kernel")
"""The first kernel [h, w, C, O] of either backbone, the only tensor that counts the channels of the pictures."""

BACKBONE_LEFT_OUT = ("fc.*", "last_conv.*", "lab.*", "*.lab.*")
"""Official names in ImageNet backbone files that the detector's backbone has no use for: the classifier, and the
learnable affine blocks of B1 and B2, which the reference implementation drops as well."""

_SIZES = {210: "mask_rtdetr_s", 300: "mask_rtdetr_m", 400: "mask_rtdetr_l", 650: "mask_rtdetr_x", 870: "mask_rtdetr_h"}
"""The official size by the number of its backbone's tensors."""

_LISTED = 5  # names of each kind shown in an error


@dataclasses.dataclass(frozen=True)
class MergeSummary:
    """What became of each tensor; every tensor of the model is in exactly one of the first three."""

    loaded: tuple[str, ...]  # taken as they are
    reshaped: tuple[str, ...]  # rows taken by class name, the others fresh
    fresh: tuple[str, ...]  # left at their initial value
    skipped: tuple[str, ...]  # in the file, not used
    copied_classes: tuple[str, ...] = ()  # classes of the model whose rows came from the file
    fresh_classes: tuple[str, ...] = ()  # classes of the model that the file does not know

    def __str__(self) -> str:
        counts = [f"{len(getattr(self, kind))} {kind}" for kind in ("loaded", "reshaped", "fresh", "skipped")]
        lines = [f"weights: {', '.join(counts)}"]
        lines += [f"  {kind}: {_list(getattr(self, kind))}" for kind in ("reshaped", "fresh", "skipped")]
        if self.reshaped:
            total = len(self.copied_classes) + len(self.fresh_classes)
            lines.append(f"  classes: {len(self.copied_classes)} of {total} by name: {_list(self.copied_classes)}")
        return "\n".join(line for line in lines if not line.endswith(": "))


def merge_variables(
    init: Mapping[str, Any],
    loaded: Mapping[str, Any],
    *,
    skip: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
    loaded_class_names: Sequence[str] | None = None,
) -> tuple[dict[str, Any], MergeSummary]:
    """Return `init` with the values of `loaded` (numpy, in the types of `init`), and what was done.

    `init` may be abstract (jax.ShapeDtypeStruct) where nothing of it stays. Tensors that match a pattern in `skip`
    keep their initial value, and those in the file are ignored. Where both lists of class names are given and differ,
    class rows are copied by name (letter case and outer blanks do not count) and stay fresh for classes that the file
    does not know.

    Raises ValueError that lists missing, unexpected and wrongly shaped tensors, or a pattern that matches nothing.
    """
    model, file = flatten_tree(init), flatten_tree(loaded)
    _check_patterns(skip, {_short(path) for path in (*model, *file)})
    wanted = {path: leaf for path, leaf in model.items() if not _matches(_short(path), skip)}
    offered = {path: leaf for path, leaf in file.items() if not _matches(_short(path), skip)}

    rows = _matching_rows(class_names, loaded_class_names)
    reshaped: list[str] = []
    if rows is not None:
        reshaped = [path for path in wanted if _short(path) in CLASS_AXES and path in offered]
        offered |= {path: _copy_rows(path, wanted[path], offered[path], rows) for path in reshaped}
    has_copied = bool(reshaped)
    for stem in STEMS:
        if _has_other_channels(stem, wanted, offered):
            offered[stem] = inflate_stem(offered[stem], wanted[stem].shape[2])
            reshaped.append(stem)
    _check_match(wanted, offered, has_class_names=rows is not None)

    merged = model | {path: np.asarray(offered[path]).astype(leaf.dtype, copy=False) for path, leaf in wanted.items()}
    copied = {row for row, _ in rows.pairs} if rows else set()
    return unflatten_tree(merged), MergeSummary(
        loaded=tuple(_short(path) for path in wanted if path not in reshaped),
        reshaped=tuple(map(_short, reshaped)),
        fresh=tuple(_short(path) for path in model if path not in wanted),
        skipped=tuple(_short(path) for path in file if path not in offered),
        copied_classes=tuple(name for row, name in enumerate(class_names or ()) if has_copied and row in copied),
        fresh_classes=tuple(name for row, name in enumerate(class_names or ()) if has_copied and row not in copied),
    )


def inflate_stem(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Make the first kernel [h, w, 3, O] one for other channels: colours keep theirs, others get the mean of the three.

    All are scaled by 3 / channels, so that a picture whose channels are alike gives what it gave before.
    """
    mean = np.repeat(kernel.mean(axis=2, keepdims=True), channels, axis=2)
    if channels > 3:
        mean[:, :, :3] = kernel
    return mean * (3 / channels)


def _has_other_channels(stem: str, wanted: Mapping[str, Any], offered: Mapping[str, Any]) -> bool:
    """Whether only the channels of the pictures differ: the file is for colours, the model is not."""
    if stem not in wanted or stem not in offered:
        return False
    model, file = wanted[stem].shape, offered[stem].shape
    return len(file) == 4 and file[2] == 3 and model[2] != 3 and (*file[:2], *file[3:]) == (*model[:2], *model[3:])


def load_backbone(init: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], MergeSummary]:
    """Return `init` with the backbone of an official state dict, and what was done; neck and transformer stay fresh.

    `state` may name its tensors with or without the prefix "backbone.", hold a classifier (`BACKBONE_LEFT_OUT`), or
    be a whole detector. Raises ValueError unless every tensor of the backbone is there.
    """
    has_prefix = any(name.startswith("backbone.") for name in state)
    names = {name: name.removeprefix("backbone.") for name in state if not has_prefix or name.startswith("backbone.")}
    used = {name: short for name, short in names.items() if not _matches(short, BACKBONE_LEFT_OUT)}
    loaded = official_to_flax({f"backbone.{short}": state[name] for name, short in used.items()})
    backbone = {name: {"backbone": tree.get("backbone", {})} for name, tree in init.items()}
    merged, summary = merge_variables(backbone, loaded)
    variables = {name: {**tree, **merged.get(name, {})} for name, tree in init.items()}
    fresh = tuple(_short(path) for path in flatten_tree(variables) if not _short(path).startswith("backbone/"))
    return variables, dataclasses.replace(summary, fresh=fresh, skipped=tuple(n for n in state if n not in used))


def is_backbone_state(state: Mapping[str, np.ndarray]) -> bool:
    """Say whether an official state dict holds a backbone alone."""
    return not any(name.startswith(("neck.", "transformer.")) for name in state)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Pairs (row of the model, row of the file) of equal class names, and the number of rows on either side."""

    pairs: tuple[tuple[int, int], ...]
    num_model: int
    num_file: int


def _matching_rows(class_names: Sequence[str] | None, loaded_class_names: Sequence[str] | None) -> _Rows | None:
    if class_names is None or loaded_class_names is None:
        return None
    wanted = [name.strip().casefold() for name in class_names]
    offered = [name.strip().casefold() for name in loaded_class_names]
    if wanted == offered:
        return None
    pairs = tuple((row, offered.index(name)) for row, name in enumerate(wanted) if name in offered)
    return _Rows(pairs, len(wanted), len(offered))


def _copy_rows(path: str, leaf: Any, value: Any, rows: _Rows) -> np.ndarray:
    """Return the initial `leaf` with the rows of `value` whose class has the same name."""
    axis = CLASS_AXES[_short(path)]
    for whose, array, count in (("model", leaf, rows.num_model), ("file", value, rows.num_file)):
        if array.shape[axis] != count:
            raise ValueError(f"{_short(path)} of the {whose} has {array.shape[axis]} classes, but {count} class names")
    others = [n for i, n in enumerate(leaf.shape) if i != axis]
    if others != [n for i, n in enumerate(value.shape) if i != axis]:
        return np.asarray(value)  # of another width as well: reported with the other wrong shapes
    if isinstance(leaf, jax.ShapeDtypeStruct):
        unknown = rows.num_model - len(rows.pairs)
        if unknown:
            raise ValueError(f"{_short(path)} has no values for {unknown} classes of the model")
        leaf = np.empty(leaf.shape, leaf.dtype)
    merged = np.moveaxis(np.array(leaf), axis, 0)
    file_rows = np.moveaxis(np.asarray(value), axis, 0)
    for row, file_row in rows.pairs:
        merged[row] = file_rows[file_row]
    return np.moveaxis(merged, 0, axis)


def _check_match(wanted: Mapping[str, Any], offered: Mapping[str, Any], *, has_class_names: bool) -> None:
    """Raise ValueError unless both sides hold the same tensors in the same shapes."""
    missing = [_short(path) for path in wanted if path not in offered]
    unexpected = [_short(path) for path in offered if path not in wanted]
    both = [(path, offered[path], leaf) for path, leaf in wanted.items() if path in offered]
    wrong = [(_short(path), f, m) for path, f, m in both if f.shape != m.shape or _is_float(f) != _is_float(m)]
    if not missing and not unexpected and not wrong:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing in the file: {_list(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} not expected by the model: {_list(unexpected)}")
    if wrong:
        shapes = [f"{path} (file {_kind(f)}, model {_kind(m)})" for path, f, m in wrong]
        parts.append(f"{len(wrong)} of another shape: {_list(shapes)}")
    hint = "name with skip=... what is to be left out"
    if not has_class_names and any(path in CLASS_AXES for path, _, _ in wrong):
        hint = "for another number of classes give the class names of both sides"
    raise ValueError(f"{_say_sizes(offered, wanted)}; {'; '.join(parts)}; {hint}")


def _say_sizes(offered: Iterable[str], wanted: Iterable[str]) -> str:
    """That weights don't fit: for another size of the model, or for something else."""
    counts = [sum(_short(path).startswith("backbone/") for path in paths) for paths in (offered, wanted)]
    if counts[0] == counts[1] or not all(counts):
        return "the weights do not fit the model"
    of_file, of_model = (_SIZES.get(count) for count in counts)
    of_file = f"of {of_file}" if of_file else "of another size"
    return f"the weights are {of_file}, the model is {of_model or 'of another size'}: each size has its own"


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _kind(array: Any) -> str:
    return f"{list(array.shape)}" if _is_float(array) else f"{list(array.shape)} {array.dtype}"


def _check_patterns(skip: Sequence[str], paths: set[str]) -> None:
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"skip pattern {quote(pattern)} matches no tensor of the model or the file")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _short(path: str) -> str:
    return path.split("/", 1)[1]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(name if len(name) <= MOST else shorten(name) for name in names[:_LISTED]) + more
