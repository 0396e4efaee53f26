"""The HTTP server: the official request and answer, with batches, limits, metrics and a page to try it.

    POST /instance-segmentation   JSON {"image": base64 | URL, ...}, a form with the file `image`, or the file as body
    GET  /health  /metrics  /docs  /

Bodies are read and checked on the event loop; decoding, the network, drawing and encoding run in threads. What waits
in the queue are compressed bytes: decoded images exist only for the batches that are being worked on. Every error is
the official JSON, its `errorCode` being the HTTP status. The only file that knows the web framework.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import html
import importlib.resources
import json
import logging
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from instseg_jax.images import decode_image
from instseg_jax.inference.pipeline import Pipeline, thresholds_by_class
from instseg_jax.inference.sources import Source
from instseg_jax.results.result import Result
from instseg_jax.results.visualize import SHADES, class_color
from instseg_jax.serving.batching import Batcher, QueueFullError
from instseg_jax.serving.fetch import FetchError, fetch_url

try:
    import prometheus_client as prometheus
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from instseg_jax.serving import schema
    from instseg_jax.serving.requests import Refused, check_image, decode_base64, drop_body, parse_request, read_body
except ImportError as error:
    raise ImportError(f'serving needs more packages ({error.name}): pip install "instseg_jax[serve]"') from error

PATH = "/instance-segmentation"
THREADS = 4  # for answers and for fetching
MOST_NAMED = 20  # classes that the page lists
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


class _Metrics:
    """What /metrics shows; a registry of its own, so that several apps can be in one process."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        about = "Requests by the status of their answer"
        self.requests = prometheus.Counter("instseg_requests", about, ["status"], registry=registry)
        about = "Seconds from a request to its answer"
        self.seconds = prometheus.Histogram("instseg_request_seconds", about, buckets=seconds, registry=registry)
        about = "Seconds of a batch: decoding, network and masks"
        self.batch_seconds = prometheus.Histogram("instseg_batch_seconds", about, buckets=seconds, registry=registry)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_size = prometheus.Histogram("instseg_batch_size", "Images a batch", buckets=sizes, registry=registry)
        self.instances = prometheus.Counter("instseg_instances", "Instances found", registry=registry)
        self.active = prometheus.Gauge("instseg_active_requests", "Requests being worked on", registry=registry)
        self.waiting = prometheus.Gauge("instseg_waiting_images", "Images waiting for a batch", registry=registry)


class Server:
    """The state behind the app: the pipeline, its queue, and the counts."""

    def __init__(self, pipeline: Pipeline, limits: Limits) -> None:
        self.pipeline, self.limits = pipeline, limits
        self.metrics = _Metrics()
        self.active = 0  # requests in work; only the event loop changes it
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="answer")
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

    def _run(self, jobs: Sequence[_Job]) -> list[Result]:
        bands = self.pipeline.feeding.bands
        sources = [Source("image.jpg", functools.partial(decode_image, job.data, "image", bands)) for job in jobs]
        return self.pipeline.segment(sources, [job.thresholds for job in jobs])

    def _observe(self, size: int, seconds: float) -> None:
        self.metrics.batch_size.observe(size)
        self.metrics.batch_seconds.observe(seconds)

    async def segment(self, request: Request) -> dict[str, Any]:
        """Answer one request. Raises Refused."""
        body = await asyncio.wait_for(read_body(request, self.limits.max_body), self.limits.timeout)
        wanted, data = await parse_request(request, body)
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
            data = await loop.run_in_executor(self.threads, self._read_image, wanted.image)
        await loop.run_in_executor(self.threads, check_image, data, self.limits.max_pixels)
        thresholds = thresholds_by_class(wanted.threshold, self.pipeline.class_names, self.pipeline.thresholds)
        try:
            future = self.batcher.submit(_Job(data, thresholds))
        except (QueueFullError, RuntimeError) as error:
            status = 429 if isinstance(error, QueueFullError) else 503
            raise Refused(status, "Too many requests" if status == 429 else "The server is shutting down") from None
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
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", image):
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


