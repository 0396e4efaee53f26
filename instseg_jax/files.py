"""Writing files so that a reader never finds half of one, and reading them so that damage does not pass for content.

A file is written aside, then moved into place. What must outlast a power cut is flushed to the disk before it is moved
(`durable`). A sealed JSON object carries a digest of itself, which reading checks. Whatever others may have put into a
folder is read by `read_regular`: a pipe would be waited for, a device never ends.
"""

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from instseg_jax.messages import quote, shorten

DIGEST = "digest"  # key of a sealed object
MAX_YAML_BYTES, MAX_YAML_DEPTH = 1 << 17, 50
MAX_BYTES = 4 << 30  # of a file that is read whole: a file of holes may call itself a million times larger than it is
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def cache_folder() -> Path:
    """The folder of downloads and compiled programs: $INSTSEG_CACHE, or ~/.cache/instseg_jax."""
    return Path(os.environ.get("INSTSEG_CACHE") or Path.home() / ".cache" / "instseg_jax")


def check_regular(path: str | Path) -> None:
    """Raise ValueError unless a path leads to a regular file, FileNotFoundError where it leads nowhere."""
    kind = stat.S_IFMT(os.stat(path).st_mode)  # noqa: PTH116 (also of strings, many times)
    if kind != stat.S_IFREG:
        raise ValueError(f"{str(path)!r} is no regular file but {KINDS.get(kind, 'something else')}.")


def read_regular(path: str | Path) -> bytes:
    """The content of a regular file. Raises ValueError for anything else or beyond MAX_BYTES, OSError without it."""
    check_regular(path)
    # Should it have become a pipe since, it is not waited for.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb", buffering=0) as file:  # noqa: PTH123 (a number)
        size = os.fstat(handle).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{str(path)!r} has {size} bytes, at most {MAX_BYTES} are read.")
        return file.read() if size else b""  # files without a size, as those of /proc, may go on for ever


def read_regular_text(path: str | Path) -> str:
    """The content of a regular file of UTF-8, with or without a BOM. Raises UnicodeDecodeError too."""
    return read_regular(path).decode("utf-8-sig")


