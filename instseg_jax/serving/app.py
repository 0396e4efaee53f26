"""The web application: which address is answered by what, the page to try it, and the loop that serves it.

POST /instance-segmentation   JSON {"image": base64 | URL, ...}, a form with the file `image`, or the file as body
GET  /health  /metrics  /docs  /
"""

import asyncio
import base64
import contextlib
import hashlib
import html
import importlib.resources
import json
import re
import signal
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from instseg_jax.inference.pipeline import Pipeline
from instseg_jax.results.visualize import SHADES, class_color
from instseg_jax.serving.server import AT_THE_END, Limits, Server, log

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from instseg_jax.serving import schema
    from instseg_jax.serving.connections import HttpServer, allow_files
    from instseg_jax.serving.metrics import CONTENT_TYPE_LATEST
    from instseg_jax.serving.requests import Refused, drop_body
except ImportError as error:
    raise ImportError(f'serving needs more packages ({error.name}): pip install "instseg_jax[serve]"') from error

PATH = "/instance-segmentation"
MOST_NAMED = 20  # classes that the page lists
UNREAD_SECONDS = 5.0  # in which the body of a request is read and dropped that is refused unread


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
        # Nothing of the body is kept before the token has been seen.
        if unread := _refuse(server, request) or _refuse_at_the_end(server):
            limits = server.limits
            with contextlib.suppress(TimeoutError, ClientDisconnect):
                await asyncio.wait_for(drop_body(request, limits.max_body), min(UNREAD_SECONDS, limits.timeout))
            server.metrics.requests.labels(str(unread.status_code)).inc()
            unread.headers["Connection"] = "close"
            return unread
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
        if status == 429:
            headers["Retry-After"] = "1"
        if status in (408, 413):  # the rest of the body may be on its way
            headers["Connection"] = "close"
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


def _refuse_at_the_end(server: Server) -> JSONResponse | None:
    """The answer to a request that comes after the signal to end; None before."""
    return JSONResponse(schema.error_answer(None, 503, AT_THE_END), 503) if server.is_ending else None


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
        if server.batcher.is_alive and not server.is_ending:
            return JSONResponse(schema.error_answer(None, 0, "Healthy"))
        return JSONResponse(schema.error_answer(None, 503, AT_THE_END), 503)

    @app.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Counts and times, for Prometheus; ask for the token, where there is one."""
        if refused := _refuse(server, request):
            return refused
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


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
        app = make_app(pipeline, limits)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        # uvicorn raises the signal once more when all is finished: to end was what was asked for, and no failure.
        signal.signal(signal.SIGTERM, lambda *_: None)

        def announce() -> None:
            seconds = time.monotonic() - started
            print(f"ready after {seconds:.1f} s: {address}{PATH}, a page at {address}", flush=True)

        server: Server = app.state.server
        HttpServer(app, say_goodbye=server.end, announce=announce, most_connections=allow_files()).run([listener])
