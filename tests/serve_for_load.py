"""The server of the load test, in a process of its own: `serve_for_load.py [WEIGHTS]`; without weights a fake network.

Prints the bare pipeline's pictures a second and the port, then serves until a signal comes.
"""

import io
import sys
import time

import numpy as np
from fake_model import make_pipeline, picture
from PIL import Image

from instseg_jax.deploy.server import Limits, run_server
from instseg_jax.images import decode_image
from instseg_jax.inference.pipeline import create_pipeline
from instseg_jax.inference.sources import Source

BATCH_SIZE = 8
SECONDS = 5.0


def measure(pipe, thresholds: np.ndarray) -> float:
    """Pictures a second of the pipeline alone: decoding, network, masks."""
    data = io.BytesIO()
    Image.fromarray(picture((0, 100, 80, 260, 240), size=(480, 640))).save(data, format="JPEG", quality=95)
    sources = [Source("a", lambda: decode_image(data.getvalue(), "a"))] * BATCH_SIZE
    pipe.segment(sources, [thresholds] * BATCH_SIZE)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < SECONDS:
        count += len(pipe.segment(sources, [thresholds] * BATCH_SIZE))
    return count / (time.monotonic() - started)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        pipe = create_pipeline(weights=sys.argv[1], batch_size=BATCH_SIZE, threshold=0.3)
    else:
        pipe = make_pipeline(image_size=64, batch_size=BATCH_SIZE)
    print(measure(pipe, pipe.thresholds), flush=True)
    limits = Limits(queue_size=64, max_wait=0.01, timeout=30.0, max_body=1_000_000, max_pixels=2_000_000)
    run_server(pipe, limits, host="127.0.0.1", port=0)
