"""Groups of options of the command line, of verbs that share them or have many."""

import argparse

from instseg_jax.peers import TRIES


def add_processes(sub: argparse.ArgumentParser) -> None:
    """The options of verbs that several processes can run together."""
    about = "be one of several processes, found by JAX (SLURM, Open MPI, Kubernetes)"
    sub.add_argument("--distributed", action="store_true", help=about)
    sub.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: where the first process listens")
    sub.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    sub.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0")
    about = "how long the others may take to come (%(default)s)"
    sub.add_argument("--initialization_timeout", type=int, metavar="SECONDS", default=300, help=about)
    about = "how often to wait that long for them (%(default)s)"
    sub.add_argument("--initialization_tries", type=int, metavar="N", default=TRIES, help=about)


def add_sweep(sub: argparse.ArgumentParser) -> None:
    """The options of a sweep."""
    about = "a field and its values (default: the variants of the config's function sweep(add))"
    sub.add_argument("--axis", action="append", metavar="FIELD=A,B,C", default=[], help=about)
    about = "vary one axis while the other fields stay as they are, or take all combinations (%(default)s)"
    sub.add_argument("--mode", choices=("one_at_a_time", "grid"), default="one_at_a_time", help=about)
    about = "runs of each variant, with the config's seed and the ones after it (%(default)s)"
    sub.add_argument("--seeds", type=int, metavar="N", default=1, help=about)
    about = "runs of each variant on each of the N folds of `split --by=blocks --folds=N`"
    sub.add_argument("--folds", type=int, metavar="N", help=about)
    about = "runs at the same time, on a device each (default: 1, of Ray as many as it has GPUs or cores)"
    sub.add_argument("--jobs", type=int, metavar="N", help=about)
    sub.add_argument("--engine", choices=("ray",), help="run on a Ray cluster, whose nodes all see this folder")
    add_address(sub)
    about = "have Optuna propose the values, within what the config's function search(space) allows"
    sub.add_argument("--search", choices=("optuna",), help=about)
    sub.add_argument("--trials", type=int, metavar="N", help="with --search: runs in all, of all processes together")
    sub.add_argument(
        "--prune", action="store_true", help="with --search: give up runs whose evaluations promise little"
    )
    sub.add_argument("--sweep_list", action="store_true", help="list the runs, how far they are, and their commands")
    sub.add_argument("--sweep_index", type=int, metavar="I", help="only run number I of the list, for array jobs")
    sub.add_argument("--sweep_table", action="store_true", help="only write the tables of what is there so far")


def add_pipeline(sub: argparse.ArgumentParser) -> None:
    """The options of verbs that run a pipeline."""
    default = "instance_segmentation"
    sub.add_argument("--pipeline", metavar="NAME|FILE", default=default, help="name or YAML file (%(default)s)")
    sub.add_argument("--weights", metavar="PATH", help="workdir of a run, checkpoint, export or .pdparams")
    about = "lowest score that counts (default: as stored with the weights, else 0.5)"
    sub.add_argument("--threshold", type=float, help=about)
    sub.add_argument("--batch_size", type=int, metavar="N", help="images a call of the network (default: 1)")
    sub.add_argument("--device", metavar="NAME", help="auto, cpu, gpu, gpu:0,1 or tpu (default: auto)")
    about = "take the quickest runtime that is installed; a checkpoint is exported once"
    sub.add_argument("--use_hpip", action="store_true", help=about)


def add_tiles(sub: argparse.ArgumentParser) -> None:
    """The options of verbs that work on large images in windows."""
    sub.add_argument("--tile", type=int, metavar="PIXELS", help="side of the windows for large images (default: none)")
    sub.add_argument("--overlap", type=float, default=0.2, help="of neighbouring windows, part of a side (%(default)s)")
    about = "look for objects larger than the overlap in the whole image too (default: yes)"
    sub.add_argument("--whole_image", action=argparse.BooleanOptionalAction, default=True, help=about)


