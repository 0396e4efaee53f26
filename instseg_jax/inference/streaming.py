"""From images to instances with decoding, device work and encoding side by side.

While the device works on a batch, threads decode and resize the images of the next ones and turn the masks of the
ones before into RLEs. A batch always has its full size, padded with empty images, so that one program serves all.
"""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from instseg_jax.bands import Bands, show_bands
from instseg_jax.geo.reading import Reading
from instseg_jax.images import preprocess
from instseg_jax.inference.postprocess import detections_to_instances
from instseg_jax.inference.sources import Source
from instseg_jax.types import Detections, Instances

THREADS = 4  # that decode, and as many that encode: numpy, OpenCV and pycocotools let go of the interpreter
BATCHES_AHEAD = 2  # decoded before their turn, and encoding after it: what bounds the memory


@dataclasses.dataclass(frozen=True)
class Feeding:
    """How a picture becomes the network's input; see `images.preprocess`."""

    size: tuple[int, int]  # (height, width)
    resize: str
    interpolation: str
    bands: Bands | None = None  # of pictures that are not 8-bit colour
    reading: Reading | None = None  # of rasters of maps

    @property
    def channels(self) -> int:
        """C of the network's input."""
        return 3 if self.bands is None else self.bands.channels


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found in one source: the instances, or why it could not be read."""

    source: Source
    image: np.ndarray | None
    instances: Instances | None
    error: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image, of which `image` may be a smaller view; (0, 0) of none."""
        return self.source.size or ((0, 0) if self.image is None else (self.image.shape[0], self.image.shape[1]))


@dataclasses.dataclass(frozen=True)
class _Decoded:
    source: Source
    image: np.ndarray | None = None
    pixels: np.ndarray | None = None  # [H, W, 3] float32
    content: tuple[int, int] = (0, 0)
    error: str | None = None


def stream_instances(
    sources: Iterator[Source],
    predict: Callable[[np.ndarray], Detections],
    *,
    feeding: Feeding,
    batch_size: int,
    thresholds: np.ndarray,
) -> Iterator[Found]:
    """Find the instances of each source, in order.

    `predict` takes [batch_size, H, W, 3] float32 and may return before it is done, as compiled functions do.
    `thresholds` [K] are the lowest scores that count, by class index. A source that cannot be read is reported at
    its place.
    """
    ahead = BATCHES_AHEAD * batch_size
    with contextlib.ExitStack() as stack:
        decoders = stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="decode"))
        encoders = stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="encode"))
        # What has not begun when the caller stops asking is not begun.
        stack.callback(decoders.shutdown, wait=False, cancel_futures=True)
        stack.callback(encoders.shutdown, wait=False, cancel_futures=True)
        decoding: deque[Future] = deque(
            decoders.submit(_decode, source, feeding) for source in itertools.islice(sources, ahead)
        )
        waiting: deque[Future] = deque()
        while decoding:
            group = _next_group(decoding, batch_size)
            decoding.extend(
                decoders.submit(_decode, source, feeding) for source in itertools.islice(sources, len(group))
            )
            waiting.extend(_start(group, predict, encoders, feeding, batch_size, thresholds))
            while len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _next_group(decoding: deque[Future], batch_size: int) -> list[_Decoded]:
    """Take decoded sources until there are a batch of readable ones (or no more)."""
    group: list[_Decoded] = []
    readable = 0
    while decoding and readable < batch_size:
        group.append(decoding.popleft().result())
        readable += group[-1].error is None
    return group


def _decode(source: Source, feeding: Feeding) -> _Decoded:
    try:
        image = source.read()
    except (ValueError, OSError) as error:
        return _Decoded(source, error=" ".join(str(error).split()) or type(error).__name__)
    if image.shape[2] != feeding.channels:
        return _Decoded(
            source, error=f"{source.name} has {image.shape[2]} channels, the model takes {feeding.channels}"
        )
    pixels, content = preprocess(image, feeding.size, resize=feeding.resize, interpolation=feeding.interpolation)
    if feeding.bands is not None:
        image = show_bands(image)
    return _Decoded(source, image, pixels, content)


def _start(
    group: list[_Decoded],
    predict: Callable[[np.ndarray], Detections],
    encoders: ThreadPoolExecutor,
    feeding: Feeding,
    batch_size: int,
    thresholds: np.ndarray,
) -> Iterator[Future]:
    """Start the device on the readable images of a group, and the encoding of each image after it."""
    readable = [decoded for decoded in group if decoded.error is None]
    if not readable:
        return (_done(Found(decoded.source, None, None, decoded.error)) for decoded in group)
    images = np.zeros((batch_size, *feeding.size, feeding.channels), np.float32)
    for slot, decoded in zip(images, readable, strict=False):
        slot[:] = decoded.pixels
    fetched = encoders.submit(jax.device_get, predict(images))
    positions = itertools.count()
    return iter(
        [
            _done(Found(decoded.source, None, None, decoded.error))
            if decoded.error is not None
            else encoders.submit(_encode, fetched, next(positions), decoded, feeding.size, thresholds)
            for decoded in group
        ]
    )


def _encode(
    fetched: Future, position: int, decoded: _Decoded, input_size: tuple[int, int], thresholds: np.ndarray
) -> Found:
    assert decoded.image is not None
    instances = keep_instances(
        fetched.result(),
        position,
        thresholds,
        input_size=input_size,
        content_size=decoded.content,
        original_size=decoded.source.size or decoded.image.shape[:2],
    )
    return Found(decoded.source, decoded.image, instances)


def keep_instances(
    detections: Detections,
    index: int,
    thresholds: np.ndarray,
    *,
    input_size: tuple[int, int],
    content_size: tuple[int, int],
    original_size: tuple[int, int],
) -> Instances:
    """The instances of image `index` whose score reaches the threshold [K] of their class, before any mask work.

    Sizes are those of `postprocess.detections_to_instances`.
    """
    scores = np.asarray(detections.scores)[index]
    labels = np.asarray(detections.labels)[index]
    kept = scores >= thresholds[labels]
    chosen = Detections(
        scores=scores[kept][None],
        labels=labels[kept][None],
        boxes_xyxy=np.asarray(detections.boxes_xyxy)[index][kept][None],
        mask_logits=np.asarray(detections.mask_logits)[index][kept][None],
    )
    return detections_to_instances(
        chosen, 0, input_size=input_size, content_size=content_size, original_size=original_size
    )


def _done(found: Found) -> Future:
    future: Future = Future()
    future.set_result(found)
    return future
