"""What `planish shrink` did, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planish.report import figures


def shrunk_text(data: Mapping[str, Any]) -> str:
    """The account of a model that streamed past, as `planish shrink --json` prints it, in a few lines."""
    worst = max(data["operators"], key=lambda one: one["error"])
    lines = [f"weights         {figures.size(data['bytes_before'])} -> {figures.size(data['bytes_after'])}"]
    if data["cosine"] is not None:
        score = f"cosine {data['cosine']:.4f}, agreement {data['agreement']:.4f}"
        lines.append(f"outputs         {score}, on {data['held_out']} samples held out")
    if data["units"]:
        before, after = (sum(pair[side] for pair in data["units"].values()) for side in (0, 1))
        lines.append(f"hidden units    {before} -> {after}, in {len(data['units'])} feed-forward layers")
    latency = data["latency_s"]
    is_one = data["threads"] == 1
    lines += [
        f"latency         {figures.seconds(latency['median'])}, on {data['threads']} thread{'' if is_one else 's'}; the original is not timed",
        f"peak memory     {figures.size(data['peak_memory_bytes'])}, {figures.size(data['memory_before_bytes'])} of it before",
        f"worst operator  {worst['name']}: {worst['error']:.2%} of its output's power",
        f"in float        {', '.join(data['skipped']) or 'nothing'}",
    ]
    return "\n".join([*lines, f"written: {data['path']}", ""])
