"""The command line: one verb, one function.

A verb's options are declared here, groups of them in `options.py`; `--config.section.field=value` sets a field.
Errors that a user can mend are one sentence and exit code 1; `--debug` shows where they come from.
"""

import argparse
import difflib
import importlib
import os
import re
import sys
from typing import NoReturn

import instseg_jax
from instseg_jax import peers
from instseg_jax.commands import program
from instseg_jax.options import (
    add_against,
    add_export,
    add_job,
    add_layer,
    add_maps,
    add_pipeline,
    add_processes,
    add_server,
    add_split,
    add_sweep,
    add_tiles,
)

DEFAULT_CONFIG = "configs/mask_rtdetr.py:l"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
HUGE_PAGES_SWITCH = "INSTSEG_HUGE_PAGES"
# On a CPU: half of the time to compile a training step, and the programs are no slower.
QUICK_COMPILATION = "xla_cpu_disable_new_fusion_emitters,xla_cpu_disable_loop_unrolling"
OPENCV_SWITCH = "OPENCV_LOG_LEVEL"
XLA_SWITCH = "TF_CPP_MIN_LOG_LEVEL"
VERB_FILES = {  # the file of `verbs/` that holds a verb, where it has another name
    "check_dataset": "data",
    "convert": "data",
    "split": "data",
    "prepare": "data",
    "suggest": "predict",
    "serve": "predict",
    "get_pipeline_config": "predict",
    "status": "jobs",
    "import_weights": "weights",
    "export_weights": "weights",
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments as every other error: one line, exit code 1."""

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"argument VERB: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(wrong[1], re.findall(r"\w+", wrong[2]), 1)
            hint = f"; did you mean {near[0]}?" if near else ";"
            message = f"there is no verb {wrong[1]!r}{hint} There are {wrong[2]}"
        raise ValueError(f"{message}; `{self.prog} --help` explains")


def build_parser() -> argparse.ArgumentParser:
    """Declare every verb with its options; `parse_args` raises ValueError for arguments that are wrong."""
    parser = _Parser(
        prog=program(),
        description="Instance segmentation in JAX with Mask-RT-DETR.",
        epilog="Any field of the config can be set: --config.train.epochs=20 --config.data.dir=my/data. "
        f"`{program()} config NAME` shows them all, `{program()} VERB --help` the options of a verb.",
    )
    parser.add_argument("--version", action="version", version=instseg_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", required=True)

    def add(verb: str, help_text: str, config: str | None) -> argparse.ArgumentParser:
        sub = verbs.add_parser(verb, help=help_text, description=help_text)
        sub.add_argument("--config", metavar="FILE[:ARG]", default=config, help="config file (default: %(default)s)")
        sub.add_argument("--workdir", metavar="DIR", default="output", help="all results go below it (%(default)s)")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    about = "check the embedded pictures, train size N on them, evaluate, predict: about 8 minutes on two cores"
    sub = add("quickstart", about, "configs/quickstart.py:pretrained")
    sub.add_argument("--threshold", type=float, default=0.3, help="lowest score that is drawn (%(default)s)")
    about = "start from nothing instead of from the weights that come with the package: --config=configs/quickstart.py"
    sub.add_argument("--from_nothing", action="store_true", help=about)
    sub = add("config", "show the fields of a config with their values and meanings, or the configs there are", None)
    sub.add_argument("name", nargs="?", metavar="NAME[:ARG]", help="such as finetune:n (default: list the configs)")
    about = "look at every picture and annotation; what passes can be trained on"
    sub = add("check_dataset", about, DEFAULT_CONFIG)
    sub.add_argument("--fix", action="store_true", help="write repaired copies of the annotation files")
    about = "turn LabelMe, VOC, YOLO, Label Studio, CVAT or COCO files, or rasters and polygons, into a data set"
    sub = add("convert", about, DEFAULT_CONFIG)
    about = "format of config.data.dir; geo: --rasters and --labels"
    kinds = "LabelMe|VOC|YOLO|LabelStudio|CVAT|COCO|geo"
    sub.add_argument("--src_dataset_type", metavar=kinds, required=True, help=about)
    sub.add_argument("--save_path", metavar="DIR", help="where annotations/ and images/ go (default: config.data.dir)")
    about = "class names, one a line (default: labels.txt and the like); geo: FILE[:LAYER] of polygons"
    sub.add_argument("--labels", metavar="FILE", help=about)
    sub.add_argument("--skip_invalid", action="store_true", help="leave out what can't be read, and say what that was")
    sub.add_argument("--train_percent", type=int, metavar="N", help="share of the training split")
    sub.add_argument("--val_percent", type=int, metavar="N", help="share of the validation split")
    sub.add_argument("--group_by", metavar="REGEX", help="pictures whose names match alike stay together")
    add_maps(sub)
    about = "deal the pictures out to training and validation anew; the old files stay as .bak"
    sub = add("split", about, DEFAULT_CONFIG)
    add_split(sub)
    about = "write the data set as ArrayRecord (TFDS), to be read with config.data.source=tfds"
    sub = add("prepare", about, DEFAULT_CONFIG)
    sub.add_argument("--save_path", metavar="DIR", required=True, help="folder of the prepared data set")
    sub = add("train", "train a model; the same command again resumes", DEFAULT_CONFIG)
    add_processes(sub)
    about = "train variants of a config, each a run of its own, and compare them; the same command again resumes"
    add_sweep(add("sweep", about, "configs/finetune.py:l"))
    sub = add("evaluate", "COCO metrics and a report of a model on the validation images, or of a results file", None)
    sub.add_argument("--weights", metavar="PATH", help="workdir of a run, checkpoint, export or .pdparams")
    sub.add_argument("--save_thresholds", action="store_true", help="store the scores with the best F1 in the weights")
    sub.add_argument("--tta", metavar="flip,scales", help="look at each picture mirrored, at several sizes, or both")
    add_tiles(sub)
    sub.add_argument("--predictions", metavar="FILE", help="score this COCO results file; needs no model and no config")
    sub.add_argument("--annotations", metavar="FILE", help="with --predictions: the COCO ground truth")
    sub.add_argument("--images", metavar="DIR", help="with --predictions: the pictures, for the report's galleries")
    add_against(sub)
    add_processes(sub)
    sub = add("compare", "metrics of several runs side by side, with bootstrap intervals over the images", None)
    sub.add_argument("runs", nargs="+", metavar="RUN", help="workdir of an evaluated run, or a COCO results file")
    sub.add_argument("--annotations", metavar="FILE", help="the COCO ground truth (default: what the runs say)")
    sub.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the images (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the resamples (%(default)s)")
    sub = add("predict", "segment pictures, videos and maps: drawings, JSON and other formats", None)
    add_pipeline(sub)
    inputs = "a picture, folder, pattern like 'a/**/*.jpg', URL or video; samples: pictures that come with the package"
    sub.add_argument("--input", metavar="PATH|URL", required=True, help=inputs)
    sub.add_argument("--save_path", metavar="DIR", help="where the results go (default: WORKDIR/predictions)")
    formats = "some of img,json,coco,labelme,yolo,label_studio,cvat,geojson,gpkg (%(default)s)"
    sub.add_argument("--formats", metavar="NAMES", default="img,json", help=formats)
    about = "replace LabelMe and YOLO files beside the pictures that were made by hand"
    sub.add_argument("--overwrite", action="store_true", help=about)
    sub.add_argument("--masks_format", choices=("rle", "crop", "polygon"), default="rle", help="in JSON (%(default)s)")
    add_tiles(sub)
    add_layer(sub)
    add_job(sub)
    sub = add("suggest", "which pictures to label next, with the predictions inside for correcting them", None)
    add_pipeline(sub)
    sub.add_argument(
        "--input", metavar="PATH", required=True, help="a folder of pictures, or a pattern like 'a/**/*.jpg'"
    )
    sub.add_argument("--n", type=int, default=50, help="pictures (%(default)s)")
    sub.add_argument("--save_path", metavar="DIR", help="where they go (default: WORKDIR/suggested)")
    formats = "some of labelme,coco,label_studio,cvat (%(default)s)"
    sub.add_argument("--formats", metavar="NAMES", default="labelme,coco,label_studio,cvat", help=formats)
    sub = add("status", "how far the job of a `predict --workdir=JOB` is: done, failed, rate, time left", None)
    sub.add_argument("job", metavar="JOB", help="folder of the job, as --workdir named it")
    add_server(add("serve", "answer requests over HTTP, with a page to try it", None))
    about = "write the YAML file of a pipeline, to change it and to name it as --pipeline"
    sub = add("get_pipeline_config", about, None)
    sub.add_argument("--pipeline", metavar="NAME", default="instance_segmentation", help="(%(default)s)")
    sub.add_argument("--save_path", metavar="DIR", required=True, help="folder of the file")
    sub.add_argument("--weights", metavar="PATH", help="the model_dir to write into it")
    sub = add("benchmark", "time inference step by step, and the training step", "configs/mask_rtdetr.py:s")
    sub.add_argument("--repeats", type=int, default=5, help="timed repetitions after a warm-up (%(default)s)")
    sub.add_argument("--parts", default="inference,training", help="what is timed (%(default)s)")
    sub.add_argument("--batch_sizes", default="1", metavar="N,N", help="of inference (%(default)s)")
    sub.add_argument("--models", "--sizes", metavar="n,s,l", help="sizes of the model (default: the config's)")
    sub.add_argument("--runtimes", metavar="xla,onnxruntime,openvino", help="time the network alone, in each of these")
    sub.add_argument("--peer", metavar="SIZE=FILE", help="other networks beside it, ONNX files: s=a.onnx,l=b.onnx")
    sub.add_argument("--weights", metavar="PATH", help="of inference: a trained model's masks encode faster than fresh")
    add_export(add("export", "write the model for other runtimes, with proof that it finds the same", None))
    sub = add("import_weights", "turn official weights into a checkpoint", DEFAULT_CONFIG)
    sub.add_argument("--weights", metavar="FILE|URL|NAME", required=True, help="e.g. mask_rtdetr_l_coco")
    sub = add("export_weights", "write a checkpoint's weights for the official tools", None)
    sub.add_argument("--weights", metavar="PATH", help="workdir of a run or checkpoint (default: workdir)")
    sub.add_argument("--format", choices=("pdparams", "safetensors"), default="pdparams", help="(%(default)s)")
    sub.add_argument("--half", action="store_true", help="of safetensors: store float16, half the size")
    return parser


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options of a verb.

    Raises: ValueError that names the option nearest to an unknown one, or the fields of the config with its name.
    """
    options, unknown = parser.parse_known_args(arguments)
    if not unknown:
        return options
    from instseg_jax.config import find_fields  # which brings JAX along

    name, equals, value = unknown[0].partition("=")
    names = [f"--{known}" for known in vars(options) if known not in ("verb", "runs", "name")]
    exact, near = find_fields(options.config or DEFAULT_CONFIG, name.lstrip("-"))
    fields = [f"--config.{field}{equals}{value}" for field in exact or near]
    nearest = fields if exact else difflib.get_close_matches(name, names, 1) or fields
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ";"
    raise ValueError(f"unknown: {' '.join(unknown)}{hint} `{parser.prog} {options.verb} --help` explains")


def split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Part `--config.field=value` (or `--config.field value`) from the other arguments.

    Raises: ValueError for a field without a value.
    """
    rest, overrides = [], {}
    iterator = iter(arguments)
    for argument in iterator:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        field, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(iterator, "--")
            if value.startswith("--"):
                raise ValueError(f"--config.{field} has no value; write --config.{field}=VALUE")
        overrides[field] = value
    return rest, overrides


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault(OPENCV_SWITCH, "ERROR")  # its warnings of broken files say what we say, amid our bars
    os.environ.setdefault(XLA_SWITCH, "3")  # its alarms at long compilations; what fails comes as an exception too
    debug = "--debug" in arguments
    try:
        rest, overrides = split_overrides(arguments)
        options = parse_arguments(build_parser(), rest)
        options.arguments = arguments
        _relaunch_with_huge_pages()
        return run_verb(options, overrides) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
    except Exception as error:
        if debug:
            raise
        name = type(error).__name__
        print(f"error: unexpected {name}: {_one_line(error)} (--debug shows where)", file=sys.stderr)
    return 1


def run() -> NoReturn:
    """The program itself: run one verb and end the process with its exit code.

    A program that XLA still compiles when a signal ends a training is not waited for.
    """
    if peers.is_wanted(sys.argv[1:]):
        raise SystemExit(peers.stand_by(sys.argv[1:]))
    compile_quickly()
    code = main()
    if code in (1, 130) and peers.SWITCH in os.environ:  # JAX would wait for the others, who see that this one is gone
        sys.stdout.flush()
        os._exit(code)
    busy = sys.modules.get("instseg_jax.training.signals")
    if busy is not None and busy.is_still_working():
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


def call(*arguments: str) -> int:
    """Run one verb in this process, as a notebook does: `call("split", "--config.data.dir=my_data", ...)`.

    Args:
      arguments: the verb and its options, as on the command line.

    Returns: the exit code of a verb that ended; errors are raised, not printed.
    """
    rest, overrides = split_overrides(list(arguments))
    options = parse_arguments(build_parser(), rest)
    options.arguments = list(arguments)
    return run_verb(options, overrides) or 0


def run_verb(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    """Call the verb's function, in the file of `verbs/` that has its name or stands in VERB_FILES."""
    from instseg_jax import compiled, devices

    processes = [getattr(options, name, None) for name in ("coordinator", "num_processes", "process_id")]
    is_one_of_several = getattr(options, "distributed", False) or processes != [None] * 3
    if is_one_of_several:
        devices.join_processes(*processes, timeout=options.initialization_timeout)
    options.overrides = overrides
    compiled.keep_compiled_programs()
    file = importlib.import_module(f"instseg_jax.verbs.{VERB_FILES.get(options.verb, options.verb)}")
    function = getattr(file, options.verb)
    if not is_one_of_several:
        return function(options)
    import jax

    with peers.watch(devices.coordination_client(), jax.process_index(), jax.process_count()):
        return function(options)


def _one_line(error: Exception) -> str:
    if isinstance(error, NotADirectoryError | FileExistsError) and error.filename:
        return f"{error.filename} can't be made or read: a file is where a folder is needed"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def compile_quickly() -> None:
    """Ask XLA for what compiles sooner; it reads this when the first program is compiled."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_extra_options={QUICK_COMPILATION}".strip()


def _relaunch_with_huge_pages() -> None:
    """Start Python again with glibc's allocator on huge pages, once.

    XLA's buffers on a CPU are mapped anew at every step; huge pages make that cheap (about 1.5 times the
    training speed). glibc reads the setting only when a process starts. INSTSEG_HUGE_PAGES=0 switches it off.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    off = os.environ.get(HUGE_PAGES_SWITCH, "1") == "0" or "hugetlb" in tunables
    if off or not sys.platform.startswith("linux") or sys.argv[0] in ("", "-c"):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, HUGE_PAGES]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":  # python -m instseg_jax.cli
    run()
