"""What `check_dataset` leaves behind: the result as JSON, drawings, a histogram, and a page to look at.

Drawing the objects themselves is handed in by the caller as a function; the rest is drawn here.
"""

import html
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from instseg_jax import bands, files, images, masks
from instseg_jax.data import check_numbers, findings, overview
from instseg_jax.data.check import Check, find_map_tiles
from instseg_jax.messages import shorten
from instseg_jax.pixels import decode

FOLDER, RESULT = "check_dataset", "check_dataset_result.json"
MAX_PICTURES = 10  # drawn of each split, as the official check does
MAX_LABEL = 40  # letters of a class name in the histogram
MAX_SIDE = 1280  # pixels of a drawing
MAX_BARS = 40  # classes of the histogram, the most frequent ones
COLORS = {"train": "#2b6cb0", "val": "#dd6b20"}
DrawInstances = Callable[..., np.ndarray]  # results.visualize.draw_instances


def write_report(
    workdir: Path,
    check: Check,
    draw_instances: DrawInstances,
    fixed: dict[str, Any] | None,
) -> dict:
    """Write check_dataset_result.json, check_dataset/ and check_dataset.html below `workdir`; return the result."""

    def read_shown(path: Path) -> np.ndarray:
        """A picture as 8-bit colour; of other pictures the range of each channel is its own."""
        if check.bands is None:
            return images.read_image(path)
        raw = decode(files.read_regular(path), str(path))
        ranges = None if raw.dtype == np.uint8 else bands.find_ranges([raw], (1.0, 99.0))
        return bands.show_bands(images.to_pixels(raw, bands.Bands(raw.shape[2], ranges)))

    (workdir / RESULT).unlink(missing_ok=True)  # of an earlier check, whose pictures are replaced now
    grouped = findings.group(check.flaws)
    paths = {split: _draw_pictures(workdir, split, check, draw_instances, read_shown) for split in check.files}
    counts = check_numbers.count_classes(check.files)
    histogram = f"{FOLDER}/histogram.png"
    _save(workdir / histogram, draw_histogram(counts))
    names = list(counts)
    attributes: dict[str, Any] = {"num_classes": _num_classes(check), "class_names": names}
    for split in ("train", "val"):
        numbers = check.measured.get(split, {})
        attributes[f"{split}_samples"] = numbers.get("annotations", 0)
        attributes[f"{split}_sample_paths"] = paths.get(split, [])
        attributes[f"{split}_images"] = numbers.get("images", 0)
    result = {
        "done_flag": True,
        "check_pass": check.passed,
        "attributes": attributes,
        "analysis": {
            "histogram": histogram,
            "objects_of_class": counts,
            "splits": check.measured,
            "overviews": _draw_overviews(workdir, check),
        },
        "dataset_path": check.source.root.resolve().name,
        "show_type": "image",
        "dataset_type": "COCOInstSegDataset",
        "findings": grouped,
    }
    if fixed is not None:
        result["fixed"] = fixed
    files.write_text(workdir / "check_dataset.html", make_page(result))
    files.write_json(workdir / RESULT, result, indent=2)  # last, since it says that all is there
    return result


def summarise(result: dict[str, Any], workdir: Path) -> list[str]:
    """The result in lines of text: what was found, where the rest stands, and the verdict last."""
    lines = []
    for finding in result["findings"]:
        lines += findings.describe(finding)
    for split in ("train", "val"):
        images, objects = (result["attributes"][f"{split}_{what}"] for what in ("images", "samples"))
        lines.append(f"{split}: {images} images, {objects} objects")
    lines += [f"map: {workdir / one['file']}, {one['caption']}" for one in result["analysis"]["overviews"]]
    lines.append(f"to look at: {workdir / 'check_dataset.html'}")
    if "fixed" in result:
        fixed = result["fixed"]
        lines += describe_repair(fixed)
        lines += [f"    --config.data.{s}_annotations={Path(file).resolve()}" for s, file in fixed["files"].items()]
    errors = sum(finding["count"] for finding in result["findings"] if finding["severity"] == findings.ERROR)
    failed = f"Check dataset failed: {errors} error{'' if errors == 1 else 's'}."
    if "fixed" not in result and result["analysis"]["splits"]:
        failed += " --fix writes repaired copies of the annotation files."
    return [*lines, "Check dataset passed !" if result["check_pass"] else failed]


def describe_repair(fixed: dict[str, Any]) -> list[str]:
    """What became of the files, in lines of text: what is lost first."""
    if not fixed["files"]:
        return ["nothing could be repaired: there is no annotation file that can be read"]
    lost = [
        f"{split}: {n['objects']} of {n['of_objects']} objects and {n['images']} of {n['of_images']} pictures"
        for split, n in fixed["lost"].items()
        if n["objects"] or n["images"]
    ]
    lines = [f"left out in the repaired copies: {'; '.join(lost) if lost else 'nothing'}"]
    if fixed["moved"]:
        lines.append(
            f"{fixed['moved']} objects were turned or scaled with their pictures: look at them before you train"
        )
        verdict = "not called passed, since masks were moved"
    else:
        verdict = "which pass the check" if fixed["check_pass"] else "which still do not pass the check"
    return [*lines, f"{len(fixed['changes'])} changes in repaired copies, {verdict}; use them with"]


