"""The server of the load test, in a process of its own: `serve_for_load.py [WEIGHTS]`; without weights a fake network.

Prints the bare pipeline's pictures a second and the port, then serves until a signal comes.
"""

import itertools
import sys
import tempfile
import time

from fake_model import make_pipeline, picture
from PIL import Image

from instseg_jax.inference.pipeline import Pipeline, create_pipeline
from instseg_jax.serving.app import run_server
from instseg_jax.serving.server import Limits

BATCH_SIZE = 8
SECONDS = 5.0


def measure(pipe: Pipeline) -> float:
    """Pictures a second of the pipeline alone, from files: decoding, network and masks side by side."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.fromarray(picture((0, 100, 80, 260, 240), size=(480, 640))).save(file.name, quality=95)
        pipe.warm_up()
        started, count = time.monotonic(), 0
        for _ in pipe.predict(itertools.repeat(file.name)):
            count += 1
            if time.monotonic() - started > SECONDS:
                break
        return count / (time.monotonic() - started)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        pipe = create_pipeline(weights=sys.argv[1], batch_size=BATCH_SIZE, threshold=0.3)
    else:
        pipe = make_pipeline(image_size=64, batch_size=BATCH_SIZE)
    print(measure(pipe), flush=True)
    limits = Limits(queue_size=64, max_wait=0.01, timeout=30.0, max_body=1_000_000, max_pixels=2_000_000)
    run_server(pipe, limits, host="127.0.0.1", port=0)
