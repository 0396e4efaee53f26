"""What others wrote, quoted in messages: never more than 80 characters of it, whatever it is.

A value of a hostile file may be huge, or small with a huge `repr`: 433 bytes of YAML with aliases make gigabytes.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

MOST = 80  # characters of a quotation
MAX_LISTED = 5  # names or ids that a message lists before it only counts
BRACKETS = ((list, "[", "]"), (tuple, "(", ")"), (Set, "{", "}"))


def quote(value: Any, most: int = MOST) -> str:
    """The `repr` of a value, cut to `most` characters, in time that depends on these alone."""
    text = ""
    for piece in _pieces(value, most):
        text += piece
        if len(text) > most:
            return f"{text[: most - 1]}…"
    return text


def shorten(text: Any, most: int = MOST) -> str:
    """A text on one line, such as another library's error, cut to `most` characters."""
    whole = str(text)
    line = " ".join(whole[: 4 * most].split())
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)  # a terminal obeys some
    return line if len(line) <= most and len(whole) <= 4 * most else f"{line[: most - 1]}…"


def first_few(items: Sequence[Any]) -> str:
    """The first five of the items, each as `shorten` has it, and how many more there are."""
    listed = ", ".join(shorten(item) for item in items[:MAX_LISTED])
    return listed + (f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else "")


def _pieces(value: Any, most: int) -> Iterator[str]:
    """The `repr` in pieces of at least a character each, so that whoever has enough can stop."""
    if isinstance(value, str | bytes):
        yield repr(value[: most + 1])
    elif isinstance(value, int) and value.bit_length() > 4 * most:  # Python refuses to write the longest ones
        yield f"a number of about {int(value.bit_length() * 0.30103) + 1} digits"
    elif isinstance(value, Mapping):
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _pieces(key, most)
            yield ": "
            yield from _pieces(item, most)
        yield "}"
    elif isinstance(value, list | tuple | Set):
        opening, closing = next((pair for kind, *pair in BRACKETS if isinstance(value, kind)))
        yield opening
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(item, most)
        yield f",{closing}" if isinstance(value, tuple) and len(value) == 1 else closing
    else:
        yield repr(value)
