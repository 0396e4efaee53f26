"""Predictions that are planned: `predict` with a folder for its job, and `status`."""

import argparse
import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.progress import Progress

from instseg_jax.cluster import PROGRAM, join_ray, run_commands
from instseg_jax.commands import print_next, without
from instseg_jax.files import make_folder, write_json
from instseg_jax.geo.shaping import Shaping
from instseg_jax.inference.pipeline import DEFAULT_WEIGHTS, Pipeline
from instseg_jax.inference.sources import URL_PREFIXES, find_files
from instseg_jax.jobs.merge import merged_results
from instseg_jax.jobs.parts import Failure, compute_part
from instseg_jax.jobs.plan import PLAN, Plan, build_plan, difference, read_plan, write_plan
from instseg_jax.jobs.progress import read_state
from instseg_jax.jobs.workers import (
    LEASES,
    PARTS,
    POLL_SECONDS,
    failed_parts,
    finished_parts,
    lease,
    missing_parts,
    work,
    work_until_done,
)
from instseg_jax.messages import quote, shorten
from instseg_jax.progress import say_duration
from instseg_jax.results.layer import FoundLayer, open_layer
from instseg_jax.results.saving import save_results
from instseg_jax.weights.locate import is_there

FAILED, MERGED = "failed.json", "merged.json"
MERGING, PLANNING = "merge", "plan"  # leases of those who do that
OURS = ("shard", "compute_only", "merge_only", "retry_failed", "engine", "jobs", "address")


def is_job(options: argparse.Namespace) -> bool:
    """Whether a prediction is planned: where --workdir names a folder that is no run.

    Raises ValueError for options of a job without such a folder.
    """
    has_folder = options.workdir != DEFAULT_WEIGHTS and not is_there(options.workdir)
    asked = [name for name in OURS if getattr(options, name)]
    if asked and not has_folder:
        raise ValueError(
            f"--{asked[0]} needs a folder for the job, --workdir is {options.workdir}, which is a run or the default; "
            "name another one, and the run as --weights"
        )
    return has_folder


def predict_job(
    options: argparse.Namespace,
    formats: Sequence[str],
    given: str,
    make_pipeline: Callable[[], Pipeline],
    say: Callable[..., None],
) -> int:
    """Plan what is given, compute what is missing, and merge; or what the options ask of that."""
    job, share, started = Path(options.workdir), _parse_shard(options.shard), time.monotonic()
    if options.jobs is not None and (options.jobs < 1 or not options.engine):
        raise ValueError(f"--jobs is {options.jobs}, it must be at least 1, with --engine=local or ray")
    if options.address and options.engine != "ray":
        raise ValueError(f"--address is {options.address}, it goes with --engine=ray")
    names = [given] if given.startswith(URL_PREFIXES) else [str(path) for path in find_files(given)]
    if options.merge_only:
        plan = _known_plan(job)
        if missing := missing_parts(job, plan):
            shown = ", ".join(str(part.number) for part in missing[:10])
            print(f"{len(missing)} of {len(plan.parts)} parts are missing: {shown}{', ...' if missing[10:] else ''}")
            print_next("predict", "...", comment="without --merge_only computes them")
            return 1
        return _merge(options, formats, plan, say, started)
    pipeline = make_pipeline()
    # What can't be written is told before hours of work.
    begin_layer(options, pipeline.class_names)
    if options.save_path:
        make_folder(Path(options.save_path))
    plan = build_plan(names, _settings(options, pipeline))
    _agree(plan, job)
    again = failed_parts(job, plan) if options.retry_failed else {}
    if again or missing_parts(job, plan):
        (job / MERGED).unlink(missing_ok=True)  # from here on results are not those of the parts
    if options.engine and (again or missing_parts(job, plan)):
        _run_workers(options, job, plan)
        again = {}
    with Progress(transient=False) as bars:
        bar = bars.add_task("parts", total=len(plan.parts), completed=len(finished_parts(job)) - len(again))

        def compute(part):
            if not is_warm:
                pipeline.warm_up()
                is_warm.append(True)
            return compute_part(plan, part, pipeline)

        is_warm: list[bool] = []
        do = work if share is not None or options.compute_only else work_until_done
        computed = do(job, plan, compute, share=share, again=again, tell=lambda done: bars.update(bar, completed=done))
    if share is not None or options.compute_only:
        left = len(missing_parts(job, plan))
        print(f"{computed} parts were computed here; {left} of {len(plan.parts)} are missing")
        print_next("status", str(job), comment="the command without --shard or --compute_only merges")
        return 0
    return _merge(options, formats, plan, say, started)


