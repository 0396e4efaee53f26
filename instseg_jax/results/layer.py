"""One layer of a map for everything that a prediction finds, whatever raster it lies on (extra `geo`).

Each feature has class, score, area and perimeter on the ellipsoid, and the raster that it was found on. A file that is
there keeps the features of other rasters; those of the same ones are replaced, so that the same command may come again.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from instseg_jax.files import alone
from instseg_jax.geo.antimeridian import mend_torn
from instseg_jax.geo.layer_files import (
    WGS84,
    driver_of,
    read_layer_file,
    reproject,
    require_extra,
    write_layer,
)
from instseg_jax.geo.shaping import Shaped, Shaping, reshape
from instseg_jax.messages import quote, shorten
from instseg_jax.results.large import LargeResult
from instseg_jax.results.result import Result
from instseg_jax.results.visualize import class_color

MIN_COVERED = 0.5  # of the smaller of two: from here on they are one object, as in windows of a picture
FIELDS = ("label", "cls_id", "score", "area_m2", "perimeter_m", "source")


@dataclasses.dataclass
class FoundLayer:
    """The features of a prediction, in the CRS of the layer, as they come."""

    path: Path
    class_names: tuple[str, ...]
    crs: Any  # of pyproj
    shaping: Shaping
    geometries: list[Any]
    rows: list[tuple]
    sources: set[str]
    unplaced: list[str]  # inputs that don't say where they lie
    shaped: list[Shaped]  # outlines that were changed; their shapes are dropped
    is_single: bool  # what two rasters of a prediction show is one object
    small: int = 0  # objects below the least area
    doubles: int = 0

    def follow(self, results: Iterable[Result | LargeResult]) -> Iterator[Result | LargeResult]:
        """Give results on, and keep their instances."""
        for result in results:
            self.add(result)
            yield result

    def add(self, result: Result | LargeResult) -> None:
        """Keep the instances of a result that lies on the ground."""
        import pyproj

        place = result.georeference
        if place is None or place.wkt is None:
            if len(result):
                self.unplaced.append(result.input_path)
            return
        try:
            own = pyproj.CRS.from_wkt(place.wkt)
            is_there = self.crs is None or own.equals(self.crs)
            there = None if is_there else pyproj.Transformer.from_crs(own, self.crs, always_xy=True)
        except pyproj.exceptions.ProjError:  # of another planet, or of a drawing
            self.unplaced.append(result.input_path)
            return
        try:
            globe = pyproj.Transformer.from_crs(own, WGS84, always_xy=True)
        except pyproj.exceptions.ProjError:
            globe = None
        self.sources.add(result.input_path)
        self.crs = self.crs or own
        geod = pyproj.Geod(ellps="WGS84")
        for box, polygons in result.outlines():
            if polygons:
                self._add(box, polygons, place, there, globe, geod, result.input_path)

    def _add(self, box: dict, polygons: Any, place: Any, there: Any, globe: Any, geod: Any, source: str) -> None:
        import shapely

        shape = shapely.multipolygons([shapely.Polygon(p.outer, p.holes) for p in polygons])
        sides = None if globe is None else _pixel_metres(place, globe, geod, shape)
        if sides is not None:
            shape = self._reshape(shape, np.array(sides), box["label"])
        ground = shapely.transform(shape, lambda xy: place.to_ground(xy))
        area = perimeter = math.nan
        if sides is not None:
            degrees = shapely.transform(ground, lambda xy: np.stack(globe.transform(xy[:, 0], xy[:, 1]), axis=1))
            area = abs(geod.geometry_area_perimeter(shapely.orient_polygons(degrees))[0])
            perimeter = geod.geometry_length(degrees.boundary) if math.isfinite(area) else math.nan
        if area < self.shaping.min_area:
            self.small += 1
            return
        if there is not None:
            ground = shapely.transform(ground, lambda xy: np.stack(there.transform(xy[:, 0], xy[:, 1]), axis=1))
            ground = mend_torn(ground) if self.crs.is_geographic else ground
        self.geometries.append(ground)
        label = box["label"]
        self.rows.append((label, int(box["cls_id"]), float(box["score"]), area, perimeter, source))

    def _reshape(self, shape: Any, sides: np.ndarray, label: str) -> Any:
        """A shape in pixels of these sides in metres, its outlines as they shall be."""
        import shapely

        shaped = reshape(shapely.transform(shape, lambda xy: xy * sides), self.shaping, label)
        if shaped is None:
            return shape
        self.shaped.append(dataclasses.replace(shaped, shape=None))
        return shapely.transform(shaped.shape, lambda xy: xy / sides)

    def write(self) -> Path:
        """Write the file; what it held of other rasters stays, also what another process writes just now.

        Raises ValueError for a layer of somebody else.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.path.with_name(f".{self.path.name}.lock")):
            return self._write()

    def _write(self) -> Path:
        import shapely

        geometries = np.array([*self.geometries, None], object)[:-1]
        columns = {name: np.array([row[k] for row in self.rows], _TYPES[name]) for k, name in enumerate(FIELDS)}
        if self.is_single and len(self.sources) > 1:
            is_kept = ~_find_doubles(geometries, columns)
            self.doubles = int((~is_kept).sum())
            geometries, columns = geometries[is_kept], {name: values[is_kept] for name, values in columns.items()}
        if self.path.exists():
            kept, known = self._others()
            geometries = np.concatenate([kept, geometries])
            columns = {name: np.concatenate([known[name].astype(_TYPES[name]), columns[name]]) for name in FIELDS}
        assert all(shapely.is_geometry(geometry) for geometry in geometries)
        return write_layer(self.path, geometries, columns, self.crs, style=make_style(self.class_names))

    def _others(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Features of the file that are of other rasters, in the CRS of this layer."""
        import shapely

        blobs, columns, crs = _read_ours(self.path)
        is_other = np.array([source not in self.sources for source in columns["source"]], bool)
        shapes = shapely.from_wkb(blobs[is_other])
        if crs is not None and len(shapes):
            shapes = reproject(shapes, crs, self.crs or crs)
            if (self.crs is not None and self.crs.is_geographic) and not self.crs.equals(crs):
                shapes = np.array([*map(mend_torn, shapes), None], object)[:-1]
        return shapes, {name: values[is_other] for name, values in columns.items()}

    def say(self) -> list[str]:
        """What a person should know about it, a line each."""
        count = len(self.rows) - self.doubles
        lines = [f"layer: {self.path}, {count} features of {len(self.sources)} rasters"]
        if self.doubles:
            lines.append(f"{self.doubles} objects of rasters that overlap were there twice; --keep_doubles keeps them")
        if self.small:
            lines.append(f"{self.small} objects of less than {self.shaping.min_area:g} m2 are left out")
        for how in sorted({one.how for one in self.shaped}):
            far, change = np.array([(one.moved, one.area_change) for one in self.shaped if one.how == how]).T
            lines.append(
                f"outlines {how}: {len(far)} of {len(self.rows) + self.small}, "
                f"moved by {np.median(far):.2f} m (median), at most {far.max():.2f} m; "
                f"areas differ by {100 * np.median(change):.2f} % (median), at most {100 * change.max():.2f} %"
            )
        if self.unplaced:
            more = f" and {len(self.unplaced) - 1} more" if len(self.unplaced) > 1 else ""
            lines.append(
                f"not in the layer, they don't say where they lie, or have no way to it: {self.unplaced[0]}{more}"
            )
        return lines


_TYPES = {"label": object, "cls_id": np.int64, "score": np.float64}
_TYPES |= {"area_m2": np.float64, "perimeter_m": np.float64, "source": object}


def open_layer(
    path: str | Path, class_names: Sequence[str], crs: str | None, shaping: Shaping, *, is_single: bool
) -> FoundLayer:
    """Begin a layer; `crs` None: WGS 84 for GeoJSON, else that of the file that is there, else of the first raster.

    `is_single`: an object that several of its rasters show is one feature.
    Raises ValueError for a suffix or CRS that is unknown, for a layer of somebody else, and where an extra is missing.
    """
    require_extra("--layer")
    import pyproj

    for name in ("simplify", "smooth", "regularize", "min_area"):
        if not getattr(shaping, name) >= 0:
            raise ValueError(f"--{name} is {getattr(shaping, name):g}, it must be at least 0.")
    known: Any = None
    is_geojson = driver_of(path) == "GeoJSON"
    there = _read_ours(Path(path))[2] if Path(path).exists() else None  # what can't be added to is told at once
    try:
        if crs is not None or is_geojson:
            known = pyproj.CRS.from_user_input(crs or WGS84)
        elif there is not None:
            known = pyproj.CRS.from_user_input(there)
    except pyproj.exceptions.CRSError as error:
        raise ValueError(f"The CRS {quote(crs)} is unknown ({shorten(error)}); one is EPSG:4326.") from error
    return FoundLayer(Path(path), tuple(class_names), known, shaping, [], [], set(), [], [], is_single)


def _read_ours(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], str | None]:
    try:
        return read_layer_file(path, None, FIELDS)
    except ValueError as error:
        raise ValueError(f"{path} is no layer of ours, nothing is added to it ({error})") from error


def _find_doubles(shapes: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Which features [n] another raster shows as well: the less sure one, or the one that its border has cut."""
    import shapely

    first, second = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    is_pair = (first < second) & (columns["label"][first] == columns["label"][second])
    is_pair &= columns["source"][first] != columns["source"][second]
    first, second = first[is_pair], second[is_pair]
    areas, valid = shapely.area(shapes), shapely.make_valid(shapes)
    shared = shapely.area(shapely.intersection(valid[first], valid[second]))
    small, large = np.minimum(areas[first], areas[second]), np.maximum(areas[first], areas[second])
    scores = columns["score"]
    is_first = np.where(small < MIN_COVERED * large, areas[first] >= areas[second], scores[first] >= scores[second])
    better, worse = np.where(is_first, first, second), np.where(is_first, second, first)
    is_double = np.zeros(len(shapes), bool)
    for k in np.lexsort((worse, better, -areas[better])):
        if shared[k] >= MIN_COVERED * small[k] and not is_double[better[k]]:
            is_double[worse[k]] = True
    return is_double


def make_style(class_names: Sequence[str]) -> str:
    """QGIS' style (QML) that gives each class the colour it has in our pictures."""
    categories, symbols = [], []
    for index, name in enumerate(class_names):
        color = ",".join(map(str, class_color(index)))
        options = {"color": f"{color},90", "outline_color": f"{color},255", "outline_width": "0.4", "style": "solid"}
        listed = "".join(f'<Option type="QString" name="{key}" value="{value}"/>' for key, value in options.items())
        shown = quoteattr(name)
        categories.append(f'<category render="true" symbol="{index}" value={shown} label={shown}/>')
        symbols.append(
            f'<symbol type="fill" name="{index}" alpha="1" clip_to_extent="1" force_rhr="0"><layer class="SimpleFill" '
            f'enabled="1" locked="0" pass="0"><Option type="Map">{listed}</Option></layer></symbol>'
        )
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.22" styleCategories="Symbology"><renderer-v2 type="categorizedSymbol" attr="label" '
        'forceraster="0" symbollevels="0" enableorderby="0">'
        f"<categories>{''.join(categories)}</categories><symbols>{''.join(symbols)}</symbols></renderer-v2></qgis>\n"
    )


def _pixel_metres(place: Any, globe: Any, geod: Any, shape: Any) -> tuple[float, float] | None:
    """Width and height in metres of a pixel where a shape lies; None off the domain of the CRS."""
    x, y = shape.centroid.coords[0]
    corners = place.to_ground(np.array([[x, y], [x + 1, y], [x, y + 1]]))
    lon, lat = globe.transform(corners[:, 0], corners[:, 1])
    if not np.isfinite([*lon, *lat]).all():
        return None
    _, _, lengths = geod.inv([lon[0]] * 2, [lat[0]] * 2, lon[1:], lat[1:])
    return float(lengths[0]), float(lengths[1])
