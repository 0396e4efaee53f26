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
MAX_PARTS = 2000  # of a JPEG or PNG file before its pixels
MAX_VALUES = 10_000  # in the JSON of a request
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
    if not is_header_short(data):
        raise Refused(422, f"The image has more than {MAX_PARTS} parts before its pixels")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise Refused(413, f"The image has more than {max_pixels} pixels") from None
    except Exception:  # whatever the parsers of a hostile file raise
        raise Refused(422, f"The image is no {', '.join(IMAGE_FORMATS)} file") from None
    if width * height > max_pixels:
        raise Refused(413, f"The image has {width} x {height} pixels, more than {max_pixels}")


def is_header_short(data: bytes) -> bool:
    """Whether the size of a JPEG or PNG file stands after few parts: of millions, parsers take seconds."""
    position, jpeg, png = 2, data.startswith(b"\xff\xd8"), data.startswith(b"\x89PNG\r\n\x1a\n")
    position = 8 if png else 2
    for _ in range(MAX_PARTS):
        head = data[position : position + 8]
        if png and len(head) == 8:
            if head[4:] == b"IDAT":
                return True
            position += 12 + int.from_bytes(head[:4], "big")
        elif jpeg and len(head) >= 4 and head[0] == 0xFF:
            if head[1] == 0xFF:  # filling between segments
                position += 1
            elif 0xC0 <= head[1] <= 0xCF and head[1] not in (0xC4, 0xC8, 0xCC):  # the size of the picture
                return True
            else:
                position += 2 + int.from_bytes(head[2:4], "big")
        else:
            return True  # another format, or damaged: the decoder says what
    return False


def read_json(body: bytes) -> Any:
    """The JSON of a body. Raises Refused for one of thousands of values: a picture is one text."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{", b":")) > MAX_VALUES:
        text = f"JSON of more than {MAX_VALUES} values; the picture is one text, `image`"
        raise Refused(422, json.dumps([{"type": "json_invalid", "loc": "body", "msg": text}]))
    return json.loads(body)


async def drop_body(request: Any, limit: int) -> None:
    """Read a body and keep nothing of it, up to DRAINED times `limit`, so that a client hears why it is refused."""
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > DRAINED * limit:
            return


class BodyRoom:
    """The bytes of bodies that all requests together may hold."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, size: int) -> bool:
        """Hold `size` bytes more; False where there is no room for them."""
        if self.held + size > self.most:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        """Hold `size` bytes less."""
        self.held -= size


async def read_body(request: Any, limit: int, room: BodyRoom) -> bytes:
    """The body, at most `limit` bytes, for which there is room: whoever has it gives the room back.

    Raises Refused, 413 for a larger one and 429 without room. It is read on for a while then and dropped, so that a
    client which is still sending hears why.
    """
    too_large = Refused(413, f"The body has more than {limit} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > DRAINED * limit:
        raise too_large
    refused = too_large if length.isdecimal() and int(length[:20]) > limit else None
    body, received = bytearray(), 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if refused is None and received > limit:
                refused = too_large
            elif refused is None and not room.take(len(chunk)):
                refused = Refused(429, "Too many requests")
            if refused is None:
                body += chunk
                continue
            room.give_back(len(body))
            body.clear()
            if received > DRAINED * limit:
                break
    except BaseException:  # also what asyncio cancels
        room.give_back(len(body))
        raise
    if refused is not None:
        raise refused
    return bytes(body)


def is_picture(body: bytes) -> bool:
    """Whether a body begins as the files do that are taken."""
    begins = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"II*\0", b"MM\0*")
    return body.startswith(begins) or (body[:4] == b"RIFF" and body[8:12] == b"WEBP")


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
        if kind != "application/json" and not kind.endswith("+json"):
            if is_picture(body):  # `curl --data-binary @a.jpg` says that it is a form
                return schema.SegmentationRequest.model_validate(
                    {"image": "file", **_from_text(request.query_params)}
                ), body
            raise Refused(
                422, f"The content type is {kind[:80]}; send application/json, a form with a file, or image/*"
            )
        content = read_json(body)
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
