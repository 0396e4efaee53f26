"""Is a data set sound? Reads every picture and every annotation and says all that is wrong with it.

`check_dataset` promises: what passes can be trained on. What can be wrong is listed in `data/findings.py`,
pictures are judged in `data/check_images.py`, annotation files in `data/check_annotations.py`, drawings and
the page to look at are made by `data/check_report.py`, and `data/repair.py` writes mended copies.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from instseg_jax.bands import Bands
from instseg_jax.data import check_annotations, check_images, check_numbers, coco, coco_entries, overview
from instseg_jax.data.check_annotations import CheckedFile, CheckedObject
from instseg_jax.data.check_images import PictureFacts
from instseg_jax.data.coco_entries import ImageRecord
from instseg_jax.data.examples import Layout
from instseg_jax.data.findings import Flaw, has_errors
from instseg_jax.data.split import LEFT_OUT
from instseg_jax.messages import quote
from instseg_jax.progress import Track

SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class Source:
    """The annotation file and the image folder of each split that there is."""

    root: Path
    splits: dict[str, tuple[Path, Path]]


@dataclasses.dataclass(frozen=True)
class Check:
    """All that was found out: the flaws, what can be used of each file, and what the pictures are."""

    source: Source
    flaws: list[Flaw]
    contents: dict[str, dict[str, Any]]  # the files as they are
    files: dict[str, CheckedFile]
    pictures: dict[str, dict[int, PictureFacts]]  # by split and image id
    measured: dict[str, dict[str, Any]]
    bands: Bands | None  # how the pictures are read; None for 8-bit colour
    allow_outside: bool  # pictures outside of their folder

    @property
    def passed(self) -> bool:
        """Whether nothing was found that fails the check; warnings and advice may be there."""
        return not has_errors(self.flaws)


def find_source(
    dir: str | Path, annotations: dict[str, str | Path | None], images: dict[str, str | Path | None]
) -> tuple[Source, list[Flaw]]:
    """Find both splits below a folder; a split that is not there is a flaw.

    Raises FileNotFoundError when the folder itself does not exist.
    """
    root, splits, flaws = coco.data_root(dir), {}, []
    for split in SPLITS:
        try:
            splits[split] = coco.find_split(dir, split, annotations[split], images[split])
        except FileNotFoundError as error:
            flaws.append(Flaw("missing_annotations", split, (), str(error)))
    return Source(root, splits), flaws


def check_dataset(
    source: Source,
    known_flaws: Iterable[Flaw],
    *,
    num_queries: int,
    max_instances: int,
    image_size: tuple[int, int],
    train_sizes: Sequence[tuple[int, int]],
    layout: Layout,
    bands: Bands | None,
    num_workers: int,
    progress: Track,
    pictures: dict[Path, PictureFacts],
    allow_outside: bool,
    shifted: Sequence[Flaw] | None,
) -> Check:
    """Check both splits of a data set.

    `pictures` keeps what is known about files that were looked at before (by path, added to): a second check of
    the same pictures is quick. `train_sizes` (height, width) and `layout` are those of training, `bands` too: how
    pictures are read. `num_workers` threads look at pictures at the same time. Pictures outside of their folder are
    not opened, unless `allow_outside`. `shifted` is what is known of labels of maps that are off, by a check before;
    None: they are searched for.
    """
    flaws = list(known_flaws)
    contents: dict[str, dict[str, Any]] = {}
    files: dict[str, CheckedFile] = {}
    facts_of: dict[str, dict[int, PictureFacts]] = {}
    trained: dict[str, int] = {}
    for split, (file, folder) in source.splits.items():
        try:
            contents[split] = coco_entries.read_json(file)
        except (ValueError, FileNotFoundError, RecursionError) as error:
            flaws.append(Flaw("broken_json", split, (), str(error)))
            continue
        files[split], found = check_annotations.check_file(split, contents[split])
        entries, strays = check_annotations.entries_by_image(split, contents[split], files[split])
        flaws += found + strays
        images = list(files[split].images.values())

        def look(image: ImageRecord, split: str = split, folder: Path = folder, entries: dict = entries) -> tuple:
            facts = pictures.get(folder / image.file_name) or check_images.inspect_listed(
                folder, image.file_name, bands, allow_outside=allow_outside
            )
            objects, found = check_annotations.check_objects(split, image, entries[image.id])
            gone = check_annotations.vanishing_sizes(objects, image, train_sizes, layout)
            for i, sizes in gone.items():
                id_ = objects[i].annotation.id
                at = ", ".join(f"{height}x{width}" for height, width in sizes)
                text = f"annotation {quote(id_)} of {quote(image.file_name)}: its mask has no pixel at {at}"
                found.append(Flaw("vanishing_mask", split, (id_,), text, is_of_annotation=True))
            lost = sum(len(sizes) == len(set(train_sizes)) for sizes in gone.values()) if layout.drop_empty_masks else 0
            return facts, objects, found, sum(o.is_trained for o in objects) - lost

        facts_of[split], trained[split] = {}, 0
        of_split: list[Flaw] = []
        with ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="check") as pool:
            for image, seen in zip(images, progress(pool.map(look, images), len(images)), strict=True):
                facts, objects, found, num_trained = seen
                trained[split] += num_trained
                pictures[folder / image.file_name] = facts_of[split][image.id] = facts
                files[split].objects[image.id] = objects
                of_split += check_images.find_picture_flaws(split, image, facts, folder) + found
        suspect = check_annotations.find_suspect_masks(split, of_split, sum(map(len, files[split].objects.values())))
        if suspect is not None:
            of_split = [suspect, *(flaw for flaw in of_split if flaw.code != "box_mask_mismatch")]
        flaws += of_split + _empty_flaws(split, files[split])
    if len(files) == len(SPLITS):
        flaws += check_annotations.compare_categories(files["train"], files["val"])
        flaws += check_images.find_leaks(*(_pairs(files[split], facts_of[split]) for split in SPLITS))
    if shifted is None:
        shifted = overview.find_shift_flaws(overview.find_tiles(_folders(source), contents, files, facts_of))
    flaws += shifted
    measured = {
        split: check_numbers.measure_split(file, image_size, layout.resize) | {"objects_trained": trained[split]}
        for split, file in files.items()
    }
    flaws += check_numbers.advise(
        files, measured, num_queries=num_queries, max_instances=max_instances, image_size=image_size
    )
    if not has_errors(flaws):
        flaws += _reading_flaws(source)
    return Check(source, flaws, contents, files, facts_of, measured, bands, allow_outside)


def find_map_tiles(check: Check) -> dict[str, list[overview.MapTile]]:
    """The pictures of each raster, where the set was cut from a map, and those that a split has left out."""
    found = overview.find_tiles(_folders(check.source), check.contents, check.files, check.pictures)
    left_out = [file.parent / LEFT_OUT for file, _ in check.source.splits.values()]
    for tile in overview.find_left_out(left_out[0]) if left_out and found else ():
        if tile.raster in found:
            found[tile.raster].append(tile)
    return found


def _folders(source: Source) -> dict[str, Path]:
    return {split: folder for split, (_, folder) in source.splits.items()}


def _pairs(file: CheckedFile, facts: dict[int, PictureFacts]) -> list[tuple[ImageRecord, PictureFacts]]:
    return [(image, facts[image_id]) for image_id, image in file.images.items()]


def _empty_flaws(split: str, file: CheckedFile) -> list[Flaw]:
    flaws = []
    empty = [image for image in file.images.values() if not any(map(_is_trainable, file.objects[image.id]))]
    if len(empty) == len(file.images):
        what = "there is no picture" if not file.images else f"none of its {len(file.images)} pictures has an object"
        flaws.append(Flaw("no_objects", split, (), f"{what} that can be trained on"))
    flaws += [
        Flaw("empty_image", split, (image.id,), f"image {quote(image.id)}, {quote(image.file_name)}, has no object")
        for image in empty
    ]
    return flaws


def _is_trainable(o: CheckedObject) -> bool:
    return o.is_trained and o.mask_area > 0


def _reading_flaws(source: Source) -> list[Flaw]:
    """Read the data set the way training does: the last word on whether it can start."""
    flaws = []
    for split, (file, folder) in source.splits.items():
        try:
            dataset = coco.read_coco(file, folder)
        except ValueError as error:
            flaws.append(Flaw("broken_json", split, (), str(error)))
            continue
        if not len(coco.select_trainable(dataset, keep_empty=False)):
            flaws.append(Flaw("no_objects", split, (), "no picture is left to train on"))
    return flaws