def add_against(sub: argparse.ArgumentParser) -> None:
    """The options with which layers of maps are held against each other."""
    group = sub.add_argument_group("a layer of a map: --predictions=found.gpkg --against=true.gpkg")
    group.add_argument("--against", metavar="FILE", help="FILE[:LAYER] of true polygons")
    about = "the field of --against that names the class (%(default)s)"
    group.add_argument("--class_field", metavar="NAME", default="label", help=about)
    group.add_argument("--class_name", metavar="NAME", help="the class of all true polygons, instead of a field")
    group.add_argument("--labels_crs", metavar="CRS", help="of --against, where it says none: EPSG:32616")
    group.add_argument("--aoi", metavar="FILE", help="FILE[:LAYER] of polygons within which both are complete")
    group.add_argument("--iou", type=float, default=0.5, help="least IoU of a pair (%(default)s)")
    group.add_argument("--block", type=metres, metavar="METRES", help="also by squares of this side, as 200m")
    about = "FILE[:LAYER] of polygons: how much is there, with intervals that the squares of --aoi tell; needs --block"
    group.add_argument("--regions", metavar="FILE", help=about)
    group.add_argument(
        "--region_field", metavar="NAME", help="the field of --regions that names them (default: numbers)"
    )
    about = "how often intervals of --regions hold the truth, percent (%(default)g)"
    group.add_argument("--coverage", type=float, default=90.0, metavar="PERCENT", help=about)


def add_layer(sub: argparse.ArgumentParser) -> None:
    """The options of a map's layer of what is found."""
    group = sub.add_argument_group("one layer of a map for all rasters")
    about = "add everything that is found on rasters to this layer: .gpkg, .geojson, .parquet or .fgb"
    group.add_argument("--layer", metavar="FILE", help=about)
    about = "of the layer, as EPSG:32633 (default: WGS 84 in GeoJSON, else that of the file or the first raster)"
    group.add_argument("--crs", metavar="CRS", help=about)
    about = "outlines with fewer corners that move by at most this much, as 0.5m (default: along the pixels)"
    group.add_argument("--simplify", type=metres, metavar="METRES", default=0.0, help=about)
    about = "outlines rounded off, that move by at most this much, as 1m"
    group.add_argument("--smooth", type=metres, metavar="METRES", default=0.0, help=about)
    about = "right angles, as of buildings, where they fit within this much, as 1m"
    group.add_argument("--regularize", type=metres, metavar="METRES", default=0.0, help=about)
    about = "with --regularize: only these classes, as building,shed (default: all)"
    group.add_argument("--regularize_classes", metavar="NAMES", help=about)
    group.add_argument(
        "--min_area", type=square_metres, metavar="M2", default=0.0, help="smaller objects are left out, as 4m2"
    )
    about = "an object on two rasters that overlap is two features (default: one, the surer or the whole one)"
    group.add_argument("--keep_doubles", action="store_true", help=about)


def square_metres(text: str) -> float:
    """An area as a command line has it: 4, 4m2 or 0.1ha."""
    number, unit = (text[:-2], 10_000.0) if text.endswith("ha") else (text.removesuffix("m2"), 1.0)
    return float(number) * unit


def add_split(sub: argparse.ArgumentParser) -> None:
    """The options of how pictures are dealt out."""
    sub.add_argument("--train_percent", type=int, metavar="N", help="share of the training split")
    sub.add_argument("--val_percent", type=int, metavar="N", help="share of the validation split")
    sub.add_argument("--group_by", metavar="REGEX", help="pictures whose names match alike stay together")
    about = "blocks: pictures cut from maps stay together with their neighbours on the ground (%(default)s)"
    sub.add_argument("--by", choices=("names", "blocks"), default="names", help=about)
    sub.add_argument("--block", type=metres, metavar="METRES", help="side of a block, as 200 or 200m")
    about = "ground between the splits; training pictures nearer to a validated one are left out (0: none overlap)"
    sub.add_argument("--gap", type=metres, metavar="METRES", help=about)
    about = "blocks dealt out to N pairs of splits for `sweep --folds=N`, each validated once"
    sub.add_argument("--folds", type=int, metavar="N", help=about)


def metres(text: str) -> float:
    """A length as a command line has it: 200, 200m or 0.2km."""
    number, unit = (text[:-2], 1000.0) if text.endswith("km") else (text.removesuffix("m"), 1.0)
    return float(number) * unit


