"""The rules of index propagation and surgery, one file per kind of operator; importing this package registers them all."""

from planish.graph.rules import (
    attention,
    contraction,
    creation,
    elementwise,
    embedding,
    movement,
    norm,
    pooling,
    recurrent,
    reduction,
    routing,
    scatter,
)

__all__ = [
    "attention",
    "contraction",
    "creation",
    "elementwise",
    "embedding",
    "movement",
    "norm",
    "pooling",
    "recurrent",
    "reduction",
    "routing",
    "scatter",
]
