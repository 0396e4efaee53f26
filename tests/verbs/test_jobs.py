"""`predict` with a folder for its job, and `status`: what a person types and is told."""

import contextlib

import numpy as np
import pytest
from fake_model import make_pipeline, picture
from PIL import Image

from instseg_jax.cli import main
from instseg_jax.verbs import jobs, predict


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder: (exit code, what it said)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "_pipeline", lambda options: make_pipeline())
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(picture((0, 10, 10, 30, 30))).save(tmp_path / "in" / f"{name}.png")

    def command(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return command


PREDICT = ("predict", "--input=in", "--workdir=job", "--formats=json,coco")


def test_shares_then_the_same_command(run, tmp_path):
    code, said = run(*PREDICT, "--merge_only")
    assert code == 1 and "there is no plan.json in job" in said
    code, said = run(*PREDICT, "--shard=1/2")
    assert code == 0 and "0 parts were computed here; 1 of 1 are missing" in said
    code, said = run(*PREDICT, "--merge_only")
    assert code == 1 and "1 of 1 parts are missing: 0" in said
    code, said = run("status", "job")
    assert code == 0 and "done: 0, in work: 0, to do: 1" in said and "merged: not yet" in said
    code, said = run(*PREDICT, "--shard=0/2")
    assert code == 0 and "1 parts were computed here; 0 of 1 are missing" in said
    code, said = run(*PREDICT)
    assert code == 0 and "2 pictures, 2 instances, 3 files in job/predictions" in said
    first = {path.name: path.read_bytes() for path in (tmp_path / "job" / "predictions").iterdir()}
    assert sorted(first) == ["a_res.json", "b_res.json", "coco.json"]
    code, said = run("status", "job")
    assert "done: 1, in work: 0, to do: 0" in said and "merged: yes" in said
    run("predict", "--input=in", "--formats=json,coco")
    plain = {path.name: path.read_bytes() for path in (tmp_path / "output" / "predictions").iterdir()}
    assert plain == first and not (tmp_path / "output" / "plan.json").exists()


def test_another_job_in_the_folder(run, tmp_path):
    assert run(*PREDICT, "--shard=1/2")[0] == 0
    code, said = run(*PREDICT, "--tile=64")
    assert code == 1 and "job holds another job that is not finished: tile is null there and 64 here" in said
    Image.fromarray(picture()).save(tmp_path / "in" / "c.png")
    code, said = run(*PREDICT)
    assert code == 1 and "1 inputs are new and 0 are gone, as in/c.png" in said
    (tmp_path / "in" / "c.png").unlink()
    assert run(*PREDICT)[0] == 0
    Image.fromarray(picture()).save(tmp_path / "in" / "c.png")
    code, said = run(*PREDICT)
    assert code == 0 and "3 pictures, 2 instances" in said, "a finished job gives way"


def test_a_job_is_merged_again_where_a_kill_came_after_parts_were_tried_again(run, tmp_path, monkeypatch):
    (tmp_path / "in" / "c.png").write_bytes(b"broken")
    run(*PREDICT)
    assert "merged: yes" in run("status", "job")[1]
    for verb, options in (("work_until_done", ["--retry_failed"]), ("save_results", [])):
        assert run(*PREDICT)[0] == 1 and "merged: yes" in run("status", "job")[1]

        def killed(*arguments, **options):
            raise KeyboardInterrupt  # nothing that is left to do is done

        monkeypatch.setattr(jobs, verb, killed)
        with contextlib.suppress(KeyboardInterrupt):
            run(*PREDICT, *options)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(predict, "_pipeline", lambda options: make_pipeline())
        assert "merged: not yet" in run("status", "job")[1]


def test_two_that_begin_another_job_in_a_folder_at_once_keep_their_parts(run, tmp_path, monkeypatch):
    assert run(*PREDICT)[0] == 0
    Image.fromarray(picture()).save(tmp_path / "in" / "c.png")
    job, read_plan, is_other = tmp_path / "job", jobs.read_plan, []
    plan = jobs.build_plan([f"in/{name}.png" for name in "abc"], read_plan(job).settings)

    def read_early(folder):
        known = read_plan(folder)
        if not is_other:  # the other one is quicker: it has a part of the new plan already
            is_other.append(True)
            jobs._agree(plan, job)
            (job / "parts").mkdir()
            (job / "parts" / "0000000.npz").write_bytes(b"new")
        return known

    monkeypatch.setattr(jobs, "read_plan", read_early)
    jobs._agree(plan, job)
    assert (job / "parts" / "0000000.npz").read_bytes() == b"new" and read_plan(job).digest == plan.digest


def test_what_fails_is_told_and_tried_again(run, tmp_path):
    (tmp_path / "in" / "c.png").write_bytes(b"broken")
    code, said = run(*PREDICT)
    assert code == 1 and "2 pictures, 2 instances" in said and "failed: in/c.png" in said
    failed = (tmp_path / "job" / "predictions" / "failed.json").read_text()
    assert '"input": "in/c.png"' in failed
    code, said = run("status", "job")
    assert "failed: 1 pictures or windows; --retry_failed" in said
    code, said = run(*PREDICT, "--retry_failed")
    assert code == 1 and (tmp_path / "job" / "predictions" / "failed.json").read_text() == failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workdir=job", "--shard=2/2"), "--shard is 2/2, it must be I/N with I from 0 to N - 1"),
        (("--workdir=job", "--jobs=2"), "--jobs is 2, it must be at least 1, with --engine=local"),
        (("--shard=0/2",), "--shard needs a folder for the job, --workdir is output"),
    ],
)
def test_wrong_options(run, arguments, message):
    code, said = run("predict", "--input=in", *arguments)
    assert code == 1 and message in said


def test_a_video_is_a_part(run, tmp_path):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 64))
    for i in range(4):
        writer.write(np.ascontiguousarray(picture((0, 5 + 8 * i, 10, 25 + 8 * i, 40))[..., ::-1]))
    writer.release()
    options = ("predict", "--input=v.mp4", "--formats=json,coco")
    code, said = run(*options, "--workdir=job")
    assert code == 0 and "4 frames" in said
    run(*options)
    for name in ("v_res.json", "coco.json"):
        folders = [tmp_path / where / "predictions" / name for where in ("job", "output")]
        assert folders[0].read_bytes() == folders[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--smooth=1m"], "--smooth is for --layer"),
        (["--regularize=1m"], "--regularize is for --layer"),
        (["--layer=found.gpkg", "--regularize_classes=a"], "--regularize_classes goes with --regularize"),
        (["--layer=found.gpkg", "--regularize=1m", "--regularize_classes=barn"], "--regularize_classes has 'barn'"),
    ],
)
def test_options_of_outlines_that_mean_nothing_are_refused(run, tmp_path, options, told):
    code, said = run("predict", "--input=in", "--save_path=out", "--formats=json", *options)
    assert code == 1 and told in said and not (tmp_path / "found.gpkg").exists()
