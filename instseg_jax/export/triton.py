"""A model repository for NVIDIA Triton, made of an ONNX export: the network, and a Python model around it.

instseg_network/config.pbtxt  1/model.onnx
instseg/config.pbtxt          1/model.py  postprocess.py  config.json
"""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from instseg_jax.files import read_json, replace_folder, write_text
from instseg_jax.runtimes.exported import CONFIG

MODEL, NETWORK = "instseg", "instseg_network"
MODEL_FILE = Path(__file__).with_name("triton_model.py")
DELAY_MICROSECONDS = 10_000  # that a request waits for others to fill its batch, as our own server's does
INSTANCES = 4  # requests that the Python model works on at a time: those whose pictures can share a batch
TYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32"}


def write_repository(export: str | os.PathLike[str], repository: str | os.PathLike[str], *, batch: int) -> Path:
    """Write the repository of an ONNX export of any batch size, replacing the one that was there; return it.

    `batch` is the largest number of pictures in a call of the network.
    """
    export, repository = Path(export), Path(repository).absolute()
    said = read_json(export / CONFIG)
    if said["format"] != "onnx" or not said["dynamic_batch"]:
        raise ValueError(f"{export} is no ONNX export with --dynamic_batch, of which a Triton repository is made")
    if repository.exists() and not (repository / MODEL).is_dir():
        raise ValueError(f"{repository} holds something else than our models, and they would replace it")
    files = {
        f"{NETWORK}/1/model.onnx": export / said["model_file"],
        f"{MODEL}/1/model.py": MODEL_FILE,
        f"{MODEL}/1/postprocess.py": export / "postprocess.py",
        f"{MODEL}/1/{CONFIG}": export / CONFIG,
    }
    aside = repository.with_name(f".{repository.name}.{secrets.token_hex(4)}.tmp")
    try:
        for name, source in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, aside / name)
        write_text(aside / NETWORK / "config.pbtxt", network_config(said, batch))
        write_text(aside / MODEL / "config.pbtxt", model_config(batch))
        replace_folder(repository, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return repository


def network_config(said: dict[str, Any], batch: int) -> str:
    """The config.pbtxt of the network, of what config.json says of its inputs and outputs."""
    parts = [f'name: "{NETWORK}"', 'platform: "onnxruntime_onnx"', f"max_batch_size: {batch}"]
    for kind in ("input", "output"):
        for one in said[f"{kind}s"]:  # the first length is the batch's, which Triton leaves out
            shape = ", ".join(str(length) for length in one["shape"][1:])
            name = json.dumps(one["name"])
            parts.append(f"{kind} {{ name: {name} data_type: {TYPES[one['dtype']]} dims: [ {shape} ] }}")
    parts.append(f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY_MICROSECONDS} }}")
    return "\n".join(parts) + "\n"


def model_config(batch: int) -> str:
    """The config.pbtxt of the Python model."""
    parts = [
        f'name: "{MODEL}"',
        'backend: "python"',
        "max_batch_size: 0",
        'input { name: "IMAGE" data_type: TYPE_STRING dims: [ -1 ] }',
        'input { name: "THRESHOLD" data_type: TYPE_FP32 dims: [ 1 ] optional: true }',
        'output { name: "RESULT" data_type: TYPE_STRING dims: [ -1 ] }',
        f"instance_group {{ count: {INSTANCES} kind: KIND_CPU }}",
        f'parameters {{ key: "network" value {{ string_value: "{NETWORK}" }} }}',
        f'parameters {{ key: "network_batch" value {{ string_value: "{batch}" }} }}',
    ]
    return "\n".join(parts) + "\n"
