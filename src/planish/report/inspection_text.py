"""What `planish inspect` found, as the command line prints it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from planish.measurement import Diagnosis
from planish.report import figures
from planish.report import sensitivity as words
from planish.report.groups_text import dense, listed, member_names, share, state
from planish.report.terminal import folded, table


def inspection_text(data: dict[str, Any]) -> str:
    """What `planish inspect` found: every operator with what can be done to it, the groups with their members, the blocks, and what stays."""
    rows = [
        (
            operator["name"],
            operator["kind"],
            "×".join(map(str, operator["output"])),
            figures.count(operator["macs"]),
            f"{operator['share']:.0%}",
            operator["width"],
            operator["int8"],
        )
        for operator in data["operators"]
    ]
    groups = [
        (
            group["name"],
            f"{group['units']} {group['unit']}",
            share(group["share_of_parameters"]),
            share(group["share_of_macs"]),
            state(group),
        )
        for group in data["groups"]
    ]
    blocks = [(block["name"], share(block["share_of_macs"]), len(block["operators"])) for block in data["blocks"]]
    parts = [
        folded(f"{data['name']}: {figures.count(data['parameters'])} parameters, {figures.count(data['macs'])} MACs a call"),
        table(("operator", "kind", "output", "MACs", "share", "width", "int8"), rows, right=(2, 3, 4), fold=(0, 5, 6), spare=(2, 3)),
    ]
    if groups:
        parts.append(table(("group", "units", "parameters", "MACs", "state"), groups, right=(2, 3), fold=(0, 1, 4)))
        told = folded("Members (out: issue the units, in: read them, affine: hold something for each, as a norm does):")
        parts.append(told + _members((group["name"], member_names(group)) for group in data["groups"]))
    if blocks:
        parts.append(table(("block that can be bypassed", "MACs", "operators"), blocks, right=(1, 2), fold=(0,)))
        parts.append(folded("Their operators:") + _members((block["name"], {"": block["operators"]}) for block in data["blocks"]))
    if data["reasons"]:
        parts.append("".join(folded(f"stays dense, {reason}: {listed(names)}", "- ") for reason, names in dense(data)))
    parts += [
        folded(f"unknown operator {name}: what it touches stays dense ({listed(where)})", "- ") for name, where in data["unknown"].items()
    ]
    parts += [folded(note, "- ") for note in data["notes"]]
    if "sensitivity" in data:
        parts.append(_sensitivity(data["sensitivity"]))
    return "\n".join(parts)


def _sensitivity(data: dict[str, Any]) -> str:
    """What `planish inspect --sensitivity` adds: every operator alone in each scheme, and all in int8 but it."""
    plain = {name: value for name, value in data.items() if name not in ("target", "notes")}
    found = msgspec.convert(plain, Diagnosis)
    schemes = words.schemes_of(found.operators)
    qualities = any(row.quality_without is not None for row in found.operators)
    columns = ["operator", *schemes, "all but it", *([figures.plain(found.metric, 30)] if qualities else []), "clipped"]
    rows = [
        (
            row.name,
            *(words.alone(row, scheme) for scheme in schemes),
            words.decibels(row.sqnr_without_db),
            *([figures.quality(row.quality_without)] if qualities else []),
            words.clipped(row),
        )
        for row in found.operators
    ]
    text = f"Sensitivity in {data['target']}, the worst first: signal to noise of the outputs in dB (more is better) with an operator alone in a scheme"
    legend = f"{figures.NOTHING}: the operator has no such form in that runtime, or there was no time"
    parts = [folded(f"{text}, and with all in int8 but it; {words.summed_up(found)}. {legend}.")]
    parts.append(table(columns, rows, right=range(1, len(columns)), fold=(0,), spare=(len(columns) - 1,)))
    return "".join([*parts, *(folded(said, "- ") for said in (*found.findings, *data["notes"]))])


def _members(named: Iterable[tuple[str, Mapping[str, Sequence[str]]]]) -> str:
    """Each name with what belongs to it below, by role."""
    lines = []
    for name, by_role in named:
        lines.append(folded(name, "  "))
        lines += [folded(f"{role}: {listed(names)}" if role else listed(names), "    ") for role, names in by_role.items()]
    return "".join(lines)
