"""A video of drawn frames and the JSON of all of them, written frame by frame beside each other.

Videos are H.264, which browsers play, where PyAV is installed (extra `video`): the wheels of OpenCV have no encoder
for it. Without PyAV they are MPEG-4 Part 2, which players play but browsers do not. A frame is shown when the source
shows it, at a variable rate too (phones, screen recordings).
"""

import contextlib
import json
import logging
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Protocol

import cv2
import numpy as np

from instseg_jax.files import check_regular
from instseg_jax.results.result import Result

DEFAULT_RATE = 25.0  # frames a second, of a video that does not say
CODEC = "mp4v"
TICKS = 90_000  # a second, of times in a video
QUALITY = {"preset": "veryfast", "crf": "20"}  # of x264: hardly told from the drawn frames, 6 ms a frame of 640 x 480

log = logging.getLogger(__name__)


class _Writer(Protocol):
    def write(self, drawn: np.ndarray, time: float) -> None: ...

    def close(self) -> None: ...


class VideoFile:
    """Two files that grow: they get their names when they are complete. Not for several threads."""

    def __init__(self, source: str, video: Path | None, frames: Path | None) -> None:
        """`video` and `frames` are the files to be, or None; they have the rate of the video `source`."""
        self.source = source
        self._rate = frame_rate(source)
        self._clock = _Clock(source, self._rate)
        self._video, self._frames = video, frames
        self._writer: _Writer | None = None
        self._text: IO[str] | None = None

    def add(self, result: Result, drawn: np.ndarray | None, masks_format: str) -> None:
        """Append a frame: its drawn image [h, w, 3] uint8 RGB, and its result. Frames come in order."""
        time = self._clock.time_of(result.page_index)
        if self._video is not None and drawn is not None:
            if self._writer is None:
                self._video.parent.mkdir(parents=True, exist_ok=True)
                self._writer = _open_writer(_aside(self._video), self._rate, drawn.shape[:2])
            self._writer.write(drawn, time)
        if self._frames is not None:
            content = result.to_json(masks_format=masks_format)["res"]
            frame = {"page_index": content["page_index"], "time": round(time, 6)}  # seconds
            frame |= {key: content[key] for key in ("boxes", "masks")}
            if self._text is None:
                self._frames.parent.mkdir(parents=True, exist_ok=True)
                self._text = _aside(self._frames).open("w", encoding="utf-8")
                head = {"input_path": result.input_path, "size": list(result.size), "frame_rate": self._rate}
                self._text.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "frames": [\n')
            else:
                self._text.write(",\n")
            self._text.write(json.dumps(frame, ensure_ascii=False))

    def close(self, *, whole: bool) -> int:
        """End both files; where they are not `whole`, remove them. Returns how many there are now."""
        self._clock.close()
        if self._writer is not None:
            self._writer.close()
        if self._text is not None:
            self._text.write("\n]}\n")
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
    """Frames a second that a video says it has; 25 where it does not say, or is gone."""
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)
    capture = cv2.VideoCapture(str(path))
    try:
        rate = capture.get(cv2.CAP_PROP_FPS) if capture.isOpened() else 0.0
    finally:
        capture.release()
    return rate if 0 < rate < 1000 else DEFAULT_RATE


class _Clock:
    """When the frames of a video are shown: read beside the frames, which come from elsewhere."""

    def __init__(self, source: str, rate: float) -> None:
        self._capture = cv2.VideoCapture(source)
        self._rate = rate
        self._index, self._time = -1, 0.0

    def time_of(self, index: int | None) -> float:
        """Seconds from the start of the video to a frame, the next one where it is None; indices only grow."""
        if index is None:
            index = self._index + 1
        while self._index < index:
            before, self._index = self._time, self._index + 1
            is_read = self._capture.isOpened() and self._capture.grab()
            time = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 if is_read else -1.0
            if self._index == 0:
                self._time = max(time, 0.0)
            else:  # a video, or a build of OpenCV, that does not say
                self._time = time if before < time < float("inf") else before + 1 / self._rate
        return self._time

    def close(self) -> None:
        self._capture.release()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.part{path.suffix}")


def _open_writer(path: Path, rate: float, size: tuple[int, int]) -> _Writer:
    """Begin an MP4 file of frames [h, w, 3] uint8 RGB of one size. Raises OSError where it can't be written."""
    try:
        import av
    except ImportError:
        log.warning(
            'browsers will not play the video; with `pip install "instseg_jax[video]"` it is H.264, which they do'
        )
        return _OpenCVWriter(path, rate, size)
    try:
        return _AVWriter(av, path, rate, size)
    except av.FFmpegError as error:
        raise OSError(f"can't write a video of {size[1]} x {size[0]} pixels to {path.parent}: {error}") from error


class _OpenCVWriter:
    def __init__(self, path: Path, rate: float, size: tuple[int, int]) -> None:
        self._file = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*CODEC), rate, (size[1], size[0]))
        if not self._file.isOpened():
            raise OSError(f"can't write a video of {size[1]} x {size[0]} pixels to {path.parent}")
        self._rate, self._written = rate, 0
        self._last: np.ndarray | None = None

    def write(self, drawn: np.ndarray, time: float) -> None:
        # One rate is all that this writer knows: a frame stays until the next one's time has come.
        frame = cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)
        for _ in range(round(time * self._rate) - self._written if self._last is not None else 0):
            self._put(self._last)
        self._put(frame)
        self._last = frame

    def _put(self, frame: Any) -> None:
        self._file.write(frame)
        self._written += 1

    def close(self) -> None:
        self._file.release()


class _AVWriter:
    def __init__(self, av: Any, path: Path, rate: float, size: tuple[int, int]) -> None:
        self._av = av
        self._file = av.open(str(path), "w", options={"movflags": "faststart"})  # plays before all of it has arrived
        self._stream = self._file.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options=QUALITY)
        # Colours are stored for two by two pixels: sides must be even.
        self._stream.height, self._stream.width = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, TICKS)
        self._ticks = -1

    def write(self, drawn: np.ndarray, time: float) -> None:
        height, width = drawn.shape[:2]
        even = np.pad(drawn, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(even, format="rgb24")
        self._ticks = max(round(time * TICKS), self._ticks + 1)
        frame.pts, frame.time_base = self._ticks, Fraction(1, TICKS)
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._file.mux(self._stream.encode())
        self._file.close()
