"""Drawing of instances on an image: the only place that draws predictions.

A class keeps its hue from picture to picture; instances of one class differ in shade. Large instances are drawn
first, labels last and where they hide each other least.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from instseg_jax.crops import crop_rle
from instseg_jax.masks import compress_rle, encode_mask, rle_area, rle_box_xyxy_px

GOLDEN_ANGLE = 137.508  # degrees: successive classes are far apart in hue, however many there are
FIRST_HUE = 25.0
CHROMA = 0.2
# (lightness, hue offset in degrees) in OKLCH, one after another for the instances of a class.
SHADES = ((0.70, 0.0), (0.58, -10.0), (0.80, 10.0), (0.64, 14.0), (0.75, -16.0))
# A label covers no other, and may hide this part of any instance's box. One that finds no such place is shortened to
# its score, then left out; a legend then names the classes. In a crowd, labels larger than their boxes are short from
# the start: names would bury the picture.
MAX_HIDDEN = 0.35
MAX_LEGEND_LINES = 8
CROWD = 25
# Pillow's own font knows ASCII only. For other names the first of these that the system has is used.
WIDE_FONTS = (
    *("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "Arial Unicode.ttf"),
    *("NotoSans-Regular.ttf", "DejaVuSans.ttf", "arial.ttf", "Arial.ttf"),
)


def draw_instances(
    image: np.ndarray,
    *,
    boxes_xyxy_px: np.ndarray,
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None,
    masks: Sequence[dict | np.ndarray],
    opacity: float = 0.45,
) -> np.ndarray:
    """Draw masks, boxes and "name 0.87" labels on a copy of an RGB image [H, W, 3] uint8.

    Everything else is per instance and of one length: boxes [n, 4] in pixels, class indices (they choose the
    colours), class names, scores (None to leave them out), and masks of the whole image, as COCO RLE or binary
    [H, W]. Where labels would hide objects or each other, the least certain are shortened or left out, and a legend
    counts the classes. Raises ValueError for another kind of image, masks of another size, or unequal lengths.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"An image to draw on must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}."
        )
    boxes_xyxy_px = np.asarray(boxes_xyxy_px, np.float64).reshape(-1, 4)
    counts = {len(boxes_xyxy_px), len(labels), len(names), len(masks), len(labels if scores is None else scores)}
    if len(counts) != 1:
        raise ValueError(f"Boxes, labels, names, scores and masks must be of one length, got {sorted(counts)}.")
    colors = instance_colors(labels)
    canvas = np.ascontiguousarray(image).copy()
    scale = math.sqrt(canvas.shape[0] * canvas.shape[1])
    rles = [compress_rle(mask) if isinstance(mask, dict) else encode_mask(mask) for mask in masks]
    areas = [rle_area(rle) for rle in rles]
    for i in sorted(np.flatnonzero(areas), key=lambda i: areas[i], reverse=True):
        if tuple(rles[i]["size"]) != image.shape[:2]:
            raise ValueError(f"A mask has size {rles[i]['size']}, but the image {list(image.shape[:2])}.")
        line = max(1, round(min(scale / 320, math.sqrt(areas[i]) / 50)))
        _draw_mask(canvas, rles[i], rle_box_xyxy_px(rles[i]), colors[i], opacity, line)
    line, font_size = _sizes(boxes_xyxy_px, scale)
    for box, color in zip(boxes_xyxy_px, colors, strict=True):
        _draw_box(canvas, box, color, line)
    picture = Image.fromarray(canvas)
    font = _load_font(font_size, "".join(names))
    frames, is_complete = _draw_labels(picture, font, boxes_xyxy_px, names, scores, colors)
    if not is_complete:
        _draw_legend(picture, font, labels, names, np.concatenate([frames, boxes_xyxy_px]))
    return np.array(picture)


def _sizes(boxes_xyxy_px: np.ndarray, scale: float) -> tuple[int, int]:
    """Width of the boxes' lines and height of the labels, in pixels of a picture whose side is about `scale`.

    Both follow the picture; in a crowd they follow the objects as well, so that names do not cover them.
    """
    line, font_size = scale / 640, 0.022 * scale
    if len(boxes_xyxy_px) > CROWD:
        sides = np.sqrt(np.prod(np.maximum(boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2], 0), axis=1))
        object_side = float(np.median(np.nan_to_num(sides)))
        font_size *= (CROWD / len(boxes_xyxy_px)) ** 0.25
        font_size = min(font_size, max(0.006 * scale, 0.4 * object_side))
        line = min(line, max(scale / 2000, object_side / 20))
    return max(1, round(line)), max(10, round(font_size))


