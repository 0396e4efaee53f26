"""The verbs that prepare data: `check_dataset`, `convert`, `split`, `prepare`; they hold no logic of the rooms."""

import argparse
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from instseg_jax.bands import build_bands
from instseg_jax.cli import DEFAULT_CONFIG
from instseg_jax.commands import changed, print_next
from instseg_jax.config import check_sizes, load_config
from instseg_jax.data import check, check_report, findings, loader, repair
from instseg_jax.data.blocks import fold_blocks, split_blocks
from instseg_jax.data.convert import Conversion, convert_dataset
from instseg_jax.data.map_windows import Cutting
from instseg_jax.data.source import build_dataset
from instseg_jax.data.split import check_percentages, fold_split, split_dataset, split_images
from instseg_jax.files import write_json
from instseg_jax.messages import quote
from instseg_jax.progress import track
from instseg_jax.results.visualize import draw_instances

FIRST_CONFIG = "finetune:n"  # to begin with: from the package's weights, on any machine


def check_dataset(options: argparse.Namespace) -> int:
    """Look for everything that is wrong with a data set; 0 when it can be trained on."""
    config = load_config(options.config, options.overrides)
    workdir = pathlib.Path(options.workdir)
    try:
        result = _check_dataset(config, workdir, is_fixed=options.fix)
    except (ValueError, OSError) as error:
        failure = {"done_flag": False, "check_pass": False, "err_type": type(error).__name__, "err_msg": str(error)}
        write_json(workdir / check_report.RESULT, failure, indent=2)
        raise
    *lines, verdict = check_report.summarise(result, workdir)
    print("\n".join(lines))
    if result["check_pass"]:
        print_next("train", *_data_options(options, config.data.dir))
    elif "fixed" not in result:
        print(f"next: {changed('check_dataset', {})} --fix")
    else:
        files = [f"--config.data.{split}_annotations={file}" for split, file in result["fixed"]["files"].items()]
        verb = "train" if result["fixed"]["check_pass"] else "check_dataset"
        print_next(verb, *_data_options(options, config.data.dir), *files)
    print(verdict)  # last, as the official tool does
    return 0 if result["check_pass"] else 1


def _check_dataset(config: ConfigDict, workdir: pathlib.Path, *, is_fixed: bool) -> dict:
    data, splits = config.data, ("train", "val")
    if data.source != "folder":
        raise ValueError(f"check_dataset looks at folders; data.source is {quote(data.source)}.")
    check_sizes(data)
    known = data.scaling == "none" or data.channel_ranges is not None
    any_ranges = ConfigDict({**data.to_dict(), "channel_ranges": ((0.0, 1.0),) * data.channels})
    bands = build_bands(data if known else any_ranges)  # which ones makes no difference to what can be read
    source, flaws = check.find_source(
        _data_folder(config),
        annotations={split: data[f"{split}_annotations"] for split in splits},
        images={split: data[f"{split}_images"] for split in splits},
    )
    run = functools.partial(
        check.check_dataset,
        num_queries=config.model.num_queries,
        max_instances=data.max_instances,
        image_size=(data.image_size, data.image_size),
        train_sizes=loader.train_sizes(config),
        layout=loader.build_layout(config, data.max_instances),
        bands=bands,
        num_workers=data.num_workers,
        progress=functools.partial(_progress, "checking"),
        pictures={},
        allow_outside=bool(data.allow_outside),
    )
    checked = run(source, flaws, shifted=None)
    fixed = None
    if is_fixed:
        repaired = repair.write_repaired(checked, workdir / check_report.FOLDER / "fixed")
        again = run(repaired.source, flaws, shifted=[flaw for flaw in checked.flaws if flaw.code == "shifted_labels"])
        fixed = {
            "files": {split: str(file) for split, (file, _) in repaired.source.splits.items()},
            # Where masks were moved a person has to look: the check can't see whether they fit.
            "check_pass": bool(repaired.source.splits) and again.passed and not repaired.moved,
            "changes": repaired.changes,
            "lost": {
                split: dict(zip(("images", "of_images", "objects", "of_objects"), counts, strict=True))
                for split, counts in repaired.lost.items()
            },
            "moved": repaired.moved,
            "findings": findings.group(again.flaws),
        }
    return check_report.write_report(workdir, checked, draw_instances, fixed)


def convert(options: argparse.Namespace) -> int:
    """Annotations of other formats, or rasters and polygons, to COCO; with percentages also split into two parts."""
    config = load_config(options.config, options.overrides)
    percentages = None
    if options.train_percent is not None or options.val_percent is not None or options.group_by is not None:
        percentages = (options.train_percent, options.val_percent)
        check_percentages(*percentages)
    if options.src_dataset_type.lower() == "geo":
        target = options.save_path
        done = _convert_maps(options, percentages, config.seed)
    else:
        source = _data_folder(config)
        target = options.save_path or source
        done = convert_dataset(
            source,
            options.src_dataset_type,
            target,
            labels=options.labels,
            percentages=percentages,
            group_by=options.group_by,
            seed=config.seed,
            progress=functools.partial(_progress, "converting"),
            skip_invalid=options.skip_invalid,
        )
    for note in done.notes:
        print(f"note: {note}")
    print(f"{len(done.categories)} classes: {', '.join(done.categories)}")
    _print_parts(done.parts)
    print_next("check_dataset", *_data_options(options, target))
    return 0


