"""Everything about the picture files of a data set: each one is decoded, measured and fingerprinted.

Fingerprints find the same picture in two splits: a digest of the file for exact copies, and a perceptual
hash (signs of low frequencies) that survives another size, compression or brightness.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote

import cv2
import numpy as np
from PIL import Image

from instseg_jax import images, pixels
from instseg_jax.bands import Bands
from instseg_jax.data.coco_entries import ImageRecord
from instseg_jax.data.findings import Flaw
from instseg_jax.files import is_inside, is_regular, read_regular
from instseg_jax.messages import quote, shorten

HASH_SIDE = 32  # pixels of the grey thumbnail that is hashed
HASH_FREQUENCIES = 8  # of the cosine transform, each way: 64 bits
MAX_HASH_DISTANCE = 8  # bits by which near duplicates differ at most
MIN_LIKENESS = 0.97  # correlation of their thumbnails
MIN_CONTRAST = 2.0  # grey levels of standard deviation; flatter pictures are only compared byte for byte
COMPARED_AT_ONCE = 1 << 22  # pairs of hashes in memory


@dataclasses.dataclass(frozen=True)
class PictureFacts:
    """What one file turned out to be; `error` says why it can't be used, the rest is then empty."""

    error: str | None
    is_missing: bool = False
    is_outside: bool = False  # of the folder: it was not opened
    size: tuple[int, int] = (0, 0)  # (height, width) as read, turned by EXIF
    orientation: int = 1  # EXIF's, 1 is upright
    is_cut: bool = False  # it has more than the 8 bits that are read
    digest: bytes = b""
    thumbnail: np.ndarray | None = None  # [32, 32] uint8 grey; None for a flat picture
    hash: int = 0


def inspect_listed(folder: Path, name: str, bands: Bands | None, *, allow_outside: bool) -> PictureFacts:
    """`inspect_picture` for a name of an annotation file; what lies outside is not opened, unless that is allowed."""
    if not allow_outside and not is_inside(folder, name):
        return PictureFacts(f"it lies outside of {str(folder)!r}", is_outside=True)
    return inspect_picture(folder / name, bands)


def inspect_picture(path: Path, bands: Bands | None = None) -> PictureFacts:
    """Decode a file as training does, and once more strictly, since OpenCV reads half a file without a word.

    `bands` are those that training reads with.
    """
    try:
        data = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return PictureFacts("there is no such file", is_missing=True)
    except OSError as error:
        return PictureFacts(f"it can't be opened: {error.strerror}")
    except ValueError as error:
        return PictureFacts(str(error))
    try:
        stored = pixels.decode(data, str(path))
        read = images.to_pixels(stored, bands, repr(str(path)))
    except ValueError as error:
        return PictureFacts(str(error))
    damage = _find_damage(data)
    if damage is not None:
        return PictureFacts(damage)
    thumbnail, picture_hash = fingerprint(read if bands is None else stored)
    return PictureFacts(
        error=None,
        size=stored.shape[:2],
        orientation=pixels.find_orientation(data),
        is_cut=bands is None and stored.dtype != np.uint8,
        digest=hashlib.blake2b(data, digest_size=16).digest(),
        thumbnail=thumbnail,
        hash=picture_hash,
    )


def find_picture_flaws(split: str, image: ImageRecord, facts: PictureFacts, folder: Path) -> list[Flaw]:
    """What is wrong with the file of a picture of the data set."""

    def flaw(code: str, detail: str) -> Flaw:
        return Flaw(code, split, (image.id,), f"image {quote(image.id)}, {quote(image.file_name)}: {detail}")

    if facts.is_missing:
        near = find_file(folder, image.file_name)
        hint = f"; but there is {quote(near.relative_to(folder).as_posix())}" if near else ""
        return [flaw("missing_image", f"there is no such file in {str(folder)!r}{hint}")]
    if facts.is_outside:
        return [flaw("outside_folder", facts.error or "")]
    if facts.error is not None:
        return [flaw("undecodable_image", facts.error)]
    height, width = facts.size
    if (height, width) != (image.height, image.width):
        is_turned = facts.orientation > 4 and (width, height) == (image.height, image.width)
        hint = " once it is turned as its EXIF orientation says" if is_turned else ""
        detail = f"it is {width}x{height}{hint}, the annotation file says {image.width}x{image.height}"
        return [flaw("size_mismatch", detail)]
    flaws = [flaw("deep_pixels", "it has more than 8 bits a channel")] if facts.is_cut else []
    if facts.orientation != 1:
        flaws.append(flaw("exif_rotation", f"EXIF orientation {facts.orientation}"))
    return flaws


