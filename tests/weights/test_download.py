"""Downloads against a server on this machine that cuts, refuses, changes and misbehaves on request."""

import hashlib
import http.server
import re
import threading

import numpy as np
import pytest

from instseg_jax.weights import download
from instseg_jax.weights.download import cached_path, fetch_weights

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path; the attributes say how it behaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag: str | None = '"v1"'
        self.modified: str | None = None
        self.cut_after: list[int | None] = []  # bytes of each answer to come before its connection is cut
        self.knows_ranges = True
        self.sends_length = True
        self.is_chunked = False
        self.status: list[int] = []  # errors to answer first
        self.requests: list[dict] = []  # the headers of each

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/weights.pdparams"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        self.close_connection = True
        if server.status:
            self.send_error(server.status.pop(0))
            return
        start, validator = 0, server.etag or server.modified
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span and server.knows_ranges and self.headers.get("If-Range") in (None, validator):
            start = int(span[1])
            if start >= len(server.content):
                self.send_error(416)
                return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            total = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.modified:
            self.send_header("Last-Modified", server.modified)
        if server.is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif server.sends_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        cut = server.cut_after.pop(0) if server.cut_after else None
        self.write(body if cut is None else body[:cut], is_whole=cut is None)

    def write(self, body: bytes, is_whole: bool):
        for start in range(0, len(body), 100_000):
            part = body[start : start + 100_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if self.server.is_chunked else part)
        if self.server.is_chunked and is_whole:
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, cache, **options):
    return fetch_weights(server.url, cache=cache, show_progress=False, timeout=10, **options)


def test_download_and_reuse(server, tmp_path):
    path = fetch(server, tmp_path / "new" / "cache")
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-weights.pdparams")
    recorded = path.with_name(f"{path.name}.sha256").read_text()
    assert recorded == f"{hashlib.sha256(CONTENT).hexdigest()}  {path.name}\n"
    assert fetch(server, tmp_path / "new" / "cache") == path
    assert len(server.requests) == 1
    assert not list(path.parent.glob("*.part*"))


