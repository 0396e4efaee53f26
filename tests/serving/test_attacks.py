"""Rude and hostile clients, bounded: connections that say nothing, bodies that drip, floods, leavers, the end.

All of it on the loopback, against a server in this process.
"""

import base64
import contextlib
import dataclasses
import http.client
import http.server
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import pytest
from fake_model import make_pipeline, picture

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from places import HELPERS, ROOT
from png_files import png_of
from running_server import LIMITS, Running, encode

from instseg_jax.serving import connections, fetch

PICTURE = encode(picture((0, 10, 20, 30, 50), size=(60, 64)))
HEAD = b"POST /instance-segmentation?visualize=false HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"


def connect(running: Running, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", running.port), 20)
    connection.sendall(data)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has ended a connection; what it said before is read."""
    try:
        while connection.recv(1000):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def ask_health(running: Running) -> float:
    """Seconds until the server says that it is well."""
    started = time.monotonic()
    assert running.send(b"", path="/health", method="GET")[0] == 200
    return time.monotonic() - started


def segment(running: Running) -> int:
    return running.send(PICTURE, content_type="image/png", path="/instance-segmentation?visualize=false")[0]


@pytest.fixture
def closing():
    """Connections that are closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


# --- connections that stay open -----------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", b"POST /inst", HEAD], ids=["nothing", "half a line", "half a head"])
def test_a_head_must_come_in_time(closing, begun):
    with Running(make_pipeline(), LIMITS, head_seconds=0.3) as running:
        quiet = [closing(connect(running, begun)) for _ in range(50)]
        dripping = closing(connect(running, HEAD))
        started = time.monotonic()
        with contextlib.suppress(OSError):  # every byte in time, the whole never
            while time.monotonic() - started < 5:
                dripping.sendall(b"X-a: b\r\n")
                time.sleep(0.05)
        assert 0.2 < time.monotonic() - started < 3
        assert all(is_closed(connection) for connection in quiet)
        assert segment(running) == 200


def test_the_next_head_of_a_kept_connection_must_come_in_time(closing):
    with Running(make_pipeline(), LIMITS, head_seconds=0.3) as running:
        kept = closing(connect(running, HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE))
        assert kept.recv(100).startswith(b"HTTP/1.1 200")
        kept.sendall(HEAD)
        started = time.monotonic()
        assert is_closed(kept) and time.monotonic() - started < 3


def test_a_slow_body_is_not_taken_for_a_slow_head(closing):
    with Running(make_pipeline(), LIMITS, head_seconds=0.2) as running:
        connection = closing(connect(running, HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE)))
        time.sleep(0.5)
        connection.sendall(PICTURE)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("begun", [b"", HEAD, HEAD + b"Content-Length: 100000\r\n\r\nx"], ids=["none", "head", "body"])
def test_waiting_connections_keep_nobody_out(closing, begun):
    """Beyond the limit the one that has waited longest goes, and whoever asks is answered."""
    with Running(make_pipeline(), LIMITS, most_connections=20) as running:
        waiting = [closing(connect(running, begun)) for _ in range(60)]
        for _ in range(5):
            assert ask_health(running) < 1 and segment(running) == 200
        waiting[0].settimeout(5)
        assert is_closed(waiting[0])
        waiting[-1].settimeout(0.2)
        assert not is_closed(waiting[-1])
        assert len(running.server.server_state.connections) <= 21


def test_files_are_as_many_as_connections():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        most = connections.allow_files(400)
        assert 1 <= most <= 400 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= most + connections.SPARE_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- bodies --------------------------------------------------------------------------------------------------------


def test_64_dripping_bodies_take_no_place(closing):
    limits = dataclasses.replace(LIMITS, queue_size=4, timeout=60.0)
    with Running(make_pipeline(), limits) as running:
        dripping = [closing(connect(running, HEAD + b"Content-Length: 190000\r\n\r\nx")) for _ in range(64)]
        for _ in range(10):
            for connection in dripping:
                connection.sendall(b"x")
            assert segment(running) == 200 and ask_health(running) < 1
        assert running.app.state.server.room.held <= 64 * 11


