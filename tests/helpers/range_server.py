"""A server of one folder on the loopback, a process of its own, that answers range requests and counts what it sends.

A process, because rasterio keeps Python from running while it opens a file.
"""

import contextlib
import http.server
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def serve_ranges(folder: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """The address of the folder, and a function that gives the number of bytes that were sent from it so far."""
    process = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"

        def sent() -> int:
            with urllib.request.urlopen(f"{address}/sent") as response:
                return int(response.read())

        yield address, sent
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of the folder, whole or in part."""

    folder = Path()
    total = 0

    def do_HEAD(self):
        self.answer(is_head=True)

    def do_GET(self):
        self.answer(is_head=False)

    def answer(self, *, is_head: bool) -> None:
        path = self.folder / Path(self.path).name
        if self.path == "/sent":
            data = str(Handler.total).encode()
        elif path.is_file():
            data = path.read_bytes()
        else:
            self.send_error(404)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        last = min(int(wanted[2]) if wanted and wanted[2] else len(data) - 1, len(data) - 1)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if not is_head:
            Handler.total += last + 1 - first
            self.wfile.write(data[first : last + 1])

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
