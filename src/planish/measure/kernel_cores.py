"""The operators of a kernel as ONNX: the filling of a sandwich, one function for each kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from planish.errors import UsageError
from planish.measure.kernels import Kernel, Shape
from planish.measure.model_writer import BINARY, Model
from planish.quantize.contract import scheme_named


def operation(kernel: Kernel) -> str:
    """The short name of an element-wise operator, norm or pool; "" for other kinds."""
    return str(dict(kernel.attributes).get("op", ""))


def integers(kernel: Kernel, name: str, rank: int, default: int) -> tuple[int, ...]:
    """An attribute that has a value for each of `rank` axes, or one for all."""
    value = dict(kernel.attributes).get(name, default)
    if isinstance(value, str):
        raise UsageError(f"kernel: {name} must be ints; got {value!r}")
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _int(kernel: Kernel, name: str, default: int) -> int:
    return int(dict(kernel.attributes).get(name, default))  # type: ignore[arg-type]


def _conv(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    weight = kernel.weights[0]
    rank = len(weight) - 2
    stride, dilation = integers(kernel, "stride", rank, 1), integers(kernel, "dilation", rank, 1)
    groups, is_transposed = _int(kernel, "groups", 1), _int(kernel, "transposed", 0)
    before, after = kernel.inputs[0][2:], kernel.output[2:]
    pads: list[tuple[int, int]] = []
    extra = []
    for i in range(rank):
        reach = dilation[i] * (weight[2 + i] - 1) + 1
        if is_transposed:
            surplus = (before[i] - 1) * stride[i] + reach - after[i]
            low = -(-max(surplus, 0) // 2)
            pads.append((low, max(surplus, 0) - low))
            extra.append(max(-surplus, 0))
        else:
            missing = (after[i] - 1) * stride[i] + reach - before[i]
            low = max(missing, 0) // 2
            pads.append((low, max(missing, 0) - low))
    padding = dict(kernel.attributes).get("padding")
    if not is_transposed and padding is not None and not isinstance(padding, str):
        pads = [(p, p) for p in integers(kernel, "padding", rank, 0)]
    inputs = [xs[0], model.weight(weight, int8, axis=1 if is_transposed else 0)]
    if len(kernel.weights) > 1 or not is_transposed:
        inputs.append(model.weight((kernel.output[1],)))
    shared: dict[str, Any] = {
        "strides": stride,
        "dilations": dilation,
        "group": groups,
        "pads": [p for p, _ in pads] + [p for _, p in pads],
    }
    return model.op("ConvTranspose", inputs, output_padding=extra, **shared) if is_transposed else model.op("Conv", inputs, **shared)


def _linear(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    out, inner = kernel.weights[0]
    has_bias = len(kernel.weights) > 1
    scheme = scheme_named(kernel.precision)
    if scheme.activations == "dynamic":
        return model.dynamic_linear(xs[0], out, inner, has_bias)
    if scheme.group:
        return model.grouped_linear(xs[0], out, inner, has_bias, scheme.weight_bits, scheme.group)
    if len(kernel.inputs[0]) == 2 and has_bias and not int8:
        return model.op("Gemm", [xs[0], model.weight((out, inner)), model.weight((out,))], transB=1)
    return model.linear(xs[0], len(kernel.inputs[0]), (out, inner), has_bias, int8)


def _matmul(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    return model.op("MatMul", xs)


def _attention(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    q, k, v = xs
    depth, rank = kernel.inputs[0][-1], len(kernel.inputs[0])
    if kernel.inputs[1][-3] != kernel.inputs[0][-3]:
        raise UsageError("kernel: attention needs as many key as query heads; repeat the key heads")
    turned = model.op("Transpose", [k], perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = model.op("MatMul", [model.op("Mul", [q, model.constant(np.float32(depth**-0.5))]), turned])
    if len(kernel.inputs) > 3:
        scores = model.op("Add", [scores, model.input(kernel.inputs[3])])
    weights = model.op("Softmax", [scores], axis=-1)
    return model.op("MatMul", [model.quantized(weights, zero=0) if int8 else weights, v])


def _recurrent(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    gates, name = (4, "LSTM") if kernel.kind == "lstm" else (3, "GRU")
    hidden, width = kernel.weights[1][1], kernel.weights[0][1]
    is_batch_first = _int(kernel, "batch_first", 0)
    x = model.op("Transpose", [xs[0]], perm=[1, 0, 2]) if is_batch_first else xs[0]
    direction = "reverse" if _int(kernel, "reverse", 0) else "forward"
    bias = model.weight((1, 2 * gates * hidden)) if len(kernel.weights) > 2 else ""
    if scheme_named(kernel.precision).activations == "dynamic":
        y = model.dynamic_lstm(x, width, hidden, bias, direction)
    else:  # weights alone in int8 are floats once the model is loaded
        inputs = [x, model.weight((1, gates * hidden, width)), model.weight((1, gates * hidden, hidden)), bias]
        more = {"linear_before_reset": 1} if name == "GRU" else {}
        y = model.op(name, inputs, hidden_size=hidden, direction=direction, **more)
    y = model.op("Squeeze", [y, model.constant(np.array([1], np.int64))])
    return model.op("Transpose", [y], perm=[1, 0, 2]) if is_batch_first else y


def _embedding(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    if kernel.precision != "fp32":
        rows, width = kernel.weights[0]
        values = model.op("Cast", [model.op("Gather", [model.integers((rows, width), np.int8), xs[0]], axis=0)], to=TensorProto.FLOAT)
        return model.op("Mul", [values, model.op("Gather", [model.weight((rows, 1)), xs[0]], axis=0)])
    return model.op("Gather", [model.weight(kernel.weights[0]), xs[0]], axis=0)


def _norm(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    name, shape = operation(kernel), kernel.inputs[0]
    if name == "layer_norm":
        return model.op("LayerNormalization", [xs[0], model.weight(shape[-1:]), model.weight(shape[-1:])], axis=-1)
    if name == "rms_norm":
        mean = model.op("ReduceMean", [model.op("Mul", [xs[0], xs[0]]), model.constant(np.array([-1], np.int64))], keepdims=1)
        root = model.op("Sqrt", [model.op("Add", [mean, model.constant(np.float32(1e-6))])])
        return model.op("Mul", [model.op("Div", [xs[0], root]), model.weight(shape[-1:])])
    channels = shape[1]
    if name == "batch_norm":
        ones = model.constant(np.ones(channels, np.float32))
        return model.op(
            "BatchNormalization", [xs[0], model.weight((channels,)), model.weight((channels,)), model.weight((channels,)), ones]
        )
    if name == "instance_norm":
        return model.op("InstanceNormalization", [xs[0], model.weight((channels,)), model.weight((channels,))])
    groups = _int(kernel, "groups", _int(kernel, "num_groups", 1))
    scale, shift = model.constant(np.ones(groups, np.float32)), model.constant(np.zeros(groups, np.float32))
    y = model.op("Reshape", [xs[0], model.constant(np.array([shape[0], groups, -1], np.int64))])
    y = model.op("InstanceNormalization", [y, scale, shift])
    y = model.op("Reshape", [y, model.constant(np.array(shape, np.int64))])
    affine = [model.weight((channels, *(1 for _ in shape[2:]))) for _ in range(2)]
    return model.op("Add", [model.op("Mul", [y, affine[0]]), affine[1]])


def _pool(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    before, after = kernel.inputs[0], kernel.output
    rank = len(before) - 2
    is_mean = "kernel_size" not in dict(kernel.attributes)
    if is_mean and len(after) == len(before) and rank > 0 and math.prod(after[2:]) > 1:
        size = tuple(b // a for b, a in zip(before[2:], after[2:], strict=True))
        y = model.op("AveragePool", xs[:1], kernel_shape=size, strides=size)
    elif is_mean and len(after) == len(before) and before[:2] == after[:2] and rank > 0:
        y = model.op("GlobalAveragePool", xs[:1])
    elif is_mean:
        axes = _lost_axes(before, after)
        y = model.op("ReduceMean", [xs[0], model.constant(np.array(axes, np.int64))], keepdims=int(len(before) == len(after)))
    else:
        size = integers(kernel, "kernel_size", rank, 1)
        stride = integers(kernel, "stride", rank, 0)
        stride = size if not any(stride) else stride
        pads = integers(kernel, "padding", rank, 0)
        ceil = int(any((b + 2 * p - k) // s + 1 < a for b, p, k, s, a in zip(before[2:], pads, size, stride, after[2:], strict=True)))
        kind = "MaxPool" if "max" in operation(kernel) else "AveragePool"
        more = {"count_include_pad": 1} if kind == "AveragePool" else {}
        y = model.op(kind, xs[:1], kernel_shape=size, strides=stride, pads=[*pads, *pads], ceil_mode=ceil, **more)
    return y


def _lost_axes(before: Shape, after: Shape) -> list[int]:
    """The axes of `before` that a reduction to `after` removes (or shrinks to 1)."""
    if len(before) == len(after):
        return [i for i, (b, a) in enumerate(zip(before, after, strict=True)) if a != b]
    lost, left = [], list(after)
    for i, size in enumerate(before):
        if left and left[0] == size:
            left.pop(0)
        else:
            lost.append(i)
    return lost


def _other(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    if operation(kernel) not in ("cat", "concat"):
        raise UsageError(f"kernel: no model is built for {operation(kernel) or 'an operator without a name'!r}")
    axis = next((i for i, (a, b) in enumerate(zip(kernel.inputs[0], kernel.output, strict=True)) if a != b), 0)
    return model.op("Concat", xs, axis=axis)


def _softmax(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    return model.op("Softmax", xs[:1], axis=_int(kernel, "dim", -1))


def _elementwise(model: Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    name = operation(kernel)
    if name in BINARY:
        other = xs[1] if len(xs) > 1 else model.constant(np.float32(1.5))
        return model.op(BINARY[name], [xs[0], other])
    return model.unary(name, xs[0])


CORES: dict[str, Callable[[Model, Kernel, list[str], bool], str]] = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
    "lstm": _recurrent,
    "gru": _recurrent,
    "embedding": _embedding,
    "norm": _norm,
    "pool": _pool,
    "softmax": _softmax,
    "elementwise": _elementwise,
    "other": _other,
}
