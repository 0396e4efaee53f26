"""The network computes what the official one computes: every stage, in float64 and in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CASES, Case, find_cases, load_case, official_weights, stored_values

from instseg_jax.models.mask_rtdetr import make_model
from instseg_jax.weights.names import official_to_flax

EVAL_CASES = find_cases("*/eval_*.json")
BEFORE_SELECTION = ("bb0", "bb1", "bb2", "bb3", "enc0", "enc1", "enc2", "mask_feat", "memory", "enc_output")
BEFORE_SELECTION += ("enc_score_max",)


def test_the_folder_holds_cases():
    assert list(CASES.glob("*/*.npz")), f"no case in {CASES}"


def nchw(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def stages(intermediates: dict, outputs) -> dict[str, np.ndarray]:
    """Our tensors under the names of the reference."""
    inner = intermediates["transformer"]
    maps = {f"bb{i}": nchw(x) for i, x in enumerate(intermediates["backbone_maps"][0])}
    maps |= {f"enc{i}": nchw(x) for i, x in enumerate(intermediates["maps"][0])}
    maps["mask_feat"] = nchw(intermediates["mask_features"][0])
    class_logits, mask_queries, boxes = inner["encoder_set"][0]
    masks = jnp.einsum("bqp,bhwp->bqhw", mask_queries, intermediates["mask_features"][0])
    encoder = {"enc_topk_logits": class_logits, "enc_topk_boxes": boxes, "enc_topk_masks": masks}
    final = {"logits": outputs.class_logits, "boxes": outputs.boxes, "masks": outputs.mask_logits}
    named = ("memory", "enc_output", "enc_score_max", "init_ref_boxes")
    rest = {name: inner[name][0] for name in inner if name in named or name.startswith(("dec_layer", "ref_in"))}
    return maps | {name: np.asarray(x) for name, x in (encoder | final | rest).items()}


@functools.cache
def compiled(variant: str, rectangular: str):
    model = make_model(f"mask_rtdetr_{variant}", num_classes=80, num_queries=300, rectangular=rectangular)

    def run(variables, images, selected_index, reference_boxes):
        return model.apply(
            variables,
            images,
            selected_index=selected_index,
            reference_boxes=reference_boxes,
            mutable=["intermediates"],
        )

    return jax.jit(run)


def run_case(case: Case, *, inject: bool, dtype=np.float32) -> tuple[dict[str, np.ndarray], dict]:
    variables = official_to_flax(official_weights(case.variant))
    variables = jax.tree.map(lambda x: x.astype(dtype), variables)
    injected = (None, None)
    if inject:
        injected = (case.tensors["topk_ind302"][:, :300], case.tensors["init_ref_boxes"].astype(dtype))
    with jax.default_matmul_precision("highest"):
        outputs, state = compiled(case.variant, "official")(variables, case.images().astype(dtype), *injected)
    return stages(state["intermediates"], outputs), state["intermediates"]


@pytest.mark.parametrize("name", EVAL_CASES)
def test_float64_agrees_with_the_reference_in_float64(name):
    case = load_case(name)
    if not case.tensors_f64:
        pytest.skip("the case holds no float64 run")
    with jax.enable_x64(True):
        mine, _ = run_case(case, inject=True, dtype=np.float64)
    worst, compared = {}, 0
    for stage, value in mine.items():
        assert value.dtype == np.float64, stage
        pair = stored_values(case.tensors_f64, stage, value)
        if pair is None:
            continue
        compared += 1
        reference, value = pair
        limit = 1e-8 if stage in BEFORE_SELECTION else 1e-4
        error = np.abs(value - reference).max() / np.abs(reference).max()
        worst[stage] = error / limit
        print(f"{name} {stage:16s} {error:.2e} of absmax")
    assert compared >= 20
    assert max(worst.values()) <= 1, worst
