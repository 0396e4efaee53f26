"""Results to files, in every format that was asked for, while the next ones are still being found.

The forms themselves are in `results.py`, `formats.py` and `geo.py`; this file names the files and keeps the count.
"""

import contextlib
import dataclasses
import itertools
import os
import threading
from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from instseg_jax.files import check_seal, read_json, seal, write_json, write_text
from instseg_jax.geo import georeference
from instseg_jax.geo.layer_files import require_extra
from instseg_jax.images import is_video
from instseg_jax.results.coco_file import CocoFile
from instseg_jax.results.label_tools import FILES as LABEL_FILES
from instseg_jax.results.label_tools import LabelFile, label_studio_config
from instseg_jax.results.large import LargeResult
from instseg_jax.results.result import Result
from instseg_jax.results.video import VideoFile

FORMATS = ("img", "json", "coco", "labelme", "yolo", "label_studio", "cvat", "geojson", "gpkg")
COCO_FILE = "coco.json"
SHARED = {"coco": COCO_FILE, **LABEL_FILES}  # formats that have one file of everything
THREADS = 2
PENDING = 4  # results that are being written: they hold their images


@dataclasses.dataclass
class Summary:
    """What was saved."""

    images: int = 0
    frames: int = 0  # of videos, counted among the images
    instances: int = 0
    files: int = 0
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (input, reason)
    renamed: int = 0  # inputs whose files got a number, since a person's file has their name


def check_formats(formats: Iterable[str]) -> tuple[str, ...]:
    """The formats, without blanks. Raises ValueError for an unknown one, for none, and where an extra is missing."""
    names = tuple(name.strip() for name in formats if name.strip())
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise ValueError(f"formats must be some of {','.join(FORMATS)}, got {','.join(unknown) or 'none'}")
    if "gpkg" in names:
        require_extra("The format gpkg")
    return names


def save_results(
    results: Iterable[Result | LargeResult],
    folder: str | Path,
    *,
    formats: Collection[str],
    masks_format: str = "rle",
    overwrite: bool = False,
) -> Summary:
    """Write each result into `folder` as it comes; return what was saved.

    img: `{stem}_res{suffix}`, of a video one video. json: `{stem}_res.json`, of a video one with all frames. coco: one
    `coco.json` of everything. labelme: `{stem}.json`. yolo: `{stem}.txt`. label_studio, cvat: one file of everything
    but frames of videos, `label_studio.json` with the labelling interface beside it, and `cvat.xml`. geojson, gpkg:
    `{stem}_res.geojson`, `.gpkg`.
    No file of one input replaces that of another: inputs whose files would share a name get numbers, `a_res.json`,
    `a_2_res.json`. LabelMe and YOLO files beside their picture that are not of an earlier run are a person's, and stay
    unless `overwrite`. Failed results are counted, not written; one that can't be written counts as failed.
    """
    formats = check_formats(formats)
    folder = Path(folder)
    saver = _Saver(folder, formats, masks_format, overwrite)
    summary = Summary()
    pending: deque = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="save") as pool, contextlib.ExitStack() as open_files:
        open_files.enter_context(saver)
        coco = open_files.enter_context(CocoFile(folder / COCO_FILE)) if "coco" in formats else None
        tools = [open_files.enter_context(LabelFile(name, folder)) for name in LABEL_FILES if name in formats]
        for result in results:
            if isinstance(result, LargeResult):
                summary.images += 1
                summary.instances += len(result)
                saver.save_large(result, saver.stem_of(result.head))
                if coco is not None:
                    coco.add(result)
                continue
            if result.error is not None:
                summary.failed.append((result.input_path, result.error))
                continue
            summary.images += 1
            summary.frames += result.page_index is not None
            summary.instances += len(result)
            if coco is not None:
                coco.add(result)
            if tools and result.page_index is not None:
                summary.failed.append((result.input_path, "label_studio and cvat take pictures, and no frames"))
            else:
                for tool in tools:
                    tool.add(result)
            if "label_studio" in formats and summary.images == 1:
                write_text(folder / "label_studio_config.xml", label_studio_config(result.class_names))
            pending.append(pool.submit(saver.save, result, saver.stem_of(result)))
            while len(pending) > PENDING:
                saver.finish(*pending.popleft().result())
        while pending:
            saver.finish(*pending.popleft().result())
    summary.files = saver.files + sum(name in SHARED for name in formats)
    summary.failed += saver.failed
    summary.renamed = saver.renamed
    return summary


