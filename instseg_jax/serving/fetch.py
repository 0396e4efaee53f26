"""Fetching of images at URLs for a server: from named hosts only, and never from inside the network.

A name is looked up once, every address is checked, and the connection goes to the checked address: a name that
changes its address in between gains nothing. Redirects are not followed.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

CHUNK = 1 << 16
IPV4_AT_THE_END = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96")))
# A network's own translation, and site-local addresses, which Python calls global.
NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("64:ff9b:1::/48", "fec0::/10", "::/96", "::ffff:0:0:0/96")))


class FetchError(ValueError):
    """The image could not be fetched; `status` is that of the answer to the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it wraps one of IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if any(ip in network for network in IPV4_AT_THE_END):
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None and not is_public(str(wrapped)):
            return False
        if any(ip in network for network in NOT_PUBLIC):
            return False
        if wrapped is not None:
            return True
    return ip.is_global and not ip.is_multicast


def fetch_url(
    url: str,
    *,
    allowed_hosts: Collection[str],
    max_bytes: int,
    timeout: float,
    is_allowed_address: Callable[[str], bool] = is_public,
) -> bytes:
    """The bytes at an http(s) URL whose host is one of `allowed_hosts` (in lower case).

    Raises: FetchError that says why not, with the HTTP status for the client.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port
    except ValueError:
        raise FetchError(422, "the URL is malformed") from None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise FetchError(422, "the URL must be http(s)://host/path without a user name")
    if host not in allowed_hosts:
        raise FetchError(403, f"URLs of {host} are not allowed here; send the image itself")
    port = port or (443 if parts.scheme == "https" else 80)
    deadline = time.monotonic() + timeout
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise FetchError(422, f"{host} is not known") from error
    if not addresses or not all(is_allowed_address(str(address)) for address in addresses):
        raise FetchError(403, f"{host} is not on the public internet")
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    if any(ord(character) <= 32 or ord(character) > 126 for character in target):
        raise FetchError(422, "the URL must be percent-encoded")
    connection = _Connection(host, port, str(sorted(addresses)[0]), parts.scheme == "https", timeout)
    watch = threading.Timer(timeout, connection.abort)  # headers and chunk sizes that trickle in count too
    watch.daemon = True
    watch.start()
    try:
        connection.request("GET", target, headers={"Accept": "image/*", "Connection": "close"})
        response = connection.getresponse()
        if response.status != 200:
            raise FetchError(422, f"{host} answered with {response.status}")
        return _read(response, max_bytes, deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, FetchError):
            raise
        if time.monotonic() > deadline:
            raise FetchError(504, "the image at the URL takes too long") from error
        raise FetchError(422, f"{host} can't be read from") from error
    finally:
        watch.cancel()
        connection.close()


def _read(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    while time.monotonic() <= deadline and (chunk := response.read1(CHUNK)):
        data += chunk
        if len(data) > max_bytes:
            raise FetchError(413, f"the image at the URL is larger than {max_bytes} bytes")
    if time.monotonic() > deadline:  # what was cut off then reads as an end
        raise FetchError(504, "the image at the URL takes too long")
    return bytes(data)


class _Connection(http.client.HTTPConnection):
    """A connection to a given address, with the name of the host in its request and its certificate."""

    def __init__(self, host: str, port: int, address: str, is_encrypted: bool, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._address, self._is_encrypted = address, is_encrypted

    def abort(self) -> None:
        """End the connection from another thread, whatever it waits for."""
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        if self._is_encrypted:
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        else:
            self.sock = plain
