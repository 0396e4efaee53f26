"""The server behind the web application: the official request and answer, with batches, limits and metrics.

Bodies are read and checked on the event loop; decoding, the network, drawing and encoding run in threads. What waits
in the queue are compressed bytes: decoded images exist only for the batches that are being worked on. Every error is
the official JSON, its `errorCode` being the HTTP status.
"""

import asyncio
import dataclasses
import functools
import hmac
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from instseg_jax.images import decode_image
from instseg_jax.inference.pipeline import Pipeline, thresholds_by_class
from instseg_jax.inference.sources import Source
from instseg_jax.results.result import Result
from instseg_jax.serving.batching import Batcher, QueueFullError
from instseg_jax.serving.fetch import FetchError, fetch_url

try:
    from fastapi import Request

    from instseg_jax.serving import schema
    from instseg_jax.serving.metrics import Metrics
    from instseg_jax.serving.requests import (
        BodyRoom,
        Refused,
        check_image,
        decode_base64,
        parse_request,
        read_body,
    )
except ImportError as error:
    raise ImportError(f'serving needs more packages ({error.name}): pip install "instseg_jax[serve]"') from error

THREADS = 4  # for answers and for fetching
AT_THE_END = "The server is shutting down"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the server takes."""

    queue_size: int  # requests at a time; beyond it 429
    max_wait: float  # seconds that a request waits for others to fill its batch
    timeout: float  # seconds for an answer, and for the body to arrive; then 504 and 408
    max_body: int  # bytes; larger ones 413
    max_pixels: int  # of an image; larger ones 413
    allowed_hosts: frozenset[str] = frozenset()  # whose URLs are fetched
    token: str | None = None  # that requests must bear

    def __post_init__(self) -> None:
        for name in ("queue_size", "timeout", "max_body", "max_pixels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be above 0")
        if not 0 <= self.max_wait <= self.timeout:
            raise ValueError(f"max_wait is {self.max_wait} s, it must be between 0 and the timeout, {self.timeout} s")


@dataclasses.dataclass(frozen=True)
class _Job:
    data: bytes
    thresholds: np.ndarray


class Server:
    """The state behind the app: the pipeline, its queue, and the counts."""

    def __init__(self, pipeline: Pipeline, limits: Limits) -> None:
        self.pipeline, self.limits = pipeline, limits
        self.metrics = Metrics()
        self.active = 0  # requests in work, whose bodies are there whole; only the event loop changes it
        self.room = BodyRoom(limits.queue_size * limits.max_body)
        self.is_ending = False
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="answer")
        self.fetchers = ThreadPoolExecutor(THREADS, thread_name_prefix="fetch")
        self.batcher = Batcher(
            self._run,
            batch_size=pipeline.batch_size,
            max_wait=limits.max_wait,
            queue_size=limits.queue_size,
            observe=self._observe,
        )
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.metrics.active.set_function(lambda: self.active)

    def close(self) -> None:
        """Finish what was accepted."""
        self.batcher.close()
        self.threads.shutdown()
        self.fetchers.shutdown(wait=False, cancel_futures=True)

    def end(self) -> None:
        """Take no more requests."""
        self.is_ending = True

    def _run(self, jobs: Sequence[_Job]) -> list[Result]:
        bands = self.pipeline.feeding.bands
        sources = [Source("image.jpg", functools.partial(decode_image, job.data, "image", bands)) for job in jobs]
        return self.pipeline.segment(sources, [job.thresholds for job in jobs])

    def _observe(self, size: int, seconds: float) -> None:
        self.metrics.batch_size.observe(size)
        self.metrics.batch_seconds.observe(seconds)

    async def segment(self, request: Request) -> dict[str, Any]:
        """Answer one request; it is one of `queue_size` once its body is there. Raises Refused, TimeoutError."""
        limits = self.limits
        body = await asyncio.wait_for(read_body(request, limits.max_body, self.room), limits.timeout)
        size = len(body)
        try:
            if self.active >= limits.queue_size:
                raise Refused(429, "Too many requests")
            self.active += 1
            try:
                wanted, data = await parse_request(request, body)
                del body  # `data` or the text of `wanted` has what is needed of it
                return await self._answer_in_time(wanted, data)
            finally:
                self.active -= 1
        finally:
            self.room.give_back(size)

    async def _answer_in_time(self, wanted: schema.SegmentationRequest, data: bytes | None) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(self._answer(wanted, data), self.limits.timeout)
        except TimeoutError:
            raise Refused(504, f"No answer within {self.limits.timeout:g} s", wanted.logId) from None
        except Refused as refused:
            refused.log_id = wanted.logId
            raise

    async def _answer(self, wanted: schema.SegmentationRequest, data: bytes | None) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        if data is None:
            threads = self.fetchers if is_address(wanted.image) else self.threads
            data = await loop.run_in_executor(threads, self._read_image, wanted.image)
            wanted.image = ""  # waits with its bytes alone
        await loop.run_in_executor(self.threads, check_image, data, self.limits.max_pixels)
        thresholds = thresholds_by_class(wanted.threshold, self.pipeline.class_names, self.pipeline.thresholds)
        try:
            future = self.batcher.submit(_Job(data, thresholds))
        except (QueueFullError, RuntimeError) as error:
            status = 429 if isinstance(error, QueueFullError) else 503
            raise Refused(status, "Too many requests" if status == 429 else AT_THE_END) from None
        result = await asyncio.wrap_future(future)
        if result.error is not None:
            raise Refused(422, "The image can't be decoded")
        self.metrics.instances.inc(len(result))
        visualize = self.pipeline.visualize if wanted.visualize is None else wanted.visualize
        return await loop.run_in_executor(
            self.threads, lambda: schema.success_answer(wanted.logId, result, visualize=visualize)
        )

    def _read_image(self, image: str) -> bytes:
        """The bytes of an image that a request gives in base64, or by a URL."""
        if is_address(image):
            if not self.limits.allowed_hosts:
                raise Refused(403, "URLs are not fetched here; send the image in base64")
            limits = self.limits
            try:
                return fetch_url(
                    image, allowed_hosts=limits.allowed_hosts, max_bytes=limits.max_body, timeout=limits.timeout
                )
            except FetchError as error:
                raise Refused(error.status, str(error)) from error
        return decode_base64(image)

    def check_token(self, request: Request) -> None:
        """Raise Refused (401) unless a request bears the token, where there is one."""
        token = self.limits.token
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refused(401, "The header `Authorization: Bearer TOKEN` is missing or wrong")


def is_address(image: str) -> bool:
    """Whether the image of a request is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://", image) is not None
