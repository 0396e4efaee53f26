"""Results in other tools' forms, and the files of a run: read back by what reads them."""

import importlib.util
import json
import sys
from fractions import Fraction

import cv2
import numpy as np
import pytest
from fake_model import CATEGORY_IDS, CLASS_NAMES, make_pipeline, picture
from PIL import Image
from pycocotools.coco import COCO

from instseg_jax.inference.sources import read_video
from instseg_jax.masks import decode_rle, encode_mask, rasterize_polygons
from instseg_jax.outlines import rle_to_polygons
from instseg_jax.results.coco_file import CocoFile
from instseg_jax.results.result import Result
from instseg_jax.results.saving import check_formats, save_results
from instseg_jax.results.video import VideoFile

SIZE = (60, 80)


def masks() -> list[np.ndarray]:
    """A square with a hole, an object of two parts, and nothing at all (whose box has no extent)."""
    holed, parted, nothing = np.zeros((3, *SIZE), bool)
    holed[10:40, 10:40] = True
    holed[20:30, 20:30] = False
    parted[45:55, 5:15] = parted[45:55, 30:50] = True
    return [holed, parted, nothing]


def make(name: str = "shots/cat.jpg", **changes) -> Result:
    boxes = [
        {"cls_id": 0, "label": "red", "score": 0.9, "coordinate": [10.0, 10.0, 40.0, 40.0]},
        {"cls_id": 2, "label": "blue", "score": 0.8, "coordinate": [5.0, 45.0, 50.0, 55.0]},
        {"cls_id": 1, "label": "green", "score": 0.7, "coordinate": [80.0, 0.0, 80.0, 0.0]},
    ]
    image = np.full((*SIZE, 3), 90, np.uint8)
    rles = [encode_mask(mask) for mask in masks()]
    return Result(name, SIZE, boxes, rles, image, None, CLASS_NAMES, CATEGORY_IDS, **changes)


def test_crop_masks_are_those_of_the_rounded_box():
    crops = make().to_json(masks_format="crop")["res"]["masks"]
    assert len(crops) == 3
    np.testing.assert_array_equal(crops[0], masks()[0][10:40, 10:40])
    np.testing.assert_array_equal(crops[1], masks()[1][45:55, 5:50])
    assert crops[2] == [[0]]  # the box without extent keeps its place


def test_polygon_masks_have_holes():
    polygons = make().to_json(masks_format="polygon")["res"]["masks"]
    assert [[len(part) for part in parts] for parts in polygons] == [[2], [1, 1], []]
    assert json.loads(json.dumps(polygons)) == polygons
    with pytest.raises(ValueError, match="'png'"):
        make().to_json(masks_format="png")


def test_labelme_draws_the_same_masks():
    content = make().to_labelme(tolerance=0.0)
    assert (content["imageHeight"], content["imageWidth"], content["imagePath"]) == (60, 80, "cat.jpg")
    assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} == set(content)
    shapes = content["shapes"]
    assert [(shape["label"], shape["group_id"]) for shape in shapes] == [("red", None), ("blue", 1), ("blue", 1)]
    assert all(shape["shape_type"] == "polygon" for shape in shapes)
    for label, mask in (("red", masks()[0]), ("blue", masks()[1])):
        polygons = [np.array(shape["points"]) for shape in shapes if shape["label"] == label]
        difference = rasterize_polygons(polygons, *SIZE) != mask
        assert difference.sum() <= 20, "the cut to the hole has no width, but pycocotools gives it a pixel's"


def test_yolo_lines():
    lines = make().to_yolo(tolerance=0.0).splitlines()
    assert [line.split()[0] for line in lines] == ["0", "2"]
    numbers = np.array(lines[0].split()[1:], float).reshape(-1, 2)
    assert numbers.min() >= 0 and numbers.max() <= 1
    assert (rasterize_polygons([numbers * (80, 60)], *SIZE) != masks()[0]).sum() <= 20


