"""What could be done to a model and what could not, found without doing any of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from planish import registry
from planish.clock import DIAGNOSIS_S, FINAL_S, SEARCH_SHARE, SENSITIVITY_SHARE, TABLES_SHARE
from planish.events import Events
from planish.graph.capture import capture
from planish.graph.facts import Shape
from planish.graph.graph import Analysis, Graph, Operator
from planish.graph.groups import analyse
from planish.graph.macs import macs, operator_macs
from planish.graph.members import Members, held, members, unit_name
from planish.graph.replay import Replay
from planish.plan import DEFAULT_SCHEMES
from planish.prune.masks.pattern import parse_masking
from planish.prune.masks.subjects import subjects
from planish.quantize.diagnosis import diagnose
from planish.quantize.ranges import calibration_warnings
from planish.quantize.schemes.int8 import INT8
from planish.quantize.subjects import everywhere, unsupported
from planish.runtimes.contract import get_runtime
from planish.target import Target

if TYPE_CHECKING:
    from planish.request import Request
    from planish.workload import Workload


_SENSITIVITY_S = 120.0


def describe(
    job: Workload, keep: Sequence[str], events: Events, sensitivity: Target | None = None, observer: str = "mse"
) -> dict[str, Any]:
    """Plain data: "operators", "groups", "blocks", "unknown", "reasons", "notes" and totals of the captured model.

    Args:
        job: the workload.
        keep: globs of parameters that must be left alone.
        events: is told of the progress.
        sensitivity: where operators are tried in every scheme, one by one, which adds "sensitivity"; None: nowhere.
        observer: the registered observer that chooses ranges for that.
    """
    events.stage("capturing the model")
    graph = capture(job.model_module(), job.example_inputs, job.state or None)
    events.stage("finding groups")
    found = analyse(graph, keep)
    nodes = {node.name: node for node in graph.module.graph.nodes}
    total = macs(found)
    shapes = {name: tuple(value.shape) for name, value in graph.module.named_parameters()}
    by_group = members(found)
    data: dict[str, Any] = {
        "name": job.name,
        "parameters": sum(map(math.prod, shapes.values())),
        "macs": total,
        "operators": [
            {
                "name": name,
                "kind": operator.kind,
                "op": operator.attributes.get("op", ""),
                "kernel": list(operator.attributes.get("kernel_size", ()) if operator.kind == "conv" else ()),
                "output": [size.full for size in operator.output],
                "macs": operator_macs(operator),
                "share": operator_macs(operator) / total if total else 0.0,
                "fused": list(operator.fused),
                "reads": list(operator.reads),
                "tensors": list(operator.tensors),
                "int8": unsupported(nodes[operator.node], INT8) or "can be quantized",
                "width": _width(operator, found, by_group),
            }
            for name, operator in found.operators.items()
        ],
        "groups": _groups(found, by_group, shapes, total),
        "blocks": [
            {
                "name": name,
                "operators": list(block.operators),
                "share_of_macs": sum(operator_macs(found.operators[o]) for o in block.operators) / total if total else 0.0,
            }
            for name, block in found.blocks.items()
        ],
        "unknown": {name: list(places) for name, places in found.unknown.items()},
        "reasons": dict(found.reasons),
        "notes": graph.notes,
    }
    if sensitivity is not None:
        data["sensitivity"] = _sensitivity(job, graph, found, sensitivity, observer, events)
    return data


def _sensitivity(job: Workload, graph: Graph, found: Analysis, target: Target, observer: str, events: Events) -> dict[str, Any]:
    """The diagnosis of the net with all that can in static int8, as plain data, with "target" and "notes" on the data."""
    from planish.workbench import check_batches

    check_batches(graph)
    runtime = get_runtime(target.runtime)
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        events.stage("reading the data")
        data = job.materialize(Path(folder))
        data.check(graph.signature)
        with torch.inference_mode():
            job.check_targets(data, graph.module(*graph.example))
        events.stage("sensitivity of operators")
        diagnosis = diagnose(
            graph,
            found,
            everywhere(graph, found, INT8) if INT8.name in runtime.schemes else {},
            runtime,
            target,
            data.calibration,
            ("validation", data.validation) if data.validation is not None else None,
            job.metric_object(graph.signature),
            [name for name in DEFAULT_SCHEMES if name in runtime.schemes],
            observer,
            seconds=_SENSITIVITY_S,
            progress=events.progress,
        )
        others = {name: split for name, split in data.splits().items() if name in ("validation", "test")}
        warnings = calibration_warnings(data.calibration, others, [spec.name for spec in graph.signature.inputs])
    plain: dict[str, Any] = msgspec.to_builtins(diagnosis)
    return {"target": target.name, **plain, "notes": [*data.notes, *warnings]}


def _width(operator: Operator, found: Analysis, by_group: Mapping[str, Members]) -> str:
    """Whether an operator's output can be made narrower, or why not."""
    if operator.weight is None:
        return "has no channels of its own"
    if operator.weight in found.reasons:
        return found.reasons[operator.weight]
    groups = [found.groups[name] for name, roles in by_group.items() if operator.name in (*roles["out"], *roles["affine"])]
    if not groups:
        return "is as wide as what it reads" if operator.kind == "norm" else "has no units that could go"
    pinned = [group.pinned for group in groups if group.pinned]
    return pinned[0] if len(pinned) == len(groups) else "can be pruned"


