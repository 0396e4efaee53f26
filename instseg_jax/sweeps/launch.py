"""Runs of a sweep as processes: several at a time or one after the other, stopped and resumed without loss."""

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from instseg_jax.files import write_json
from instseg_jax.messages import quote
from instseg_jax.sweeps.plan import Run
from instseg_jax.sweeps.state import State, lock, read_ended, read_state
from instseg_jax.training.workdir import RESULT

PROGRAM = (sys.executable, "-m", "instseg_jax.cli")
CONSOLE = "console.log"  # what the process of a run printed
POLL_SECONDS = 0.5
LOCK_TRIES = 5  # whoever only looks whether a folder is taken holds its lock for a moment
PACKAGE_PARENT = Path(__file__).parents[2]
LIST_DEVICES = (
    "import sys; from instseg_jax.devices import select_devices; "
    "print(*[f'{d.platform}:{d.id}' for d in select_devices(sys.argv[1])])"
)


def command_of(spec: str, overrides: dict[str, str], workdir: Path) -> list[str]:
    """The arguments that train a run, after the program's name."""
    fields = [f"--config.{field}={text}" for field, text in overrides.items()]
    return ["train", f"--config={spec}", *fields, f"--workdir={workdir}"]


def list_devices(device: str) -> list[str]:
    """The devices that a text such as auto or gpu:0,1 names, one by one: gpu:0, gpu:1.

    Another process looks: whoever asks JAX for a GPU holds much of its memory from then on.

    Raises: ValueError when there are no such devices.
    """
    command = [sys.executable, "-c", LIST_DEVICES, device]
    found = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if found.returncode:
        last = found.stderr.strip().splitlines()[-1:]
        raise ValueError(last[0].removeprefix("ValueError: ") if last else f"no device {quote(device)} was found")
    return found.stdout.split()


def assign_devices(device: str, num_jobs: int) -> list[str | None]:
    """The devices of the places in which runs go on at the same time; None: as the config says.

    Raises: ValueError when there are fewer devices than places, unless all are on one CPU.
    """
    if num_jobs < 1:
        raise ValueError(f"--jobs is {num_jobs}, it must be at least 1")
    if num_jobs == 1:
        return [None]
    present = list_devices(device)
    if len(present) >= num_jobs:
        return list(present[:num_jobs])
    if len(present) == 1 and present[0].startswith("cpu"):
        return [None] * num_jobs
    raise ValueError(f"--jobs is {num_jobs}, but config.device={device} has {len(present)}: {', '.join(present)}")


@dataclasses.dataclass
class _Place:
    device: str | None
    run: Run
    process: subprocess.Popen
    is_given_up: bool = False


def launch(
    runs: Iterable[Run],
    workdir: Path,
    *,
    spec: str,
    devices: Sequence[str | None],
    tell: Callable[[str, Run, State], None],
    wait: Callable[[list[Run]], None],
    give_up: Callable[[Run], bool] = lambda run: False,
) -> bool:
    """Train runs, each in a process and a folder of its own; a run that breaks leaves the others alone.

    Args:
      runs: asked for the next one when there is a place for it.
      workdir: of all; the runs' folders are below it.
      devices: one entry a place; as many runs go on at the same time.
      tell: called with "start" or "end", the run and its state.
      wait: called about twice a second with the runs that go on.
      give_up: asked as often of each; a run for which it says yes is stopped, with its state saved.

    Returns: whether all were tried; False when SIGINT or SIGTERM ended it. Runs that went on then have saved their
      state, a second signal kills them.
    """
    waiting, free, is_more = iter(runs), collections.deque(devices), True
    places: list[_Place] = []
    with _Stop(places) as stop:
        while places or (is_more and not stop.asked):
            while is_more and free and not stop.asked:
                run = next(waiting, None)
                if run is None:
                    is_more = False
                    break
                device = free.popleft()
                process = _start(run, workdir, spec, device)
                if process is None:  # somebody else trains in this folder, or has
                    free.append(device)
                    tell("end", run, read_state(workdir / run.name))
                    continue
                places.append(_Place(device, run, process))
                if stop.asked:  # just before it could hear of it
                    process.terminate()
                tell("start", run, State("running"))
            wait([place.run for place in places])
            for place in places:
                if not place.is_given_up and give_up(place.run):
                    place.is_given_up = True
                    place.process.terminate()
            for place in [place for place in places if place.process.poll() is not None]:
                places.remove(place)
                free.append(place.device)
                _note_silent_end(workdir / place.run.name, place.process.returncode, stop.asked)
                tell("end", place.run, read_state(workdir / place.run.name))
            if places:
                time.sleep(POLL_SECONDS)
    return not stop.asked


def _start(run: Run, workdir: Path, spec: str, device: str | None) -> subprocess.Popen | None:
    folder = workdir / run.name
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _lock_patiently(folder)
    if descriptor is False:
        return None
    if read_ended(folder).status == "finished":  # by another process, since this one looked
        if descriptor is not None:
            os.close(descriptor)
        return None
    (folder / RESULT).unlink(missing_ok=True)  # of an earlier try
    overrides = run.overrides | ({"device": device} if device else {})
    environment = _environment()
    if device and not device.startswith("cpu"):
        # Each process sees all GPUs, and would take most of the memory of every one of them.
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    command = [*PROGRAM, *command_of(spec, overrides, folder)]
    inherited = () if descriptor is None else (descriptor,)
    try:
        with (folder / CONSOLE).open("ab") as console:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                start_new_session=True,  # a Ctrl-C reaches it through us alone, once
            )
    finally:
        for one in inherited:
            os.close(one)


def _lock_patiently(folder: Path) -> int | bool | None:
    """As `lock`; False when the folder is taken."""
    for _ in range(LOCK_TRIES):
        try:
            return lock(folder)
        except BlockingIOError:
            time.sleep(0.1)
    return False


def _environment() -> dict[str, str]:
    """Ours, in which the package is found whatever the current folder, and output to a file is not coloured."""
    paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    return ours | {"PYTHONPATH": os.pathsep.join(paths)}


def _note_silent_end(folder: Path, code: int, is_stopping: bool) -> None:
    """Have train_result.json say why, where the process could not: killed, or broken before it had a folder."""
    if (folder / RESULT).is_file() or is_stopping:
        return
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; often there is not enough memory" if name == "SIGKILL" else ""
        failure = ("Killed", f"the process was ended by {name}{hint}; the last checkpoint is intact")
    else:
        lines = (folder / CONSOLE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        failure = ("Exit", f"the process ended with code {code}; it said: {lines[-1] if lines else 'nothing'}")
    write_json(folder / RESULT, {"done_flag": False, "err_type": failure[0], "err_msg": failure[1]}, indent=2)


class _Stop:
    """While inside, SIGINT and SIGTERM are handed on to the runs, which save and end, and no more are started."""

    def __init__(self, places: list[_Place]):
        self._places, self.asked = places, False

    def __enter__(self) -> "_Stop":
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._hand_on)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break
        return self

    def _hand_on(self, number: int, frame) -> None:
        self.asked = True
        for place in list(self._places):
            place.process.send_signal(signal.SIGTERM)

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for place in self._places:  # after an error of ours
            place.process.terminate()
