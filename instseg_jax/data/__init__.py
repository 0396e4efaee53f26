"""Where examples come from: annotation files, augmentation, batches. numpy only, no jax arrays."""
