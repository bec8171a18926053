"""Which line of the user's model is to blame when it cannot be traced, in one sentence."""

from __future__ import annotations

import inspect
import linecache
import sysconfig
import traceback
from pathlib import Path

import torch
from torch import nn

from planish.errors import CaptureError

FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What the forward of somebody's model, or tracing it, may raise."""

_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_INSIDE = (Path(torch.__file__).resolve().parent, Path(__file__).resolve().parent.parent)
_VALUES = ("data-dependent", "data dependent", "_local_scalar_dense", "unbacked", "is_nonzero", "datadependent", "guardondatadependent")
_SHAPES = ("dynamicoutputshape", "dynamic_output_shape", "_pack_padded_sequence")


def _rank(filename: str) -> int:
    """0: torch, planish, the standard library or generated code; 1: an installed package; 2: the user's own file."""
    if filename.startswith("<"):
        return 0
    path = Path(filename).resolve()
    if any(path.is_relative_to(folder) for folder in _INSIDE):
        return 0
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return 1
    return 0 if path.is_relative_to(_STANDARD_LIBRARY) else 2


def _chain(error: BaseException) -> list[BaseException]:
    """The error and all that caused it, outermost first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _place(error: BaseException) -> tuple[str, int] | None:
    """The deepest frame in the user's code over the whole chain; if there is none, the deepest in an installed package."""
    best: tuple[int, int, str, int] | None = None
    for one in _chain(error):
        for depth, frame in enumerate(traceback.extract_tb(one.__traceback__)):
            rank = _rank(frame.filename)
            if rank and (best is None or (rank, depth) >= best[:2]):
                best = (rank, depth, frame.filename, frame.lineno or 0)
    return None if best is None else (best[2], best[3])


def _reason(error: BaseException, line: str) -> tuple[str, str]:
    """What is wrong, and what to do."""
    text = " ".join(f"{type(one).__name__} {one}" for one in _chain(error)).lower()
    if "pack_padded_sequence" in line or any(word in text for word in _SHAPES):
        return (
            "the shape of a result depends on the values of a tensor",
            "keep padded tensors of fixed shape and mask them (for recurrent layers: pass the padded batch, without packing)",
        )
    if any(word in text for word in _VALUES):
        return (
            "Python needs the value of a tensor, which is not known while tracing",
            "replace a branch by torch.where, a loop bound by a shape and .item() by tensor arithmetic, or move it out of forward",
        )
    message = str(error).strip().splitlines()
    first = message[0].rstrip(".") if message else "no message"
    return f"{type(error).__name__}: {first[:300]}", "rewrite this line so that torch.export can trace it"


def blame(model: nn.Module, error: BaseException, traced: bool, hint: str = "") -> CaptureError:
    """The error to raise instead of `error`: one sentence with file, line, reason and remedy.

    Args:
        model: the user's; its class stands in where no frame of the traceback is the user's.
        error: what its forward, or tracing it, raised.
        traced: whether it came from tracing; otherwise the model itself refused its example inputs.
        hint: what is wrong with them, where that is known.
    """
    place = _place(error)
    if place is None:
        try:
            _, number = inspect.getsourcelines(type(model))
            place = (inspect.getsourcefile(type(model)) or "<unknown>", number)
        except (OSError, TypeError):
            place = ("<unknown>", 0)
    source = linecache.getline(*place).strip()
    where = f"{place[0]}:{place[1]}" + (f" (`{source[:120]}`)" if source else "")
    if not traced:
        message = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
        return CaptureError(
            f"capture: the model must run on its example_inputs; {where} raised {type(error).__name__}: {message[:300]}; "
            + (hint or "give example_inputs as the tuple or dict that the model takes")
        )
    reason, remedy = _reason(error, source)
    return CaptureError(f"capture: the model must be traceable by torch.export; {where}: {reason}; {remedy}")