def test_coco_data_set_is_read_by_pycocotools(tmp_path):
    path = tmp_path / "coco.json"
    with CocoFile(path) as file:
        file.add(make("a.jpg"))
        file.add(make("b.jpg"))
    coco = COCO(path)
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a.jpg", "b.jpg"]
    assert {c["id"]: c["name"] for c in coco.cats.values()} == dict(zip(CATEGORY_IDS, CLASS_NAMES, strict=True))
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[2]))
    assert [a["category_id"] for a in annotations] == [7, 90, 3]
    np.testing.assert_array_equal(coco.annToMask(annotations[1]), masks()[1])
    assert annotations[1]["area"] == 300 and annotations[1]["bbox"] == [5, 45, 45, 10]


def test_supervision():
    pytest.importorskip("supervision")
    detections = make().to_supervision()
    assert len(detections) == 3 and detections.class_id.tolist() == [0, 2, 1]
    np.testing.assert_array_equal(detections.mask, np.stack(masks()))
    assert detections.data["class_name"].tolist() == ["red", "blue", "green"]
    assert len(make().filter(1.0).to_supervision()) == 0


def test_a_small_view_is_drawn_with_the_masks_of_the_large_image():
    small = np.full((30, 40, 3), 90, np.uint8)
    large = Result("big.tif", SIZE, make().boxes, make().masks, small)
    assert large.img["res"].size == (40, 30)
    drawn = np.asarray(large.img["res"]).astype(int)
    changed = np.abs(drawn - 90).max(axis=2) > 20
    assert changed[7, 12] and not changed[12, 12]  # inside the object, and in its hole
    with pytest.raises(ValueError, match=r"must be \[60, 80, 3\]"):
        Result("big.tif", SIZE, [], [], np.zeros((61, 80, 3), np.uint8))


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    return make_pipeline()


def test_every_format_is_written(tmp_path, pipe):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture((0, 10, 20, 30, 50))).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"broken")
    formats = ["img", "json", "coco", "labelme", "yolo", "geojson"]
    formats += ["gpkg"] if importlib.util.find_spec("pyogrio") else []
    summary = save_results(pipe.predict(tmp_path / "in"), tmp_path / "out", formats=formats)
    names = ["a.json", "a.txt", "a_res.geojson", "a_res.json", "a_res.png", "coco.json"]
    names += ["a_res.gpkg"] if "gpkg" in formats else []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert (summary.images, summary.instances, summary.files) == (1, 1, len(formats))
    ((name, reason),) = summary.failed
    assert name.endswith("b.jpg") and "can't be read" in reason
    labelme = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (tmp_path / "out" / labelme["imagePath"]).resolve() == (tmp_path / "in" / "a.png").resolve()


def test_a_geopackage_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyogrio" else True)
    with pytest.raises(ValueError, match=r"The format gpkg needs pip install .instseg_jax\[geo\]"):
        check_formats(("json", "gpkg"))
    assert check_formats(("json", "geojson")) == ("json", "geojson")


def test_inputs_that_share_a_name_do_not_overwrite_each_other(tmp_path, pipe):
    for folder, label in (("x", 0), ("y", 1)):
        (tmp_path / folder).mkdir()
        for suffix in ("png", "bmp"):
            Image.fromarray(picture((label, 10, 20, 30, 50))).save(tmp_path / folder / f"a.{suffix}")
    summary = save_results(pipe.predict(f"{tmp_path}/**/a.*"), tmp_path / "out", formats=("json",))
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["a_2_res.json", "a_3_res.json", "a_4_res.json", "a_res.json"]
    assert len({json.loads(path.read_text())["input_path"] for path in files}) == summary.files == 4