class _Saver:
    """Writes files of results: `save` from several threads, `finish` in the order of the results."""

    def __init__(self, folder: Path, formats: Collection[str], masks_format: str, overwrite: bool) -> None:
        self.folder, self.formats, self.masks_format, self.overwrite = folder, formats, masks_format, overwrite
        self.files = self.renamed = 0
        self.failed: list[tuple[str, str]] = []
        self._taken = {
            SHARED[name] for name in formats if name in SHARED
        }  # names of files of this run, in small letters
        self._count = threading.Lock()
        self._video: VideoFile | None = None
        self._video_stem = ""
        self._of_video: tuple[str, str, int] | None = None  # its path, the stem of its files, the last frame

    def __enter__(self) -> "_Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._close_video(whole=kind is None)

    def stem_of(self, result: Result) -> str:
        """How the files of a result begin, with a number where they would replace files of another input."""
        if result.page_index is None or not is_video(result.input_path):
            return self._free_stem(result, result.stem, [self._name_of(name, result) for name in self.formats])
        known = self._of_video
        is_next = known is not None and known[0] == result.input_path and known[2] < result.page_index
        if known is None or not is_next:  # another video, or the same once more
            names = [
                f"{{}}_res{suffix}" for name, suffix in (("img", ".mp4"), ("json", ".json")) if name in self.formats
            ]
            names += [self._name_of(name, result) for name in self.formats if name not in ("img", "json")]
            stem = self._free_stem(result, Path(result.name).stem, names)
        else:
            stem = known[1]
        self._of_video = (result.input_path, stem, result.page_index)
        return f"{stem}_{result.page_index}"

    def _free_stem(self, result: Result, wanted: str, names: list[str]) -> str:
        is_renamed = False
        for number in itertools.count(1):
            stem = wanted if number == 1 else f"{wanted}_{number}"
            files = [name.format(stem) for name in names if name]
            if any(file.casefold() in self._taken for file in files):
                continue
            if not self.overwrite and any(self._is_a_persons(self.folder / file, result) for file in files):
                is_renamed = True
                continue
            self._taken.update(file.casefold() for file in files)
            self.renamed += is_renamed
            return stem
        raise AssertionError

    def _name_of(self, name: str, result: Result) -> str:
        """The file of a format, with {} for the stem; "" where all results share one."""
        own = {"img": f"{{}}_res{result.image_suffix}", "labelme": "{}.json", "yolo": "{}.txt"} | dict.fromkeys(
            SHARED, ""
        )
        return own.get(name, f"{{}}_res.{name}")

    def _is_a_persons(self, file: Path, result: Result) -> bool:
        """Whether a label file that lies beside its picture was made by hand, or by another tool."""
        if file.suffix not in (".json", ".txt") or file.stem.endswith("_res") or not file.is_file():
            return False
        if Path(result.input_path).absolute().parent != file.absolute().parent:
            return False
        if file.suffix == ".txt":
            return file.read_bytes() != result.to_yolo().encode()
        try:
            check_seal(read_json(file), file, is_sealed=True)
        except (ValueError, AttributeError):  # another tool's, or ours corrected by hand
            return True
        return False

    def save(self, result: Result, stem: str) -> tuple[Result, str, np.ndarray | None]:
        """Write the files of one result. A frame of a video is drawn and given back for `finish`."""
        is_frame = result.page_index is not None and is_video(result.input_path)
        drawn = np.asarray(result.img["res"]) if is_frame and "img" in self.formats else None
        for name in self.formats:
            if name in SHARED or (is_frame and name in ("img", "json")):
                continue
            try:
                self._write(name, result, stem)
            except (OSError, ValueError, RuntimeError) as error:  # one name, one CRS must not end the run
                with self._count:
                    self.failed.append((result.input_path, f"{name}: {error}"))
                continue
            with self._count:
                self.files += 1
        return result, stem, drawn

    def save_large(self, result: LargeResult, stem: str) -> None:
        """Write the files of a result that is on the disk."""
        for name in self.formats:
            if name == "coco":  # written meanwhile
                continue
            try:
                result.save(name, self.folder, stem, self.masks_format)
                self.files += 1
            except (OSError, ValueError, RuntimeError) as error:
                self.failed.append((result.input_path, f"{name}: {error}"))

    def finish(self, result: Result, stem: str, drawn: np.ndarray | None) -> None:
        """Add a frame to its video; called in order."""
        if result.page_index is None or not is_video(result.input_path):
            return
        stem = stem.removesuffix(f"_{result.page_index}")
        if self._video is None or self._video_stem != stem:
            self._close_video(whole=True)
            self._video_stem = stem
            self._video = VideoFile(
                result.input_path,
                self.folder / f"{stem}_res.mp4" if "img" in self.formats else None,
                self.folder / f"{stem}_res.json" if "json" in self.formats else None,
            )
        self._video.add(result, drawn, self.masks_format)

    def _close_video(self, *, whole: bool) -> None:
        if self._video is not None:
            self.files += self._video.close(whole=whole)
            self._video = None

    def _write(self, name: str, result: Result, stem: str) -> None:
        folder = self.folder
        if name == "img":
            result.save_to_img(folder / f"{stem}_res{result.image_suffix}")
        elif name == "json":
            result.save_to_json(folder / f"{stem}_res.json", masks_format=self.masks_format)
        elif name == "labelme":
            picture = Path(result.input_path)
            where = os.path.relpath(picture.absolute(), folder.absolute()) if picture.exists() else result.name
            content = result.to_labelme(image_path=Path(where).as_posix())
            write_json(folder / f"{stem}.json", seal(content), indent=2)
        elif name == "yolo":
            write_text(folder / f"{stem}.txt", result.to_yolo())
        elif name == "geojson":
            georeference.write_geojson(folder / f"{stem}_res.geojson", result)
        else:
            georeference.write_geopackage(folder / f"{stem}_res.gpkg", result)
