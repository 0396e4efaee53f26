"""Replicas on Ray Serve: `serve run ray_serve:app`, then `curl --data-binary @picture.jpg localhost:8000`."""

import asyncio
import os

from ray import serve


@serve.deployment(num_replicas=int(os.environ.get("REPLICAS", "2")), max_ongoing_requests=16)
class Segmenter:
    """A pipeline that answers the bytes of a picture with JSON."""

    def __init__(self, weights: str | None = None) -> None:
        from instseg_jax import create_pipeline

        self.pipeline = create_pipeline(weights=weights)
        self.pipeline.warm_up()

    async def __call__(self, request) -> dict:
        """Segment the picture that a request has as its body."""
        return (await asyncio.to_thread(self.pipeline, await request.body()))[0].to_json()


app = Segmenter.bind(os.environ.get("WEIGHTS"))
