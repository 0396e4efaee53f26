"""Writes `.github/docs/api.md` from the docstrings of the public names: `python tests/helpers/api_page.py`."""

import inspect
import pathlib
import re

import instseg_jax

PAGE = pathlib.Path(__file__).parent.parent.parent / ".github" / "docs" / "api.md"
HEAD = """# API

What `import instseg_jax` offers, made from the docstrings by `python tests/helpers/api_page.py`; [examples](python.md).
"""


def signature_of(function) -> str:
    """`(model, *, seed=0)`: names and defaults; the types are in the source."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(plain))


def functions_of(module) -> str:
    """A line for each public function that a module defines, with the first line of its docstring."""
    found = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    public = [f for f in found if not f.__name__.startswith("_")]
    return "\n".join(f"{f.__name__}{signature_of(f)}\n    {inspect.getdoc(f).splitlines()[0]}" for f in public)


def api_page() -> str:
    """The text of the page."""
    parts = [HEAD]
    for name in instseg_jax.__all__:
        if name == "__version__":
            continue
        function = getattr(instseg_jax, name)
        if inspect.ismodule(function):
            parts.append(f"## {name}\n\n```text\n{function.__doc__.strip()}\n\n{functions_of(function)}\n```\n")
            continue
        text = re.sub(r"(?<=\S)\n(?=(Args|Returns|Raises|Yields):)", "\n\n", inspect.getdoc(function))
        parts.append(f"## {name}\n\n```text\n{name}{signature_of(function)}\n\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(api_page(), encoding="utf-8")
