"""What could be done to a model and what could not, found without doing any of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from planish.clock import FINAL_S, SEARCH_SHARE, SENSITIVITY_SHARE, TABLES_SHARE
from planish.events import Events
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs, operator_macs
from planish.graph.replay import Replay
from planish.prune.masks.pattern import parse_masking
from planish.prune.masks.subjects import subjects
from planish.quantize.placement import unsupported
from planish.runtimes.contract import get_runtime
from planish.target import Target

if TYPE_CHECKING:
    from planish.request import Request
    from planish.workload import Workload


def describe(job: Workload, keep: Sequence[str], events: Events) -> dict[str, Any]:
    """Plain data: "operators", "groups", "blocks", "unknown", "reasons", "notes" and totals of the captured model."""
    events.stage("capturing the model")
    graph = capture(job.model_module(), job.example_inputs, job.state or None)
    events.stage("finding groups")
    found = analyse(graph, keep)
    nodes = {node.name: node for node in graph.module.graph.nodes}
    total = macs(found)
    parameters = sum(value.numel() for value in graph.module.parameters())
    return {
        "name": job.name,
        "parameters": parameters,
        "macs": total,
        "operators": [
            {
                "name": name,
                "kind": operator.kind,
                "output": [size.full for size in operator.output],
                "macs": operator_macs(operator),
                "share": operator_macs(operator) / total if total else 0.0,
                "fused": list(operator.fused),
                "int8": unsupported(nodes[operator.node]) or "can be quantized",
                "width": found.reasons.get(operator.weight or "", "") or "can be pruned"
                if operator.weight is not None
                else "has no channels of its own",
            }
            for name, operator in found.operators.items()
        ],
        "groups": [
            {
                "name": name,
                "units": group.units,
                "parameters": len(group.unit_of),
                "exact": group.exact,
                "pinned": group.pinned,
            }
            for name, group in found.groups.items()
        ],
        "blocks": [{"name": name, "operators": list(block.operators)} for name, block in found.blocks.items()],
        "unknown": {name: list(places) for name, places in found.unknown.items()},
        "reasons": dict(found.reasons),
        "notes": graph.notes,
    }


def _masks(graph: Graph, found: Analysis, request: Request, target: Target) -> int:
    """How many masks a run would try: none where the runtime's file is no smaller for them, or no limit on the size asks for it."""
    is_asked = "mask" in request.techniques and any(limit.quantity == "size" for limit in request.budget.limits)
    if not is_asked or not get_runtime(target.runtime).stores_sparse:
        return 0
    return len(parse_masking(request.masking)[1]) * len(subjects(Replay(graph.module), found, request.keep))


def _too_short(total_s: float, limit_s: float | None) -> list[str]:
    if limit_s is None or total_s <= limit_s:
        return []
    return [f"--time-limit {limit_s:.0f} leaves no time for recovery, and may be exceeded: the other steps take about {total_s:.0f} s"]


def work_plan(job: Workload, request: Request, events: Events) -> dict[str, Any]:
    """What `optimize` would do, stage by stage, with seconds estimated from one timed pass of the model; nothing is written.

    Returns:
        "stages": name and estimated seconds each; "seconds" in all; "groups", "blocks", "options", "targets".
    """
    import time

    from planish.prune.levels import width_levels
    from planish.workbench import RECOVERY_S, targets_for, width_step

    targets = targets_for(request.target, request.threads)
    events.stage("capturing the model")
    began = time.monotonic()
    graph = capture(job.model_module(), job.example_inputs, job.state or None)
    found = analyse(graph, request.keep)
    capturing = time.monotonic() - began
    with torch.inference_mode():
        graph.module(*graph.example)
        began = time.monotonic()
        graph.module(*graph.example)
        sample = (time.monotonic() - began) / len(graph.example[0])
    multiple = width_step(targets[0])
    levels = sum(len(width_levels(group, multiple)) - 1 for group in found.groups.values()) if "prune" in request.techniques else 0
    blocks = len(found.blocks) if "prune" in request.techniques else 0
    nodes = {node.name: node for node in graph.module.graph.nodes}
    int8 = sum(not unsupported(nodes[o.node]) for o in found.operators.values()) if "quantize" in request.techniques else 0
    limit = request.time_limit or math.inf
    masks = _masks(graph, found, request, targets[0])
    stages = {
        "capture and groups": capturing,
        "exporting and measuring the original": (capturing + 6.0) * (len(targets) + 1),
        "sensitivity of groups and blocks": min(0.6 * (levels + blocks) * 256 * sample, SENSITIVITY_SHARE * limit),
        "int8 in each runtime": (capturing + 6.0) * len(targets) if int8 else 0.0,
        "sensitivity of int8": min(0.6 * int8 * 256 * sample, SENSITIVITY_SHARE * limit),
        "sensitivity of masks": min(0.6 * masks * 256 * sample, SENSITIVITY_SHARE * limit),
        "latency tables": min(0.3 * (levels * 4 + int8), TABLES_SHARE * limit),
        "candidates": min(request.trials * (8 * 512 * sample + capturing + 5.0), SEARCH_SHARE * limit),
        "final measurement": FINAL_S,
    }
    total = sum(stages.values())
    if "distill" in request.techniques:
        left = RECOVERY_S if request.time_limit is None else max(0.0, request.time_limit - total)
        stages["recovery"] = left
    return {
        "name": job.name,
        "targets": [target.name for target in targets],
        "groups": len(found.groups),
        "blocks": blocks,
        "options": levels + blocks + int8 + masks,
        "stages": stages,
        "seconds": sum(stages.values()),
        "notes": [*graph.notes, *_too_short(total, request.time_limit)],
    }
