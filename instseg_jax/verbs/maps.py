"""`evaluate --against`: a layer that was found, held against one that is true."""

import argparse
import collections
from pathlib import Path

import numpy as np

from instseg_jax.commands import print_next
from instseg_jax.files import write_json
from instseg_jax.geo.layer_files import read_layer_file, reproject, require_extra
from instseg_jax.geo.layers import known_crs, read_layer
from instseg_jax.messages import quote
from instseg_jax.scoring.maps import (
    ALL,
    MapLayer,
    by_block,
    by_class,
    check_classes,
    find_origin,
    layer_on_plane,
    match_layers,
    shapes_on_plane,
    write_map_report,
)
from instseg_jax.scoring.regions import estimate_regions


def evaluate_map(options: argparse.Namespace) -> int:
    """Precision, recall and F1 of a layer of `predict --layer`, by class and block; numbers, a page with the map."""
    if not options.predictions:
        raise ValueError("--against needs --predictions, the layer that predict --layer wrote")
    if options.regions and not (options.aoi and options.block):
        raise ValueError("--regions needs --aoi, the ground on which --against is complete, and --block, as 200m")
    require_extra("--against")
    notes: collections.Counter[str] = collections.Counter()
    true, found = _true_layer(options, notes), _found_layer(options.predictions)
    check_classes(found, true)
    area = None
    if options.aoi:
        layer = read_layer(options.aoi, class_field=None, class_name="area", crs=None, notes=collections.Counter())
        area = reproject(layer.shapes, known_crs(layer), true.crs)
    pairs = match_layers(found, true, iou=options.iou, area=area)
    tables = {"Classes": by_class(pairs)} | (
        {} if options.block is None else {"Blocks": by_block(pairs, options.block)}
    )
    regions = {} if area is None or not options.regions else _estimate_regions(options, found, true, area)
    workdir = Path(options.workdir)
    facts = [
        f"found: {options.predictions}",
        f"true: {options.against}",
        f"pairs: same class, IoU at least {options.iou:g}",
    ]
    facts += [f"within: {options.aoi}"] if options.aoi else []
    facts += [f"regions: intervals of {options.coverage:g} %"] if options.regions else []
    report = write_map_report(workdir / "map_report.html", pairs, tables, regions, facts)
    numbers = {"iou": options.iou, "classes": tables["Classes"], "blocks": tables.get("Blocks", {})}
    numbers |= {"regions": regions, "coverage": options.coverage} if options.regions else {}
    write_json(workdir / "map_result.json", numbers | {"notes": dict(notes)}, indent=2)
    for note, count in notes.items():
        print(f"note: {note}: {count}")
    for name, row in tables["Classes"].items():
        if name != ALL or len(tables["Classes"]) > 2:
            score = ", ".join(
                f"{key} {'-' if row[key] is None else f'{row[key]:.3f}'}" for key in ("precision", "recall", "f1")
            )
            print(f"{name}: {row['true']} true, {row['found']} found, {row['pairs']} pairs; {score}")
    for name, rows in regions.items():
        for label, row in rows.items():
            if label != ALL or len(rows) > 2:
                print(f"region {name}, {label}: {row['found']:.0f} found, {_say_region(row)}")
    print(f"all numbers: {workdir / 'map_result.json'}")
    print(f"report:      {report}")
    print_next("predict", "...", f"--layer={options.predictions}", comment="finds more, on other rasters")
    return 0


def _estimate_regions(
    options: argparse.Namespace, found: MapLayer, true: MapLayer, area: np.ndarray
) -> dict[str, dict[str, dict[str, float | None]]]:
    """What each region holds: polygons of one name are one region, without names each is one of its own."""
    import shapely

    name = None if options.region_field else "region"
    layer = read_layer(
        options.regions, class_field=options.region_field, class_name=name, crs=None, notes=collections.Counter()
    )
    origin = find_origin(true)
    shapes = shapely.make_valid(shapes_on_plane(layer.shapes, known_crs(layer), origin))
    names = np.array(layer.names if options.region_field else range(1, len(shapes) + 1), object).astype(str)
    return estimate_regions(
        layer_on_plane(found, origin),
        layer_on_plane(true, origin),
        shapely.make_valid(shapes_on_plane(area, true.crs, origin)),
        {str(one): shapely.union_all(shapes[names == one]) for one in dict.fromkeys(names.tolist())},
        latitude=float(origin[1]),
        block=options.block,
        coverage=options.coverage / 100,
    )


def _say_region(row: dict[str, float | None]) -> str:
    if row["count"] is None:
        return "too few blocks of --aoi to say how many there are"
    said = f"{row['count']:.0f} there ({row['count_low']:.0f} to {row['count_high']:.0f})"
    if row["area_m2"] is None:
        return said
    return f"{said} of {row['area_m2']:,.0f} m2 ({row['area_m2_low']:,.0f} to {row['area_m2_high']:,.0f})"


def _true_layer(options: argparse.Namespace, notes: collections.Counter[str]) -> MapLayer:
    field = None if options.class_name else options.class_field
    layer = read_layer(
        options.against, class_field=field, class_name=options.class_name, crs=options.labels_crs, notes=notes
    )
    return MapLayer(layer.shapes, np.array(layer.names, object), np.ones(len(layer.names)), known_crs(layer))


def _found_layer(source: str) -> MapLayer:
    import pyproj
    import shapely

    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"There is no layer {quote(source)}.")
    blobs, columns, crs = read_layer_file(path, None, ("label", "score"))
    shapes = np.array([*shapely.from_wkb(blobs), None], object)[:-1]
    if crs is None and len(shapes):
        raise ValueError(f"The layer {path} says no CRS, it can't be held against another one.")
    scores = np.array(columns["score"], np.float64)
    return MapLayer(
        shapes, np.array(columns["label"], object), scores, None if crs is None else pyproj.CRS.from_user_input(crs)
    )
