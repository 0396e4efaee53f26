"""Rasters that a STAC item names: `ITEM.json#ASSET`, a file or an address."""

import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from instseg_jax.files import parse_json, read_regular
from instseg_jax.messages import quote, shorten

MAX_BYTES = 16 << 20  # of an item
SECONDS = 30
HTTP = ("http://", "https://")


def is_asset(name: str) -> bool:
    """Whether a name is that of an asset of a STAC item."""
    item, mark, asset = name.rpartition("#")
    return bool(mark and asset) and urllib.parse.urlsplit(item).path.lower().endswith((".json", ".geojson"))


def find_asset(name: str) -> str:
    """The path or address of an asset that `ITEM#ASSET` names; a relative one is beside the item.

    Raises ValueError that names the assets there are, FileNotFoundError where there is no item.
    """
    item, _, asset = name.rpartition("#")
    content = parse_json(_read(item), item)
    assets = content.get("assets") if isinstance(content, dict) else None
    if not isinstance(assets, dict):
        raise ValueError(f"{item} is no STAC item: it has no assets.")
    found = assets.get(asset)
    href = found.get("href") if isinstance(found, dict) else None
    if not isinstance(href, str):
        known = ", ".join(map(str, assets)) or "none"
        raise ValueError(f"{item} has no asset {quote(asset)}; it has {shorten(known)}.")
    if item.startswith(HTTP):
        return urllib.parse.urljoin(item, href)
    return href if "://" in href else str(Path(item).parent / href)


def _read(item: str) -> bytes:
    if not item.startswith(HTTP):
        if not Path(item).exists():
            raise FileNotFoundError(f"There is no STAC item {quote(item)}.")
        return read_regular(item)
    try:
        with urllib.request.urlopen(item, timeout=SECONDS) as response:
            data = response.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ValueError(f"{item} can't be fetched ({error}).") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{item} is larger than {MAX_BYTES >> 20} MiB.")
    return data
