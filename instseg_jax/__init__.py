"""instseg_jax: instance segmentation in JAX."""
