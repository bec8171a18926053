"""How groups, operators and blocks are named after the modules of the user's model."""

from __future__ import annotations

import re
from collections.abc import Mapping


def module_path(parameter: str) -> str:
    """The module that a parameter belongs to; a layer of a recurrent module adds its number ("rnn.l0", "rnn.l0_reverse")."""
    path, _, leaf = parameter.rpartition(".")
    layer = re.fullmatch(r"(?:weight|bias)_(?:ih|hh)_(l\d+(?:_reverse)?)", leaf)
    if layer:
        return f"{path}.{layer[1]}" if path else layer[1]
    if re.match(r"(in_proj_|out_proj_)?(weight|bias)", leaf) and path:
        return path
    return parameter


def unique(name: str, taken: Mapping[str, object]) -> str:
    """`name`, or `name#2`, `name#3`, ... where it is taken."""
    if name not in taken:
        return name
    number = 2
    while f"{name}#{number}" in taken:
        number += 1
    return f"{name}#{number}"