def status(options: argparse.Namespace) -> int:
    """Print how far a job is."""
    job = Path(options.job)
    plan = _known_plan(job)
    state = read_state(job, plan)
    print(f"plan {plan.digest}: {len(plan.inputs)} inputs, {state.total} parts")
    print(f"done: {state.done}, in work: {state.in_work}, to do: {state.total - state.done - state.in_work}")
    print(f"failed: {state.failed} pictures or windows" + ("; --retry_failed tries them again" if state.failed else ""))
    if state.rate is not None and state.seconds_left is not None:
        left = f", {say_duration(state.seconds_left)} left" if state.done < state.total else ""
        print(f"rate: {60 * state.rate:.1f} parts a minute{left}")
    is_merged = (job / MERGED).exists()
    print(f"merged: {'yes' if is_merged else 'not yet'}")
    if not is_merged:
        print_next("predict", "...", f"--workdir={job}", comment="the command that began it does the rest")
    return 0


def _settings(options: argparse.Namespace, pipeline: Pipeline) -> dict:
    return {
        "tile": options.tile,
        "overlap": options.overlap,
        "whole_image": options.whole_image,
        "model": pipeline.fingerprint(),
        "bands": None if pipeline.feeding.bands is None else dataclasses.asdict(pipeline.feeding.bands),
        "reading": None if pipeline.feeding.reading is None else dataclasses.asdict(pipeline.feeding.reading),
        "batch_size": pipeline.batch_size,
        "thresholds": pipeline.thresholds.tolist(),
        "class_names": pipeline.class_names,
        "category_ids": pipeline.category_ids,
    }


def _known_plan(job: Path) -> Plan:
    plan = read_plan(job)
    if plan is None:
        raise FileNotFoundError(f"there is no {PLAN} in {job}; `predict --workdir={job}` makes one")
    return plan


def _agree(plan: Plan, job: Path) -> None:
    """Write the plan, or see that it is the job's. A job that is merged gives way to another one.

    One process at a time does, so that none takes the parts of the new plan for those of the old one.
    """
    known = read_plan(job)
    is_agreed = known is not None and known.digest == plan.digest
    while not is_agreed:
        with lease(job, PLANNING) as is_agreed:
            if is_agreed:
                _replace_plan(plan, job)
        if not is_agreed:
            time.sleep(POLL_SECONDS)


def _replace_plan(plan: Plan, job: Path) -> None:
    known = read_plan(job)
    if known is not None and known.digest != plan.digest:
        if not (job / MERGED).exists():
            raise ValueError(
                f"{job} holds another job that is not finished: {difference(plan, known)}. "
                "Finish it with the command it was begun with, or name another --workdir"
            )
        shutil.rmtree(job / PARTS, ignore_errors=True)
        for left in (job / LEASES).iterdir():
            if left.name != PLANNING:
                left.unlink(missing_ok=True)
        (job / PLAN).unlink()
        known = None
    if known is None:
        (job / MERGED).unlink(missing_ok=True)
        write_plan(plan, job)