def draw_histogram(counts: dict[str, dict[str, int]]) -> Image.Image:
    """Draw the objects of each class in each split as bars; of many classes the 40 most frequent."""
    from matplotlib.figure import Figure  # importing it takes a second, which no other verb should wait for

    order = sorted(counts, key=lambda name: -sum(counts[name].values()))
    shown = [name for name in counts if name in order[:MAX_BARS]]
    figure = Figure(figsize=(10, 1.2 + 0.4 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots()
    for k, (split, color) in enumerate(COLORS.items()):
        places = np.arange(len(shown)) + 0.4 * (k - 0.5)
        bars = axes.barh(places, [counts[name].get(split, 0) for name in shown], 0.4, label=split, color=color)
        axes.bar_label(bars, padding=3, fontsize="small")
    axes.set_yticks(range(len(shown)), [shorten(name, MAX_LABEL) for name in shown], parse_math=False)
    axes.invert_yaxis()
    axes.set_title(
        "Objects of each class"
        + (f" (the {MAX_BARS} most frequent of {len(counts)})" if len(counts) > MAX_BARS else "")
    )
    axes.legend()
    picture = io.BytesIO()
    with warnings.catch_warnings():  # letters that matplotlib's font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(picture, dpi=90, format="png")
    return Image.open(picture).convert("RGB")


def make_page(result: dict[str, Any]) -> str:
    """The result as a page of HTML; pictures are linked relative to it."""
    verdict = "Check dataset passed !" if result["check_pass"] else "Check dataset failed"
    color = "#276749" if result["check_pass"] else "#c53030"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(verdict)}</title><style>{_STYLE}</style></head><body>",
        f"<h1 style='color:{color}'>{html.escape(verdict)}</h1><p>{html.escape(result['dataset_path'])}</p>",
        _numbers_table(result),
        "<h2>Findings</h2>" if result["findings"] else "<h2>No findings</h2>",
    ]
    parts += [_finding_block(finding) for finding in result["findings"]]
    if result.get("fixed"):
        parts.append(_fixed_block(result["fixed"]))
    parts.append(
        f"<h2>Classes</h2><img class='wide' src='{result['analysis']['histogram']}' alt='objects of each class'>"
    )
    if overviews := result["analysis"]["overviews"]:
        keys = ", ".join(f"<span style='color:{color}'>&#9632;</span> {split}" for split, color in COLORS.items())
        parts.append(f"<h2>Maps</h2><p>Pictures and their labels on each raster: {keys}</p>")
        parts += [_figure(one["file"], one["caption"]) for one in overviews]
    for split in ("train", "val"):
        paths = result["attributes"][f"{split}_sample_paths"]
        if paths:
            parts.append(f"<h2>Pictures of {split}</h2><div class='grid'>")
            parts += [_figure(path, Path(path).name) for path in paths]
            parts.append("</div>")
    return "\n".join([*parts, "</body></html>\n"])


