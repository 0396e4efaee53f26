"""Commands as a person types them here, for hints: `instseg ...` where installed, `python run.py ...` in a checkout."""

import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence

OURS = ("instseg", "run.py", "cli.py")  # names under which this program is started


def program() -> str:
    """What to type before a verb."""
    return "python run.py" if pathlib.Path(sys.argv[0]).name == "run.py" else "instseg"


def shown(*arguments: str) -> str:
    """A command, quoted for a shell where it must be."""
    return f"{program()} {shlex.join(arguments)}"


def print_next(*arguments: str, comment: str = "") -> None:
    """What a verb says last: the command that comes next."""
    print(f"next: {shown(*arguments)}{f'  # {comment}' if comment else ''}")


def changed(verb: str, options: Mapping[str, str]) -> str:
    """The command that is running, with other values of some options; one with these alone where none is."""
    new = [f"{name}={value}" for name, value in options.items()]
    if pathlib.Path(sys.argv[0]).name not in OURS:
        return shown(verb, "--config=CONFIG", *new)
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name not in options:
            kept.append(argument)
        elif not equals:
            next(arguments, None)
    return shown(*kept, *new)


def without(arguments: list[str], names: Sequence[str]) -> list[str]:
    """Command line arguments without some options that have values, each `--name=value` or `--name value`."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in names:
            next(rest, None)
        elif not argument.startswith(tuple(f"{name}=" for name in names)):
            kept.append(argument)
    return kept
