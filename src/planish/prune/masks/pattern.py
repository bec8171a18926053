"""Which weights of a matrix are zero: a share of them, or N of every M kept; and what `--masking` stands for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from planish.errors import UsageError

PATTERNS = ("50%", "75%", "90%")
"""What is offered where nothing is asked for by name. 2:4 takes as many bytes as 50 % and loses more, and no runtime here computes less for it."""

_SHARE = re.compile(r"(\d{1,2}(?:\.\d{1,3})?)%")
_GROUPED = re.compile(r"(\d{1,2}):(\d{1,2})")


@dataclass(frozen=True)
class Pattern:
    """Zeros of a matrix, as text "75%" or "2:4".

    Args:
        sparsity: share of zeros, in (0, 1).
        kept, of: N and M: of every M consecutive columns of a row at most N are not zero; 0 and 0 where zeros may be anywhere.
    """

    sparsity: float
    kept: int = 0
    of: int = 0

    def gone(self, columns: int) -> int:
        """Zeros in so many columns, for each row, on average; whole groups of M where there are groups."""
        if self.of:
            return columns // self.of * (self.of - self.kept)
        return math.floor(self.sparsity * columns + 1e-9)


def parse_pattern(text: str) -> Pattern:
    """The pattern that a text stands for.

    Raises:
        UsageError: it is neither a share of zeros such as "75%" nor N:M such as "2:4".
    """
    if (found := _SHARE.fullmatch(text)) and 0 < float(found[1]) < 100:
        return Pattern(float(found[1]) / 100)
    if (found := _GROUPED.fullmatch(text)) and 0 < int(found[1]) < int(found[2]):
        return Pattern(1 - int(found[1]) / int(found[2]), int(found[1]), int(found[2]))
    raise UsageError(f"masking: a pattern is a share of zeros, as 75%, or N:M with N below M, as 2:4; got {text[:40]!r}")


def parse_masking(text: str) -> tuple[str, tuple[str, ...]]:
    """The method and the patterns that `--masking` stands for: "wanda", or "wanda:2:4" for one pattern alone.

    Raises:
        UsageError: the pattern makes no sense.
    """
    method, colon, pattern = text.partition(":")
    if colon:
        parse_pattern(pattern)
    return method, (pattern,) if colon else PATTERNS
