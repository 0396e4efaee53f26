"""Data sets and transforms of other libraries as the Python page shows them, each where it is installed."""

import numpy as np
import pytest

import instseg_jax

NUMBERS = range(4)


def make_item(number):
    masks = np.zeros((1, 80, 80), bool)
    masks[0, 10 + number : 40, 10:60] = True
    image = np.where(masks[0, ..., None], 200, 50).astype(np.uint8).repeat(3, axis=2)
    return {"image": image, "labels": [0], "masks": masks}


def check(items):
    dataset = instseg_jax.own_data(items, ["box"])
    areas = [annotation.area for objects in dataset.annotations for annotation in objects]
    assert areas == [make_item(number)["masks"].sum() for number in NUMBERS]
    np.testing.assert_array_equal(dataset.read_image(3), make_item(3)["image"])


def test_grain_sources():
    grain = pytest.importorskip("grain")

    class Source(grain.sources.RandomAccessDataSource):
        def __len__(self):
            return len(NUMBERS)

        def __getitem__(self, index):
            return make_item(index)

    check(Source())
    check(grain.MapDataset.source(list(NUMBERS)).map(make_item))


def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")

    def to_items(rows):
        items = [make_item(number) for number in rows["number"]]
        return {name: [item[name] for item in items] for name in items[0]}

    check(datasets.Dataset.from_dict({"number": list(NUMBERS)}).with_transform(to_items))


def test_loaders_of_pytorch():
    """A loader of rows, with workers too; a data set that is asked for rows; tensors in place of arrays."""
    torch = pytest.importorskip("torch")

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(NUMBERS)

        def __getitem__(self, index):
            item = make_item(index)
            return {name: torch.as_tensor(np.asarray(value)) for name, value in item.items()}

    check(Rows())
    tiny = {"data.image_size": 64, "data.max_instances": 2, "train.batch_size": 2}
    config = instseg_jax.load_config("mask_rtdetr:n", tiny)
    expected = list(instseg_jax.batches(map(make_item, NUMBERS), config, num_classes=1))
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=workers)
        for batch, truth in zip(instseg_jax.batches(loader, config, num_classes=1), expected, strict=True):
            np.testing.assert_array_equal(batch.images, truth.images)
            np.testing.assert_array_equal(batch.targets.masks, truth.targets.masks)


def test_albumentations_keeps_masks():
    albumentations = pytest.importorskip("albumentations")
    flip = albumentations.Compose([albumentations.HorizontalFlip(p=1.0)])
    item = make_item(0)
    example = instseg_jax.make_example(item["image"], item["labels"], item["masks"])
    masks = instseg_jax.dense_masks(example)
    new = flip(image=example.image, masks=list(masks))
    flipped = instseg_jax.make_example(new["image"], example.labels, np.stack(new["masks"]))
    np.testing.assert_array_equal(instseg_jax.dense_masks(flipped), item["masks"][..., ::-1])
    assert (flipped.image != example.image).any()
