"""A server in this process, and what is sent to it."""

import io
import json
import socket
import threading
import time

import numpy as np
from PIL import Image

from instseg_jax.serving.app import make_app
from instseg_jax.serving.connections import HttpServer
from instseg_jax.serving.server import Limits

LIMITS = Limits(queue_size=16, max_wait=0.01, timeout=10.0, max_body=200_000, max_pixels=500_000)


def encode(image: np.ndarray, image_format: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format=image_format)
    return data.getvalue()


class Running:
    """A server on a free port of the loopback, in a thread."""

    def __init__(self, pipeline, limits, **options) -> None:
        self.app = make_app(pipeline, limits)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.socket.getsockname()[1]
        self.server = HttpServer(
            self.app, **{"say_goodbye": self.app.state.server.end, "last_words_seconds": 0.05} | options
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self) -> "Running":
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(self, body: bytes | dict, *, path: str = "/instance-segmentation", method: str = "POST", **headers):
        """(status, JSON of the answer, headers)."""
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"content_type": "application/json"} | headers
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        is_json = "json" in response.headers["content-type"]
        return response.status, json.loads(text) if is_json else text.decode(), dict(response.headers)
