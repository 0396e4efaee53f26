"""The road of official weights, on this machine: an address, a cache, a conversion, a training that begins there."""

import functools
import http.server
import json
import threading

import jax
import numpy as np
import pytest
from tiny_runs import TINY, write_subset

import instseg_jax
from instseg_jax.cli import main
from instseg_jax.weights import download
from instseg_jax.weights.names import flax_to_official
from instseg_jax.weights.paddle import write_pdparams

NAME = "mask_rtdetr_s_coco"
pytestmark = pytest.mark.slow  # 30 MB of weights; the training step of S is compiled


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 (one server at a time)

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Random values of S under official names, served where the known name points; its variables and the cache."""
    _, variables = instseg_jax.create_model("mask_rtdetr_s", seed=7)
    folder, cache = tmp_path / "server", tmp_path / "cache"
    folder.mkdir()
    write_pdparams(folder / "s.pdparams", flax_to_official(variables))
    Handler.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setitem(download.KNOWN_WEIGHTS, NAME, f"http://127.0.0.1:{server.server_port}/s.pdparams")
    monkeypatch.setenv("INSTSEG_CACHE", str(cache))
    yield variables, cache
    server.shutdown()
    server.server_close()


def test_a_known_name_is_fetched_once_and_becomes_the_network(official):
    variables, cache = official
    for _ in range(2):
        model, found = instseg_jax.create_model("mask_rtdetr_s", weights=NAME)
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), found, variables)
        assert jax.tree.all(same) and jax.tree.structure(found) == jax.tree.structure(variables)
        assert model.num_classes == 80
    assert Handler.asked == ["/s.pdparams"] and (cache / "s.pdparams.sha256").is_file()
    damaged = bytearray((cache / "s.pdparams").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (cache / "s.pdparams").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"s\.pdparams"):
        instseg_jax.create_model("mask_rtdetr_s", weights=NAME)


def test_a_training_begins_with_them(official, tmp_path, capsys):
    data, run = write_subset(tmp_path / "data", 4), tmp_path / "run"
    fields = {key: value for key, value in TINY.items() if key != "model.num_decoder_layers"}
    fields |= {"model.weights": NAME, "data.dir": str(data), "train.epochs": "1", "eval.every_epochs": "1"}
    options = [f"--config.{key}={value}" for key, value in fields.items()]
    assert main(["train", "--config=finetune:s", *options, f"--workdir={run}"]) == 0
    assert Handler.asked == ["/s.pdparams"] and "classes" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()
    _, before = instseg_jax.create_model("mask_rtdetr_s", weights=NAME)
    _, after = instseg_jax.create_model(weights=run)
    backbone = [tree["params"]["backbone"] for tree in (before, after)]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *backbone)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # it started there, and went on
