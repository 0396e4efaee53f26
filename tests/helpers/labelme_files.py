"""LabelMe files, written as its program does."""

import json
from pathlib import Path

from converted_data import HEIGHT, WIDTH, write_picture


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}} | more


def write_labelme(folder: Path, name: str, shapes, *, picture=True, **more) -> Path:
    if picture:
        write_picture(folder / f"{name}.png", seed=len(name))
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png", "imageData": None}
    content |= {"imageHeight": HEIGHT, "imageWidth": WIDTH} | more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]
