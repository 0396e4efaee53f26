"""Run by test_evaluation_devices.py in processes of its own: evaluate a made-up network on however many devices.

Arguments: output file, batch size, number of processes, index of this process, port of the coordinator. Results and
metrics of process 0 (and of the others, beside it) go to the file.
"""

import json
import sys

import jax
import jax.numpy as jnp


class Network:
    """Finds bright and dark places: different for every image, made of operations that every device computes alike."""

    def apply(self, variables: dict, images: jax.Array):
        from instseg_jax.types import Outputs

        count, height, width, _ = images.shape
        cells = images.reshape(count, height // 4, 4, width // 4, 4, 3).mean(axis=(2, 4))
        cells *= jnp.linspace(0.8, 1.2, width // 4)[None, None, :, None]  # so that a mirrored picture has other scores
        logits = jnp.einsum("bhwc,cq->bqhw", cells - cells.mean(axis=(1, 2), keepdims=True), variables["params"]["w"])
        strength = jnp.abs(logits).max(axis=(2, 3))
        # Boxes side by side, wider where something is found: no two of a picture are alike.
        x = jnp.broadcast_to((jnp.arange(strength.shape[1]) + 0.5) / strength.shape[1], strength.shape)
        boxes = jnp.stack([x, jnp.full_like(x, 0.5), 0.1 + 0.05 * strength, jnp.full_like(x, 0.4)], axis=-1)
        return Outputs(class_logits=strength[..., None] - 1, boxes=boxes, mask_logits=logits * 20)


def main(file: str, batch_size: int, num_processes: int, index: int, port: int, views: str) -> None:
    if num_processes > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes, index)
    from instseg_jax.config import load_config
    from instseg_jax.inference.predictor import LoadedModel
    from instseg_jax.scoring.run import score_model

    config = load_config(
        "configs/quickstart.py",
        {
            "data.image_size": "64",
            "eval.batch_size": str(batch_size),
            "eval.num_detections": "6",
            "eval.tta_scales": "(0.5, 1.5)",
        },
    )
    w = jnp.asarray(
        [[1.0, -0.8, 0.5, 0.0, 2.0, -0.3], [1.0, -0.7, -1.0, 1.0, 0.1, 0.7], [1.0, -0.9, 0.5, -1.0, 1.0, 0.2]]
    )
    model = LoadedModel(Network(), {"params": {"w": w}}, config, ("building",), (1,), {}, "")
    evaluated = score_model(model, "made up", tuple(filter(None, views.split(","))))
    content = {
        "devices": len(jax.devices()),
        "processes": jax.process_count(),
        "metrics": evaluated.metrics,
        "results": evaluated.results,
    }
    with open(f"{file}.{index}", "w", encoding="utf-8") as out:  # noqa: PTH123
        json.dump(content, out)


if __name__ == "__main__":
    output, batch, processes, process, coordinator, tta = sys.argv[1:]
    main(output, int(batch), int(processes), int(process), int(coordinator), tta)