def make_app(pipeline: Pipeline, limits: Limits) -> FastAPI:
    """Make the web application of a pipeline. Its queue and threads end with the application's lifespan."""
    server = Server(pipeline, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, server.close)

    # FastAPI's own pages load scripts from elsewhere.
    app = FastAPI(
        title="instseg_jax",
        description="Instance segmentation",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.server = server
    _add_segmentation(app, server)
    _add_pages(app, server)

    @app.exception_handler(404)
    @app.exception_handler(405)
    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(schema.error_answer(None, error.status_code, str(error.detail)), error.status_code)

    return app


def _add_segmentation(app: FastAPI, server: Server) -> None:
    body = {
        "application/json": {"schema": schema.SegmentationRequest.model_json_schema()},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "string", "format": "binary"},
                    "threshold": {"type": "number"},
                    "visualize": {"type": "boolean"},
                    "logId": {"type": "string"},
                },
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
    }
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": schema.Answer} for status in (401, 403, 408, 413, 422, 429, 500, 503, 504)
    }

    @app.post(
        PATH,
        response_model=schema.SegmentationAnswer,
        responses=errors,
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )
    async def segment(request: Request) -> Response:
        """Find the instances in a picture."""
        started = time.monotonic()
        headers: dict[str, str] = {}
        if without_token := _refuse(server, request):  # before anything of the body is kept
            server.metrics.requests.labels("401").inc()
            without_token.headers["Connection"] = "close"
            return without_token
        if server.active >= server.limits.queue_size:
            with contextlib.suppress(Refused, TimeoutError, ClientDisconnect):
                await asyncio.wait_for(drop_body(request, server.limits.max_body), server.limits.timeout)
            status, content = 429, schema.error_answer(None, 429, "Too many requests")
            headers["Retry-After"] = "1"
        else:
            server.active += 1
            try:
                status, content = 200, await server.segment(request)
            except Refused as refused:
                status, content = refused.status, schema.error_answer(refused.log_id, refused.status, str(refused))
            except HTTPException as error:  # of the form parser
                status, content = 422, schema.error_answer(None, 422, str(error.detail))
            except TimeoutError:
                status, content = 408, schema.error_answer(None, 408, "The body did not arrive in time")
            except ClientDisconnect:  # nobody is there to hear it
                status, content = 499, schema.error_answer(None, 499, "The client left")
            except Exception:
                log.exception("a request failed")
                status, content = 500, schema.error_answer(None, 500, "Internal server error")
            finally:
                server.active -= 1
        server.metrics.requests.labels(str(status)).inc()
        server.metrics.seconds.observe(time.monotonic() - started)
        return JSONResponse(content, status, headers)


def _refuse(server: Server, request: Request) -> JSONResponse | None:
    """The answer to a request that lacks the token; None where it has it, or needs none."""
    try:
        server.check_token(request)
    except Refused as refused:
        content = schema.error_answer(None, refused.status, str(refused))
        return JSONResponse(content, refused.status, {"WWW-Authenticate": "Bearer"})
    return None


def _describe_api(app: FastAPI) -> str:
    """What is answered where, as a page without any script."""
    rows = "".join(
        f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(entry.get('description', ''))}</p>"
        for path, methods in app.openapi()["paths"].items()
        for method, entry in methods.items()
    )
    example = html.escape(f"curl --data-binary @picture.jpg http://HOST:PORT{PATH}")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>instseg_jax</title></head><body>"
        f"<h1>instseg_jax</h1><pre>{example}</pre>{rows}<p><a href='/openapi.json'>openapi.json</a></p></body></html>"
    )


def _add_pages(app: FastAPI, server: Server) -> None:
    page = importlib.resources.files("instseg_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
    palette = [
        ["#{:02x}{:02x}{:02x}".format(*class_color(index, rank)) for rank in range(len(SHADES))]
        for index in range(len(server.pipeline.class_names))
    ]
    page = page.replace("const PALETTE = [];", f"const PALETTE = {json.dumps(palette)};", 1)
    classes = html.escape(", ".join(server.pipeline.class_names[:MOST_NAMED]))
    more = len(server.pipeline.class_names) - MOST_NAMED
    page = page.replace("<!-- classes -->", classes + (f" and {more} more" if more > 0 else ""), 1)
    # Only the page's own script and style run, and nothing is loaded from elsewhere.
    sources = {
        f"{kind}-src": " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for kind, tag in (("script", "script"), ("style", "style"))
    }
    policy = "; ".join(f"{name} {value}" for name, value in sources.items())
    policy = f"default-src 'none'; {policy}; img-src blob: data:; connect-src 'self'; frame-ancestors 'self'"

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """A page to drop a picture on."""
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> JSONResponse:
        return _refuse(server, request) or JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return _refuse(server, request) or HTMLResponse(
            _describe_api(app), headers={"Content-Security-Policy": "default-src 'none'"}
        )

    @app.get("/health", response_model=schema.Answer)
    async def health() -> JSONResponse:
        """Whether requests are answered."""
        if server.batcher.is_alive:
            return JSONResponse(schema.error_answer(None, 0, "Healthy"))
        return JSONResponse(schema.error_answer(None, 503, "The server is shutting down"), 503)

    @app.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Counts and times, for Prometheus; ask for the token, where there is one."""
        if refused := _refuse(server, request):
            return refused
        return Response(prometheus.generate_latest(server.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)


def run_server(pipeline: Pipeline, limits: Limits, *, host: str, port: int) -> None:
    """Compile, then serve until a signal comes; what was accepted by then is finished.

    Raises: OSError where the address is taken or not this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"can't listen at {host}:{port} ({error})") from error
        started = time.monotonic()
        pipeline.warm_up()
        config = uvicorn.Config(make_app(pipeline, limits), log_level="warning", access_log=False)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        # uvicorn raises the signal once more when all is finished: to end was what was asked for, and no failure.
        signal.signal(signal.SIGTERM, lambda *_: None)
        _AnnouncedServer(config, address, started).run(sockets=[listener])


class _AnnouncedServer(uvicorn.Server):
    """Says where it is once it listens."""

    def __init__(self, config: uvicorn.Config, address: str, started: float) -> None:
        super().__init__(config)
        self._address, self._started_at = address, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        seconds = time.monotonic() - self._started_at
        print(f"ready after {seconds:.1f} s: {self._address}{PATH}, a page at {self._address}", flush=True)
