"""The page of the server in a real browser: a picture is dropped on it, and its instances appear."""

import base64
import html
import json
import re
import shutil
import subprocess

import pytest
from fake_model import make_pipeline, picture

pytest.importorskip("fastapi")

from fastapi.responses import HTMLResponse
from running_server import LIMITS, Running, encode

from instseg_jax.results.visualize import instance_colors

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURE = picture((0, 100, 40, 180, 120), (0, 20, 20, 60, 70), (2, 200, 60, 280, 180), size=(200, 300))
# The page in a frame; a file is dropped on it as a person would, then what it shows is written out.
AROUND = """<!doctype html><title>waiting</title>
<iframe id="page" src="/" width="1000" height="700"></iframe><pre id="out"></pre>
<script>
const frame = document.getElementById("page");
const wait = async (is) => { for (let i = 0; i < 200 && !is(); i++) await new Promise((r) => setTimeout(r, 50)); };
frame.onload = async () => {
  const page = frame.contentDocument, get = (id) => page.getElementById(id), seen = {};
  const bytes = Uint8Array.from(atob("PICTURE"), (c) => c.charCodeAt(0));
  const drop = (file) => {
    const transfer = new frame.contentWindow.DataTransfer();
    transfer.items.add(file);
    page.dispatchEvent(new frame.contentWindow.DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
  };
  const names = () => [...get("list").querySelectorAll(".name")].map((e) => e.textContent);
  drop(new File([bytes], "a.png", { type: "image/png" }));
  await wait(() => !get("view").hidden);
  seen.status = get("status").textContent;
  seen.names = names();
  seen.size = [get("canvas").width, get("canvas").height];
  const at = (x, y) => [...get("canvas").getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
  seen.inside = at(140, 80);
  seen.outside = at(5, 190);
  get("threshold").value = 0.93;
  get("threshold").dispatchEvent(new Event("input"));
  seen.fewer = names();
  seen.fewerStatus = get("status").textContent;
  drop(new File(["no picture"], "b.png", { type: "image/png" }));
  await wait(() => get("status").className === "error");
  seen.error = get("status").textContent;
  document.getElementById("out").textContent = JSON.stringify(seen);
  document.title = "done";
};
</script>"""


def browse(address: str, *options: str) -> str:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        *options,
        address,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_dropped_picture_shows_its_instances():
    with Running(make_pipeline(), LIMITS) as running:
        text = AROUND.replace("PICTURE", base64.b64encode(encode(PICTURE)).decode())
        running.app.add_api_route("/around", lambda: HTMLResponse(text))
        shown = browse(f"{running.address}/around", "--dump-dom")
    written = re.search(r'<pre id="out">(.*?)</pre>', shown, re.DOTALL)
    assert written and written[1], shown[-2000:]
    seen = json.loads(html.unescape(written[1]))
    assert seen["status"] == "3 instances" and seen["names"] == ["blue", "red", "red"] and seen["size"] == [300, 200]
    assert seen["outside"] == [110, 110, 110]
    assert seen["inside"] != [255, 0, 0], "the mask lies over the picture"
    assert seen["fewer"] == ["blue"] and seen["fewerStatus"].startswith("1 of 3 instances")
    assert "no JPEG" in seen["error"]


def test_the_page_runs_nothing_but_itself():
    with Running(make_pipeline(), LIMITS) as running:
        status, text, headers = running.send(b"", path="/", method="GET")
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert "sha256-" in policy and "http" not in re.sub(r"<!doctype.*?>", "", text)


def test_the_page_colours_classes_as_drawings_do():
    with Running(make_pipeline(), LIMITS) as running:
        _, text, _ = running.send(b"", path="/", method="GET")
    palette = json.loads(re.search(r"const PALETTE = (\[.*?\]);", text)[1])
    assert len(palette) == 3 and len({shade for shades in palette for shade in shades}) == 3 * len(palette[0])
    for index, shades in enumerate(palette):
        drawn = instance_colors([index] * len(shades))
        assert [tuple(bytes.fromhex(shade[1:])) for shade in shades] == drawn