def _merge(
    options: argparse.Namespace,
    formats: Sequence[str],
    plan: Plan,
    say: Callable[..., None],
    started: float,
) -> int:
    """Write the results; one process at a time does."""
    job = Path(options.workdir)
    folder = Path(options.save_path or job / "predictions")
    failed: list[Failure] = []
    while True:
        with lease(job, MERGING) as is_mine:
            if is_mine:
                (job / MERGED).unlink(missing_ok=True)
                layer = begin_layer(options, plan.settings["class_names"])
                results: Iterator = merged_results(plan, job, failed, with_images="img" in formats)
                results = results if layer is None else layer.follow(results)
                summary = save_results(
                    results, folder, formats=formats, masks_format=options.masks_format, overwrite=options.overwrite
                )
                if layer is not None:
                    layer.write()
                _note(job, folder, plan, failed)
                break
        time.sleep(POLL_SECONDS)
    seen = {name for name, _ in summary.failed}
    summary.failed += [(one.input, f"window {one.window}: {one.error}") for one in failed if one.input not in seen]
    seconds = time.monotonic() - started
    pace = f"{seconds:.1f} s, {len(plan.parts)} parts"
    say(summary, folder, pace, plan.settings["class_names"], min(plan.settings["thresholds"]))
    if layer is not None:
        print("\n".join(layer.say()))
    print_next("status", str(job), comment="the same command again computes nothing, and merges")
    return 1 if summary.failed else 0


def begin_layer(options: argparse.Namespace, class_names: Sequence[str]) -> FoundLayer | None:
    """The layer of a map that the options ask for. Raises ValueError for options that need one and have none."""
    if not options.layer:
        for name in ("crs", "simplify", "smooth", "regularize", "regularize_classes", "min_area", "keep_doubles"):
            if getattr(options, name):
                raise ValueError(f"--{name} is for --layer, which names the file of a layer")
        return None
    classes = None
    if options.regularize_classes:
        if not options.regularize:
            raise ValueError("--regularize_classes goes with --regularize, which says how far outlines may move")
        classes = tuple(name.strip() for name in options.regularize_classes.split(","))
        unknown = [name for name in classes if name not in class_names]
        if unknown:
            known = shorten(", ".join(class_names))
            raise ValueError(f"--regularize_classes has {quote(unknown[0])}, the model's classes are {known}")
    shaping = Shaping(options.simplify, options.smooth, options.regularize, classes, options.min_area)
    return open_layer(options.layer, class_names, options.crs, shaping, is_single=not options.keep_doubles)


def _note(job: Path, folder: Path, plan: Plan, failed: list[Failure]) -> None:
    """Say that the job is merged, and list what failed beside the results."""
    if failed:
        write_json(folder / FAILED, [one._asdict() for one in failed], indent=1)
    else:
        (folder / FAILED).unlink(missing_ok=True)
    write_json(job / MERGED, {"plan": plan.digest, "failed": len(failed)})


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ValueError(f"--shard is {text}, it must be I/N with I from 0 to N - 1")
    return int(number), int(count)


def _run_workers(options: argparse.Namespace, job: Path, plan: Plan) -> None:
    """Run workers until they find nothing more to do: as processes of this machine, or as tasks of a Ray cluster."""
    arguments = [*without(options.arguments, ("--engine", "--jobs", "--address")), "--compute_only"]
    codes = _run_on_ray(options, arguments, job, plan) if options.engine == "ray" else _run_here(options, arguments)
    if any(codes):
        failed = sum(map(bool, codes))
        print(f"{failed} of {len(codes)} workers ended with an error; what they left is computed here")


def _run_here(options: argparse.Namespace, arguments: list[str]) -> list[int]:
    """Each worker has a share of the cores; their exit codes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = options.jobs or 1
    workers = []
    try:
        for i in range(count):
            share = cores[i * len(cores) // count : (i + 1) * len(cores) // count]
            if share:
                os.sched_setaffinity(0, share)  # which the process inherits
            workers.append(
                subprocess.Popen([*PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            )
            if share:
                os.sched_setaffinity(0, cores)
        return [worker.wait() for worker in workers]
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise


def _run_on_ray(options: argparse.Namespace, arguments: list[str], job: Path, plan: Plan) -> list[int]:
    """A worker for each GPU, or core, of the cluster, if --jobs names no other number; their exit codes."""
    cluster = join_ray(options.address)
    count, codes = options.jobs or cluster.places, []
    with Progress(transient=True) as bars:
        bar = bars.add_task(f"parts, {count} workers", total=len(plan.parts))

        def show() -> None:
            bars.update(bar, completed=len(finished_parts(job)))

        for ended in run_commands(cluster, [arguments] * count, wait=show):
            codes.append(ended.code)
            if ended.code:
                bars.console.print(ended.error, markup=False)
    return codes