def read_address(url: str, *, most: int, seconds: float) -> bytes:
    """The bytes at an address. Raises ValueError in one sentence when they don't come or are more than `most`."""
    import urllib.request  # few commands need it, and all wait for this file

    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            data = response.read(most + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{url} can't be fetched ({error}).") from error
    if len(data) > most:
        raise ValueError(f"{url} is larger than {most >> 20} MiB.")
    return data


def make_folder(folder: Path) -> None:
    """Make a folder, unless it is there, and see that it can be written to. Raises OSError that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"can't write to the folder {folder} ({error.strerror})") from error


def is_regular(path: str | Path) -> bool:
    """Whether a path leads to a regular file; one that is too long or has a NUL leads nowhere."""
    return os.path.isfile(path)  # noqa: PTH113 (which raises then)


def is_inside(folder: str | Path, name: str | Path) -> bool:
    """Whether a name leads to a place below a folder, once `..`, absolute paths and links are followed."""
    path = os.path.join(folder, name)  # noqa: PTH118 (for each picture of a data set)
    if os.path.basename(name) == str(name) not in ("", ".", "..") and not os.path.islink(path):  # noqa: PTH119, PTH114
        return True
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is inside with the same lock file; where there are no such locks, go on."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with lock.open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """The path of a file to write, in a folder that is there; it becomes `path` at the end, or goes after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a move is only atomic within a file system; hidden, and a name of its own for
    # each writer, so that two of them never share it.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def replace_folder(folder: Path, aside: Path) -> None:
    """Put the folder `aside`, which lies beside, in the place of `folder`, whether there is one or not."""
    previous = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.previous")
    if folder.exists():
        folder.rename(previous)
    try:
        aside.rename(folder)
    except OSError:
        if previous.exists():
            previous.rename(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes, *, durable: bool = False) -> Path:
    """Write `data` to `path` whole or not at all, making its folder if need be; return the path."""
    path = Path(path)
    with written_aside(path) as aside:
        aside.write_bytes(data)
        if durable:
            sync(aside)
    if durable:
        sync(path.parent)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path` whole or not at all; return the path."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(
    path: str | Path, obj: Any, *, indent: int | None = None, ensure_ascii: bool = False, durable: bool = False
) -> Path:
    """Write `obj` as JSON to `path` whole or not at all; return the path.

    numpy scalars and arrays become numbers and lists, paths become strings. Raises ValueError for NaN and
    infinity, which JSON does not have: use None.
    """
    text = json.dumps(obj, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False, default=_plain)
    return write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"), durable=durable)


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ValueError that names the file and the place where it is damaged, OSError without it."""
    return parse_json(read_regular(path), path, verdict="is damaged")


def parse_json(data: bytes, name: str | Path, *, verdict: str = "is not valid JSON") -> Any:
    """Read JSON, UTF-8 with or without a BOM. Raises ValueError, `name`, `verdict` and the reason in one sentence."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        reason: Exception = error
        said = f"it is not a UTF-8 text file (byte {error.start})"
    except json.JSONDecodeError as error:
        reason, said = error, f"{error.msg} in line {error.lineno}, column {error.colno}"
    except RecursionError as error:
        reason, said = error, "it is nested too deeply"
    except ValueError as error:  # numbers of thousands of digits
        reason, said = error, shorten(error)
    raise ValueError(f"{name} {verdict}: {said}.") from reason


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file of plain values. Raises ValueError, also for aliases, which may stand for any amount."""
    import yaml  # slow to import

    data = read_regular(path)
    if len(data) > MAX_YAML_BYTES:
        raise ValueError(f"{path} is no YAML file of ours: it has {len(data)} bytes, at most {MAX_YAML_BYTES} are read")
    try:
        text = data.decode("utf-8-sig")
        depth = 0
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):
                raise ValueError("it has aliases, write out what they stand for")
            name = type(token).__name__  # FlowSequenceStartToken, BlockEndToken, ...
            depth += name.endswith("StartToken") - (name.endswith("EndToken") and name != "DocumentEndToken")
            if depth > MAX_YAML_DEPTH:
                raise ValueError(f"it is nested in more than {MAX_YAML_DEPTH} levels")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{path} is no YAML file ({where}{shorten(error.problem or error.context)})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file (byte {error.start})") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML file ({shorten(error)})") from error


def sync(path: Path) -> None:
    """Have the system write a file, or the list of a folder, to the disk; nothing where it can't (Windows folders)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # a file system that can't
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` for everything below a folder, and the folder."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def digest(data: Any) -> str:
    """CRC-32 of some bytes (any buffer), as 8 hex digits: no flipped bit leaves it the same."""
    return f"{zlib.crc32(data):08x}"


def digest_file(path: str | Path) -> str:
    """`digest` of a file's content, read in parts."""
    value = 0
    with Path(path).open("rb") as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return f"{value:08x}"


def seal(obj: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of its content under the key "digest"."""
    plain = {key: value for key, value in obj.items() if key != DIGEST}
    return plain | {DIGEST: _digest_of_json(plain)}


def check_seal(obj: Mapping[str, Any], where: str | Path, *, is_sealed: bool = False) -> dict[str, Any]:
    """The object without its digest. Raises ValueError that names `where` it was read from if its content is another
    than was sealed. Objects without a digest, of before there were any, pass unless `is_sealed` says that it had one.
    """
    plain = {key: value for key, value in obj.items() if key != DIGEST}
    if (is_sealed or DIGEST in obj) and obj.get(DIGEST) != _digest_of_json(plain):
        raise ValueError(f"{where} is damaged: its content is not what was written")
    return plain


def _digest_of_json(obj: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(obj, default=_plain))  # as it is read again: keys are text, tuples are lists
    return digest(json.dumps(plain, sort_keys=True).encode())


def _plain(value: Any) -> Any:
    """Make a value that JSON does not know a plain one."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"Cannot write {type(value).__name__} as JSON: {quote(value)}.")