def test_a_cut_connection_is_continued_within_one_call(server, tmp_path):
    server.cut_after = [1_200_000, 700_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    ranges = [request.get("Range") for request in server.requests]
    assert ranges == [None, "bytes=1200000-", "bytes=1900000-"]
    assert server.requests[1]["If-Range"] == '"v1"'


def test_a_download_that_failed_is_continued_by_the_next_call(server, tmp_path):
    server.cut_after = [1_200_000, 0, 0]
    with pytest.raises(ConnectionError, match=r"connection was cut.*run again to continue, or fetch it elsewhere") as e:
        fetch(server, tmp_path, attempts=2)
    path = cached_path(server.url, tmp_path)
    assert str(path) in str(e.value)
    assert not path.exists()
    assert path.with_name(f"{path.name}.part").read_bytes() == CONTENT[:1_200_000]
    assert fetch(server, tmp_path) == path
    assert path.read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=1200000-"


@pytest.mark.parametrize(
    "change",
    [
        {"knows_ranges": False},  # answers 200 with the whole file
        {"content": CONTENT[::-1], "etag": '"v2"'},  # has become another file
        {"content": CONTENT[:1000], "etag": '"v1"'},  # shorter than what is there: 416
        {"etag": None, "modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
    ],
)
def test_what_can_not_be_continued_starts_again(server, tmp_path, change):
    server.cut_after = [1_200_000, 0, 0]
    with pytest.raises(ConnectionError):
        fetch(server, tmp_path, attempts=2)
    for name, value in change.items():
        setattr(server, name, value)
    assert fetch(server, tmp_path).read_bytes() == server.content


@pytest.mark.parametrize(("etag", "is_continued"), [(None, False), ('W/"weak"', False), ('"strong"', True)])
def test_only_a_strong_validator_vouches_for_the_first_part(server, tmp_path, etag, is_continued):
    server.etag = etag
    server.cut_after = [2_000_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert ("Range" in server.requests[1]) == is_continued


def test_the_modification_date_is_a_validator_too(server, tmp_path):
    server.etag, server.modified = None, "Mon, 01 Jan 2024 00:00:00 GMT"
    server.cut_after = [2_000_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[1]["If-Range"] == server.modified


@pytest.mark.parametrize("setting", ["no length", "chunked", "chunked and cut"])
def test_answers_without_a_length(server, tmp_path, setting):
    server.sends_length = False
    server.is_chunked = "chunked" in setting
    server.cut_after = [1_000_000] if "cut" in setting else []
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 1 + ("cut" in setting)


def test_killed_after_the_last_byte(server, tmp_path):
    path = cached_path(server.url, tmp_path)
    server.cut_after = [1_200_000, 0, 0]
    with pytest.raises(ConnectionError):
        fetch(server, tmp_path, attempts=2)
    path.with_name(f"{path.name}.part").write_bytes(CONTENT)
    server.requests.clear()
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == []


def test_a_refusal_is_final_and_a_busy_server_is_not(server, tmp_path):
    server.status = [503, 503]
    assert fetch(server, tmp_path / "a").read_bytes() == CONTENT
    assert len(server.requests) == 3
    server.requests.clear()
    server.status = [404]
    with pytest.raises(ConnectionError, match=r"HTTP Error 404.*put it at"):
        fetch(server, tmp_path / "b")
    assert len(server.requests) == 1


def test_no_network_says_where_to_put_the_file(server, tmp_path, monkeypatch):
    monkeypatch.setitem(download.KNOWN_WEIGHTS, "mask_rtdetr_s_coco", "http://127.0.0.1:9/weights.pdparams")
    monkeypatch.setenv("INSTSEG_CACHE", str(tmp_path))
    place = tmp_path / "weights.pdparams"
    with pytest.raises(ConnectionError, match=re.escape(f"put it at {place}")):
        fetch_weights("mask_rtdetr_s_coco", show_progress=False)
    place.write_bytes(b"fetched elsewhere")
    assert fetch_weights("mask_rtdetr_s_coco", show_progress=False) == place
    assert place.with_name("weights.pdparams.sha256").exists()


def test_a_changed_cached_file_is_noticed(server, tmp_path):
    path = fetch(server, tmp_path)
    damaged = bytearray(CONTENT)
    damaged[1_234_567] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"has changed since it was downloaded.*delete both files"):
        fetch(server, tmp_path)


def test_two_at_once_download_once(server, tmp_path):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(server, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 3
    assert len(server.requests) == 1


def test_two_addresses_with_one_file_name_do_not_collide(server, tmp_path):
    other = server.url.replace("models", "others")
    assert cached_path(server.url, tmp_path) != cached_path(other, tmp_path)


def test_known_names():
    assert len(download.KNOWN_WEIGHTS) == 10
    assert download.KNOWN_WEIGHTS["mask_rtdetr_l_coco"] == (
        "https://paddledet.bj.bcebos.com/models/mask_rtdetr_hgnetv2_l_6x_coco.pdparams"
    )
    assert cached_path("pphgnetv2_x_imagenet").name == "PPHGNetV2_B5_ssld_stage1_pretrained.pdparams"
    assert cached_path(download.KNOWN_WEIGHTS["pphgnetv2_h_imagenet"]) == cached_path("pphgnetv2_h_imagenet")


@pytest.mark.parametrize("source", ["mask_rtdetr_q_coco", "file:///etc/passwd", "ftp://host/x.pdparams"])
def test_other_sources_are_refused(source):
    assert not download.is_downloadable(source)
    with pytest.raises(ValueError, match="mask_rtdetr_s_coco"):
        fetch_weights(source)


def test_progress_goes_to_the_error_stream(server, tmp_path, capsys):
    fetch_weights(server.url, cache=tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100%" in captured.err


@pytest.mark.parametrize("is_written", [False, True])
def test_a_file_that_changed_is_not_mixed_with_what_was_there_when_a_kill_comes_between(
    server, tmp_path, monkeypatch, is_written
):
    server.cut_after = [1_200_000, 0, 0]
    with pytest.raises(ConnectionError):
        fetch(server, tmp_path, attempts=2)
    server.content, server.etag = np.random.default_rng(1).bytes(3_000_000), '"v2"'
    write_record = download._write_record

    def killed(*arguments):
        if is_written:
            write_record(*arguments)
        raise KeyboardInterrupt  # nothing that is left to do is done

    monkeypatch.setattr(download, "_write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path)
    monkeypatch.undo()
    assert fetch(server, tmp_path).read_bytes() == server.content
