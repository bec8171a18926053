"""What could be done to a model and what could not, found without doing any of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planish.events import Events
from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.macs import macs, operator_macs
from planish.quantize.placement import unsupported

if TYPE_CHECKING:
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
