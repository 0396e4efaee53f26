"""The server: the official schema, batches, limits, tokens, addresses, shutdown, and hostile input."""

import base64
import io
import threading
import time
import zlib

import numpy as np
import pytest
from fake_model import make_pipeline, picture
from PIL import Image
from pycocotools import mask as mask_api

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import dataclasses
import socket

from png_files import png_of
from running_server import LIMITS, Running, encode

from instseg_jax.serving import client, fetch
from instseg_jax.serving.batching import Batcher, QueueFullError

PICTURE = picture((0, 10, 20, 30, 50), (2, 40, 8, 60, 28), size=(60, 64))


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


@pytest.fixture(scope="module")
def server():
    with Running(make_pipeline(batch_size=4), LIMITS) as running:
        yield running


def is_error(answer: dict, status: int) -> bool:
    return set(answer) == {"logId", "errorCode", "errorMsg"} and answer["errorCode"] == status and answer["errorMsg"]


def test_the_official_answer(server):
    status, answer, _ = server.send({"image": in_base64(encode(PICTURE)), "logId": "mine"})
    assert status == 200 and set(answer) == {"logId", "errorCode", "errorMsg", "result"}
    assert (answer["logId"], answer["errorCode"], answer["errorMsg"]) == ("mine", 0, "Success")
    first, second = answer["result"]["instances"]
    assert set(first) == {"bbox", "categoryId", "categoryName", "score", "mask", "segmentation"}
    assert (first["categoryId"], first["categoryName"], second["categoryName"]) == (0, "red", "blue")
    np.testing.assert_allclose(first["bbox"], [10, 20, 30, 50], atol=1e-4)
    assert set(first["mask"]) == {"rleResult", "size"} and first["mask"]["size"] == [30, 20]
    # As a client of the official server puts the mask into the image.
    crop = mask_api.decode({"size": first["mask"]["size"], "counts": first["mask"]["rleResult"]})
    x1, y1, x2, y2 = (round(v) for v in first["bbox"])
    pasted = np.zeros((60, 64), np.uint8)
    pasted[y1:y2, x1:x2] = crop
    np.testing.assert_array_equal(pasted, (PICTURE == [255, 0, 0]).all(axis=2))
    np.testing.assert_array_equal(mask_api.decode(first["segmentation"]), pasted)
    with Image.open(io.BytesIO(base64.b64decode(answer["result"]["image"]))) as drawn:
        assert drawn.format == "JPEG" and drawn.size == (64, 60)


def test_options_of_a_request(server):
    image = in_base64(encode(PICTURE))
    _, answer, _ = server.send({"image": image, "threshold": 0.92, "visualize": False})
    assert "image" not in answer["result"]
    assert [instance["categoryName"] for instance in answer["result"]["instances"]] == ["red"]
    _, answer, _ = server.send({"image": image, "threshold": None, "visualize": None})
    assert "image" in answer["result"] and len(answer["result"]["instances"]) == 2 and len(answer["logId"]) > 20
    _, answer, _ = server.send({"image": "data:image/png;base64," + image})
    assert len(answer["result"]["instances"]) == 2


def test_visualize_follows_the_pipeline_where_a_request_is_silent():
    quiet = dataclasses.replace(make_pipeline(), visualize=False)
    with Running(quiet, LIMITS) as running:
        assert "image" not in running.send({"image": in_base64(encode(PICTURE))})[1]["result"]


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_files_as_body_and_in_a_form(server, image_format):
    data = encode(PICTURE, image_format)
    _, answer, _ = server.send(
        data, path="/instance-segmentation?threshold=0.5&visualize=false&logId=a", content_type="image/any"
    )
    assert answer["logId"] == "a" and len(answer["result"]["instances"]) == 2 and "image" not in answer["result"]
    head = b'--X\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + data
    tail = b'\r\n--X\r\nContent-Disposition: form-data; name="threshold"\r\n\r\n0.92\r\n--X--\r\n'
    _, answer, _ = server.send(head + tail, content_type="multipart/form-data; boundary=X")
    assert [instance["categoryName"] for instance in answer["result"]["instances"]] == ["red"]


