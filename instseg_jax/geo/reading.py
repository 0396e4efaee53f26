"""How the rasters were read that a model was trained on; new ones are read alike.

`convert --src_dataset_type=geo` writes it into the annotation files, training puts it into the config (`data.map_*`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from instseg_jax.messages import quote

MAP_FIELDS = ("map_gsd", "map_bands", "map_stretch")


@dataclasses.dataclass(frozen=True)
class Reading:
    """Resolution, bands and stretch of rasters; None: as each file says."""

    gsd: float | None  # metres on the ground of a pixel
    bands: tuple[str, ...] | None  # shown as red, green and blue, by colour or number
    stretch: tuple[tuple[float, ...], tuple[float, ...]] | None  # values of the three that become 0, and 255

    def as_fields(self) -> dict[str, Any]:
        """The fields of a config that say it."""
        return dict(zip(MAP_FIELDS, (self.gsd, self.bands, self.stretch), strict=True))


def build_reading(data: ConfigDict) -> Reading | None:
    """How rasters are read for a model of this config; None: each as it says itself. Raises ValueError."""
    if all(data[field] is None for field in MAP_FIELDS):
        return None
    return make_reading({field.removeprefix("map_"): data[field] for field in MAP_FIELDS}, "data.map_")


def make_reading(said: Mapping[str, Any], where: str) -> Reading:
    """A reading of plain values, as JSON has them. Raises ValueError that names the value after `where`."""
    gsd, bands, stretch = (said.get(name) for name in ("gsd", "bands", "stretch"))
    if gsd is not None and not (_is_number(gsd) and 0 < gsd < 1e6):
        raise ValueError(f"{where}gsd is {quote(gsd)}, it must be above 0 metres.")
    if bands is not None and not (_is_list(bands, 3) and all(isinstance(band, str) for band in bands)):
        raise ValueError(f"{where}bands is {quote(bands)}, it must name three.")
    if stretch is not None:
        pairs = _is_list(stretch, 2) and all(_is_list(row, 3) and all(map(_is_number, row)) for row in stretch)
        if not pairs or any(low > high for low, high in zip(*stretch, strict=True)):
            raise ValueError(f"{where}stretch is {quote(stretch)}, it must hold three low and three high values.")
    return Reading(
        None if gsd is None else float(gsd),
        None if bands is None else tuple(bands),
        None if stretch is None else (tuple(map(float, stretch[0])), tuple(map(float, stretch[1]))),
    )


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