def instance_colors(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Choose an RGB colour for each instance: the hue by its class index, the shade by its rank within the class."""
    seen: Counter[int] = Counter()
    colors = []
    for label in map(int, labels):
        colors.append(class_color(label, seen[label]))
        seen[label] += 1
    return colors


def class_color(index: int, rank: int = 0) -> tuple[int, int, int]:
    """The RGB colour of the instance number `rank` of a class in a picture, wherever it is drawn.

    The hue follows from the class index, the shade from the rank; shades repeat after `len(SHADES)`.
    """
    lightness, offset = SHADES[rank % len(SHADES)]
    return _oklch_to_rgb(lightness, CHROMA, FIRST_HUE + GOLDEN_ANGLE * index + offset)


def _oklch_to_rgb(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """Convert OKLCH (Ottosson 2020; hue in degrees) to sRGB 0..255, with less chroma where sRGB ends."""
    angle = math.radians(hue)
    while True:
        a, b = chroma * math.cos(angle), chroma * math.sin(angle)
        long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        )
        if chroma < 0.01 or all(-0.001 <= v <= 1.001 for v in linear):
            break
        chroma *= 0.95
    gamma = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in linear)
    red, green, blue = (min(255, max(0, round(255 * v))) for v in gamma)
    return red, green, blue


def _draw_mask(
    canvas: np.ndarray,
    rle: dict,
    box: tuple[int, int, int, int],
    color: tuple[int, int, int],
    opacity: float,
    line: int,
) -> None:
    """Blend the inside of a mask with its colour and draw its outline, in place."""
    x1, y1, x2, y2 = box
    crop = crop_rle(rle, box)
    region = canvas[y1:y2, x1:x2]
    blended = np.arange(256)[:, None] * (1 - opacity) + np.array(color) * opacity
    region[:] = cv2.copyTo(cv2.LUT(region, np.rint(blended).astype(np.uint8)[None]), crop, region)
    contours, _ = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, contours, -1, color, line, cv2.LINE_AA, offset=(x1, y1))


def _draw_box(canvas: np.ndarray, box: np.ndarray, color: tuple[int, int, int], line: int) -> None:
    """Draw the part of a box that lies in the image, in place."""
    height, width = canvas.shape[:2]
    if not np.isfinite(box).all() or box[0] >= width or box[1] >= height or box[2] < 0 or box[3] < 0:
        return
    x1, y1, x2, y2 = np.clip(np.rint(box), 0, [width - 1, height - 1, width - 1, height - 1]).astype(int).tolist()
    cv2.rectangle(canvas, (x1, y1), (x2, y2), color, line)


def _load_font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Load Pillow's own font, or for text beyond ASCII one of the system's, at `size` pixels."""
    if not text.isascii():
        for name in WIDE_FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as always when a size is given
    return font


def _draw_labels(
    picture: Image.Image,
    font: ImageFont.FreeTypeFont,
    boxes_xyxy_px: np.ndarray,
    names: Sequence[str],
    scores: Sequence[float] | None,
    colors: Sequence[tuple[int, int, int]],
) -> tuple[np.ndarray, bool]:
    """Write labels where they hide little, the most certain first.

    Returns the frames [m, 4] of the labels that were written, and whether that is all of them, with their names.
    """
    draw = ImageDraw.Draw(picture)
    ascent, descent = font.getmetrics()
    pad = max(1, round(ascent / 6))
    visible = np.clip(np.nan_to_num(boxes_xyxy_px), 0, np.tile(picture.size, 2))
    order = range(len(names)) if scores is None else np.argsort(-np.asarray(scores, np.float64), kind="stable")
    placed, is_complete = np.zeros((0, 4)), True
    for i in order:
        texts = [names[i]] if scores is None else [f"{names[i]} {scores[i]:.2f}", f"{scores[i]:.2f}"]
        sizes = [(math.ceil(font.getlength(text)) + 2 * pad, ascent + descent) for text in texts]
        is_larger = math.prod(sizes[0]) > math.prod(visible[i, 2:] - visible[i, :2])
        if len(names) > CROWD and is_larger:
            texts, sizes, is_complete = texts[1:], sizes[1:], False
        for text, size in zip(texts, sizes, strict=True):
            frame = _place_label(visible[i], size, picture.size, placed, visible)
            if frame is not None:
                draw.rectangle(frame.tolist(), fill=colors[i])
                draw.text((frame[0] + pad, frame[1]), text, fill=_text_color(colors[i]), font=font)
                placed = np.concatenate([placed, frame[None]])
                is_complete = is_complete and text == texts[0]
                break
        else:
            is_complete = False
    return placed, is_complete


def _place_label(
    box: np.ndarray, size: tuple[int, int], picture_size: tuple[int, int], placed: np.ndarray, visible: np.ndarray
) -> np.ndarray | None:
    """Choose a label's frame (x1, y1, x2, y2) at its box and inside the picture; None where it would hide too much."""
    (w, h), (x1, y1, x2, y2) = size, box
    if w >= picture_size[0] or h >= picture_size[1]:
        return None
    corners = np.array([
        (x1, y1 - h), (x1, y1), (x2 - w, y1 - h), (x1, y2), (x2 - w, y2), (x2, y1), (x1 - w, y1),
        # Where neighbours have taken these: inside the box at its other sides, and one line further off.
        (x2 - w, y1), (x1, y2 - h), (x2 - w, y2 - h), (x1, y1 + h), (x1, y1 - 2 * h), (x1, y2 + h),
    ])  # fmt: skip
    corners = np.rint(np.clip(corners, 0, np.subtract(picture_size, (w + 1, h + 1))))
    frames = np.concatenate([corners, np.add(corners, (w, h))], axis=1)
    is_free = _shared_area(frames, placed).sum(axis=1) == 0
    areas = np.maximum(np.prod(visible[:, 2:] - visible[:, :2], axis=1), 1)
    hidden = (_shared_area(frames, visible) / areas).max(axis=1)
    good = np.flatnonzero(is_free & (hidden <= MAX_HIDDEN))
    return frames[good[0]] if len(good) else None


def _shared_area(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Areas that frames [n, 4] share with frames [m, 4]: [n, m]."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return np.prod(np.maximum(sides, 0), axis=-1)


def _draw_legend(
    picture: Image.Image,
    font: ImageFont.FreeTypeFont,
    labels: Sequence[int],
    names: Sequence[str],
    occupied: np.ndarray,
) -> None:
    """Name the classes with their colours and counts, in the corner that holds the least of `occupied` [m, 4].

    Pictures too small for it go without.
    """
    counts = Counter(zip(map(int, labels), names, strict=True)).most_common()
    lines: list[tuple[str, tuple[int, int, int] | None]] = [
        (f"{name} ({count})", instance_colors([label])[0]) for (label, name), count in counts[:MAX_LEGEND_LINES]
    ]
    if len(counts) > MAX_LEGEND_LINES:
        lines.append((f"and {len(counts) - MAX_LEGEND_LINES} more", None))
    ascent, descent = font.getmetrics()
    step = ascent + descent
    w = math.ceil(max(font.getlength(text) for text, _ in lines)) + 2 * step
    h = step * len(lines) + step // 2
    if w * h > picture.width * picture.height / 4:
        return
    right, bottom = max(picture.width - w - 1, 0), max(picture.height - h - 1, 0)
    corners = np.array([(0, 0), (right, 0), (0, bottom), (right, bottom)])
    frames = np.concatenate([corners, np.add(corners, (w, h))], axis=1)
    x, y = corners[np.argmin(_shared_area(frames, occupied).sum(axis=1))].tolist()
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x, y, x + w, y + h), fill=(24, 24, 24))
    for i, (text, color) in enumerate(lines):
        top = y + step // 4 + i * step
        if color is not None:
            draw.rectangle((x + step // 3, top + step // 5, x + step, top + step - step // 5), fill=color)
        draw.text((x + step * 1.35, top), text, fill=(255, 255, 255), font=font)


def _text_color(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever reads better on a colour (WCAG relative luminance)."""
    linear = [v / 3294.6 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.2 else (255, 255, 255)
