"""Download weight files into a cache: atomic, resumable, checked.

A download grows as `NAME.part` beside its place and is renamed when complete; what was fetched before an interruption
is continued, provided that the server's validator (ETag or Last-Modified, kept in `NAME.part.json`) still holds. The
SHA-256 of the complete file is kept in `NAME.sha256` and checked whenever the file is used again.
"""

import contextlib
import hashlib
import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from instseg_jax.files import alone, cache_folder, sync, write_json, write_text
from instseg_jax.messages import quote

_COCO = "https://paddledet.bj.bcebos.com/models/mask_rtdetr_hgnetv2_{}_6x_coco.pdparams"
_PADDLEDET = "https://bj.bcebos.com/v1/paddledet/models/pretrained/PPHGNetV2_{}_ssld_pretrained.pdparams"
_PADDLECLAS = (
    "https://paddle-imagenet-models-name.bj.bcebos.com/dygraph/legendary_models/"
    "PPHGNetV2_{}_ssld_stage1_pretrained.pdparams"
)
KNOWN_WEIGHTS = {f"mask_rtdetr_{size}_coco": _COCO.format(size) for size in "smlxh"} | {
    "pphgnetv2_s_imagenet": _PADDLECLAS.format("B1"),
    "pphgnetv2_m_imagenet": _PADDLECLAS.format("B2"),
    "pphgnetv2_l_imagenet": _PADDLEDET.format("L"),
    "pphgnetv2_x_imagenet": _PADDLECLAS.format("B5"),
    "pphgnetv2_h_imagenet": _PADDLEDET.format("H"),
}
"""Official weights by name: detectors trained on COCO, and backbones trained on ImageNet."""

_CHUNK_BYTES = 1 << 20
_NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


def is_downloadable(source: str) -> bool:
    """Say whether `source` is a known name or an http(s) address, rather than a path."""
    return source in KNOWN_WEIGHTS or urlsplit(source).scheme in ("http", "https")


def cached_path(source: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return where the file of a known name or an address lies, or would lie, in the cache."""
    url = KNOWN_WEIGHTS.get(source, source)
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    if source not in KNOWN_WEIGHTS and url not in KNOWN_WEIGHTS.values():
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"  # files of one name from two addresses
    return (Path(cache) if cache else cache_folder()) / name


def fetch_weights(
    source: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    attempts: int = 3,
    timeout: float = 30.0,
    show_progress: bool = True,
) -> Path:
    """Return the local file of a known name or an http(s) address, downloading it unless it is in the cache.

    A cut connection is continued, up to `attempts` times in a row without a new byte; `timeout` is in seconds without
    an answer. A file that was put into the cache by hand is accepted and its SHA-256 recorded.

    Raises ValueError for an unknown name and for a cached file that has changed since it was recorded, and
    ConnectionError, which says where to put the file by hand, when it can't be fetched.
    """
    if not is_downloadable(source):
        raise ValueError(f"{quote(source)} is neither an http(s) address nor one of {', '.join(KNOWN_WEIGHTS)}")
    url, path = KNOWN_WEIGHTS.get(source, source), cached_path(source, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.with_name(f"{path.name}.lock")):  # the processes of one machine download a file once
        if not path.exists():
            _download(url, path, attempts, timeout, show_progress)
        _check_sha256(path)
    return path


def _download(url: str, path: Path, attempts: int, timeout: float, show_progress: bool) -> None:
    """Fetch `url` to `path`, through its part file."""
    part = path.with_name(f"{path.name}.part")
    failures = 0
    with _progress_bar(path.name, show_progress) as report:
        while failures < attempts:
            before = part.stat().st_size if part.exists() else 0
            try:
                if _fetch_rest(url, part, timeout, report):
                    sync(part)
                    part.replace(path)
                    _record_path(part).unlink()
                    return
                reason = "the connection was cut"
            except urllib.error.HTTPError as error:
                reason = str(error)
                failures = failures if error.code >= 500 else attempts  # a refusal will not change, a busy server may
            except _NETWORK_ERRORS as error:
                reason = str(getattr(error, "reason", error) or type(error).__name__)
            has_grown = part.exists() and part.stat().st_size > before
            failures = 0 if has_grown else failures + 1
    raise ConnectionError(
        f"can't download {url} ({reason}); run again to continue, or fetch it elsewhere and put it at {path}"
    )


def _fetch_rest(url: str, part: Path, timeout: float, report: Callable[[int, int | None], None]) -> bool:
    """Append what is missing to the part file; return whether the file is complete now."""
    validator, total = _read_record(part, url)
    have = part.stat().st_size if validator and part.exists() else 0
    if have and have == total:
        return True
    headers = {"User-Agent": "instseg_jax", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}  # the whole file again if it has changed
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            part.unlink()  # the file is shorter than what is here: start again
            return False
        raise
    with response:
        size, total = _extent(response, have)
        if not size:
            part.unlink(missing_ok=True)  # before the record: of this version there is not a byte yet
        _write_record(part, url, response.headers, total)
        is_cut = False
        with part.open("r+b" if size else "wb") as file:
            file.seek(size)
            while True:
                try:
                    chunk = response.read(_CHUNK_BYTES)
                except http.client.IncompleteRead as error:
                    chunk, is_cut = error.partial, True
                file.write(chunk)
                size += len(chunk)
                report(size, total)
                if is_cut or not chunk:
                    break
    return not is_cut and total in (None, size)


def _extent(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Return (position of the first byte of the answer, size of the whole file or None)."""
    if response.status == http.client.PARTIAL_CONTENT:
        unit, _, extent = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = extent.partition("/")
        if unit != "bytes" or span.partition("-")[0] != str(have):
            raise http.client.HTTPException(f"the server sent the range {quote(extent)}, not from byte {have}")
        return have, int(total) if total.isdecimal() else None
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _record_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _write_record(part: Path, url: str, headers: http.client.HTTPMessage, total: int | None) -> None:
    etag = headers.get("ETag", "")
    strong = etag if etag.startswith('"') else ""  # a weak one can't vouch for bytes
    record = {"url": url, "validator": strong or headers.get("Last-Modified", ""), "total": total}
    write_json(_record_path(part), record)


def _read_record(part: Path, url: str) -> tuple[str, int | None]:
    """Return what identifies the version that the part file belongs to ("" when unknown), and the size of the whole."""
    try:
        record = json.loads(_record_path(part).read_text(encoding="utf-8"))
        return (record["validator"], record["total"]) if record["url"] == url else ("", None)
    except (OSError, ValueError, KeyError, TypeError):
        return "", None


def _check_sha256(path: Path) -> None:
    """Compare `path` with its recorded SHA-256, or record it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = path.with_name(f"{path.name}.sha256")
    if record.exists():
        recorded = record.read_text(encoding="utf-8").split()[:1]
        if recorded != [digest]:
            raise ValueError(
                f"{path} has changed since it was downloaded (SHA-256 {digest[:12]}..., recorded in {record.name}: "
                f"{''.join(recorded)[:12]}...); delete both files to download it again"
            )
        return
    write_text(record, f"{digest}  {path.name}\n")


@contextlib.contextmanager
def _progress_bar(name: str, show: bool) -> Iterator[Callable[[int, int | None], None]]:
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