def _convert_maps(options: argparse.Namespace, percentages: tuple[int, int] | None, seed: int) -> Conversion:
    for name in ("rasters", "labels", "save_path"):
        if not getattr(options, name):
            raise ValueError(
                f"--{name} is missing; --src_dataset_type=geo cuts --rasters around --labels into --save_path"
            )
    if options.group_by is not None:
        raise ValueError("--group_by is for names of pictures; pictures of a map are split by split --by=blocks.")
    from instseg_jax.data.maps import convert_maps  # needs the extra geo

    return convert_maps(
        [name for name in options.rasters.split(",") if name],
        options.labels,
        pathlib.Path(options.save_path),
        Cutting(
            tile=options.tile,
            overlap=options.overlap,
            min_visible=options.min_visible,
            empty_share=options.empty_share,
            gsd=options.gsd,
            bands=tuple(options.bands.split(",")) if options.bands else None,
            seed=seed,
        ),
        class_field=options.class_field,
        class_name=options.class_name,
        labels_crs=options.labels_crs,
        aoi=options.aoi,
        percentages=percentages,
        progress=functools.partial(_progress, "cutting"),
    )


def split(options: argparse.Namespace) -> int:
    """Deal the pictures of a data set out to training and validation anew."""
    config = load_config(options.config, options.overrides)
    parts = split_dataset(_data_folder(config), _dealing(options, config.seed))
    _print_parts(parts)
    if options.folds is not None:
        print_next("sweep", *_data_options(options, config.data.dir), f"--folds={options.folds}")
    else:
        print_next("check_dataset", *_data_options(options, config.data.dir))
    return 0


def _dealing(options: argparse.Namespace, seed: int) -> Callable[[dict], dict[str, dict]]:
    """The function that deals pictures out as the options say. Raises ValueError for some that don't go together."""
    if options.folds is None:
        check_percentages(options.train_percent, options.val_percent)
    elif options.train_percent is not None or options.val_percent is not None:
        raise ValueError("--folds deals out equal parts; leave --train_percent and --val_percent away")
    if options.by == "names":
        if options.folds is not None or options.block is not None or options.gap is not None:
            raise ValueError("--folds, --block and --gap are for --by=blocks")

        def by_names(whole: dict) -> dict[str, dict]:
            percentages = {"train_percent": options.train_percent, "val_percent": options.val_percent}
            train, val = split_images(whole, **percentages, group_by=options.group_by, seed=seed)
            return {"train": train, "val": val}

        return by_names
    if options.block is None:
        raise ValueError("--block is missing; --by=blocks needs the side of a block in metres, as --block=200m")
    if options.group_by is not None:
        raise ValueError("--group_by is for --by=names")
    ground: dict[str, Any] = {"block": options.block, "gap": options.gap or 0.0, "seed": seed}

    def by_blocks(whole: dict) -> dict[str, dict]:
        if options.folds is None:
            found = split_blocks(whole, val_share=options.val_percent / 100, **ground)
            return dict(zip(("train", "val", "left_out"), found, strict=True))
        folds = fold_blocks(whole, folds=options.folds, **ground)
        return {
            fold_split(number, part): fold[part == "val"]
            for number, fold in enumerate(folds, start=1)
            for part in ("train", "val")
        }

    return by_blocks


def prepare(options: argparse.Namespace) -> int:
    """Write a data set as TFDS, to be read with data.source=tfds."""
    config = load_config(options.config, options.overrides)
    from instseg_jax.data.tfds_builder import prepare_dataset  # importing TFDS takes a second

    datasets = {split: build_dataset(config.data, split) for split in ("train", "val")}
    folder = prepare_dataset(datasets, options.save_path)
    for name, dataset in datasets.items():
        print(f"{name}: {len(dataset)} images, {sum(map(len, dataset.annotations))} objects")
    print_next("train", *_data_options(options, folder), "--config.data.source=tfds")
    return 0


def _data_options(options: argparse.Namespace, folder: str | pathlib.Path) -> list[str]:
    """The options of a verb on the same data: another config than the default one, and the folder."""
    spec = FIRST_CONFIG if options.config == DEFAULT_CONFIG else options.config
    return [f"--config={spec}", f"--config.data.dir={folder}"]


def _print_parts(parts: dict[str, tuple[pathlib.Path, int, int]]) -> None:
    for part, (file, num_images, num_objects) in parts.items():
        print(f"{part}: {num_images} images, {num_objects} objects: {file}")


def _data_folder(config: ConfigDict) -> str:
    if not config.data.dir:
        raise ValueError("data.dir is empty; name the data set's folder with --config.data.dir=DIR")
    return config.data.dir


def _progress(text: str, items: Iterable, total: int) -> Iterable:
    return track(items, text, total)