def test_the_sample_client(server, tmp_path):
    (tmp_path / "a.png").write_bytes(encode(PICTURE))
    result = client.segment(server.address, tmp_path / "a.png", threshold=0.5, visualize=True)
    first, second = result["instances"]
    np.testing.assert_array_equal(client.decode_mask(first["segmentation"]), (PICTURE == [255, 0, 0]).all(axis=2))
    assert client.decode_mask(second["segmentation"]).sum() == 400 and "image" in result
    with pytest.raises(RuntimeError, match="422: "):
        client.segment(server.address, tmp_path / "a.png", threshold=7)


def test_health_metrics_and_documentation(server):
    status, answer, _ = server.send(b"", path="/health", method="GET")
    assert status == 200 and (answer["errorCode"], answer["errorMsg"]) == (0, "Healthy")
    server.send({"image": in_base64(encode(PICTURE))})
    status, text, _ = server.send(b"", path="/metrics", method="GET")
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(counts['instseg_requests_total{status="200"}']) >= 1
    assert float(counts["instseg_batch_size_sum"]) >= 1 and float(counts["instseg_instances_total"]) >= 2
    assert float(counts["instseg_active_requests"]) == 0
    _, description, _ = server.send(b"", path="/openapi.json", method="GET")
    operation = description["paths"]["/instance-segmentation"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data", "image/*"}
    assert {"200", "413", "422", "429", "504"} <= set(operation["responses"])


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, '"loc": "body.image"'),
        ({"image": 5}, 422, "string_type"),
        ({"image": ""}, 422, "string_too_short"),
        ({"image": "no base64!"}, 422, "neither base64 nor a URL"),
        ({"image": in_base64(b"text")}, 422, "is no JPEG"),
        ({"image": in_base64(png_of(64, 64))}, 422, "can't be decoded"),
        ({"image": in_base64(encode(PICTURE)), "threshold": 3}, 422, '"loc": "body.threshold"'),
        ({"image": in_base64(encode(PICTURE)), "threshold": "a"}, 422, "body.threshold"),
        ({"image": in_base64(encode(PICTURE)), "visualize": "yes"}, 422, "body.visualize"),
        ({"image": in_base64(png_of(1000, 1000))}, 413, "1000 x 1000"),
        ({"image": in_base64(png_of(100_000, 100_000))}, 413, "pixels"),
        ({"image": "A" * 300_000}, 413, "200000 bytes"),
        ({"image": "http://127.0.0.1/a.png"}, 403, "URLs are not fetched"),
        ({"image": "file:///etc/passwd"}, 403, "URLs are not fetched"),
        (b"{", 422, "json_invalid"),
        (b"[1]", 422, "model_type"),
        (b"\xff\xfe", 422, "json_invalid"),
        (b"[" * 100_000, 422, "json_invalid"),
        (b'{"image": "a", "threshold": NaN}', 422, "threshold"),
    ],
)  # fmt: skip
def test_every_error_is_the_official_one(server, body, status, message):
    given, answer, _ = server.send(body)
    assert given == status and is_error(answer, status), answer
    assert message in answer["errorMsg"]


def test_other_paths_and_methods(server):
    for path, method, status in (("/nowhere", "GET", 404), ("/instance-segmentation", "GET", 405)):
        given, answer, _ = server.send(b"", path=path, method=method)
        assert given == status and is_error(answer, status)


def test_forms_without_a_picture(server):
    body = b'--X\r\nContent-Disposition: form-data; name="other"\r\n\r\n1\r\n--X--\r\n'
    for content in (body, b"rubbish"):
        status, answer, _ = server.send(content, content_type="multipart/form-data; boundary=X")
        assert status == 422 and is_error(answer, 422)


def test_a_body_that_only_says_it_is_huge_is_refused_at_once(server):
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(b"POST /instance-segmentation HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_log_id_comes_back_with_an_error(server):
    _, answer, _ = server.send({"image": "no base64!", "logId": "mine"})
    assert answer["logId"] == "mine"


def test_the_token():
    with Running(make_pipeline(), dataclasses.replace(LIMITS, token="geheim")) as running:
        body = {"image": in_base64(encode(PICTURE))}
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "geheim"},
            {"authorization": "Bearer ä"},
        ):
            status, answer, given = running.send(body, **{k: v.encode("latin-1") for k, v in headers.items()})
            assert status == 401 and is_error(answer, 401) and given["www-authenticate"] == "Bearer"
        assert running.send(body, authorization="Bearer geheim")[0] == 200
        assert running.send(b"", path="/health", method="GET")[0] == 200


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/openapi.json"])
def test_pages_about_the_server_ask_for_the_token(path):
    with Running(make_pipeline(), dataclasses.replace(LIMITS, token="geheim")) as running:
        assert running.send(b"", path=path, method="GET")[0] == 401
        status, text, _ = running.send(b"", path=path, method="GET", authorization="Bearer geheim")
        assert (status == 200 and "script" not in str(text)) or path == "/openapi.json"


def test_a_picture_without_a_header_is_one(server):
    """As `curl --data-binary @a.jpg` sends it."""
    body = encode(PICTURE, "JPEG")
    status, answer, _ = server.send(body, content_type="application/x-www-form-urlencoded")
    assert status == 200 and len(answer["result"]["instances"]) == 2
    status, answer, _ = server.send(b'{"image": "a"}', content_type="text/plain")
    assert status == 422 and "content type is text/plain" in answer["errorMsg"]


def parts_without_pixels(kind: str, count: int) -> bytes:
    if kind == "jpeg":
        return b"\xff\xd8" + b"\xff\xe0\x00\x02" * count
    chunk = b"\0\0\0\0tEXt" + zlib.crc32(b"tEXt").to_bytes(4, "big")
    return png_of(8, 8)[:33] + chunk * count


@pytest.mark.parametrize("kind", ["jpeg", "png", "json"])
def test_bodies_that_take_long_to_parse_do_not_hold_up_others(kind):
    if kind == "json":
        body, headers = b'{"image": [' + b"[]," * 1_000_000 + b"[]]}", {"content_type": "application/json"}
    else:
        body, headers = parts_without_pixels(kind, 300_000), {"content_type": "image/jpeg"}
    with Running(make_pipeline(), dataclasses.replace(LIMITS, max_body=8_000_000)) as running:
        answers: list = []
        threads = [threading.Thread(target=lambda: answers.append(running.send(body, **headers))) for _ in range(4)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        slowest = 0.0
        while any(thread.is_alive() for thread in threads):
            asked = time.monotonic()
            assert running.send(b"", path="/health", method="GET")[0] == 200
            slowest = max(slowest, time.monotonic() - asked)
        for thread in threads:
            thread.join()
    assert [status for status, _, _ in answers] == [422] * 4
    assert time.monotonic() - started < 20 and slowest < 3


def test_a_client_that_leaves_is_no_failure(caplog):
    with Running(make_pipeline(), LIMITS) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            head = b"POST /instance-segmentation HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
            head += b"Content-Length: 5000\r\n"
            connection.sendall(head + b"\r\n" + b"x" * 100)
        for _ in range(200):
            _, text, _ = running.send(b"", path="/metrics", method="GET")
            if 'status="499"' in text:
                break
            time.sleep(0.02)
        assert 'instseg_requests_total{status="499"} 1.0' in text and 'status="500"' not in text
    assert "Traceback" not in caplog.text


def held_pipeline(*, batch_size: int = 1):
    """A pipeline whose network waits for the event, and the sizes of the batches that it was given."""
    pipe, gate, sizes = make_pipeline(batch_size=batch_size), threading.Event(), []

    def run(images):
        sizes.append(int((images.reshape(len(images), -1).max(axis=1) > 0).sum()))
        assert gate.wait(60)
        return pipe.run(images)

    return dataclasses.replace(pipe, run=run), gate, sizes


def wait_for_requests(running: Running, count: int) -> None:
    deadline = time.monotonic() + 30
    while running.app.state.server.active < count:
        assert time.monotonic() < deadline, "the requests did not arrive"
        time.sleep(0.01)


def start_in_parallel(count: int, call) -> tuple[list[threading.Thread], list]:
    results = [None] * count
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, call(i))) for i in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_full_queue_refuses():
    pipe, gate, _ = held_pipeline()
    body = {"image": in_base64(encode(PICTURE))}
    with Running(pipe, dataclasses.replace(LIMITS, queue_size=3, timeout=60.0)) as running:
        threads, accepted = start_in_parallel(3, lambda _: running.send(body))
        wait_for_requests(running, 3)
        for _ in range(5):
            status, answer, headers = running.send(body)
            assert status == 429 and is_error(answer, 429) and headers["retry-after"]
        gate.set()
        join(threads)
        assert [status for status, _, _ in accepted] == [200] * 3
        assert running.send(body)[0] == 200


def test_a_late_answer_is_given_up():
    pipe, gate, _ = held_pipeline()
    with Running(pipe, dataclasses.replace(LIMITS, timeout=0.3)) as running:
        status, answer, _ = running.send({"image": in_base64(encode(PICTURE)), "logId": "late"})
        assert status == 504 and is_error(answer, 504) and answer["logId"] == "late"
        gate.set()  # only now: nobody waited for the network


def test_a_body_that_does_not_come_is_given_up():
    limits = dataclasses.replace(LIMITS, timeout=0.3)
    with (
        Running(make_pipeline(), limits) as running,
        socket.create_connection(("127.0.0.1", running.port), 10) as connection,
    ):
        connection.sendall(b"POST /instance-segmentation HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_requests_share_batches():
    pipe, gate, sizes = held_pipeline(batch_size=4)
    with Running(pipe, dataclasses.replace(LIMITS, max_wait=0.05, timeout=60.0)) as running:
        images = [picture((i % 3, 2 * i, i, 2 * i + 10, i + 9)) for i in range(12)]
        threads, answers = start_in_parallel(12, lambda i: running.send({"image": in_base64(encode(images[i]))})[1])
        wait_for_requests(running, 12)
        gate.set()
        join(threads)
    # Two threads may take what there is at first; the rest has arrived by then and fills its batches.
    assert sum(sizes) == 12 and max(sizes) == 4 and len(sizes) < 9
    for i, answer in enumerate(answers):  # everyone gets their own
        ((box, name),) = [(found["bbox"], found["categoryName"]) for found in answer["result"]["instances"]]
        np.testing.assert_allclose(box, [2 * i, i, 2 * i + 10, i + 9], atol=1e-3)
        assert name == ("red", "green", "blue")[i % 3]


def test_what_was_accepted_is_finished_at_shutdown():
    pipe, gate, _ = held_pipeline()
    with Running(pipe, LIMITS) as running:
        threads, answers = start_in_parallel(4, lambda _: running.send({"image": in_base64(encode(PICTURE))})[0])
        wait_for_requests(running, 4)
        threading.Timer(0.3, gate.set).start()  # after the server was told to stop
    join(threads)
    assert answers == [200] * 4
    with pytest.raises(RuntimeError, match="closed"):
        running.app.state.server.batcher.submit(None)


def test_a_failing_network_is_an_error_of_the_server():
    def broken(images):
        raise ArithmeticError("secret detail")

    with Running(dataclasses.replace(make_pipeline(), run=broken), LIMITS) as running:
        status, answer, _ = running.send({"image": in_base64(encode(PICTURE))})
        assert status == 500 and is_error(answer, 500) and "secret" not in answer["errorMsg"]
        assert running.send(b"", path="/health", method="GET")[0] == 200


@pytest.mark.parametrize(("field", "value"), [("queue_size", 0), ("timeout", 0), ("max_body", -1), ("max_wait", 99)])
def test_limits_must_make_sense(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(LIMITS, **{field: value})


# --- batching ------------------------------------------------------------------------------------------------------


def test_one_bad_item_fails_alone():
    def run(items):
        if 3 in items:
            raise ValueError("three")
        return [item * 10 for item in items]

    batcher = Batcher(run, batch_size=8, max_wait=0.05, queue_size=8)
    futures = [batcher.submit(i) for i in range(5)]
    batcher.close()
    assert [future.result() for i, future in enumerate(futures) if i != 3] == [0, 10, 20, 40]
    with pytest.raises(ValueError, match="three"):
        futures[3].result()


def test_the_queue_is_bounded_and_cancelled_items_are_not_run():
    release, seen = threading.Event(), []

    def run(items):
        seen.extend(items)
        release.wait(10)
        return items

    batcher = Batcher(run, batch_size=1, max_wait=0.0, queue_size=2)
    running = [batcher.submit(i) for i in range(2)]
    while len(seen) < 2:
        time.sleep(0.01)
    waiting = [batcher.submit(i) for i in (2, 3)]
    with pytest.raises(QueueFullError):
        batcher.submit(4)
    assert batcher.waiting == 2 and waiting[0].cancel()
    release.set()
    batcher.close()
    assert [future.result() for future in (*running, waiting[1])] == [0, 1, 3] and sorted(seen) == [0, 1, 3]


def test_a_lone_item_does_not_wait_for_ever():
    batcher = Batcher(list, batch_size=64, max_wait=0.05, queue_size=8)
    started = time.monotonic()
    assert batcher.submit(1).result(5) == 1
    assert time.monotonic() - started < 2
    batcher.close()


# --- URLs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
     "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "::",
     "64:ff9b:1::1", "64:ff9b:1::5db8:d70e", "fec0::1", "::10.0.0.1", "::ffff:0:10.0.0.1", "::5db8:d70e"],
)  # fmt: skip
def test_private_addresses_are_not_public(address):
    assert not fetch.is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:93.184.215.14"])
def test_public_addresses_are(address):
    assert fetch.is_public(address)


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("ftp://images.example/a.png", 422),
        ("http://user@images.example/a.png", 422),
        ("http://other.example/a.png", 403),
        ("http://images.example.evil.example/a.png", 403),
        ("http://images.example:99999/a.png", 422),
        ("http://[::1/a.png", 422),
        ("http:///a.png", 422),
    ],
)
def test_urls_that_are_refused(url, status):
    with pytest.raises(fetch.FetchError) as refused:
        fetch.fetch_url(url, allowed_hosts={"images.example"}, max_bytes=1000, timeout=1.0)
    assert refused.value.status == status


def test_a_name_inside_the_network_is_not_reached(monkeypatch, server):
    """An allowed name that leads to the loopback, alone or among public addresses."""
    for addresses in (["127.0.0.1"], ["93.184.215.14", "10.0.0.1"]):
        found = [(2, 1, 6, "", (address, 80)) for address in addresses]
        monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, found=found, **__: found)
        with pytest.raises(fetch.FetchError, match="not on the public internet"):
            fetch.fetch_url("http://images.example/", allowed_hosts={"images.example"}, max_bytes=1000, timeout=1.0)


def test_an_allowed_url_is_fetched(tmp_path):
    """On the loopback, with the check of addresses loosened for the test alone."""
    import functools
    import http.server

    (tmp_path / "a.png").write_bytes(encode(PICTURE))
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path)))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    options = {"allowed_hosts": {"localhost"}, "timeout": 5.0, "is_allowed_address": lambda _: True}
    url = f"http://localhost:{files.server_port}"
    try:
        assert fetch.fetch_url(f"{url}/a.png", max_bytes=100_000, **options) == encode(PICTURE)
        with pytest.raises(fetch.FetchError) as refused:
            fetch.fetch_url(f"{url}/a.png", max_bytes=50, **options)
        assert refused.value.status == 413
        with pytest.raises(fetch.FetchError, match="answered with 404"):
            fetch.fetch_url(f"{url}/none.png", max_bytes=50, **options)
    finally:
        files.shutdown()
        files.server_close()


def test_urls_of_named_hosts_go_through_the_server(monkeypatch):
    limits = dataclasses.replace(LIMITS, allowed_hosts=frozenset({"images.example"}))
    asked = []

    def fetch_url(url, **options):
        asked.append((url, options["max_bytes"]))
        return encode(PICTURE)

    monkeypatch.setattr("instseg_jax.serving.server.fetch_url", fetch_url)
    with Running(make_pipeline(), limits) as running:
        status, answer, _ = running.send({"image": "https://images.example/a.png"})
        assert status == 200 and len(answer["result"]["instances"]) == 2
    assert asked == [("https://images.example/a.png", LIMITS.max_body)]