def find_file(folder: Path, file_name: str) -> Path | None:
    """The one file that a wrong file name may mean.

    Without its folders, in other case, with another ending, percent-encoded, in another form of Unicode (as a Mac
    writes umlauts), or one folder down.
    """
    plain = unquote(file_name.replace("\\", "/"))
    for text in (file_name.replace("\\", "/"), plain, *(normalize(form, plain) for form in ("NFC", "NFD"))):
        for wanted in (Path(text), Path(Path(text).name)):
            path = folder / wanted
            if not wanted.is_absolute() and is_regular(path) and is_inside(folder, wanted):
                return path
    if not folder.is_dir():
        return None
    wanted = Path(normalize("NFC", plain))
    there = [path for path in folder.iterdir() if is_regular(path)]
    there += [path for down in sorted(folder.iterdir()) if down.is_dir() for path in down.iterdir() if is_regular(path)]
    there = [path for path in there if is_inside(folder, path.relative_to(folder))]
    for name in (lambda path: path.name, lambda path: path.stem):
        found = [path for path in there if normalize("NFC", name(path)).casefold() == name(wanted).casefold()]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def fingerprint(image: np.ndarray) -> tuple[np.ndarray | None, int]:
    """Grey thumbnail [32, 32] uint8 and 64-bit perceptual hash of a picture; (None, 0) for a flat one."""
    plain = image if image.dtype in (np.uint8, np.uint16) else image.astype(np.float32)
    small = images.in_groups(
        lambda pixels: cv2.resize(pixels, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA), plain
    )
    grey = np.nan_to_num(small.astype(np.float32).mean(axis=2))
    if image.dtype != np.uint8:  # any range
        grey = (grey - grey.min()) * (255 / max(float(np.ptp(grey)), 1e-6))
    if grey.std() < MIN_CONTRAST:
        return None, 0
    low = cv2.dct(grey - grey.mean())[:HASH_FREQUENCIES, :HASH_FREQUENCIES].ravel()
    bits = low > np.median(low)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8), int(np.packbits(bits).view(">u8")[0])


def find_leaks(
    train: Sequence[tuple[ImageRecord, PictureFacts]], val: Sequence[tuple[ImageRecord, PictureFacts]]
) -> list[Flaw]:
    """Pictures of the validation split that are in the training split too: same bytes, or the same to the eye."""
    by_digest = {facts.digest: image for image, facts in train if facts.error is None}
    flaws, rest = [], []
    for image, facts in val:
        if facts.error is not None:
            continue
        twin = by_digest.get(facts.digest)
        if twin is None:
            rest.append((image, facts))
        else:
            flaws.append(_leak(twin, image, "the same file"))
    shown = [(image, facts) for image, facts in train if facts.thumbnail is not None]
    rest = [(image, facts) for image, facts in rest if facts.thumbnail is not None]
    return flaws + [_leak(a, b, "nearly the same picture") for a, b in _near_duplicates(shown, rest)]


def _near_duplicates(
    train: Sequence[tuple[ImageRecord, PictureFacts]], val: Sequence[tuple[ImageRecord, PictureFacts]]
) -> list[tuple[ImageRecord, ImageRecord]]:
    """For each picture of `val` the most alike one of `train`, where there is one."""
    if not train or not val:
        return []
    hashes = np.array([facts.hash for _, facts in train], np.uint64)
    pairs = []
    rows = max(1, COMPARED_AT_ONCE // len(hashes))
    for start in range(0, len(val), rows):
        block = np.array([facts.hash for _, facts in val[start : start + rows]], np.uint64)
        near = np.bitwise_count(block[:, None] ^ hashes[None]) <= MAX_HASH_DISTANCE
        for row in np.flatnonzero(near.any(axis=1)).tolist():
            image, facts = val[start + row]
            likeness = [(_likeness(train[i][1], facts), i) for i in np.flatnonzero(near[row]).tolist()]
            best, position = max(likeness)
            if best >= MIN_LIKENESS:
                pairs.append((train[position][0], image))
    return pairs


def _likeness(a: PictureFacts, b: PictureFacts) -> float:
    """Correlation of two thumbnails, -1..1."""
    assert a.thumbnail is not None and b.thumbnail is not None  # flat pictures were left out
    return float(np.corrcoef(a.thumbnail.ravel(), b.thumbnail.ravel())[0, 1])


def _leak(train: ImageRecord, val: ImageRecord, what: str) -> Flaw:
    detail = f"{quote(train.file_name)} of train and {quote(val.file_name)} of val are {what}"
    return Flaw("leak", None, (train.id, val.id), detail)


def _find_damage(data: bytes) -> str | None:
    """What Pillow says against the pixels of a file; a format that it does not know passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its doubts about size or metadata are none about the pixels
        try:
            picture = pixels.open_by_pillow(data)
        except Exception:  # a format, or a layout of TIFF, that others read
            return None
        try:
            picture.load()
        except Image.DecompressionBombError:  # more pixels than Pillow likes
            return None
        except Exception as error:  # Pillow's plugins raise all kinds on damaged files
            return None if str(error).endswith("not available") else f"it is damaged: {shorten(error)}"
    return None


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a binary mask [H, W] to (height, width)."""
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
