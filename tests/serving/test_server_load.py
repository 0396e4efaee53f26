"""The server under load: half a minute of 32 clients with good, broken and huge input, among hostile ones.

`INSTSEG_LOAD_WEIGHTS=RUN` puts trained weights in the fake network's place; answers are then only checked for form.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from fake_model import picture
from PIL import Image
from places import HELPERS, ROOT
from png_files import png_of
from pycocotools import mask as mask_api

CLIENTS, SECONDS = 32, 30.0
WEIGHTS = os.environ.get("INSTSEG_LOAD_WEIGHTS")


def good(random_numbers: random.Random) -> tuple[bytes, tuple[int, ...]]:
    """A photograph-sized picture with a rectangle somewhere, and where."""
    x, y = random_numbers.randrange(0, 440, 10), random_numbers.randrange(0, 280, 10)
    box = (x, y, x + random_numbers.randrange(80, 200, 10), y + random_numbers.randrange(80, 200, 10))
    data = io.BytesIO()
    Image.fromarray(picture((0, *box), size=(480, 640))).save(data, format="JPEG", quality=95)
    return data.getvalue(), box


def bad(random_numbers: random.Random) -> tuple[bytes, set[int]]:
    """A body that must be refused, and with which statuses it may be."""
    picture_bytes, _ = good(random_numbers)
    text = base64.b64encode(picture_bytes).decode()
    return random_numbers.choice(
        [
            (b"{", {422}),
            (json.dumps({"image": text[:300]}).encode(), {422}),
            (json.dumps({"image": "http://169.254.169.254/"}).encode(), {403}),
            (json.dumps({"image": text, "threshold": 5}).encode(), {422}),
            (json.dumps({"image": base64.b64encode(png_of(30_000, 30_000)).decode()}).encode(), {413}),
            (json.dumps({"image": base64.b64encode(png_of(900, 900)).decode()}).encode(), {422}),
            (json.dumps({"image": "A" * 1_500_000}).encode(), {413}),
        ]
    )


def is_right(answer: dict, box: tuple[int, ...]) -> bool:
    """Whether an answer shows the client's own rectangle, to the resolution of the fake network's input."""
    instances = answer["result"]["instances"]
    if WEIGHTS:
        return all(instance["segmentation"]["size"] == [480, 640] for instance in instances)
    if len(instances) != 1 or np.abs(np.subtract(instances[0]["bbox"], box)).max() > 12:
        return False
    x, y, w, h = mask_api.toBbox(instances[0]["segmentation"])
    return np.abs(np.subtract((x, y, x + w, y + h), box)).max() <= 12


def prepare() -> tuple[list, list]:
    """Bodies with what is expected of their answers, made before the clock runs: (good, bad)."""
    numbers = random.Random(0)
    requests = []
    for _ in range(64):
        data, box = good(numbers)
        content = {"image": base64.b64encode(data).decode(), "visualize": False}
        requests.append((json.dumps(content).encode(), box))
    return requests, [bad(numbers) for _ in range(64)]


class Client(threading.Thread):
    """Asks until the time is over, on one connection as long as the server keeps it."""

    def __init__(self, port: int, seed: int, until: float, good_ones: list, bad_ones: list) -> None:
        super().__init__()
        self.port, self.until, self.random = port, until, random.Random(seed)
        self.good_ones, self.bad_ones = good_ones, bad_ones
        self.statuses: Counter = Counter()
        self.seconds: list[float] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while time.monotonic() < self.until:
            is_good = self.random.random() < 0.8
            body, expected = self.random.choice(self.good_ones if is_good else self.bad_ones)
            started = time.monotonic()
            try:
                connection.request("POST", "/instance-segmentation", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                connection.close()
                continue
            self.statuses[response.status] += 1
            if is_good and response.status == 200:
                self.seconds.append(time.monotonic() - started)
                if not is_right(answer, expected):
                    self.wrong.append(f"{expected}: {str(answer)[:300]}")
            elif response.status != 429 and (is_good or response.status not in expected):
                self.wrong.append(f"{response.status}: {answer}")
        connection.close()


def attack(port: int, until: float) -> None:
    """Heads and bodies that never end, floods of parts and values, and leavers, until the time is over."""
    head = b"POST /instance-segmentation HTTP/1.1\r\nHost: a\r\n"
    jpeg = b"\xff\xd8" + b"\xff\xe0\x00\x02" * 200_000
    floods = [(b"image/jpeg", jpeg), (b"application/json", b'{"image": [' + b"[]," * 250_000 + b"[]]}")]
    floods.append((b"application/json", b'{"image": "' + b"A" * 900_000 + b'"}'))
    waiting: list[socket.socket] = []
    while time.monotonic() < until:
        for kind, body in floods:
            sent = head + b"Content-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind, len(body)) + body
            for data, is_read in ((sent, True), (sent[: len(sent) // 2], False), (head + b"X-a: b\r\n", None)):
                with contextlib.suppress(OSError):
                    connection = socket.create_connection(("127.0.0.1", port), 10)
                    connection.sendall(data)
                    if is_read:
                        connection.recv(1000)
                    if is_read is None:
                        waiting.append(connection)
                    else:
                        connection.close()
        with contextlib.suppress(OSError):
            dripping = socket.create_connection(("127.0.0.1", port), 10)
            dripping.sendall(head + b"Content-Length: 900000\r\n\r\nx")
            waiting.append(dripping)
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
        time.sleep(0.05)
    for connection in waiting:
        connection.close()


def watch_health(port: int, until: float, seconds: list[float]) -> None:
    """How long the server takes to say that it is well, over and over."""
    while time.monotonic() < until:
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        seconds.append(time.monotonic() - started)
        time.sleep(0.05)


def memory_mb(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def count_files(pid: int) -> int:
    return sum(1 for _ in pathlib.Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.slow
def test_half_a_minute_of_32_clients():
    pytest.importorskip("fastapi")
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}:{ROOT}"}
    command = [sys.executable, str(HELPERS / "serve_for_load.py"), *([WEIGHTS] if WEIGHTS else [])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        bare = float(server.stdout.readline())
        port = int(re.search(r"127\.0\.0\.1:(\d+)", server.stdout.readline())[1])
        time.sleep(1)
        good_ones, bad_ones = prepare()
        until = time.monotonic() + SECONDS
        clients = [Client(port, seed, until, good_ones, bad_ones) for seed in range(CLIENTS)]
        health: list[float] = []
        others = [threading.Thread(target=attack, args=(port, until)) for _ in range(2)]
        others.append(threading.Thread(target=watch_health, args=(port, until, health)))
        for thread in (*clients, *others):
            thread.start()
        time.sleep(SECONDS / 3)
        early, early_files = memory_mb(server.pid), count_files(server.pid)
        for thread in (*clients, *others):
            thread.join()
        late = memory_mb(server.pid)
        time.sleep(1)
        late_files = count_files(server.pid)
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    seconds = np.array(sorted(second for client in clients for second in client.seconds))
    statuses = sum((client.statuses for client in clients), Counter())
    wrong = [text for client in clients for text in client.wrong]
    print(
        f"\n{len(seconds) / SECONDS:.1f} pictures a second, the pipeline alone {bare:.1f}; "
        f"p50 {1000 * np.percentile(seconds, 50):.0f} ms, p99 {1000 * np.percentile(seconds, 99):.0f} ms; "
        f"/health at most {1000 * max(health):.0f} ms of {len(health)}; "
        f"answers {dict(sorted(statuses.items()))}; {early:.0f} MB after {SECONDS / 3:.0f} s, {late:.0f} MB at the end"
    )
    assert not wrong, wrong[:5]
    assert len(health) > SECONDS and max(health) < 1.0
    assert statuses[200] > 100 and statuses[413] > 10 and statuses[422] > 10 and statuses[403] > 1
    assert not {500, 503, 504} & set(statuses)
    assert late - early < 60 and late_files <= early_files + 10
    assert server.returncode == 0 and "Traceback" not in errors, errors[-2000:]
