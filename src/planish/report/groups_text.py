"""Groups in words: who their members are, whether units may go, and why the rest stays dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.report.figures import plain

_SHOWN = 12
"""More names than this are not listed; `--json` has them all."""


def share(value: float) -> str:
    """`12 %`; what is more than nothing is never 0."""
    return f"{value:.0%}".replace("%", " %") if value >= 0.01 or value <= 0 else "< 1 %"


def state(group: dict[str, Any]) -> str:
    """Whether units may go: `exact`, `inexact: changes what a norm or softmax runs over`, in what steps, or by what the group is pinned."""
    if group["pinned"]:
        return f"pinned by {group['pinned']}"
    if group.get("routed"):
        return f"experts, of which {group['routed']} are picked at a time"
    kind = "exact" if group["exact"] else "inexact: changes what a norm or softmax runs over"
    return kind + (f", in steps of {group['multiple']}" if group["multiple"] > 1 else "")


def member_names(group: dict[str, Any]) -> dict[str, list[str]]:
    """Role -> the tensors that hold the group's units, as `conv1 (weight, bias)`, in the order of the program."""
    found: dict[str, list[str]] = {}
    for role in ("out", "affine", "in"):
        by_module: dict[str, list[str]] = {}
        for member in group["members"]:
            if member["role"] == role:
                path, _, leaf = member["tensor"].rpartition(".")
                by_module.setdefault(path or leaf, []).append(leaf if path else "")
        found[role] = [path + (f" ({', '.join(dict.fromkeys(leaves))})" if any(leaves) else "") for path, leaves in by_module.items()]
    return {role: names for role, names in found.items() if names}


def listed(names: Sequence[str]) -> str:
    """Names after each other, each on one line and cut in its middle where it is long; of very many only the first and the last."""
    shown = [plain(name, 80) for name in names]
    if len(shown) > _SHOWN:
        shown = [*shown[: _SHOWN - 1], f"… {len(shown) - _SHOWN} more …", shown[-1]]
    return ", ".join(shown)


def dense(data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Why output dimensions stay as they are -> the parameters that do for that reason, in the order of the program."""
    found: dict[str, list[str]] = {}
    for parameter, reason in data["reasons"].items():
        found.setdefault(reason, []).append(parameter)
    return list(found.items())
