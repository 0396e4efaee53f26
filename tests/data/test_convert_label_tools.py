"""What predict writes for tools in which people label comes back by convert: every hole, every part, every class."""

import json

import numpy as np
import pytest
from converted_data import HEIGHT, WIDTH, box_mask, convert, read, write_picture
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg_jax import masks
from instseg_jax.brush_rle import decode_brush, encode_brush
from instseg_jax.results.label_tools import FILES
from instseg_jax.results.result import Result
from instseg_jax.results.saving import save_results

RING = box_mask(5, 5, 30, 40) - box_mask(10, 10, 20, 30)
TWO_PARTS = box_mask(40, 5, 50, 15) | box_mask(60, 20, 75, 50)
NAMES = ("roof", 'a "wall" & <door>')
KINDS = {"label_studio": "LabelStudio", "cvat": "CVAT", "coco": "COCO"}


def result(path, drawn):
    boxes = [
        {"cls_id": label, "label": NAMES[label], "score": 0.5 + label / 4, "coordinate": [0, 0, WIDTH, HEIGHT]}
        for label, _ in drawn
    ]
    rles = [masks.encode_mask(mask) for _, mask in drawn]
    return Result(str(path), (HEIGHT, WIDTH), boxes, rles, class_names=NAMES, category_ids=(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_holes_and_parts_come_back(kind, tmp_path):
    drawn = {
        "a.png": [(0, RING), (1, TWO_PARTS), (1, box_mask(32, 20, 38, 50)), (0, box_mask(0, 0, WIDTH, HEIGHT))],
        "b.png": [],
        "ü %20.png": [(1, box_mask(79, 59, 80, 60))],
    }
    for name in drawn:
        write_picture(tmp_path / name)
    summary = save_results((result(tmp_path / name, d) for name, d in drawn.items()), tmp_path, formats=[kind])
    assert (summary.files, summary.instances, summary.failed) == (1, 5, [])
    done = convert(tmp_path, KINDS[kind], tmp_path / "out")
    assert done.categories == NAMES and not done.notes
    found, _ = read(tmp_path / "out")
    assert found.keys() == drawn.keys()
    for name, expected in drawn.items():
        assert [label for label, _ in found[name]] == [NAMES[label] for label, _ in expected]
        for (_, mask), (_, truth) in zip(found[name], expected, strict=True):
            np.testing.assert_array_equal(mask, truth)


def test_labelme_keeps_holes_and_parts_to_a_pixel_of_their_outlines(tmp_path):
    """It has polygons alone: a hole is opened by a cut, parts share a group_id, outlines keep within a pixel."""
    write_picture(tmp_path / "a.png")
    drawn = [(0, RING), (1, TWO_PARTS), (0, box_mask(0, 0, WIDTH, HEIGHT))]
    save_results([result(tmp_path / "a.png", drawn)], tmp_path, formats=["labelme"])
    assert not convert(tmp_path, "LabelMe", tmp_path / "out").notes
    found = read(tmp_path / "out")[0]["a.png"]
    for (_, mask), (_, truth) in zip(found, drawn, strict=True):
        assert (mask & truth).sum() / (mask | truth).sum() > 0.95
    assert found[0][1][12:28, 12:18].sum() == 0  # the hole


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 300), st.floats(0, 1))
def test_the_brush_code_is_undone(seed, height, width, share):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    np.testing.assert_array_equal(decode_brush(encode_brush(mask), height, width), mask)