def _groups(found: Analysis, by_group: Mapping[str, Members], shapes: Mapping[str, Shape], total: int) -> list[dict[str, Any]]:
    """Each group with its members, by tensor and by operator, and what would go if all its units went.

    An element of a weight belongs to a group on each side of it, so that the shares of all groups add up to more than one.
    """
    parameters = max(1, sum(map(math.prod, shapes.values())))
    return [
        {
            "name": name,
            "units": group.units,
            "unit": unit_name(group, found, by_group[name]),
            "parameters": len(group.unit_of),
            "exact": group.exact,
            "multiple": group.multiple,
            "routed": group.routed,
            "pinned": group.pinned,
            "share_of_parameters": held(group, shapes) / parameters,
            "share_of_macs": 1 - macs(found, {name: 0}) / total if total else 0.0,
            "members": [
                {"tensor": tensor, "dimension": dimension, "role": group.roles[tensor, dimension], "indices": int((units >= 0).sum())}
                for (tensor, dimension), units in group.unit_of.items()
            ],
            "operators": {role: list(operators) for role, operators in by_group[name].items()},
        }
        for name, group in found.groups.items()
    ]


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
        "stages": name and estimated seconds each; "at_most": those of them whose seconds are what they may take, since they mostly end
        sooner; "seconds" in all; "groups", "blocks", "options", "targets".
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
    schemes = [registry.get("scheme", name) for name in request.schemes if any(name in get_runtime(t.runtime).schemes for t in targets)]
    int8 = sum(len(everywhere(graph, found, scheme)) for scheme in schemes) if "quantize" in request.techniques else 0
    limit = request.time_limit or math.inf
    masks = _masks(graph, found, request, targets[0])
    stages = {
        "capture and groups": capturing,
        "exporting and measuring the original": (capturing + 6.0) * (len(targets) + 1),
        "sensitivity of groups and blocks": min(0.6 * (levels + blocks) * 256 * sample, SENSITIVITY_SHARE * limit),
        "schemes in each runtime": 1.5 * (capturing + 6.0) * len(targets) if int8 else 0.0,
        "sensitivity of schemes": min(0.6 * int8 * 256 * sample, SENSITIVITY_SHARE * limit),
        "sensitivity of masks": min(0.6 * masks * 256 * sample, SENSITIVITY_SHARE * limit),
        "latency tables": min(0.3 * (levels * 4 + int8), TABLES_SHARE * limit),
        "candidates": min(request.trials * (8 * 512 * sample + capturing + 5.0), SEARCH_SHARE * limit),
        "final measurement": FINAL_S,
        "diagnosis of quantization": min(1.5 * int8 * 128 * sample, DIAGNOSIS_S, SENSITIVITY_SHARE * limit),
    }
    total = sum(stages.values())
    if "distill" in request.techniques:
        stages["recovery"] = RECOVERY_S if request.time_limit is None else max(0.0, request.time_limit - total)
    return {
        "name": job.name,
        "targets": [target.name for target in targets],
        "groups": len(found.groups),
        "blocks": blocks,
        "options": levels + blocks + int8 + masks,
        "stages": stages,
        "at_most": [name for name in ("recovery",) if name in stages],
        "seconds": sum(stages.values()),
        "notes": [*graph.notes, *_too_short(total, request.time_limit)],
    }
