"""The road of official weights, on this machine: an address, a cache, a conversion, a network."""

import functools
import http.server
import threading

import jax
import numpy as np
import pytest

import instseg_jax
from instseg_jax.weights import download
from instseg_jax.weights.names import flax_to_official
from instseg_jax.weights.paddle import write_pdparams

NAME = "mask_rtdetr_s_coco"
pytestmark = pytest.mark.slow  # the weights of a whole S, written, sent and read


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
