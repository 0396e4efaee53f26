"""The Python model of a Triton repository: encoded pictures in, their instances as JSON out.

Runs in Triton's Python backend, beside `postprocess.py` and `config.json` of the export, without the package that made
it; the network is the repository's other model, whose batches Triton forms from all requests.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

OUTPUTS = ("scores", "labels", "boxes_xyxy", "mask_logits")


class TritonPythonModel:
    """What Triton calls; its methods have the names that Triton's Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the export says; `args["model_config"]` is config.pbtxt as JSON."""
        here = Path(__file__).resolve().parent
        spec = importlib.util.spec_from_file_location("instseg_postprocess", here / "postprocess.py")
        assert spec is not None and spec.loader is not None
        self.shared: Any = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self.shared
        spec.loader.exec_module(self.shared)
        self.config = json.loads((here / "config.json").read_text(encoding="utf-8"))
        parameters = json.loads(args["model_config"])["parameters"]
        self.network = parameters["network"]["string_value"]
        self.batch = int(parameters["network_batch"]["string_value"])

    def execute(self, requests: list) -> list:
        """A response for each request; one that can't be answered bears an error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            pictures = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().reshape(-1)
            given = pb_utils.get_input_tensor_by_name(request, "THRESHOLD")
            threshold = None if given is None else float(given.as_numpy().reshape(-1)[0])
            found = [self._decode(bytes(data), number) for number, data in enumerate(pictures)]
            texts = []
            for begin in range(0, len(found), self.batch):
                texts += self._segment(found[begin : begin + self.batch], threshold)
        except ValueError as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        result = pb_utils.Tensor("RESULT", np.array([text.encode() for text in texts], np.object_))
        return pb_utils.InferenceResponse(output_tensors=[result])

    def _decode(self, data: bytes, number: int) -> np.ndarray:
        feeding, name = self.config["preprocessing"], f"picture {number}"
        is_color = feeding["channels"] == 3 and feeding["channel_ranges"] is None
        return self.shared.scale_channels(self.shared.decode(data, name, is_color=is_color), self.config, name)

    def _segment(self, images: list[np.ndarray], threshold: float | None) -> list[str]:
        fed = [self.shared.preprocess(image, self.config) for image in images]
        inputs = [pb_utils.Tensor(self.config["inputs"][0]["name"], np.stack([pixels for pixels, _ in fed]))]
        asked = pb_utils.InferenceRequest(
            model_name=self.network, requested_output_names=list(OUTPUTS), inputs=inputs
        ).exec()
        if asked.has_error():
            raise ValueError(asked.error().message())
        outputs = tuple(pb_utils.get_output_tensor_by_name(asked, name).as_numpy() for name in OUTPUTS)
        return [
            json.dumps(self.shared.find_instances(outputs, i, self.config, content, image.shape[:2], threshold))
            for i, (image, (_, content)) in enumerate(zip(images, fed, strict=True))
        ]
