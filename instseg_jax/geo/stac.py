"""Rasters that a STAC item names: `ITEM.json#ASSET`, a file or an address."""

import urllib.parse
from pathlib import Path

from instseg_jax.files import parse_json, read_address, read_regular
from instseg_jax.messages import quote, shorten

MAX_BYTES = 16 << 20  # of an item
SECONDS = 30
HTTP = ("http://", "https://")
REMOTE = (*HTTP, "s3://", "gs://")


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
    is_remote = item.startswith(HTTP)
    place = urllib.parse.urljoin(item, href) if is_remote else href
    if place.startswith(REMOTE):
        return place
    # The item was named, not what it says: from elsewhere it opens no file here, and nowhere a driver of GDAL's.
    if is_remote or "://" in place or place.startswith("/vsi"):
        raise ValueError(
            f"Asset {quote(asset)} of {item} lies at {quote(href)}; allowed are {', '.join(REMOTE)} or a file."
        )
    return str(Path(item).parent / place)


def _read(item: str) -> bytes:
    if item.startswith(HTTP):
        return read_address(item, most=MAX_BYTES, seconds=SECONDS)
    if not Path(item).exists():
        raise FileNotFoundError(f"There is no STAC item {quote(item)}.")
    return read_regular(item)
