"""Edits of the dataset registry that leave every other line, comment and space of it as it is."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from steps.datasets import REGISTRY
from steps.errors import DataError

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")


def with_file(registry: str, name: str, role: str, file: str) -> str:
    """The registry's text with one more line under a dataset's `source.files`.

    Raises:
        DataError: the line cannot be added without changing others.
    """
    files = _inner(_inner(_inner(_inner(yaml.compose(registry), "datasets"), name), "source"), "files")
    expected = _parsed(registry)
    line = f"{_written(role)}: {_written(file)}"
    if files is None:
        raise _by_hand(name, line, "the entry has no source.files")
    expected[name]["source"]["files"] |= {role: file}
    if files.flow_style:
        text = _grown(registry, files, line)
    else:
        text = _after(registry, _last_line(files), [" " * files.start_mark.column + line])
    return _checked(text, expected, name, line)


def with_entry(
    registry: str, name: str, format: str, files: dict[str, str], columns: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The registry's text with a new dataset at its end.

    The seed of its split comes from its name: rows taken from a part of another dataset would all be dealt to that part
    again by the same one.

    Raises:
        DataError: it cannot be added without changing other lines.
    """
    datasets = _inner(yaml.compose(registry), "datasets")
    listed = [f"      {_written(role)}: {_written(file)}" for role, file in files.items()]
    seed = zlib.crc32(name.encode()) % 10_000
    renamed = [f"    {_written(field)}: {_written(own)}" for field, own in columns.items()]
    block = [f"{name}:", f"  format: {format}", "  source:", "    files:", *listed]
    block += [*(["  columns:", *renamed] if renamed else []), f"  split: {{seed: {seed}}}"]
    if not isinstance(datasets, yaml.MappingNode) or datasets.flow_style or not datasets.value:
        raise _by_hand(name, "\n        ".join(block), "`datasets:` is no block of entries")
    indent = " " * datasets.value[0][0].start_mark.column
    text = _after(registry, _last_line(datasets), [indent + line for line in block])
    made = {"format": format, "source": {"files": files}, "split": {"seed": seed}}
    made |= {"columns": dict(columns)} if columns else {}
    expected = _parsed(registry) | {name: made}
    return _checked(text, expected, name, "\n        ".join(block))


def with_forgotten(registry: str, name: str, ids: Sequence[str]) -> str:
    """The registry's text with more row ids under a dataset's `forgotten`.

    Raises:
        DataError: they cannot be added without changing other lines.
    """
    entry = _inner(_inner(yaml.compose(registry), "datasets"), name)
    expected = _parsed(registry)
    expected[name]["forgotten"] = [*(expected[name].get("forgotten") or []), *ids]
    quoted = [json.dumps(row) for row in ids]  # always: some ids look like numbers, and to some readers only
    by_hand = f"forgotten: [{', '.join(quoted)}]"
    listed = _inner(entry, "forgotten")
    if isinstance(listed, yaml.SequenceNode) and not listed.flow_style:
        text = _after(registry, _last_line(listed), [" " * listed.start_mark.column + f"- {row}" for row in quoted])
    elif isinstance(listed, yaml.SequenceNode):
        text = _grown(registry, listed, ", ".join(quoted))
    elif listed is None and entry is not None and entry.flow_style:
        text = _grown(registry, entry, by_hand)
    elif listed is None and entry is not None and entry.value:
        indent = " " * entry.start_mark.column
        block = [f"{indent}forgotten:", *(f"{indent}  - {row}" for row in quoted)]
        text = _after(registry, _last_line(entry), block)
    else:
        raise _by_hand(name, by_hand, "its layout is unusual")
    return _checked(text, expected, name, by_hand)


def _grown(text: str, node: yaml.CollectionNode, more: str) -> str:
    """A flow mapping or list with one thing more before its closing bracket."""
    place = node.end_mark.index - 1
    return text[:place].rstrip() + (", " if node.value else "") + more + text[place:]


def _inner(node: yaml.Node | None, key: str) -> Any:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for inner, value in node.value if inner.value == key), None)


def _last_line(node: yaml.Node) -> int:
    """The line on which a node's last value ends; a block's own end mark lies behind the comments that follow."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    end = node.end_mark
    return end.line - 1 if end.column == 0 and end.line > node.start_mark.line else end.line


def _after(text: str, line: int, added: list[str]) -> str:
    lines = text.splitlines()
    return "\n".join([*lines[: line + 1], *added, *lines[line + 1 :]]) + "\n"


def _written(value: str) -> str:
    plain = _PLAIN.fullmatch(value) and isinstance(yaml.safe_load(value), str)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _parsed(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text)["datasets"])


def _checked(text: str, expected: dict[str, Any], name: str, line: str) -> str:
    try:
        if _parsed(text) == expected:
            return text
    except (yaml.YAMLError, TypeError, KeyError):
        pass
    raise _by_hand(name, line, "its layout is unusual")


def _by_hand(name: str, line: str, why: str) -> DataError:
    return DataError(
        f"the registry's entry of '{name}' cannot be edited for you",
        where=str(Path(REGISTRY)),
        have=why,
        then=f"add this by hand, then run again:\n        {line}",
    )
