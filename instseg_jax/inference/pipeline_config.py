"""The YAML file of a pipeline, in the official schema: reading, checking and writing it."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from instseg_jax.config import find_config
from instseg_jax.files import read_yaml, write_text
from instseg_jax.messages import quote, shorten

PIPELINES = ("instance_segmentation",)
MODULE = "InstanceSegmentation"
KEYS = ("pipeline_name", "SubModules", "Serving", "use_hpip", "hpi_config", "device")
MODULE_KEYS = ("module_name", "model_name", "model_dir", "batch_size", "threshold")
SERVING_KEYS = ("visualize",)

HPI_KEYS = ("backend", "backend_config", "auto_config")
HPI_BACKENDS = ("onnxruntime", "openvino", "xla")  # xla: the network as JAX compiles it


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline's YAML says; None where it leaves the choice to the weights."""

    model_name: str | None
    model_dir: str | None
    batch_size: int
    threshold: float | dict[str, float] | None
    use_hpip: bool | None
    hpi_config: Mapping[str, Any] | None
    visualize: bool
    device: str | None = None


def load_pipeline_config(pipeline: str | Path | Mapping[str, Any]) -> PipelineConfig:
    """Read a pipeline by its name, the path of its YAML file, or the content of one.

    A relative model_dir is looked for from the current folder, then from the file's.
    Raises: FileNotFoundError, or ValueError that names the key that is wrong.
    """
    if isinstance(pipeline, Mapping):
        return _parse(pipeline, "config", None)
    path = default_path(str(pipeline)) if str(pipeline) in PIPELINES else Path(pipeline)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"pipeline is {str(pipeline)!r}; it must be {' or '.join(PIPELINES)}, or a .yaml file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no pipeline file {path}")
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold the keys {', '.join(KEYS)}, got {type(content).__name__}")
    return _parse(content, str(path), path.parent)


def write_pipeline_config(save_path: str | Path, *, pipeline: str, model_dir: str | None) -> Path:
    """Write a pipeline's default YAML into a folder (or to a .yaml file), for changing; return the file.

    `model_dir` fills the key of that name. Raises ValueError for an unknown pipeline.
    """
    if pipeline not in PIPELINES:
        raise ValueError(f"pipeline is {quote(pipeline)}, it must be one of {', '.join(PIPELINES)}")
    path = Path(save_path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        path = path / f"{pipeline}.yaml"
    text = default_path(pipeline).read_text(encoding="utf-8")
    if model_dir is not None:
        value = yaml.safe_dump(str(model_dir), default_style='"').strip()
        text = text.replace("model_dir: null ", f"model_dir: {value} ", 1)
    return write_text(path, text)


def default_path(pipeline: str) -> Path:
    """The YAML file that comes with the package for a pipeline's name. Raises FileNotFoundError."""
    return find_config(f"configs/{pipeline}.yaml")


def _parse(content: Mapping[str, Any], where: str, folder: Path | None) -> PipelineConfig:
    _check_keys(content, KEYS, where)
    name = content.get("pipeline_name", PIPELINES[0])
    if name not in PIPELINES:
        raise ValueError(f"{where}: pipeline_name is {quote(name)}, it must be one of {', '.join(PIPELINES)}")
    modules = content.get("SubModules") or {}
    _check_keys(modules, (MODULE,), f"{where}: SubModules")
    module = modules.get(MODULE) or {}
    _check_keys(module, MODULE_KEYS, f"{where}: {MODULE}")
    serving = content.get("Serving") or {}
    _check_keys(serving, SERVING_KEYS, f"{where}: Serving")
    batch_size = module.get("batch_size", 1)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"{where}: batch_size is {quote(batch_size)}, it must be a whole number of at least 1")
    model_dir = module.get("model_dir")
    if model_dir is not None and folder is not None and not Path(model_dir).exists() and (folder / model_dir).exists():
        model_dir = str(folder / model_dir)
    return PipelineConfig(
        model_name=module.get("model_name"),
        model_dir=None if model_dir is None else str(model_dir),
        batch_size=batch_size,
        threshold=module.get("threshold"),
        use_hpip=content.get("use_hpip"),
        hpi_config=content.get("hpi_config"),
        visualize=bool(serving.get("visualize", True)),
        device=content.get("device"),
    )


def _check_keys(content: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must hold the keys {', '.join(known)}, got {quote(content)}")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"{where} has an unknown key {quote(key)}{hint}")


@dataclasses.dataclass(frozen=True)
class HighPerformance:
    """What `hpi_config` asks for."""

    backend: str | None = None  # one of HPI_BACKENDS; None: the quickest
    num_threads: int | None = None  # of the CPU; None: as the runtime likes


def parse_hpi_config(content: Mapping[str, Any] | None) -> HighPerformance:
    """Read the official `hpi_config`: backend, backend_config.cpu_num_threads (also below the backend's name).

    `auto_config` (whether to find the quickest) is true where no backend is named. Raises: ValueError for keys and
    backends that mean nothing here, such as those of Paddle and TensorRT.
    """
    content = dict(content or {})
    for key in content:
        if key not in HPI_KEYS:
            raise ValueError(f"hpi_config.{shorten(key)} means nothing here; it may hold {', '.join(HPI_KEYS)}")
    backend = content.get("backend")
    if backend is not None and backend not in HPI_BACKENDS:
        raise ValueError(f"hpi_config.backend is {quote(backend)}, it must be one of {', '.join(HPI_BACKENDS)}")
    if backend is None and content.get("auto_config", True) is not True:
        raise ValueError(f"hpi_config.auto_config is off, so backend must name one of {', '.join(HPI_BACKENDS)}")
    inner = dict(content.get("backend_config") or {})
    if set(inner) & set(HPI_BACKENDS):  # one section a backend
        unknown = sorted(set(inner) - set(HPI_BACKENDS))
        if unknown:
            raise ValueError(
                f"hpi_config.backend_config has {quote(unknown[0])} beside sections of {', '.join(HPI_BACKENDS)}"
            )
        inner = dict(inner.get(backend or "onnxruntime") or {})
    threads = inner.pop("cpu_num_threads", None)
    if inner:
        raise ValueError(
            f"hpi_config.backend_config.{shorten(next(iter(inner)))} means nothing here; cpu_num_threads does"
        )
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise ValueError(f"cpu_num_threads is {quote(threads)}, it must be a whole number of at least 1")
    if threads is not None and backend == "xla":
        raise ValueError("cpu_num_threads can't be set for xla, which takes all cores")
    return HighPerformance(backend, threads)
