"""A client of the server, with the standard library and numpy alone: copy it, or run it.

python -m instseg_jax.serving.client http://127.0.0.1:8080 picture.jpg --threshold=0.4
"""

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np


def segment(
    server: str,
    picture: str | Path,
    *,
    threshold: float | None = None,
    visualize: bool = False,
    token: str | None = None,
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Send a picture; return the answer's `result`. Raises RuntimeError with the server's message."""
    content = {
        "image": base64.b64encode(Path(picture).read_bytes()).decode("ascii"),
        "threshold": threshold,
        "visualize": visualize,
    }
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(
        f"{server.rstrip('/')}/instance-segmentation", json.dumps(content).encode(), headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)["result"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code}: {json.load(error)['errorMsg']}") from None


def decode_mask(segmentation: dict[str, Any]) -> np.ndarray:
    """The mask [height, width] bool of an instance's `segmentation`, a compressed COCO RLE of the whole image."""
    runs: list[int] = []
    value = shift = 0
    for character in segmentation["counts"].encode("ascii"):
        digit = character - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:  # the last digit of a run; 16 is its sign
            value -= (1 << shift) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    height, width = segmentation["size"]
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return pixels.reshape(width, height).T


def main() -> int:
    """Send the picture that the command line names, print its instances; returns the exit code."""
    parser = argparse.ArgumentParser(description="Segment a picture with a server.")
    parser.add_argument("server", help="e.g. http://127.0.0.1:8080")
    parser.add_argument("picture")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--token")
    parser.add_argument("--save", metavar="FILE", help="write the drawn picture (JPEG)")
    options = parser.parse_args()
    try:
        result = segment(
            options.server,
            options.picture,
            threshold=options.threshold,
            visualize=options.save is not None,
            token=options.token,
        )
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for instance in result["instances"]:
        box = ", ".join(f"{value:.0f}" for value in instance["bbox"])
        pixels = int(decode_mask(instance["segmentation"]).sum())
        print(f"{instance['categoryName']} {instance['score']:.2f}: box {box}; {pixels} pixels")
    if options.save is not None:
        Path(options.save).write_bytes(base64.b64decode(result["image"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
