"""Floating point of eight bits, for devices that multiply it."""

from planish.quantize.contract import Scheme

FP8 = Scheme(
    "fp8",
    frozenset({"conv", "linear", "matmul"}),
    8,
    "static",
    refusal="no processor multiplies 8-bit floats; on GPUs from the Hopper and Ada generations on they do; take int8 here",
)
"""Its steps grow with the values, so that ranges need no calibration; int8 is as small, and exact to twice as many steps near its ends."""
