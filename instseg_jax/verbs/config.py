"""The verb `config`: the fields of a config with their values and what they mean."""

import argparse
import ast
import io
import pathlib
import re
import tokenize

from ml_collections import ConfigDict

from instseg_jax.commands import print_next
from instseg_jax.config import CHECKOUT, PACKAGED, find_config, list_fields, load_config

COMPLETE = "mask_rtdetr"  # the config that has every field, with its comment


def config(options: argparse.Namespace) -> int:
    """Print every field of a config as it is set on the command line; without a name, the configs that there are."""
    spec = options.name or options.config
    if not spec:
        for path in _config_files():
            print(f"{_name(path):22s} {_first_line(path)}")
        print_next("config", "finetune:n", comment="its fields")
        return 0
    chosen = load_config(spec, options.overrides)
    official = load_config(f"{COMPLETE}:{chosen.model.name[-1]}")
    described = read_fields(find_config(COMPLETE).read_text(encoding="utf-8"))
    print(f"# {spec}: {_first_line(find_config(spec.partition(':')[0]))}")
    known = list_fields(chosen)
    for field in [*(field for field in described if field in known), *(set(known) - set(described))]:
        value = _value(chosen, field)
        notes = [described[field]] if described.get(field) else []
        if field not in described:
            notes.append("of this config alone")
        elif value != _value(official, field):
            notes.append(f"in the official recipe {_shown(_value(official, field))}")
        comment = f"  # {'; '.join(notes)}" if notes else ""
        print(f"--config.{field}={_shown(value)}{comment}")
    fields = [f"--config.{field}={value}" for field, value in options.overrides.items()]
    data = [] if chosen.data.dir else ["--config.data.dir=YOUR_DATA"]
    print_next("train", f"--config={spec}", *fields, *data)
    return 0


def read_fields(source: str) -> dict[str, str]:
    """The fields that the text of a config sets, in its order, each with the comment behind it or "".

    Sections have names of their own there (`config.eval = evaluation = ConfigDict()`); a field that a loop makes has
    the comment of the loop.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment_of = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    sections: dict[str, str] = {"config": ""}
    found: dict[str, str] = {}

    def read(statements: list[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
                prefixes = [str(each.value) for each in node.iter.elts if isinstance(each, ast.Constant)]
                names = re.findall(r'(\w+)\[f"\{\w+\}(\w+)"\]', ast.get_source_segment(source, node) or "")
                made = [f"{sections[section]}.{prefix}{name}" for prefix in prefixes for section, name in names]
                found.update(dict.fromkeys(made, comment_of.get(node.lineno, "")))
            if not isinstance(node, ast.Assign):
                continue
            of_section = [t for t in node.targets if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name)]
            for target in of_section:
                section = sections.get(target.value.id) if isinstance(target.value, ast.Name) else None
                if section is None:
                    continue
                field = f"{section}.{target.attr}".lstrip(".")
                aliases = [alias.id for alias in node.targets if isinstance(alias, ast.Name)]
                sections.update(dict.fromkeys(aliases, field))
                if not aliases:
                    found[field] = comment_of.get(node.end_lineno or node.lineno, "")

    for function in (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)):
        if function.name == "get_config":
            read(function.body)
    return found


def _config_files() -> list[pathlib.Path]:
    root = CHECKOUT if CHECKOUT.is_dir() else PACKAGED
    return sorted(root.glob("*.py")) + sorted(path for path in root.glob("*/*.py") if path.stem != "base")


def _name(path: pathlib.Path) -> str:
    root = CHECKOUT if path.is_relative_to(CHECKOUT) else PACKAGED
    return path.relative_to(root).with_suffix("").as_posix()


def _first_line(path: pathlib.Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return text.splitlines()[0] if text else ""


def _value(config: ConfigDict, field: str):
    for part in field.split("."):
        config = config[part]
    return config


def _shown(value: object) -> str:
    """A value as it is typed: text as it is, all else as Python writes it, in quotes where a shell needs them."""
    text = value if isinstance(value, str) else repr(value)
    if not re.search(r"[^\w./:=,+-]", text):
        return text
    escaped = re.sub(r'(["$`\\])', r"\\\1", text)
    return f'"{escaped}"'
