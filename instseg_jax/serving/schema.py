"""Requests and answers of the server: the official schema, and what goes beyond it.

Beyond it: `segmentation`, the RLE of the whole image, beside the official RLE of the box's crop.
"""

import base64
import io
import uuid
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from instseg_jax.crops import crop_bounds, crop_rle
from instseg_jax.masks import encode_mask
from instseg_jax.results.result import Result

JPEG_QUALITY = 90
MAX_LOG_ID = 128  # characters


class SegmentationRequest(BaseModel):
    """A picture to segment."""

    model_config = ConfigDict(strict=True)

    image: str = Field(min_length=1, description="The image file in base64, or its URL where the server allows that.")
    threshold: float | None = Field(None, ge=0, le=1, description="Lowest score; null: the model's own thresholds.")
    visualize: bool | None = Field(None, description="Whether the answer holds the drawn image; null: the server's.")
    logId: str | None = Field(None, max_length=MAX_LOG_ID, description="Comes back in the answer.")


class Mask(BaseModel):
    """The mask inside the box rounded to pixels: paste it at round(bbox)."""

    rleResult: str = Field(description="COCO's compressed RLE `counts` of the crop.")
    size: list[int] = Field(description="[height, width] of the crop.")


class Segmentation(BaseModel):
    """The mask in the whole image, as COCO RLE."""

    size: list[int]
    counts: str


class Instance(BaseModel):
    """An object in the image, in pixels of it; `mask` is of its rounded box, `segmentation` of the whole image."""

    bbox: list[float] = Field(description="[x1, y1, x2, y2] in pixels.")
    categoryId: int
    categoryName: str
    score: float
    mask: Mask
    segmentation: Segmentation


class SegmentationResult(BaseModel):
    """What was found in an image, by falling score."""

    instances: list[Instance]
    image: str | None = Field(None, description="The drawn image as base64 JPEG; absent when it was not asked for.")


class Answer(BaseModel):
    """Every answer has these; `errorCode` is 0, or the HTTP status."""

    logId: str
    errorCode: int = 0
    errorMsg: str = "Success"


class SegmentationAnswer(Answer):
    """The answer to a request that succeeded."""

    result: SegmentationResult


def new_log_id() -> str:
    """An identifier (UUID) for a request that brings none."""
    return str(uuid.uuid4())


def error_answer(log_id: str | None, code: int, message: str) -> dict[str, Any]:
    """The official answer to a request that failed; `code` is the HTTP status."""
    return {"logId": log_id or new_log_id(), "errorCode": code, "errorMsg": message}


def success_answer(log_id: str | None, result: Result, *, visualize: bool) -> dict[str, Any]:
    """The answer to a request: each instance with its box, its crop's mask and the whole image's."""
    instances = [
        {
            "bbox": box["coordinate"],
            "categoryId": box["cls_id"],
            "categoryName": box["label"],
            "score": box["score"],
            "mask": _crop_mask(box, mask, result.size),
            "segmentation": dict(mask),
        }
        for box, mask in zip(result.boxes, result.masks, strict=True)
    ]
    content: dict[str, Any] = {"instances": instances}
    if visualize:
        picture = io.BytesIO()
        result.img["res"].save(picture, format="JPEG", quality=JPEG_QUALITY)
        content["image"] = base64.b64encode(picture.getvalue()).decode("ascii")
    return {"logId": log_id or new_log_id(), "errorCode": 0, "errorMsg": "Success", "result": content}


def validation_message(errors: list[Any]) -> list[dict[str, str]]:
    """What is wrong with a request, as the official server lists it: type, loc such as "body.a[0]", msg."""
    shown = []
    for error in errors:
        loc = "body"
        for part in error["loc"]:
            loc += f"[{part}]" if isinstance(part, int) else f".{part}"
        shown.append({"type": error["type"], "loc": loc, "msg": error["msg"]})
    return shown


def _crop_mask(box: dict, mask: dict, size: tuple[int, int]) -> dict[str, Any]:
    rle = encode_mask(np.asarray(crop_rle(mask, crop_bounds(box["coordinate"], size))))
    return {"rleResult": rle["counts"], "size": rle["size"]}
