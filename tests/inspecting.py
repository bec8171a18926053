"""What `planish inspect` finds in small nets, and a made-up finding whose names are hostile."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import planish
from planish import flow

HOSTILE = [
    "<script>document.title='owned'</script>",
    "\"'><img src=x onerror=\"document.title='owned'\">",
    "{{ 7 * 7 }}{% raw %}&amp;",
    "ü" * 300,
    "nul\0\x1b[31m\u202e",
]


class Residual(nn.Module):
    """A stem, a block that can be bypassed with a norm of its own, a gate with an operator of no rule kept out, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))
        both = torch.cat([self.left(x), torch.sigmoid(self.right(x))], 1)
        return self.head(both.mean((2, 3)))


@functools.cache
def found() -> dict[str, Any]:
    """What is found in `Residual`."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    job = planish.Workload(model=Residual().eval(), example_inputs=(x[:1],), calibration=[x], metric="agreement", name="residual")
    return flow.inspect(job).to_json()


def hostile() -> dict[str, Any]:
    """A chain in which every free text is hostile."""

    def operator(name: str, reads: list[str]) -> dict[str, Any]:
        costs = {"output": [1, 4], "macs": 2, "share": 0.5, "kernel": [], "op": ""}
        return {"name": name, "kind": "linear", "fused": [name], "reads": reads, "tensors": [name], "int8": name, "width": name, **costs}

    members = [{"tensor": name, "dimension": 0, "role": role, "indices": 4} for name, role in zip(HOSTILE, ("out", "in"), strict=False)]
    group = {"units": 4, "unit": "channels", "parameters": 2, "exact": True, "multiple": 1, "members": members}
    shares = {"share_of_parameters": 0.5, "share_of_macs": 0.001}
    return {
        "name": "".join(HOSTILE),
        "parameters": 8,
        "macs": 4,
        "operators": [operator(name, HOSTILE[max(0, i - 1) : i]) for i, name in enumerate(HOSTILE)],
        "groups": [
            {"name": name, "pinned": name, "operators": {"out": [name], "in": [HOSTILE[0]], "affine": [], "passes": []}, **group, **shares}
            for name in HOSTILE
        ],
        "blocks": [{"name": name, "operators": [name], "share_of_macs": 0.5} for name in HOSTILE],
        "unknown": {name: [name] for name in HOSTILE},
        "reasons": {name: name for name in HOSTILE},
        "notes": HOSTILE,
    }
