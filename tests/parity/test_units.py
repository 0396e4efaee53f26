"""Single layers and functions give the numbers of the reference's (`unit/funcs.npz`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from flax import linen as nn
from reference import CASES, load_json

from instseg_jax.inference.postprocess import detections_to_instances, select_detections
from instseg_jax.masks import decode_rle
from instseg_jax.models.attention import MultiHeadAttention
from instseg_jax.models.deformable_attention import DeformableAttention
from instseg_jax.models.hgnetv2 import Stem
from instseg_jax.models.hybrid_encoder import CSPRepLayer, sine_position_embedding
from instseg_jax.models.query_selection import make_anchors, masks_to_boxes
from instseg_jax.models.sampling import upsample_bilinear_2x, upsample_nearest_2x
from instseg_jax.types import Outputs
from instseg_jax.weights.names import flax_to_official, official_to_flax

FILE = CASES / "unit" / "funcs.npz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the folder has no unit/funcs.npz")


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    return dict(np.load(FILE))


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def close(mine, reference, rtol: float = 1e-5) -> None:
    """Equal to `rtol` of the largest value of the reference."""
    np.testing.assert_allclose(np.asarray(mine), reference, rtol=0, atol=rtol * np.abs(reference).max())


def apply(module: nn.Module, prefix: str, *args, **kwargs):
    """Run a layer with the synthetic weights of that prefix."""
    args = tuple(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in args)
    shapes = _shapes(prefix, module, *args, **kwargs)
    state = {name: synth.synth_tensor(prefix + name, shape) for name, shape in shapes.items()}
    variables = official_to_flax({f"layer.{name}": tensor for name, tensor in state.items()})
    variables = {key: tree["layer"] for key, tree in variables.items() if tree}
    return module.apply(jax.tree.map(jnp.asarray, variables), *args, **kwargs)


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def test_resizing(numbers):
    close(np.moveaxis(upsample_bilinear_2x(nhwc(numbers["gs_x"])), -1, 1), numbers["up2"])
    np.testing.assert_array_equal(np.moveaxis(upsample_nearest_2x(nhwc(numbers["gs_x"])), -1, 1), numbers["near2"])


def test_masks_to_boxes(numbers):
    logits = jnp.where(numbers["m2b_in"], 1.0, -1.0)
    close(masks_to_boxes(logits), numbers["m2b_xywh"], 1e-6)


@pytest.mark.parametrize(("width", "height"), [(4, 4), (6, 4), (3, 5)])
def test_position_embedding(numbers, width, height):
    mine = sine_position_embedding(height, width, 16, "official")
    close(mine, numbers[f"pos_w{width}_h{height}_c16"][0], 1e-6)


@pytest.mark.parametrize("kind", ["sq", "rect"])
def test_anchors(numbers, kind):
    sizes = {"sq": ((8, 8), (4, 4), (2, 2)), "rect": ((8, 12), (4, 6), (2, 3))}[kind]
    anchors, valid = make_anchors(sizes, "official")
    np.testing.assert_array_equal(valid, numbers[f"anchor_valid_{kind}"][0, :, 0])
    reference = numbers[f"anchor_{kind}"][0]
    np.testing.assert_allclose(anchors[valid], reference[valid], atol=2e-5)


def test_deformable_attention(numbers):
    module = DeformableAttention(num_heads=4, num_points=4)
    shapes = ((6, 8), (3, 4), (2, 2))
    reference = numbers["msda_ref"][:, :, 0]
    close(apply(module, "unit.msda.", numbers["msda_q"], reference, numbers["msda_val"], shapes), numbers["msda_out"])


def test_multi_head_attention(numbers):
    x, module = numbers["mha_x"], MultiHeadAttention(num_heads=4)
    close(apply(module, "unit.mha.", x, x, x), numbers["mha_out_nomask"])
    close(apply(module, "unit.mha.", x, x, x, numbers["mha_mask"]), numbers["mha_out"])
    assert np.abs(numbers["mha_out"] - numbers["mha_out_nomask"]).max() > 1e-2


def test_stem(numbers):
    module = Stem(8, 12, frozen_norm=True)
    mine = apply(module, "unit.stem.", nhwc(numbers["stem_x"]), train=False)
    close(np.moveaxis(np.asarray(mine), -1, 1), numbers["stem_out"])


@pytest.mark.parametrize(("name", "expansion"), [("csp_e1", 1.0), ("csp_e05", 0.5)])
def test_csp_block(numbers, name, expansion):
    blocks = len({key.split(".")[1] for key in _shapes("unit.csp_e05.") if key.startswith("bottlenecks.")})
    x, module = nhwc(numbers[f"{name}_x"]), CSPRepLayer(8, expansion, blocks)
    mine = apply(module, f"unit.{name}.", x, train=False)
    close(np.moveaxis(np.asarray(mine), -1, 1), numbers[f"{name}_out"])


def _shapes(prefix: str, module: nn.Module | None = None, *args, **kwargs) -> dict:
    """Official shapes of a layer's tensors: from the table, or where it lacks the layer from the layer itself."""
    table = load_json("unit/funcs_shapes.json")
    if prefix in table:
        return table[prefix]
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    zeros = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), {key: {"layer": tree} for key, tree in abstract.items()}
    )
    return {name.removeprefix("layer."): tensor.shape for name, tensor in flax_to_official(zeros).items()}


def test_post_processing(numbers):
    outputs = Outputs(numbers["pp_logits"], numbers["pp_boxes"], numbers["pp_masks"])
    detections = select_detections(outputs, num_detections=100)
    frame = {"input_size": (64, 64), "content_size": (64, 64), "original_size": (37, 51)}
    instances = detections_to_instances(detections, 0, **frame)
    rows = np.column_stack([instances.labels, instances.scores, instances.boxes_xyxy_px])
    np.testing.assert_allclose(rows, numbers["pp_bbox"], atol=2e-5)
    masks = np.stack([decode_rle(rle) for rle in instances.masks])
    reference = np.unpackbits(numbers["pp_mask"])[: masks.size].reshape(masks.shape)
    assert 0.01 < reference.mean() < 0.99
    np.testing.assert_array_equal(masks, reference)
