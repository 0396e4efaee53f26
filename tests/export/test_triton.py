"""The Triton repository: configs by Triton's own schema, and the Python model against a stand-in for its backend."""

import dataclasses
import io
import json
import runpy
import sys
import types

import numpy as np
import pytest
from fake_model import CLASS_NAMES, SCORES, SLOTS, detect, picture
from PIL import Image

from instseg_jax.cli import main
from instseg_jax.export import export as export_room
from instseg_jax.export import triton
from instseg_jax.export.triton import MODEL, NETWORK, write_repository

SIZE, BATCH = 64, 2
SHAPES = {"scores": [SLOTS], "labels": [SLOTS], "boxes_xyxy": [SLOTS, 4], "mask_logits": [SLOTS, SIZE, SIZE]}


@pytest.fixture
def repository(tmp_path):
    """The repository of an export whose network is none."""
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"a network")
    (folder / "postprocess.py").write_text(export_room.standalone_text(), encoding="utf-8")
    kinds = {name: "int32" if name == "labels" else "float32" for name in SHAPES}
    said = {
        "format": "onnx",
        "model_file": "model.onnx",
        "dynamic_batch": True,
        "inputs": [{"name": "images", "shape": ["batch", SIZE, SIZE, 3], "dtype": "float32"}],
        "outputs": [{"name": name, "shape": ["batch", *SHAPES[name]], "dtype": kinds[name]} for name in SHAPES],
        "class_names": CLASS_NAMES,
        "thresholds": [0.1] * 3,
        "preprocessing": {"size": [SIZE, SIZE], "resize": "letterbox", "interpolation": "nearest"}
        | {"channels": 3, "channel_ranges": None},
    }
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return write_repository(folder, tmp_path / "triton", batch=BATCH)


@dataclasses.dataclass
class Tensor:
    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@dataclasses.dataclass
class Response:
    output_tensors: list
    error: str | None = None

    def has_error(self) -> bool:
        return self.error is not None


def make_backend(batches: list[int]) -> types.ModuleType:
    """Stands in for `triton_python_backend_utils`; the network finds plain rectangles."""

    @dataclasses.dataclass
    class InferenceRequest:
        model_name: str
        requested_output_names: list
        inputs: list

        def exec(self) -> Response:
            (images,) = self.inputs
            assert (self.model_name, images.name, images.values.dtype) == (NETWORK, "images", np.float32)
            assert images.values.shape[1:] == (SIZE, SIZE, 3) and len(images.values) <= BATCH
            batches.append(len(images.values))
            found = detect(images.values)
            return Response([Tensor(name, getattr(found, name)) for name in self.requested_output_names])

    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.InferenceRequest = Tensor, Response, InferenceRequest
    module.TritonError = str
    module.get_input_tensor_by_name = lambda request, name: request.get(name)
    module.get_output_tensor_by_name = lambda response, name: next(
        tensor for tensor in response.output_tensors if tensor.name == name
    )
    return module


def encoded(*rectangles, size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(*rectangles, size=size)).save(data, format="PNG")
    return data.getvalue()


def test_the_python_model(repository, monkeypatch):
    batches: list[int] = []
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", make_backend(batches))
    model = runpy.run_path(str(repository / MODEL / "1" / "model.py"))["TritonPythonModel"]()
    parameters = {"network": {"string_value": NETWORK}, "network_batch": {"string_value": str(BATCH)}}
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    pictures = [
        encoded((0, 10, 20, 30, 50), (2, 40, 8, 60, 28), size=(64, 64)),
        encoded((1, 20, 20, 80, 60), size=(128, 128)),
        encoded(size=(64, 64)),
    ]

    def ask(*data: bytes, **more) -> dict:
        return {"IMAGE": Tensor("IMAGE", np.array(data, np.object_)), **more}

    sure = Tensor("THRESHOLD", np.array([(SCORES[0] + SCORES[1]) / 2], np.float32))
    answers = model.execute([ask(*pictures), ask(b"no picture"), ask(pictures[0], THRESHOLD=sure)])
    (tensor,) = answers[0].output_tensors
    first, second, third = map(json.loads, tensor.as_numpy())
    assert tensor.name == "RESULT" and batches == [2, 1, 1]
    assert [(box["label"], box["coordinate"]) for box in first["boxes"]] == [
        ("red", [10, 20, 30, 50]),
        ("blue", [40, 8, 60, 28]),
    ]
    assert [(box["label"], box["coordinate"]) for box in second["boxes"]] == [("green", [20, 20, 80, 60])]
    assert second["size"] == second["masks"][0]["size"] == [128, 128] and third["boxes"] == []
    assert answers[1].has_error() and "picture 0" in answers[1].error and not answers[1].output_tensors
    (alone,) = answers[2].output_tensors
    assert [box["label"] for box in json.loads(alone.as_numpy()[0])["boxes"]] == ["red"]


def test_the_configs_by_the_schema_of_triton(repository):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    network, model = (
        text_format.Parse((repository / name / "config.pbtxt").read_text(), schema.ModelConfig())
        for name in (NETWORK, MODEL)
    )
    assert (network.name, network.platform, network.max_batch_size) == (NETWORK, "onnxruntime_onnx", BATCH)
    assert {one.name: list(one.dims) for one in network.output} == SHAPES
    assert [list(one.dims) for one in network.input] == [[SIZE, SIZE, 3]] and network.HasField("dynamic_batching")
    assert {one.name for one in network.output if one.data_type == schema.TYPE_INT32} == {"labels"}
    assert (model.name, model.backend, model.max_batch_size) == (MODEL, "python", 0)
    assert [(one.name, one.data_type, one.optional) for one in model.input] == [
        ("IMAGE", schema.TYPE_STRING, False),
        ("THRESHOLD", schema.TYPE_FP32, True),
    ]
    assert {name: one.string_value for name, one in model.parameters.items()} == {
        "network": NETWORK,
        "network_batch": str(BATCH),
    }


def test_what_is_refused(repository):
    other = repository.parent / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="other holds something else than our models"):
        write_repository(repository.parent / "onnx", other, batch=1)
    said = json.loads((repository.parent / "onnx" / "config.json").read_text())
    (repository.parent / "onnx" / "config.json").write_text(json.dumps(said | {"dynamic_batch": False}))
    with pytest.raises(ValueError, match="is no ONNX export with --dynamic_batch"):
        write_repository(repository.parent / "onnx", repository, batch=1)
    assert (repository / NETWORK / "1" / "model.onnx").read_bytes() == b"a network"


def test_a_repository_that_is_replaced_by_a_command_that_is_killed_can_be_written_again(repository, monkeypatch):
    export = repository.with_name("onnx")

    def killed(folder, **_):
        if folder.name.endswith(".tmp"):
            return
        rmtree(folder / MODEL)
        raise KeyboardInterrupt  # nothing that is left to do is done

    rmtree = triton.shutil.rmtree
    monkeypatch.setattr(triton.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write_repository(export, repository, batch=BATCH)
    monkeypatch.undo()
    assert (write_repository(export, repository, batch=BATCH) / MODEL / "config.pbtxt").is_file()


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    weights = "--weights=mask_rtdetr_n_pretrained"
    assert main(["export", weights, "--format=triton", "--batch=8", f"--workdir={tmp_path}"]) == 0
    folder = tmp_path / "export" / "triton"
    assert "max_batch_size: 8" in (folder / NETWORK / "config.pbtxt").read_text()
    one, other = folder / NETWORK / "1" / "model.onnx", tmp_path / "export" / "onnx" / "model.onnx"
    assert one.read_bytes() == other.read_bytes()