def add_maps(sub: argparse.ArgumentParser) -> None:
    """The options with which pictures for training are cut from maps."""
    group = sub.add_argument_group("maps (--src_dataset_type=geo)")
    about = "rasters, folders of GeoTIFFs or URLs, with commas between them"
    group.add_argument("--rasters", metavar="FILE,FILE|DIR", help=about)
    group.add_argument("--class_field", metavar="NAME", help="the field of --labels that names the class")
    group.add_argument("--class_name", metavar="NAME", help="the class of all polygons, instead of a field")
    group.add_argument("--labels_crs", metavar="CRS", help="of --labels, where it says none or a wrong one: EPSG:32616")
    about = "FILE[:LAYER] of polygons within which everything is labelled (default: the hull of the labels)"
    group.add_argument("--aoi", metavar="FILE", help=about)
    group.add_argument("--tile", type=int, default=640, metavar="PIXELS", help="side of the pictures (%(default)s)")
    group.add_argument("--overlap", type=float, default=0.2, help="of neighbours, part of a side (%(default)s)")
    group.add_argument("--gsd", type=float, metavar="METRES", help="of a pixel on the ground (default: the raster's)")
    about = "shown as red, green and blue, by colour or number: nir,red,green (default: the colours)"
    group.add_argument("--bands", metavar="A,B,C", help=about)
    about = "part of an object below which it is ignored in a picture (%(default)s)"
    group.add_argument("--min_visible", type=float, default=0.5, metavar="SHARE", help=about)
    about = "pictures of labelled ground without objects, for each one with some (%(default)s)"
    group.add_argument("--empty_share", type=float, default=0.2, metavar="SHARE", help=about)


def add_job(sub: argparse.ArgumentParser) -> None:
    """The options of predictions that are planned: --workdir names a folder that is no run."""
    about = "do only parts I, I + N, I + 2 N, ... of the plan in --workdir, I from 0; a command without it merges"
    sub.add_argument("--shard", metavar="I/N", help=about)
    sub.add_argument("--compute_only", action="store_true", help="compute parts that nobody has, and don't merge")
    sub.add_argument("--merge_only", action="store_true", help="merge what is computed, or say what is missing")
    sub.add_argument("--retry_failed", action="store_true", help="compute again the parts in which something failed")
    about = "who runs the workers: processes of this machine, or a Ray cluster, whose nodes all see this folder"
    sub.add_argument("--engine", choices=("local", "ray"), help=about)
    sub.add_argument("--jobs", type=int, metavar="N", help="workers of --engine (default: 1, of Ray one a GPU or core)")
    add_address(sub)


def add_address(sub: argparse.ArgumentParser) -> None:
    """Where a Ray cluster is."""
    about = "of the Ray cluster (default: $RAY_ADDRESS, else one that runs here or is begun)"
    sub.add_argument("--address", metavar="HOST:PORT", help=about)


def add_export(sub: argparse.ArgumentParser) -> None:
    """The options of an export."""
    sub.add_argument("--weights", metavar="PATH", help="workdir of a run or checkpoint (default: workdir)")
    sub.add_argument("--format", metavar="NAME", default="onnx", help="onnx (the default), stablehlo, triton, ...")
    sub.add_argument("--batch", type=int, metavar="N", default=1, help="images a call, of triton at most (%(default)s)")
    sub.add_argument("--size", type=int, metavar="PIXELS", help="of the square input (default: as trained)")
    sub.add_argument("--dynamic_batch", action="store_true", help="any number of images a call")
    sub.add_argument("--half", action="store_true", help="16-bit numbers (of what, says the README)")
    sub.add_argument("--int8", action="store_true", help="8-bit layers where pictures show that it costs little")
    about = "folder of pictures or data set to calibrate --int8 on (default: the training images of the run)"
    sub.add_argument("--calibration", metavar="DIR", help=about)
    sub.add_argument("--data", metavar="DIR", help="data set on whose validation images AP is told before and after")


def add_server(sub: argparse.ArgumentParser) -> None:
    """The options of the server."""
    add_pipeline(sub)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (%(default)s)")
    sub.add_argument("--port", type=int, default=8080, help="(%(default)s)")
    about = "how long a request waits for others to fill its batch (%(default)s)"
    sub.add_argument("--max_wait_ms", type=float, metavar="MS", default=10.0, help=about)
    about = "requests at a time; more are refused with 429 (%(default)s)"
    sub.add_argument("--queue_size", type=int, metavar="N", default=64, help=about)
    about = "for an answer, then 504; also for a body to arrive (%(default)s)"
    sub.add_argument("--timeout", type=float, metavar="SECONDS", default=60.0, help=about)
    about = "largest body of a request; larger ones are refused with 413 (%(default)s)"
    sub.add_argument("--max_body_mb", type=float, metavar="MB", default=32.0, help=about)
    about = "largest image; larger ones are refused with 413 (%(default)s)"
    sub.add_argument("--max_megapixels", type=float, metavar="MP", default=64.0, help=about)
    about = "hosts whose URLs are fetched, with commas between (default: none)"
    sub.add_argument("--allow_urls", metavar="HOSTS", default="", help=about)
    about = "requests must bear this token (default: $INSTSEG_TOKEN, which other users of the machine do not see)"
    sub.add_argument("--token", metavar="TOKEN", help=about)
