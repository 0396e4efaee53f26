"""Where compiled programs are kept: one folder a kind of processor, whole files only, not without end."""

import os
import subprocess
import sys
import zlib

import jax
import pytest

from instseg_jax import compiled

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def _settings_come_back(monkeypatch, tmp_path):
    before = {name: jax.config.values[name] for name in SETTINGS}
    jax.config.update(SETTINGS[0], None)
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.setenv("INSTSEG_CACHE", str(tmp_path / "cache"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder_of_jax() -> str | None:
    return jax.config.values[SETTINGS[0]]


def write_program(path, size=100, read_at=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zlib.compress(os.urandom(size)))
    if read_at is not None:
        os.utime(path, (read_at, read_at))


def test_workdirs_share_one_folder_of_the_user(tmp_path):
    compiled.keep_compiled_programs()
    (folder,) = (tmp_path / "cache/compiled").iterdir()
    assert folder_of_jax() == str(folder)
    assert folder.stat().st_mode & 0o077 == 0  # its files are run: nobody else may write them


def test_another_processor_or_number_of_cores_has_another_folder(monkeypatch):
    mine = compiled._describe_processor()
    assert mine == compiled._describe_processor()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)), raising=False)
    assert compiled._describe_processor() != mine


def test_the_switch_names_a_folder_or_turns_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv(compiled.SWITCH, "")
    compiled.keep_compiled_programs()
    assert folder_of_jax() is None and not (tmp_path / "cache").exists()
    monkeypatch.setenv(compiled.SWITCH, str(tmp_path / "mine"))
    compiled.keep_compiled_programs()
    assert folder_of_jax() == str(tmp_path / "mine")


def test_a_folder_that_was_given_to_jax_stays(tmp_path):
    jax.config.update(SETTINGS[0], str(tmp_path / "of_jax"))
    compiled.keep_compiled_programs()
    assert folder_of_jax() == str(tmp_path / "of_jax")


def test_a_half_written_program_is_dropped_and_a_whole_one_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(compiled.SWITCH, str(tmp_path))
    write_program(tmp_path / "whole-cache")
    (tmp_path / "half-cache").write_bytes((tmp_path / "whole-cache").read_bytes()[:-20])
    (tmp_path / "empty-cache").touch()
    compiled.keep_compiled_programs()
    assert {path.name for path in tmp_path.glob("*-cache")} == {"whole-cache"}
    (tmp_path / "later-cache").write_bytes(b"no")
    compiled.keep_compiled_programs()
    assert {path.name for path in tmp_path.glob("*-cache")} == {"whole-cache"}


def test_what_another_process_has_just_dropped_is_no_matter(tmp_path, monkeypatch):
    monkeypatch.setenv(compiled.SWITCH, str(tmp_path))
    for name in ("gone-cache", "half-cache"):
        (tmp_path / name).write_bytes(b"no")
    look = compiled._is_whole

    def is_whole(data):
        (tmp_path / "gone-cache").unlink(missing_ok=True)
        (tmp_path / "half-cache").unlink(missing_ok=True)
        return look(data)

    monkeypatch.setattr(compiled, "_is_whole", is_whole)
    compiled.keep_compiled_programs()
    assert folder_of_jax() == str(tmp_path) and not list(tmp_path.glob("*-cache"))


def test_what_was_read_last_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_BYTES", 2500)
    for name, read_at in (("a/new-cache", 3e9), ("a/old-cache", 1e9), ("b/middle-cache", 2e9)):
        write_program(tmp_path / "cache/compiled" / name, 1000, read_at)
    compiled.keep_compiled_programs()
    assert {path.name for path in tmp_path.rglob("*-cache")} == {"new-cache", "middle-cache"}


def test_without_a_place_it_goes_on_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.warns(UserWarning, match="INSTSEG_COMPILED=FOLDER names a place"):
        compiled.keep_compiled_programs()
    assert folder_of_jax() is None


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    code = """
import jax, jax.numpy as jnp, time
from instseg_jax import compiled
compiled.keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.linalg.norm(jnp.sin(x) @ x))(jnp.ones((9, 9)))
"""
    environment = os.environ | {"INSTSEG_CACHE": str(tmp_path)}
    counts = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        counts.append(sorted(tmp_path.rglob("*-cache")))
    assert counts[0] == counts[1] and counts[0]
