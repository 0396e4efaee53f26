"""Runs commands of `run.py` as forks of a process that has imported everything: they come to their work at once.

As a program it reads requests from its input, a line of JSON each: {"start": [arguments], "log": file} is answered with
the process's number, {"wait": number, "seconds": s} with its exit code as Popen has it, or null when it still runs.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time


class Commands:
    """Starts commands in the folder `root`, with `environment`."""

    def __init__(self, root: pathlib.Path, environment: dict[str, str]) -> None:
        options = {"cwd": root, "env": environment, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
        )

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: list[str], log: pathlib.Path) -> "Command":
        return Command(self, self.ask(start=arguments, log=str(log)), arguments, log)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Command:
    """A command that runs, with what Popen has."""

    def __init__(self, commands: Commands, pid: int, args: list[str], log: pathlib.Path) -> None:
        self.commands, self.pid, self.args, self.log = commands, pid, args, log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.commands.ask(wait=self.pid, seconds=0)
        return self.returncode

    def wait(self, seconds: float) -> int:
        if self.returncode is None:
            self.returncode = self.commands.ask(wait=self.pid, seconds=seconds)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, seconds)
        return self.returncode

    def kill(self) -> None:
        """Kill it with all that it started."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # so young that it is not yet a session of its own
                os.kill(self.pid, signal.SIGKILL)
            self.wait(60)


def serve() -> None:
    import instseg_jax.serving.server
    import instseg_jax.verbs.predict
    import instseg_jax.verbs.sweep
    import instseg_jax.verbs.train  # noqa: F401
    from instseg_jax import cli

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
        elif (answer := os.fork()) == 0:
            become(cli.run, request["start"], request["log"])
        print(json.dumps(answer), flush=True)


def wait(pid: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.005)


def become(program, arguments: list[str], log: str) -> None:
    """Be the program from here on, as if it was started in a session of its own."""
    os.setsid()
    with open(log, "w") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["run.py", *arguments]
    code = 1
    try:
        program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    serve()