@pytest.mark.parametrize("has_pyav", [True, False])
def test_a_video_gives_a_video(tmp_path, pipe, monkeypatch, caplog, has_pyav):
    if has_pyav:
        pytest.importorskip("av")
    else:
        monkeypatch.setitem(sys.modules, "av", None)
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.5, (64, 64))
    for i in range(6):
        writer.write(picture((0, 8 * i, 16, 8 * i + 16, 40))[..., ::-1])
    writer.release()
    summary = save_results(pipe.predict(tmp_path / "clip.avi"), tmp_path / "out", formats=("img", "json"))
    assert (summary.images, summary.frames, summary.files) == (6, 6, 2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip_res.json", "clip_res.mp4"]
    content = json.loads((tmp_path / "out" / "clip_res.json").read_text())
    assert content["frame_rate"] == 12.5 and [frame["page_index"] for frame in content["frames"]] == list(range(6))
    assert all(frame["boxes"][0]["label"] == "red" and len(frame["masks"]) == 1 for frame in content["frames"])
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip_res.mp4"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 6 and capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    assert int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little") == (b"h264" if has_pyav else b"FMP4")
    assert ("browsers will not play" in caplog.text) != has_pyav
    is_read, frame = capture.read()
    assert is_read and frame.shape == (64, 64, 3)
    red = frame[16:40, 4:12, 2].mean() - frame[16:40, 4:12, :2].mean()
    assert red > 60 > abs(float(frame[48:, 32:, 2].mean()) - float(frame[48:, 32:, 1].mean())), "drawn, in RGB"


@pytest.mark.parametrize("has_pyav", [True, False])
def test_frames_of_a_variable_rate_keep_their_times(tmp_path, monkeypatch, has_pyav):
    """As of a phone or of a recorded screen: six frames in three seconds, the third one stays for a second."""
    av = pytest.importorskip("av")
    times = [0.0, 0.1, 0.2, 1.2, 1.3, 3.0]
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    frames = list(read_video(tmp_path / "clip.mp4"))
    source = str(tmp_path / "clip.mp4")
    if not has_pyav:
        monkeypatch.setitem(sys.modules, "av", None)
    file = VideoFile(source, tmp_path / "out.mp4", tmp_path / "out.json")
    for number, frame in enumerate(frames):
        result = Result(source, (64, 64), [], [], frame, number, class_names=("x",), category_ids=(1,))
        file.add(result, frame, "rle")
    assert file.close(whole=True) == 2
    told = [frame["time"] for frame in json.loads((tmp_path / "out.json").read_text())["frames"]]
    assert told == pytest.approx(times, abs=1e-3)
    with av.open(str(tmp_path / "out.mp4")) as video:
        shown = [(frame.time, int(frame.to_ndarray(format="gray").mean())) for frame in video.decode(video=0)]
    first_shown = [min(time for time, grey in shown if abs(grey - frames[i].mean()) < 15) for i in range(6)]
    # Without PyAV there is one rate, that which the source says it has on average, here 2 a second.
    assert first_shown == pytest.approx(times, abs=1e-3 if has_pyav else 0.5)
    assert len(shown) == 6 if has_pyav else len(shown) >= 6


def test_a_video_of_odd_sides(tmp_path):
    av = pytest.importorskip("av")
    frames = [np.full((33, 51, 3), (200, 40, 10 * i), np.uint8) for i in range(5)]
    file = VideoFile("unknown.avi", tmp_path / "odd.mp4", None)
    for frame in frames:
        file.add(Result.failed("unknown.avi", "only drawn"), frame, "rle")
    assert file.close(whole=True) == 1
    with av.open(str(tmp_path / "odd.mp4")) as video:
        read = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 25
    assert len(read) == 5 and read[0].shape == (34, 52, 3)
    np.testing.assert_allclose(np.mean(read, axis=(1, 2)), [frame[0, 0] for frame in frames], atol=6)


def test_a_video_that_is_cut_short_leaves_nothing(tmp_path, pipe):
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.5, (64, 64))
    for _ in range(20):
        writer.write(picture((0, 8, 16, 24, 40))[..., ::-1])
    writer.release()

    def interrupted():
        for number, result in enumerate(pipe.predict(tmp_path / "clip.avi")):
            if number == 12:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        save_results(interrupted(), tmp_path / "out", formats=("img", "json"))
    assert list((tmp_path / "out").iterdir()) == []


def test_formats_are_checked():
    assert check_formats(["img", " json "]) == ("img", "json")
    for wrong in ([], ["img", "gif"]):
        with pytest.raises(ValueError, match="formats must be some of img,json,coco"):
            check_formats(wrong)


def test_outlines_of_a_result_are_those_of_its_masks():
    assert [sum(p.area for p in rle_to_polygons(mask)) for mask in make().masks] == [800, 300, 0]
    np.testing.assert_array_equal(decode_rle(make().masks[0]), masks()[0])
