"""Reading requests: bodies of bounded size, in three forms, and images of bounded size.

`Refused` is what the server turns into an error answer. Requests are Starlette's; this file only uses what they hold.
"""

import base64
import binascii
import contextlib
import io
import json
from typing import Any

from PIL import Image
from pydantic import ValidationError

from instseg_jax.serving import schema

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
DRAINED = 2  # times the largest body: what is read and dropped so that a client hears why it was refused


class Refused(Exception):
    """A request that gets an error answer."""

    def __init__(self, status: int, message: str, log_id: str | None = None) -> None:
        super().__init__(message)
        self.status, self.log_id = status, log_id


def decode_base64(text: str) -> bytes:
    """The bytes of base64, with or without line breaks and the head of a data URL. Raises Refused."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(422, "The image is neither base64 nor a URL") from None


def check_image(data: bytes, max_pixels: int) -> None:
    """Look at the header of an image file. Raises Refused for too many pixels, and for what is no image."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise Refused(413, f"The image has more than {max_pixels} pixels") from None
    except Exception:  # whatever the parsers of a hostile file raise
        raise Refused(422, f"The image is no {', '.join(IMAGE_FORMATS)} file") from None
    if width * height > max_pixels:
        raise Refused(413, f"The image has {width} x {height} pixels, more than {max_pixels}")


async def read_body(request: Any, limit: int) -> bytes:
    """The body, at most `limit` bytes. Raises Refused (413) for a larger one.

    That is read on for a while and dropped, so that a client which is still sending hears why.
    """
    length = request.headers.get("content-length", "")
    is_too_large = length.isdecimal() and int(length) > limit
    if is_too_large and int(length) > DRAINED * limit:
        raise Refused(413, f"The body has more than {limit} bytes")
    body, received = bytearray(), 0
    async for chunk in request.stream():
        received += len(chunk)
        if is_too_large or received > limit:
            is_too_large = True
            body.clear()
            if received > DRAINED * limit:
                break
        else:
            body += chunk
    if is_too_large:
        raise Refused(413, f"The body has more than {limit} bytes")
    return bytes(body)


async def parse_request(request: Any, body: bytes) -> tuple[schema.SegmentationRequest, bytes | None]:
    """What is asked for, and the bytes of an image that came as a file (None: it is in the request).

    Raises Refused (422) for a body that is neither the official JSON, nor a form with a file, nor a picture.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    data = None
    try:
        if kind == "multipart/form-data":
            request._body = body  # Starlette's own cache, which its form parser reads
            async with request.form(max_files=1, max_fields=8) as form:
                upload = form.get("image")
                if upload is None or isinstance(upload, str):
                    raise Refused(422, "The form has no file `image`")
                data = await upload.read()
                options = {name: value for name, value in form.items() if name != "image"}
            return schema.SegmentationRequest.model_validate({"image": "file", **_from_text(options)}), data
        if kind.startswith("image/") or kind == "application/octet-stream":
            return schema.SegmentationRequest.model_validate(
                {"image": "file", **_from_text(request.query_params)}
            ), body
        content = json.loads(body)
        return schema.SegmentationRequest.model_validate(content), None
    except ValidationError as error:
        message = schema.validation_message(error.errors(include_url=False, include_context=False))
        raise Refused(422, json.dumps(message)) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        message = [{"type": "json_invalid", "loc": "body", "msg": f"JSON decode error: {error}"}]
        raise Refused(422, json.dumps(message)) from None
    except ValueError:  # of the form parser
        raise Refused(422, "The form can't be read") from None


def _from_text(options: Any) -> dict[str, Any]:
    """Fields of a form or query: numbers and truth values from text, null left out."""
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name == "logId":
            values[name] = text
        elif text not in ("", "null"):
            with contextlib.suppress(json.JSONDecodeError):
                text = json.loads(text)
            values[name] = text
    return values