def test_the_brush_code_by_hand():
    """A drawn pixel: 4 values of 8 bits, lengths of 3, 4, 8, 16 bits, a run of 4 times 255; and value by value."""
    head = f"{4:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
    run, single = "1" + "00" + "011" + "1" * 8, "0" + "00" + "011" + "0" * 24 + "1" * 8
    as_bytes = [[int(t[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(t), 8)] for t in (head + run, head + single)]
    assert encode_brush(np.ones((1, 1))) == as_bytes[0]
    assert decode_brush(as_bytes[0], 1, 1).tolist() == decode_brush(as_bytes[1], 1, 1).tolist() == [[1]]
    for code, told in ((as_bytes[0][:7], "ends after 7 bytes"), (as_bytes[0], "has 4 values, 1 x 2 pixels have 8")):
        with pytest.raises(ValueError, match=told):
            decode_brush(code, 1, 1 if "ends" in told else 2)


def tasks(folder, results, **task):
    write_picture(folder / "p.png")
    content = [{"data": {"image": "/data/upload/1/0123abcd-p.png"}, "annotations": [{"result": results}], **task}]
    (folder / "tasks.json").write_text(json.dumps(content))


def test_regions_of_other_shapes_and_parts(tmp_path):
    rectangle = {"x": 25, "y": 50, "width": 50, "height": 25, "rotation": 0}
    turned = {"x": 50, "y": 0, "width": 50, "height": 25, "rotation": 90}  # around its corner, to the left and down
    tasks(
        tmp_path,
        [
            {"id": "1", "type": "rectangle", "value": rectangle},
            {"id": "1", "type": "labels", "value": rectangle | {"labels": ["x"]}},
            {"id": "2", "parentID": "1", "value": {"rectanglelabels": ["x"], "x": 0, "y": 0, "width": 5, "height": 5}},
            {"id": "3", "value": {"rectanglelabels": ["y"], **turned}},
            {"id": "4", "value": {"rectanglelabels": ["y"], "choices": ["a"]}},
            {"from_id": "1", "to_id": "2", "type": "relation"},
        ],
    )
    done = convert(tmp_path, "LabelStudio", tmp_path / "out")
    assert done.notes == ("regions left out, that are no polygon, brush, rectangle or ellipse: 1",)
    found, _ = read(tmp_path / "out")
    assert [label for label, _ in found["p.png"]] == ["x", "y"]
    np.testing.assert_array_equal(found["p.png"][0][1], box_mask(20, 30, 60, 45) | box_mask(0, 0, 4, 3))
    assert abs(int(found["p.png"][1][1].sum()) - 40 * 15) < 60 and found["p.png"][1][1][0:38, 26:39].all()


def test_what_cannot_be_read_is_named(tmp_path):
    tasks(tmp_path, [{"id": "r", "value": {"brushlabels": ["x"], "rle": [0, 0, 0, 9]}}])
    with pytest.raises(ValueError, match=r"Task 1 of .*tasks\.json has a region 'r' that can't be read: the brush"):
        convert(tmp_path, "LabelStudio", tmp_path / "out")
    (tmp_path / "a.xml").write_text("<annotations><track/></annotations>")
    with pytest.raises(ValueError, match=r"a\.xml is of a video; export it as"):
        convert(tmp_path, "CVAT", tmp_path / "out")
    shape = '<mask label="x" rle="1, 2" left="0" top="0" width="2" height="2"/>'
    (tmp_path / "a.xml").write_text(f'<annotations><image name="p.png">{shape}</image></annotations>')
    with pytest.raises(ValueError, match=r"'p\.png' of .*a mask that can't be read: its runs are 3 pixels"):
        convert(tmp_path, "CVAT", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no JSON file with tasks"):
        convert(tmp_path / "out" if (tmp_path / "out").exists() else empty(tmp_path), "LabelStudio", tmp_path / "o")


def empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def test_shapes_of_a_group_are_one_object(tmp_path):
    write_picture(tmp_path / "images" / "p.png")
    shapes = (
        '<polygon label="x" group_id="7" points="0,0;10,0;10,10;0,10"/>'
        '<box label="x" group_id="7" xtl="20" ytl="20" xbr="30" ybr="25"/>'
        '<box label="x" xtl="50" ytl="0" xbr="60" ybr="9"/>'
        '<ellipse label="y" cx="40" cy="40" rx="10" ry="5"/><points label="y" points="1,1"/>'
    )
    (tmp_path / "annotations.xml").write_text(
        f'<annotations><image name="p.png" width="{WIDTH}" height="{HEIGHT}">{shapes}</image></annotations>'
    )
    assert convert(tmp_path, "cvat", tmp_path / "out").notes == ("shapes left out, that are a points: 1",)
    (a, b, c) = (mask for _, mask in read(tmp_path / "out")[0]["p.png"])
    np.testing.assert_array_equal(a, box_mask(0, 0, 10, 10) | box_mask(20, 20, 30, 25))
    np.testing.assert_array_equal(b, box_mask(50, 0, 60, 9))
    assert abs(int(c.sum()) - np.pi * 50) < 8
    assert {*FILES, "coco"} == set(KINDS)