def _figure(path: str, caption: str) -> str:
    shown = html.escape(path)
    return (
        f"<figure><a href='{shown}'><img src='{shown}' loading='lazy'></a>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1a202c}
table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #e2e8f0;text-align:right}
td:first-child,th:first-child{text-align:left}
.finding{border-left:.4rem solid #a0aec0;padding:.2rem 1rem;margin:1rem 0;background:#f7fafc}
.error{border-color:#c53030}.warning{border-color:#dd6b20}.advice{border-color:#3182ce}
.badge{font-size:.8rem;text-transform:uppercase;letter-spacing:.05em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1rem}
figure{margin:0}img{max-width:100%}figcaption{font-size:.8rem;color:#4a5568}code{word-break:break-all}
"""


def _numbers_table(result: dict[str, Any]) -> str:
    splits = result["analysis"]["splits"]
    rows = [
        ("images", "images"),
        ("images without objects", "images_without_objects"),
        ("objects", "objects"),
        ("of them crowds", "crowds"),
        ("objects an image", "objects_per_image"),
        ("image width, px", "image_width_px"),
        ("image height, px", "image_height_px"),
        ("object side (root of area), px", "object_side_px"),
        ("object side at the training size, px", "object_side_at_training_size_px"),
    ]
    cells = [
        f"<tr><th>{result['attributes']['num_classes']} classes</th>{''.join(f'<th>{s}</th>' for s in splits)}</tr>"
    ]
    for title, key in rows:
        values = "".join(f"<td>{_show_number(numbers[key])}</td>" for numbers in splits.values())
        cells.append(f"<tr><td>{title}</td>{values}</tr>")
    return f"<table>{''.join(cells)}</table>"


def _show_number(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if not value:
        return "-"
    return f"median {value['p50']:g} (1 %: {value['p1']:g}, 99 %: {value['p99']:g}, most {value['max']:g})"


def _finding_block(finding: dict[str, Any]) -> str:
    where = f" in {finding['split']}" if finding["split"] else ""
    details = "".join(f"<li>{html.escape(text)}</li>" for text in finding["details"])
    left = finding["count"] - len(finding["details"])
    is_open = " open" if finding["severity"] == findings.ERROR else ""
    more = f"<li>and {left} more; their ids are in check_dataset_result.json</li>" if left > 0 else ""
    return (
        f"<div class='finding {finding['severity']}'><span class='badge'>{finding['severity']}</span> "
        f"<b><code>{finding['code']}</code></b>{where}: {html.escape(finding['message'])} ({finding['count']})"
        f"<details{is_open}><summary>places</summary><ul>{details}{more}</ul></details>"
        f"<p>{html.escape(finding['what_to_do'])}</p></div>"
    )


def _fixed_block(fixed: dict[str, Any]) -> str:
    said = "<br>".join(html.escape(line) for line in describe_repair(fixed))
    listed = "".join(f"<li>{html.escape(change)}</li>" for change in fixed["changes"])
    paths = html.escape(", ".join(fixed["files"].values()))
    return f"<h2>Repaired copies</h2><p>{said}</p><p>{paths}</p><ul>{listed}</ul>"


def _draw_pictures(
    workdir: Path, split: str, check: Check, draw_instances: DrawInstances, read_shown: Callable[[Path], np.ndarray]
) -> list[str]:
    """Draw a few pictures of a split with their objects; returns the paths relative to the workdir."""
    file, facts = check.files[split], check.pictures[split]
    usable = [i for i in file.images if facts[i].error is None and facts[i].size == _size_of(file.images[i])]
    usable = [i for i in usable if file.objects[i]] or usable
    index = {id_: i for i, id_ in enumerate(sorted(file.categories))}  # of the class, as training has it
    paths = []
    for position in np.linspace(0, len(usable) - 1, min(MAX_PICTURES, len(usable))).round().astype(int):
        image_id = usable[position]
        image, objects = file.images[image_id], file.objects[image_id]
        drawn = draw_instances(
            read_shown(check.source.splits[split][1] / image.file_name),
            boxes_xyxy_px=np.array([_corners(o.annotation.box_xywh_px) for o in objects]).reshape(-1, 4),
            labels=[index[o.category_id] for o in objects],
            names=[file.categories[o.category_id] for o in objects],
            scores=None,
            masks=[masks.segmentation_to_rle(o.annotation.segmentation, image.height, image.width) for o in objects],
        )
        name = f"{split}_{Path(image.file_name.replace('/', '_')).stem}.jpg"
        path = f"{FOLDER}/demo_img/{name}"
        if path in paths:  # the same name in several folders or with several endings
            path = f"{FOLDER}/demo_img/{split}_{image_id}_{name.removeprefix(split + '_')}"
        _save(workdir / path, Image.fromarray(_shrink(drawn)))
        paths.append(path)
    return paths


def _draw_overviews(workdir: Path, check: Check) -> list[dict[str, str]]:
    """Draw the rasters that pictures were cut from; a file, relative to the workdir, and a caption for each."""
    rasters, drawn = find_map_tiles(check), []
    for number, (raster, tiles) in enumerate(list(rasters.items())[: overview.MOST_RASTERS], start=1):
        base, size = overview.read_base(check.source.root, check.contents[tiles[0].split], raster)
        path = f"{FOLDER}/overview_{number}.jpg"
        _save(workdir / path, Image.fromarray(overview.draw_overview(tiles, base, size)))
        counts = {split: sum(tile.split == split for tile in tiles) for split in COLORS}
        said = [f"{count} pictures of {split}" for split, count in counts.items() if count]
        left_out = sum(tile.split == overview.LEFT for tile in tiles)
        caption = f"{raster}: " + ", ".join(said + [f"{left_out} left out"] * bool(left_out))
        drawn.append({"file": path, "caption": caption})
    if len(rasters) > len(drawn):
        drawn[-1]["caption"] += f"; {len(rasters) - len(drawn)} more rasters are not drawn"
    return drawn


def _num_classes(check: Check) -> int:
    return len({i for file in check.files.values() for i in file.categories})


def _size_of(image: Any) -> tuple[int, int]:
    return image.height, image.width


def _corners(box_xywh_px: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, w, h = box_xywh_px
    return x, y, x + w, y + h


def _shrink(picture: np.ndarray) -> np.ndarray:
    scale = MAX_SIDE / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _save(path: Path, picture: Image.Image) -> None:
    encoded = cv2.imencode(path.suffix, np.asarray(picture)[..., ::-1])[1]
    files.write_bytes(path, encoded.tobytes())
