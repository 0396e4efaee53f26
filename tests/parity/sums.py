"""Loss terms added up as the reference logs them."""

import jax.numpy as jnp
from jax import Array

from instseg_jax.training.criterion import TERMS


def sum_terms(terms: dict[str, Array]) -> dict[str, Array]:
    """Add up sets as the reference logs them: `class`, `class_aux`, `class_dn`, `class_aux_dn`, and so on."""
    sums = {f"{term}{aux}{dn}": jnp.zeros(()) for dn in ("", "_dn") for aux in ("", "_aux") for term in TERMS}
    for name, value in terms.items():
        _, term, *rest = name.split("/")
        is_denoising = rest[:1] == ["denoising"]
        is_aux = len(rest) > is_denoising
        key = f"{term}{'_aux' if is_aux else ''}{'_dn' if is_denoising else ''}"
        sums[key] = sums[key] + value
    return sums
