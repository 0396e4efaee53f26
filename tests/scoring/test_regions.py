"""Intervals for what is in a region hold the truth as often as they say, on simulated ground with known truth."""

import json

import numpy as np
import pytest

from instseg_jax.cli import main
from instseg_jax.scoring.regions import estimate


def ground(rng, blocks, *, density=20.0, share=0.8, spread=20.0, false=2.0):
    """Counts and areas of blocks: what is there, and what a model with its own luck in each block finds."""
    true = rng.poisson(rng.gamma(3.0, density / 3.0, blocks))
    found = rng.binomial(true, rng.beta(share * spread, (1 - share) * spread, blocks)) + rng.poisson(false, blocks)
    sizes = rng.lognormal(4.0, 0.5, blocks)
    return found, true, found * sizes * rng.lognormal(0, 0.1, blocks), true * sizes


@pytest.mark.parametrize(("blocks", "size"), [(60, 1), (60, 4), (60, 20)])
def test_intervals_cover_what_they_say(blocks, size):
    """Also of regions that are larger than any group of blocks: `size` 20 is compared with groups of 6."""
    rng = np.random.default_rng(0)
    hits, widths, as_found = [], [], []
    for _ in range(700):
        found, true, found_m2, true_m2 = ground(rng, blocks + size)
        one = estimate(found[:size].sum(), found[size:], true[size:], coverage=0.9, unit=1.0, size=size)
        hits.append(one.low <= true[:size].sum() <= one.high)
        widths.append((one.high - one.low) / max(true[:size].sum(), 1))
        as_found.append(found[:size].sum() == true[:size].sum())
        unit = true_m2[size:].sum() / true[size:].sum()
        one = estimate(found_m2[:size].sum(), found_m2[size:], true_m2[size:], coverage=0.9, unit=unit, size=size)
        hits.append(one.low <= true_m2[:size].sum() <= one.high)
    assert 0.88 <= np.mean(hits) <= 0.92
    assert np.median(widths) < 1.3 / np.sqrt(size)  # they say something
    assert np.mean(as_found) < 0.2  # what was found is not what is there


def test_by_hand():
    found, true = np.array([10.0] * 9), np.array([20.0] * 9)
    options = {"coverage": 0.9, "unit": 1.0, "size": 1}
    one = estimate(5.0, found, true, **options)
    assert (one.value, one.low, one.high) == (10, 10, 10)  # each block has twice of what was found
    true[0] = 31
    one = estimate(10.0, found, true, **options)
    assert one.value == pytest.approx(191 / 9) and one.high - one.value == pytest.approx(11, rel=0.05)
    assert one.low == pytest.approx(2 * one.value - one.high)
    assert estimate(0.0, found, true, **options).low == 0
    assert estimate(10.0, found[:8], true[:8], **options) is None  # 9 blocks are the least
    assert estimate(10.0, np.zeros(9), true, **options) is None


class TestOnAMap:
    @pytest.fixture(autouse=True)
    def _here(self, monkeypatch):
        monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")

    def make(self, tmp_path):
        """16 squares of 100 m, the western 12 labelled: 4 houses of 100 m2 in each, of which 2 are found."""
        pyproj, shapely = pytest.importorskip("pyproj"), pytest.importorskip("shapely")
        pytest.importorskip("rasterio"), pytest.importorskip("pyogrio")
        from instseg_jax.geo.layer_files import write_layer

        crs, corner = pyproj.CRS(32633), np.array([500_000.0, 5_500_000.0])

        def write(file, boxes, **columns):
            shapes = np.array([shapely.box(*(np.array(b).reshape(2, 2) + corner).ravel()) for b in boxes], object)
            write_layer(tmp_path / f"{file}.gpkg", shapes, {k: np.array(v) for k, v in columns.items()}, crs)

        places = [(100 * x + 10, 100 * y + dy, x) for x in range(4) for y in range(4) for dy in (10, 30, 50, 70)]
        houses = [(x, y, x + 10, y + 10) for x, y, _ in places]
        labelled = [house for house, (_, _, column) in zip(houses, places, strict=True) if column < 3]
        write("true", labelled, label=["house"] * len(labelled))
        found = houses[::2]
        write("found", found, label=["house"] * len(found), score=[0.9] * len(found))
        write("area", [(0, 0, 300, 400)], label=["area"])
        write("regions", [(0, 0, 200, 400), (300, 0, 400, 400), (200, 0, 300, 200)], name=["west", "east", "east"])
        return [f"--{k}={tmp_path / f'{v}.gpkg'}" for k, v in (("predictions", "found"), ("against", "true"))]

    def test_labelled_ground_is_known_and_the_rest_told(self, tmp_path, capsys):
        options = [*self.make(tmp_path), f"--aoi={tmp_path / 'area.gpkg'}", f"--regions={tmp_path / 'regions.gpkg'}"]
        options += ["--region_field=name", "--block=100m", f"--workdir={tmp_path / 'out'}"]
        assert main(["evaluate", *options]) == 0
        said = json.loads((tmp_path / "out" / "map_result.json").read_text())["regions"]
        west, east = (said[name]["house"] for name in ("west", "east"))
        assert (west["found"], west["count"], west["count_low"], west["count_high"]) == (16, 32, 32, 32)
        assert (east["found"], east["count"]) == (12, 8 + 16) and east["count_low"] <= 24 <= east["count_high"]
        assert east["area_m2"] == pytest.approx(2400, rel=0.005)
        assert "region east, house: 12 found, 24 there (24 to 24)" in capsys.readouterr().out
        assert "Regions" in (tmp_path / "out" / "map_report.html").read_text()

    def test_what_is_missing_is_asked_for(self, tmp_path, capsys):
        options = [*self.make(tmp_path), f"--regions={tmp_path / 'regions.gpkg'}", f"--workdir={tmp_path / 'out'}"]
        assert main(["evaluate", *options, "--block=100m"]) != 0
        assert "--regions needs --aoi" in capsys.readouterr().err
        area = f"--aoi={tmp_path / 'area.gpkg'}"
        assert main(["evaluate", *options, area, "--block=100m", "--coverage=100"]) != 0
        assert "--coverage is 100" in capsys.readouterr().err
        assert main(["evaluate", *options, area, "--block=200m"]) == 0
        assert "too few blocks" in capsys.readouterr().out
        assert main(["evaluate", "--regions=x.gpkg", f"--workdir={tmp_path / 'out'}"]) != 0
        assert "--regions goes with" in capsys.readouterr().err
