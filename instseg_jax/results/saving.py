"""Results to files, in every format that was asked for, while the next ones are still being found.

The forms themselves are in `results.py`, `formats.py` and `geo.py`; this file names the files and keeps the count.
"""

import dataclasses
import itertools
import os
import threading
from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from instseg_jax.files import write_json, write_text
from instseg_jax.geo import georeference
from instseg_jax.images import is_video
from instseg_jax.results.formats import to_coco_dataset
from instseg_jax.results.result import Result
from instseg_jax.results.video import VideoFile

FORMATS = ("img", "json", "coco", "labelme", "yolo", "geojson", "gpkg")
COCO_FILE = "coco.json"
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


def check_formats(formats: Iterable[str]) -> tuple[str, ...]:
    """The formats, without blanks. Raises ValueError for an unknown one, or none."""
    names = tuple(name.strip() for name in formats if name.strip())
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise ValueError(f"formats must be some of {','.join(FORMATS)}, got {','.join(unknown) or 'none'}")
    return names


def save_results(
    results: Iterable[Result], folder: str | Path, *, formats: Collection[str], masks_format: str = "rle"
) -> Summary:
    """Write each result into `folder` as it comes; return what was saved.

    img: `{stem}_res{suffix}`, of a video one video. json: `{stem}_res.json`, of a video one with all frames. coco: one
    `coco.json` of everything. labelme: `{stem}.json`. yolo: `{stem}.txt`. geojson, gpkg: `{stem}_res.geojson`, `.gpkg`.
    Inputs that share a name get numbers: `a_res.json`, `a_2_res.json`. Failed results are counted, not written.
    """
    formats = check_formats(formats)
    folder = Path(folder)
    saver = _Saver(folder, formats, masks_format)
    summary = Summary()
    kept: list[Result] = []
    pending: deque = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="save") as pool, saver:
        for result in results:
            if result.error is not None:
                summary.failed.append((result.input_path, result.error))
                continue
            summary.images += 1
            summary.frames += result.page_index is not None
            summary.instances += len(result)
            if "coco" in formats:
                kept.append(dataclasses.replace(result, image=None))
            pending.append(pool.submit(saver.save, result, saver.stem_of(result)))
            while len(pending) > PENDING:
                saver.finish(*pending.popleft().result())
        while pending:
            saver.finish(*pending.popleft().result())
    if "coco" in formats:
        write_json(folder / COCO_FILE, to_coco_dataset(kept))
    summary.files = saver.files + ("coco" in formats)
    return summary


class _Saver:
    """Writes files of results: `save` from several threads, `finish` in the order of the results."""

    def __init__(self, folder: Path, formats: Collection[str], masks_format: str) -> None:
        self.folder, self.formats, self.masks_format = folder, formats, masks_format
        self.files = 0
        self._stems: dict[tuple[str, int | None], str] = {}
        self._taken: set[str] = set()
        self._count = threading.Lock()
        self._video: VideoFile | None = None

    def __enter__(self) -> "_Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._close_video(whole=kind is None)

    def stem_of(self, result: Result) -> str:
        """The result's stem, with a number where another input of this run has the same."""
        key = (result.input_path, result.page_index)
        if key not in self._stems or not is_video(result.input_path):
            candidates = itertools.chain([result.stem], (f"{result.stem}_{n}" for n in itertools.count(2)))
            self._stems[key] = next(stem for stem in candidates if stem not in self._taken)
            self._taken.add(self._stems[key])
        return self._stems[key]

    def save(self, result: Result, stem: str) -> tuple[Result, np.ndarray | None]:
        """Write the files of one result. A frame of a video is drawn and given back for `finish`."""
        is_frame = result.page_index is not None and is_video(result.input_path)
        drawn = np.asarray(result.img["res"]) if is_frame and "img" in self.formats else None
        written = 0
        for name in self.formats:
            if name == "coco" or (is_frame and name in ("img", "json")):
                continue
            self._write(name, result, stem)
            written += 1
        with self._count:
            self.files += written
        return result, drawn

    def finish(self, result: Result, drawn: np.ndarray | None) -> None:
        """Add a frame to its video; called in order."""
        if result.page_index is None or not is_video(result.input_path):
            return
        if self._video is None or self._video.source != result.input_path:
            self._close_video(whole=True)
            stem = Path(result.name).stem
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
            write_json(folder / f"{stem}.json", result.to_labelme(image_path=Path(where).as_posix()), indent=2)
        elif name == "yolo":
            write_text(folder / f"{stem}.txt", result.to_yolo())
        elif name == "geojson":
            georeference.write_geojson(folder / f"{stem}_res.geojson", result)
        else:
            georeference.write_geopackage(folder / f"{stem}_res.gpkg", result)
