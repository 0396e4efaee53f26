"""Which data set a config means: a folder of pictures, or one that `prepare` wrote as TFDS."""

from ml_collections import ConfigDict

from instseg_jax.data import coco

SOURCES = ("folder", "tfds")


def build_dataset(data: ConfigDict, split: str) -> coco.CocoDataset:
    """Read one split ("train", "val") of the data set that a config's section `data` names.

    Raises: ValueError when no folder is named or data.source is neither folder nor tfds, and what reading raises.
    """
    if not data.dir:
        raise ValueError("data.dir is empty; name the data set's folder with --config.data.dir=DIR")
    if data.source not in SOURCES:
        raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {data.source!r}.")
    if data.source == "tfds":
        from instseg_jax.data import tfds_builder  # importing TFDS takes a second

        return tfds_builder.read_prepared(data.dir, split)
    return coco.read_split(
        data.dir,
        split,
        annotations=data[f"{split}_annotations"],
        images=data[f"{split}_images"],
        skip_invalid=data.skip_invalid,
    )
