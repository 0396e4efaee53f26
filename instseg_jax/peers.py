"""Several processes that work as one: who is lost is said in a sentence, and nobody waits for the dead.

JAX ends a process from C++ when the one that coordinates is lost, or when the others do not come in time: with stacks
and exit code 134, past everything that Python could do. So a process that is one of several is started by another one,
which stands by (`stand_by`): it hands on signals, leaves out the stacks, says what happened and gives the exit code.
Within the process a thread (`watch`) notes every second that it lives, in JAX's store, and looks at the others.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from instseg_jax.files import write_json

REQUEUE = 75  # exit code of a run that SIGUSR1 stopped: EX_TEMPFAIL, "try again later"
TRIES = 3  # to find the others
SWITCH = "INSTSEG_STANDBY"  # in the environment of a process that works: the pipe to the one that stands by
BEAT_SECONDS = 1.0
QUIET_SECONDS = 15.0  # without a beat of a process until it is lost: reading a large file holds up its thread
QUIET_AFTER_ERROR = 4.0  # where something has failed in this one, which is what a loss looks like
GO_ON = "the same command goes on from the last save"
# What JAX says when it gives up, and the stacks.
FATAL = re.compile(
    rb"^[WEF]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)|^\*\*\* Check failure|^ +@ +0x"
    rb"|^terminate called|^Additional GRPC error|^:UNKNOWN:|^RPC: |^The following tasks|^/job:"
)
_result: list[Path] = []  # the file that tells how the run ended, where one is to be written


# --- the process that stands by ------------------------------------------------------------------------------------


def is_wanted(arguments: Sequence[str]) -> bool:
    """Whether a command is one of several processes, and nobody stands by yet."""
    names = {argument.partition("=")[0] for argument in arguments}
    return os.name == "posix" and SWITCH not in os.environ and bool(names & {"--distributed", "--coordinator"})


def stand_by(arguments: Sequence[str]) -> int:
    """Run this program once more, with everything as it is; returns its exit code.

    Where the others are not found it is tried again, `--initialization_tries` times in all.
    """
    given = re.search(r"--initialization_tries[= ](\d+)", " ".join(arguments))
    tries = max(1, int(given[1]) if given else TRIES)
    for attempt in range(1, tries + 1):
        code, told, last_words = _run_once()
        has_joined = "joined" in told
        if code != -signal.SIGABRT or has_joined or attempt == tries:
            break
        print(f"the other processes did not come in time; try {attempt + 1} of {tries}", file=sys.stderr, flush=True)
    if code != -signal.SIGABRT:
        return code if code >= 0 else 128 - code
    if not has_joined:
        return _fail("the other processes did not come in time (--initialization_timeout gives them longer)", told)
    lost = sorted({int(number) for number in re.findall(rb"/task:(\d+)[^\n]*(?:heartbeat|unhealthy)", last_words)})
    who = f"process {', '.join(map(str, lost))}" if lost else "process 0, which coordinates the others,"
    return _fail(f"{who} was lost; {GO_ON}", told)


def _run_once() -> tuple[int, dict[str, str], bytes]:
    """Exit code of the process that works (negative: its signal), what it told, and what JAX said last."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {SWITCH: str(writer)},
        stderr=subprocess.PIPE,
        pass_fds=(writer,),
        preexec_fn=_die_with_parent,  # no thread runs here yet
    )
    os.close(writer)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
    last_words = b""
    try:
        for line in process.stderr or ():
            if FATAL.search(line):
                last_words = (last_words + line)[-1 << 16 :]
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with os.fdopen(reader) as told:
        return code, dict(line.rstrip("\n").partition(" ")[::2] for line in told), last_words


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux; elsewhere `watch` looks
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _fail(sentence: str, told: dict[str, str]) -> int:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    if "result" in told:
        _write_failure(Path(told["result"]), sentence)
    return 1


def _write_failure(file: Path, sentence: str) -> None:
    with contextlib.suppress(OSError):  # the sentence is worth more than its record
        write_json(file, {"done_flag": False, "err_type": "LostProcessError", "err_msg": sentence}, indent=2)


# --- the process that works ----------------------------------------------------------------------------------------


def tell(what: str, value: str = "") -> None:
    """Tell the process that stands by, if there is one."""
    if SWITCH in os.environ:
        with contextlib.suppress(OSError):
            os.write(int(os.environ[SWITCH]), f"{what} {value}\n".encode())


def write_here_if_lost(file: Path) -> None:
    """Have whoever is left write to this file that a process was lost."""
    _result[:] = [file]
    tell("result", str(file.absolute()))


@contextlib.contextmanager
def watch(client: Any, process: int, count: int) -> Iterator[None]:
    """While inside, end this process with a sentence and exit code 1 when another one is lost.

    `client` is that of JAX's coordination service, where each of `count` processes keeps its beat.
    """
    tell("joined")
    watcher = _Watcher(client, process, count)
    thread = threading.Thread(target=watcher.run, name="peers", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        watcher.quiet_seconds = QUIET_AFTER_ERROR
        time.sleep(QUIET_AFTER_ERROR + 3 * BEAT_SECONDS)  # it ends the process, if someone is lost
        if process == 0:
            time.sleep(2 * BEAT_SECONDS)  # the others need it to say what they have to
        raise
    finally:
        watcher.leave()
        thread.join(3 * BEAT_SECONDS)


class _Watcher:
    """Keeps the beat of this process and looks for those of the others."""

    def __init__(self, client: Any, process: int, count: int) -> None:
        self.client, self.process, self.count = client, process, count
        self.stopped = threading.Event()
        self.quiet_seconds = QUIET_SECONDS
        self.parent = os.getppid()

    def run(self) -> None:
        others = [str(who) for who in range(self.count)]
        seen = dict.fromkeys(others, ("", time.monotonic()))  # the last beat of each process, and when it was new
        number = 0
        while not self.stopped.wait(BEAT_SECONDS):
            if SWITCH in os.environ and os.getppid() != self.parent:
                os._exit(1)  # whoever stood by was killed
            number, now = number + 1, time.monotonic()
            try:
                self.client.key_value_set(f"instseg/beat/{self.process}", str(number), allow_overwrite=True)
                beats = {key.rpartition("/")[2]: value for key, value in self.client.key_value_dir_get("instseg/beat/")}
            except Exception:  # the coordinator is gone, which JAX itself ends this process for
                continue
            for who in others:
                if beats.get(who, "") != seen[who][0]:
                    seen[who] = beats[who], now
            lost = [who for who in others if beats.get(who) != "left" and now - seen[who][1] > self.quiet_seconds]
            if lost and not self.stopped.is_set():
                self._end(f"process {', '.join(lost)} of {self.count} was lost; {GO_ON}")

    def leave(self) -> None:
        """Say that this process ends as it should."""
        self.stopped.set()
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"instseg/beat/{self.process}", "left", allow_overwrite=True)

    def _end(self, sentence: str) -> None:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        for file in _result:
            _write_failure(file, sentence)
        sys.stdout.flush()
        os._exit(1)  # past JAX, which would wait for everybody
