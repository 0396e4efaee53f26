"""Drawing: what is painted where, and that nothing drifts or breaks."""

import colorsys
import itertools

import numpy as np
import pytest
from PIL import Image

from instseg_jax.masks import encode_mask
from instseg_jax.results import visualize
from instseg_jax.results.visualize import draw_instances, instance_colors


def filled(size, x1, y1, x2, y2) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def scene(count: int, size=(480, 640), *, seed: int = 0, num_classes: int = 5) -> dict:
    """Rectangles at random places with masks of the same extent, by falling score."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, [size[1] - 60, size[0] - 60], (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(5, 60, (count, 2))], axis=1)
    labels = rng.integers(0, num_classes, count).tolist()
    return {
        "boxes_xyxy_px": boxes.astype(float),
        "labels": labels,
        "names": [f"class {label}" for label in labels],
        "scores": np.sort(rng.uniform(size=count))[::-1],
        "masks": [filled(size, *box) for box in boxes],
    }


def one(size, box, *, label: int = 0, score: float = 0.87, mask=None) -> dict:
    mask = filled(size, *box) if mask is None else mask
    return {
        "boxes_xyxy_px": np.array([box], float),
        "labels": [label],
        "names": ["cat"],
        "scores": [score],
        "masks": [mask],
    }


def hue(color) -> float:
    return 360 * colorsys.rgb_to_hsv(*(v / 255 for v in color))[0]


def hue_distance(a, b) -> float:
    return abs((hue(a) - hue(b) + 180) % 360 - 180)


def test_inside_of_a_mask_is_blended_by_hand():
    image = np.full((200, 200, 3), 100, np.uint8)
    image[120:130] = (0, 50, 250)
    drawn = draw_instances(image, **one((200, 200), (50, 60, 150, 160)), opacity=0.25)
    color = np.array(instance_colors([0])[0])
    np.testing.assert_array_equal(drawn[100, 100], np.rint(75 + 0.25 * color))
    np.testing.assert_array_equal(drawn[125, 100], np.rint(np.array([0, 37.5, 187.5]) + 0.25 * color))
    # Outline and box are drawn in the full colour, on the border of the mask.
    np.testing.assert_array_equal(drawn[110, 50], color)
    np.testing.assert_array_equal(drawn[160, 100], color)
    # Far from the instance and its label, nothing.
    np.testing.assert_array_equal(drawn[165:], image[165:])
    np.testing.assert_array_equal(drawn[:, 160:], image[:, 160:])


def test_smaller_instances_lie_on_larger_ones():
    size = (300, 300)
    large, small = filled(size, 20, 20, 280, 280), filled(size, 100, 100, 200, 200)
    arguments = {
        "boxes_xyxy_px": np.array([[100, 100, 200, 200], [20, 20, 280, 280]]),
        "labels": [0, 1], "names": ["a", "b"], "scores": [0.9, 0.8], "masks": [small, large],
    }  # fmt: skip
    image = np.zeros((*size, 3), np.uint8)
    drawn = draw_instances(image, **arguments, opacity=1.0)
    a, b = instance_colors([0, 1])
    np.testing.assert_array_equal(drawn[150, 150], a)
    np.testing.assert_array_equal(drawn[250, 250], b)
    reverse = {name: value[::-1] for name, value in arguments.items()}
    # The order in which instances are given doesn't matter: their colours are those of their classes.
    np.testing.assert_array_equal(draw_instances(image, **reverse, opacity=1.0)[150, 150], a)


def test_holes_stay_open():
    mask = filled((200, 200), 40, 40, 160, 160) & ~filled((200, 200), 80, 80, 120, 120)
    image = np.full((200, 200, 3), 100, np.uint8)
    drawn = draw_instances(image, **one((200, 200), (40, 40, 160, 160), mask=mask))
    np.testing.assert_array_equal(drawn[100, 100], [100, 100, 100])
    assert (drawn[60, 100] != 100).any()


def test_nothing_given_is_changed():
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    arguments = scene(20)
    before = image.copy(), arguments["boxes_xyxy_px"].copy(), [mask.copy() for mask in arguments["masks"]]
    first = draw_instances(image, **arguments)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(arguments["boxes_xyxy_px"], before[1])
    np.testing.assert_array_equal(arguments["masks"], before[2])
    assert not np.array_equal(first, image)
    # And nothing drifts: the next picture gets the same colours.
    np.testing.assert_array_equal(draw_instances(image, **arguments), first)


def test_codes_and_binary_masks_give_the_same_picture():
    image = np.full((480, 640, 3), 30, np.uint8)
    arguments = scene(10)
    rles = [encode_mask(mask) for mask in arguments["masks"]]
    drawn = draw_instances(image, **arguments)
    np.testing.assert_array_equal(draw_instances(image, **(arguments | {"masks": rles})), drawn)
    as_numbers = [mask.astype(np.uint8) * 255 for mask in arguments["masks"]]
    np.testing.assert_array_equal(draw_instances(image, **(arguments | {"masks": as_numbers})), drawn)


def test_read_only_and_strided_images():
    image = np.full((480, 640, 3), 30, np.uint8)
    expected = draw_instances(image, **scene(5))
    image.setflags(write=False)
    np.testing.assert_array_equal(draw_instances(image, **scene(5)), expected)
    flipped = np.full((480, 640, 3), 30, np.uint8)[:, ::-1, ::-1]
    np.testing.assert_array_equal(draw_instances(flipped, **scene(5)), expected)


def test_classes_keep_their_hue_and_instances_differ():
    alone = instance_colors([3])[0]
    assert instance_colors([0, 1, 3, 2])[2] == alone
    shades = instance_colors([3] * 5)
    assert len(set(shades)) == 5
    assert all(hue_distance(shade, alone) < 40 for shade in shades)
    assert len(set(instance_colors(range(80)))) == 80
    neighbours = instance_colors(range(10))
    assert min(hue_distance(a, b) for a, b in itertools.pairwise(neighbours)) > 40


def test_labels_stay_inside_and_do_not_hide_small_objects():
    size = (300, 400)
    image = np.zeros((*size, 3), np.uint8)
    for box in [(0, 0, 60, 60), (340, 0, 400, 60), (0, 240, 60, 300), (340, 240, 400, 300), (0, 0, 400, 300)]:
        color = instance_colors([0])[0]
        drawn = draw_instances(image, **one(size, box, mask=np.zeros(size, bool)))
        # A filled label of at least 10 x 30 pixels, apart from the outline of the box.
        painted = (drawn == color).all(axis=2)
        assert painted.sum() > 10 * 30 + 2 * (box[2] - box[0] + box[3] - box[1])
        assert not (drawn[5:-5, 5:-5][painted[5:-5, 5:-5]] == 0).all()
    tiny = one(size, (200, 150, 204, 154))
    drawn = draw_instances(image, **tiny, opacity=1.0)
    np.testing.assert_array_equal(drawn[150:154, 200:204], np.broadcast_to(instance_colors([0])[0], (4, 4, 3)))
    assert (drawn != 0).any(axis=2).sum() > 300


def test_labels_of_one_place_can_all_be_read():
    image = np.zeros((400, 600, 3), np.uint8)
    single = one((400, 600), (200, 100, 400, 300), mask=np.zeros((400, 600), bool))
    alone = (draw_instances(image, **single) == instance_colors([0])[0]).all(axis=2).sum() - 2 * (200 + 200)
    assert alone > 300
    five = {name: list(value) * 5 for name, value in single.items()} | {"labels": [0, 1, 2, 3, 4]}
    drawn = draw_instances(image, **five)
    for color in instance_colors(range(5)):
        assert (drawn == color).all(axis=2).sum() > 0.8 * alone


def test_a_label_makes_room_for_a_small_neighbour():
    size = (300, 300)
    # The neighbour lies where the label of the large instance would go by itself: above its upper left corner.
    large, neighbour = (50, 100, 200, 250), (52, 88, 62, 98)
    arguments = {
        "boxes_xyxy_px": np.array([large, neighbour], float),
        "labels": [0, 1],
        "names": ["cat", "dog"],
        "scores": [0.9, 0.8],
        "masks": [filled(size, *large), filled(size, *neighbour)],
    }
    image = np.zeros((*size, 3), np.uint8)
    a, b = instance_colors([0, 1])
    by_itself = draw_instances(image, **{name: value[:1] for name, value in arguments.items()})
    assert (by_itself[88:98, 52:62] == a).all(axis=2).mean() > 0.4
    drawn = draw_instances(image, **arguments, opacity=1.0)
    assert (drawn[88:98, 52:62] == b).all()


def test_labels_of_a_row_do_not_cover_each_other():
    """Nine people side by side, nearer than their labels are long: each is named, and all can be read."""
    boxes = np.array([[10 + 60 * i, 130, 110 + 60 * i, 390] for i in range(9)], float)
    scores = [0.95 - 0.03 * i for i in range(9)]
    picture = Image.new("RGB", (640, 480))
    font = visualize._load_font(12, "")
    colors = visualize.instance_colors([0] * 9)
    frames, is_complete = visualize._draw_labels(picture, font, boxes, ["person"] * 9, scores, colors)
    assert len(frames) == 9 and is_complete
    assert frames[:, 2].max() - frames[:, 0].min() < (frames[:, 2] - frames[:, 0]).sum(), "they need two rows"
    shared = visualize._shared_area(frames, frames)
    assert not shared[~np.eye(9, dtype=bool)].any()
    assert all(before != after for before, after in itertools.pairwise(colors))


def test_labels_of_one_place_do_not_pile_up():
    image = np.zeros((400, 600, 3), np.uint8)
    single = one((400, 600), (200, 100, 400, 300))
    many = {name: list(value) * 60 for name, value in single.items()}
    many["labels"] = list(range(60))
    drawn = draw_instances(image, **many)
    background = (drawn == 0).all(axis=2)
    # Seven places at most, and the legend: the rest of the picture stays empty.
    assert background.mean() > 0.6


@pytest.mark.parametrize("size", [(480, 640), (200, 300), (1500, 1200)])
def test_a_hundred_instances(size):
    image = np.full((*size, 3), 60, np.uint8)
    drawn = draw_instances(image, **scene(100, size))
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    changed = (drawn != image).any(axis=2).mean()
    covered = np.any(scene(100, size)["masks"], axis=0).mean()
    assert covered * 0.95 < changed < covered + 0.5


def test_a_crowd_gets_a_legend():
    # In a crowd of small objects the names are in a dark panel in the emptiest corner, once for each class.
    size = (480, 640)
    arguments = scene(60, size)
    keep_clear = np.array([0, 200, 0, 200])
    arguments["boxes_xyxy_px"] = arguments["boxes_xyxy_px"] * [1, 0.5, 1, 0.5] + keep_clear
    arguments["masks"] = [np.zeros(size, bool)] * 60
    drawn = draw_instances(np.full((*size, 3), 128, np.uint8), **arguments)
    panel = (drawn == 24).all(axis=2)
    assert panel[:200].sum() > 2000 and panel[200:].sum() == 0
    few = {name: value[:3] for name, value in arguments.items()}
    few["boxes_xyxy_px"] = np.array([[20, 50, 200, 200], [250, 50, 400, 200], [420, 300, 600, 450]])
    assert not (draw_instances(np.full((*size, 3), 128, np.uint8), **few) == 24).all(axis=2).any()


def test_no_instances():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    drawn = draw_instances(image, boxes_xyxy_px=np.zeros((0, 4)), labels=[], names=[], scores=[], masks=[])
    np.testing.assert_array_equal(drawn, image)
    assert drawn is not image


@pytest.mark.parametrize(
    "box", [(-50, -50, -10, -10), (500, 20, 600, 90), (np.nan, 0, 5, 5), (10, 10, 10, 10), (90, 90, 20, 20)]
)
def test_odd_boxes(box):
    image = np.full((100, 100, 3), 50, np.uint8)
    drawn = draw_instances(image, **one((100, 100), box, mask=filled((100, 100), 30, 30, 60, 60)))
    assert (drawn[40, 40] != 50).any()


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (8, 200), (200, 8), (32, 32)])
def test_tiny_images(size):
    image = np.full((*size, 3), 50, np.uint8)
    drawn = draw_instances(image, **one(size, (0, 0, size[1], size[0])))
    assert drawn.shape == image.shape and (drawn != 50).any()


def test_one_pixel_and_empty_masks():
    image = np.full((100, 100, 3), 50, np.uint8)
    pixel = filled((100, 100), 70, 80, 71, 81)
    drawn = draw_instances(image, **one((100, 100), (20, 30, 40, 50), mask=pixel))
    np.testing.assert_array_equal(drawn[80, 70], np.rint(0.55 * 50 + 0.45 * np.array(instance_colors([0])[0])))
    empty = draw_instances(image, **one((100, 100), (20, 30, 40, 50), mask=np.zeros((100, 100), bool)))
    np.testing.assert_array_equal(empty[80, 70], [50, 50, 50])
    assert (empty != 50).any()


def test_without_scores_and_with_names_of_other_scripts():
    image = np.full((200, 200, 3), 50, np.uint8)
    arguments = one((200, 200), (20, 50, 180, 180)) | {"scores": None}
    plain = draw_instances(image, **arguments)
    for name in ("Käfer", "Жук", "甲虫", ""):
        drawn = draw_instances(image, **(arguments | {"names": [name]}))
        assert not np.array_equal(drawn, plain) and (drawn != 50).any()


@pytest.mark.parametrize(
    ("image", "changes", "message"),
    [
        (np.zeros((40, 60), np.uint8), {}, r"must be uint8 \[height, width, 3\], got uint8 \[40, 60\]"),
        (np.zeros((40, 60, 3), np.float32), {}, "got float32"),
        (np.zeros((40, 60, 3), np.uint8), {"names": []}, r"of one length, got \[0, 1\]"),
        (np.zeros((60, 40, 3), np.uint8), {}, r"mask has size \[40, 60\], but the image \[60, 40\]"),
    ],
)
def test_bad_input(image, changes, message):
    with pytest.raises(ValueError, match=message):
        draw_instances(image, **(one((40, 60), (5, 5, 20, 20)) | changes))


def test_a_crowd_in_a_large_picture_is_drawn_finely():
    """Lines of boxes follow the small objects of a crowd, and the picture where there are few."""
    corners = np.stack(np.meshgrid(np.arange(50, 1950, 100), np.arange(50, 1950, 100)), axis=-1).reshape(-1, 2)
    painted = {}
    for count in (20, len(corners)):
        boxes = np.concatenate([corners[:count], corners[:count] + 30], axis=1).astype(float)
        content = {"boxes_xyxy_px": boxes, "labels": [0] * count, "names": ["a"] * count, "scores": None}
        empty = [np.zeros((2000, 2000), bool)] * count
        drawn = draw_instances(np.full((2000, 2000, 3), 100, np.uint8), **content, masks=empty)
        row = drawn[65]  # through the middle of the first row of boxes
        painted[count] = int((row[40:150] != 100).any(axis=1).sum())
    assert 2 <= painted[len(corners)] < painted[20]