def test_bodies_are_held_within_the_room_alone(closing):
    """More bodies than the queue has places for, each whole but for its last byte."""
    limits = dataclasses.replace(LIMITS, queue_size=3, timeout=3.0)
    size, most = limits.max_body, limits.queue_size * limits.max_body
    with Running(make_pipeline(), limits) as running:
        room = running.app.state.server.room
        held = [closing(connect(running, HEAD + b"Content-Length: %d\r\n\r\n" % size)) for _ in range(12)]
        for connection in held:
            connection.sendall(b"x" * (size - 1))
        highest, until = 0, time.monotonic() + 1
        while time.monotonic() < until:
            highest = max(highest, room.held)
            time.sleep(0.01)
        assert most - size < highest <= most
        assert ask_health(running) < 1
        answers = []
        for connection in held:
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
            answers.append(connection.recv(100)[9:12])
        assert set(answers) <= {b"429", b"422", b"408"} and b"429" in answers
        for _ in range(100):
            if room.held == 0:
                break
            time.sleep(0.05)
        assert room.held == 0 and segment(running) == 200


def test_the_token_is_looked_at_before_the_body(closing):
    limits = dataclasses.replace(LIMITS, queue_size=2, token="geheim", timeout=2.0)
    with Running(make_pipeline(), limits) as running:
        room, highest = running.app.state.server.room, 0
        senders = [closing(connect(running, HEAD + b"Content-Length: 150000\r\n\r\n")) for _ in range(20)]
        for sender in senders:
            sender.sendall(b"x" * 149_999)
            highest = max(highest, room.held)
        assert highest == 0
        status, _, _ = running.send(
            PICTURE, content_type="image/png", authorization="Bearer geheim", path="/instance-segmentation"
        )
        assert status == 200
        senders[0].sendall(b"x")
        assert senders[0].recv(100).startswith(b"HTTP/1.1 401"), "a client that sends on hears why"


def test_leavers_leave_nothing(caplog):
    with Running(make_pipeline(), LIMITS) as running:
        for number in range(40):
            whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE
            connect(running, whole[: len(whole) if number % 2 else len(HEAD) + 40 + number]).close()
        server = running.app.state.server
        for _ in range(200):
            if server.active == 0 and server.room.held == 0:
                break
            time.sleep(0.02)
        assert server.active == 0 and server.room.held == 0 and segment(running) == 200
    assert "Traceback" not in caplog.text


# --- pictures and texts that cost ----------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff_of_two_sizes(side: int) -> bytes:
    """A TIFF that says its width and height twice: 64 pixels for one library, `side` for the other."""
    entries = [(256, side), (256, 64), (257, side), (257, 64), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1)]
    entries += [(278, side), (279, 4096)]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 4104) + bytes(4096) + struct.pack("<H", len(entries)) + body + bytes(4)


HEAVY = {
    "png of empty chunks": png_of(8, 8)[:33] + chunk(b"abCd") * 300_000,
    "png of texts": png_of(8, 8)[:33] + chunk(b"tEXt", b"a\0b") * 200_000,
    "jpeg of empty segments": b"\xff\xd8" + b"\xff\xe0\x00\x02" * 900_000,
    "tiff of two sizes": tiff_of_two_sizes(30_000),
    "png bomb": png_of(60_000, 60_000),
    "bmp that lies": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
    "json of lists": b'{"image": [' + b"[]," * 900_000 + b"[]]}",
    "json of depth": b'{"image": ' + b"[" * 3_000_000,
    "json of digits": b'{"image": ' + b"9" * 3_000_000 + b"}",
    "base64 of nothing": b'{"image": "' + b"A" * 3_500_000 + b'"}',
    "form of fields": b"--X\r\n" + b'Content-Disposition: form-data; name="a"\r\n\r\n1\r\n--X\r\n' * 50_000,
}


def kind_of(name: str) -> str:
    if name.startswith(("json", "base64")):
        return "application/json"
    return "multipart/form-data; boundary=X" if name.startswith("form") else "image/png"


