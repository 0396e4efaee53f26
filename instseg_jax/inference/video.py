"""A video of drawn frames and the JSON of all of them, written frame by frame beside each other."""

import json
from pathlib import Path
from typing import IO

import cv2
import numpy as np

from instseg_jax.inference.results import Result

DEFAULT_RATE = 25.0  # frames a second, of a video that does not say
CODEC = "mp4v"


class VideoFile:
    """Two files that grow: they get their names when they are complete. Not for several threads."""

    def __init__(self, source: str, video: Path | None, frames: Path | None) -> None:
        """`video` and `frames` are the files to be, or None; they have the rate of the video `source`."""
        self.source = source
        self._rate = frame_rate(source)
        self._video, self._frames = video, frames
        self._writer: cv2.VideoWriter | None = None
        self._text: IO[str] | None = None

    def add(self, result: Result, drawn: np.ndarray | None, masks_format: str) -> None:
        """Append a frame: its drawn image [h, w, 3] uint8 RGB, and its result."""
        if self._video is not None and drawn is not None:
            if self._writer is None:
                self._video.parent.mkdir(parents=True, exist_ok=True)
                height, width = drawn.shape[:2]
                fourcc = cv2.VideoWriter.fourcc(*CODEC)
                self._writer = cv2.VideoWriter(str(_aside(self._video)), fourcc, self._rate, (width, height))
                if not self._writer.isOpened():
                    raise OSError(f"can't write a video of {width} x {height} pixels to {self._video}")
            self._writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        if self._frames is not None:
            content = result.to_json(masks_format=masks_format)["res"]
            frame = {key: content[key] for key in ("page_index", "boxes", "masks")}
            if self._text is None:
                self._frames.parent.mkdir(parents=True, exist_ok=True)
                self._text = _aside(self._frames).open("w", encoding="utf-8")
                head = {"input_path": result.input_path, "size": list(result.size), "frame_rate": self._rate}
                self._text.write('{"res": ' + json.dumps(head, ensure_ascii=False)[:-1] + ', "frames": [\n')
            else:
                self._text.write(",\n")
            self._text.write(json.dumps(frame, ensure_ascii=False))

    def close(self, *, whole: bool) -> int:
        """End both files; where they are not `whole`, remove them. Returns how many there are now."""
        if self._writer is not None:
            self._writer.release()
        if self._text is not None:
            self._text.write("\n]}}\n")
            self._text.close()
        count = 0
        for path in (self._video, self._frames):
            if path is not None and _aside(path).exists():
                if whole:
                    _aside(path).replace(path)
                    count += 1
                else:
                    _aside(path).unlink()
        return count


def frame_rate(path: str | Path) -> float:
    """Frames a second that a video says it has; 25 where it does not say."""
    capture = cv2.VideoCapture(str(path))
    try:
        rate = capture.get(cv2.CAP_PROP_FPS) if capture.isOpened() else 0.0
    finally:
        capture.release()
    return rate if 0 < rate < 1000 else DEFAULT_RATE


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.part{path.suffix}")
