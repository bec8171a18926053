"""Options and plans: what could be done to a graph, and what is to be done; hashable, JSON both ways, no tensors."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import msgspec

TECHNIQUES = ("prune", "adapt", "mask", "quantize", "distill")
"""What `techniques=` may name."""
DEFAULT_TECHNIQUES = ("prune", "quantize", "distill")
"""What is used where nothing else is asked for: masks make files smaller, and nothing faster."""
WHOLE_MAP = "1x1"
"""The value of a block that leaves a linear map of all its channels behind; "rank-R" is one through R channels."""
DEFAULT_SALIENCY = "auto"
"""The criterion that says which units go first, where no other is asked for."""
FULL_PRECISION = "fp32"
"""What an operator computes in that no scheme is chosen for."""
DEFAULT_SCHEMES = ("bf16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "codebook")
"""What operators may compute in besides fp32, where no schemes are asked for."""
DEFAULT_OBSERVER = "mse"
"""How the ranges of tensors are chosen, where no other way is asked for."""
DEFAULT_ROUNDING = "nearest"
"""How weights come to their grids, where no other way is asked for."""
ONE_SHOT = "one-shot"
"""The schedule by which all units leave at once, before recovery."""


def rank_of(adaptor: str) -> int | None:
    """Through how many channels an adaptor goes; None: all. Raises ValueError where it is none."""
    if adaptor == WHOLE_MAP:
        return None
    kind, _, rank = adaptor.partition("-")
    if kind != "rank" or not rank.isdecimal() or int(rank) < 1:
        raise ValueError(f"an adaptor must be {WHOLE_MAP!r} or 'rank-R'; got {adaptor[:40]!r}")
    return int(rank)


class Option(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that could be done to one group, operator or block.

    Args:
        technique: "width" (keep `value` units of a group), "block" (bypass it: value 1, or leave an adaptor: "1x1" or "rank-R"), "precision" (run
            it as `value`) or "mask" (zeros as `value` has it).
        subject: the name of the group, block or operator.
        value: units kept, 1, the name of a scheme such as "int8", or a pattern such as "75%" or "2:4".
        loss: predicted increase of the calibration loss (same unit for all options of a graph), at least 0.
        note: why the loss is what it is, or why the option is not offered at more levels; for the report.
    """

    technique: str
    subject: str
    value: int | str
    loss: float
    note: str = ""


class Recovery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a compressed net is trained back.

    Args:
        samples: how many training samples it sees (an epoch or less of a large set, several of a small one); 0: none.
        learning_rate: the peak; it decays linearly to zero. ResNet-56 with 8 of 27 blocks gone lost 2.7 points before and, after a minute,
            0.7 at 0.01 with 128 samples a step, 1.2 at 0.02 with 64, and 1.1 to 1.3 at 0.0025 to 0.005 with 64.
        batch_size: samples in a step.
        quantized_share: the share of the samples that is trained with fake quantization in place, in [0, 1].
    """

    samples: int = 0
    learning_rate: float = 0.02
    batch_size: int = 128
    quantized_share: float = 0.25


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """What is to be done to a graph, and nothing else: replaying it on the same job gives the same module.

    Args:
        target: "runtime:device" that it was made for (placement of quantizers and ranges depend on it).
        widths: units kept, per group; a group that is not named keeps all.
        blocks: residual blocks that are bypassed.
        adaptors: those of them that leave a linear map of the stream behind -> its kind, "1x1" or "rank-R".
        precisions: scheme per operator; an operator that is not named stays in fp32.
        floats: what operators that stay in floating point are computed in: "fp32", or "bf16" in a runtime that executes it.
        masks: pattern of zeros per operator; an operator that is not named keeps all its weights.
        masking: who chooses the zeros, and changes the weights that stay.
        saliency: which units of a group go first.
        schedule: how they leave: "one-shot", or over time while the net trains.
        observer: how activation ranges are chosen.
        rounding: which grid point stands for each weight.
        recovery: how the result is trained back.
        seed: of everything random on the way.
    """

    target: str
    widths: dict[str, int] = {}
    blocks: tuple[str, ...] = ()
    adaptors: dict[str, str] = {}
    precisions: dict[str, str] = {}
    floats: str = FULL_PRECISION
    masks: dict[str, str] = {}
    masking: str = "sparsegpt"
    saliency: str = "magnitude"
    schedule: str = ONE_SHOT
    observer: str = DEFAULT_OBSERVER
    rounding: str = DEFAULT_ROUNDING
    recovery: Recovery = Recovery()
    seed: int = 0

    @functools.cached_property
    def digest(self) -> str:
        """A stable hexadecimal name of the plan: 16 digits of the SHA-256 of the canonical JSON of what is not as it is by default.

        A field that a later version adds does not rename the plans that were made before it.
        """
        defaults = Plan(self.target)
        chosen = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) != getattr(defaults, name)}
        return hashlib.sha256(msgspec.json.encode({"target": self.target, **chosen}, order="sorted")).hexdigest()[:16]

    def __hash__(self) -> int:
        return int(self.digest, 16)

    @property
    def is_identity(self) -> bool:
        """Whether the plan changes nothing."""
        return not (self.widths or self.blocks or self.precisions or self.masks or self.floats != FULL_PRECISION)

    @property
    def is_dense(self) -> bool:
        """Whether all weights stay where they are: nothing is pruned or masked."""
        return not (self.widths or self.blocks or self.masks)

    def replace(self, **changes: Any) -> Plan:
        """The same plan with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def diff(self, other: Plan) -> dict[str, tuple[Any, Any]]:
        """What differs, as `field or field[name] -> (here, there)`."""
        out: dict[str, tuple[Any, Any]] = {}
        for field in self.__struct_fields__:
            here, there = getattr(self, field), getattr(other, field)
            if isinstance(here, dict) and isinstance(there, dict):
                for name in sorted({*here, *there}):
                    if here.get(name) != there.get(name):
                        out[f"{field}[{name}]"] = (here.get(name), there.get(name))
            elif here != there:
                out[field] = (here, there)
        return out