def test_heavy_bodies_hold_up_nobody():
    """Each is refused, and the server is well and works all the time."""
    limits = dataclasses.replace(LIMITS, max_body=4_000_000, timeout=60.0)
    with Running(make_pipeline(), limits) as running:
        slowest = 0.0
        for name, body in HEAVY.items():
            answers: list[int] = []
            sender = threading.Thread(
                target=lambda body=body, name=name, answers=answers: answers.append(
                    running.send(body, content_type=kind_of(name))[0]
                )
            )
            sender.start()
            while sender.is_alive():
                slowest = max(slowest, ask_health(running))
                time.sleep(0.01)
            sender.join()
            assert answers and answers[0] in (413, 422), (name, answers)
        assert segment(running) == 200
    assert slowest < 3


# --- addresses -----------------------------------------------------------------------------------------------------


class _Dripping(http.server.BaseHTTPRequestHandler):
    """Heads, or chunk sizes, that never end."""

    def do_GET(self):
        line = b"X-a: b\r\n" if self.path == "/head" else b"1\r\nx\r\n"
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\n" + (b"" if self.path == "/head" else b"Transfer-Encoding: chunked\r\n\r\n")
        )
        with contextlib.suppress(OSError):
            for _ in range(200):
                self.wfile.write(line)
                time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("path", ["/head", "/chunks"])
def test_a_fetch_has_one_deadline(path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Dripping)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    started = time.monotonic()
    try:
        with pytest.raises(fetch.FetchError) as refused:
            fetch.fetch_url(
                f"http://localhost:{server.server_port}{path}",
                allowed_hosts={"localhost"},
                max_bytes=1_000_000,
                timeout=0.5,
                is_allowed_address=lambda _: True,
            )
        assert refused.value.status == 504 and time.monotonic() - started < 3
    finally:
        server.shutdown()
        server.server_close()


def test_slow_addresses_do_not_hold_up_pictures(monkeypatch):
    gate = threading.Event()

    def fetch_url(url, **_):
        gate.wait(30)
        raise fetch.FetchError(504, "slow")

    monkeypatch.setattr("instseg_jax.serving.server.fetch_url", fetch_url)
    limits = dataclasses.replace(LIMITS, allowed_hosts=frozenset({"images.example"}), timeout=30.0)
    with Running(make_pipeline(), limits) as running:
        asking = [
            threading.Thread(target=running.send, args=({"image": "https://images.example/a.png"},)) for _ in range(8)
        ]
        for thread in asking:
            thread.start()
        while running.app.state.server.active < 8:
            time.sleep(0.01)
        body = {"image": base64.b64encode(PICTURE).decode(), "visualize": False}
        started = time.monotonic()
        assert running.send(body)[0] == 200 and time.monotonic() - started < 5
        gate.set()
        for thread in asking:
            thread.join()


# --- the end -------------------------------------------------------------------------------------------------------


def test_whoever_has_connected_at_the_end_hears_503(closing):
    with Running(make_pipeline(), LIMITS, last_words_seconds=1.0) as running:
        early = [closing(connect(running)) for _ in range(5)]
        kept = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        assert segment(running) == 200
        running.server.should_exit = True
        while not running.app.state.server.is_ending:
            time.sleep(0.01)
        late = closing(connect(running))  # it still listens, to say so
        for connection in (*early[:3], late):
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE)
            assert connection.recv(2000).startswith(b"HTTP/1.1 503")
        kept.request("GET", "/health")
        assert kept.getresponse().status == 503
        for connection in early[3:]:  # which never ask
            assert connection.recv(2000).startswith(b"HTTP/1.1 503")


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="needs signals")
def test_a_signal_ends_a_server_with_answers():
    """The program itself: connections that were made before SIGTERM get an answer, and it ends well."""
    code = (
        "from fake_model import make_pipeline; from running_server import LIMITS;"
        "from instseg_jax.serving.app import run_server;"
        "run_server(make_pipeline(), LIMITS, host='127.0.0.1', port=0)"
    )
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}:{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        port = int(process.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
        made = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(10)]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        for connection in made:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE)
            assert connection.recv(1000)[:12] in (b"HTTP/1.1 503", b"HTTP/1.1 200")
            connection.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
