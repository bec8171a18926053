"""Small ONNX models whose times add up to the time of one kernel: sandwiches, and the same sandwiches without their filling.

A kernel alone is no measure: runtimes block channels and reorder at the borders of a program. So it is put between a producer and
a consumer of its own kind: an operator that makes the input (8 channels -> C, 1x1; or a linear map 8 -> D), and one that reads a
single position of the output, which costs next to nothing at any size. With the times of

    base(s)   producer of shape s, consumer          empty     consumer alone
    sandwich  producers, kernel, consumer            mixed     fp32 producer, int8 consumer; and the reverse

a kernel with inputs s1, s2, ... takes sandwich - (base(s1) - empty) - (base(s2) - empty) - ... - empty, and a conversion forth and
back takes both mixed models less the fp32 and the int8 base. Models are named by `Kernel`s too, with the kinds "base", "empty",
"quantize" and "dequantize", which only this file knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from planish.errors import UsageError
from planish.measure.kernels import Kernel, Shape
from planish.signature import Signature, TensorSpec

PROBE_CHANNELS = 8
_INT8_KINDS = ("conv", "linear", "matmul", "attention", "pool", "other")
_UNARY: dict[str, tuple[str, ...]] = {
    "relu": ("Relu",),
    "gelu": ("Gelu",),
    "sigmoid": ("Sigmoid",),
    "tanh": ("Tanh",),
    "hardswish": ("HardSwish",),
    "hardsigmoid": ("HardSigmoid",),
    "relu6": ("Clip",),
    "hardtanh": ("Clip",),
    "clamp": ("Clip",),
    "leaky_relu": ("LeakyRelu",),
    "elu": ("Elu",),
    "softplus": ("Softplus",),
    "mish": ("Mish",),
    "exp": ("Exp",),
    "log": ("Log",),
    "sqrt": ("Sqrt",),
    "rsqrt": ("Sqrt", "Reciprocal"),
    "reciprocal": ("Reciprocal",),
    "neg": ("Neg",),
    "abs": ("Abs",),
    "erf": ("Erf",),
    "sin": ("Sin",),
    "cos": ("Cos",),
}
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min"}


def recipe(kernel: Kernel) -> list[tuple[int, Kernel]]:
    """The models whose times, times these factors, add up to the time of `kernel`.

    Raises:
        UsageError: a kernel that no model can be built for; the message says why.
    """
    layout = layout_of(kernel)
    if kernel.kind == "conversion":
        shape = kernel.inputs[0]
        pair = [Kernel(kind, (shape,), shape, attributes=(("layout", layout),)) for kind in ("quantize", "dequantize")]
        return [(1, pair[0]), (1, pair[1]), (-1, _base(shape, layout, "fp32")), (-1, _base(shape, layout, "int8"))]
    if kernel.precision == "int8" and not (kernel.kind in _INT8_KINDS or (kernel.kind == "elementwise" and _op(kernel) == "add")):
        raise UsageError(f"kernel: {kernel.kind} {_op(kernel)} is not run in int8")
    if kernel.kind not in _CORES:
        raise UsageError(f"kernel: there is no kind {kernel.kind!r}")
    at_end = _consumer_layout(kernel)
    empty = Kernel("empty", (), _smallest(kernel.output, at_end), attributes=(("layout", at_end),), precision=kernel.precision)
    plain_inputs = [(shape, _is_barred(kernel)) for shape in _produced(kernel)]
    plain_inputs += [(kernel.output, False) for op in kernel.fused if op in _BINARY]
    bases = [_base(shape, layout, kernel.precision, barred) for shape, barred in plain_inputs]
    terms = [(1, kernel), *((-1, base) for base in bases)]
    if len(bases) != 1:
        terms.append((len(bases) - 1, empty))
    return terms


def layout_of(kernel: Kernel) -> str:
    """ "channels" where the producer is a convolution, "plain" where it is a linear map."""
    given = dict(kernel.attributes).get("layout")
    if given is not None:
        return str(given)
    rank = len(kernel.inputs[0]) if kernel.inputs else len(kernel.output)
    if kernel.kind == "conv" or (kernel.kind == "pool" and rank >= 3):
        return "channels"
    if kernel.kind == "norm":
        return "plain" if _op(kernel) in ("layer_norm", "rms_norm") or rank < 3 else "channels"
    return "channels" if kernel.kind in ("elementwise", "conversion", "other") and rank >= 4 else "plain"


def build(
    kernel: Kernel,
    quantized_inputs: frozenset[str] = frozenset(),
    quantized_outputs: frozenset[str] = frozenset(),
    weight_range: int = 63,
) -> tuple[bytes, Signature]:
    """The ONNX model that a kernel (or a model of `recipe`) names, all shapes fixed, and its signature.

    Args:
        quantized_inputs: the runtime's `quantize_inputs_of`: with "add", fused additions in an int8 sandwich get a quantizer too.
        quantized_outputs: the runtime's `quantize_outputs_of`.
        weight_range: largest magnitude of an int8 weight.

    Raises:
        UsageError: a kernel that no model can be built for.
    """
    model = _Model(quantized_inputs, weight_range)
    layout, int8 = layout_of(kernel), kernel.precision == "int8"
    if kernel.kind in ("base", "quantize", "dequantize"):
        first, last = (int8, int8) if kernel.kind == "base" else (kernel.kind == "dequantize", kernel.kind == "quantize")
        y = model.producer(kernel.inputs[0], layout, first, barred=bool(dict(kernel.attributes).get("barrier")))
        y = model.quantized(y) if first or last else y
        return model.finish(*model.consumer(y, kernel.output, layout, last))
    if kernel.kind == "empty":
        x = model.input(kernel.output)
        return model.finish(*model.consumer(model.quantized(x) if int8 else x, kernel.output, layout, int8))
    if _is_fed(kernel):
        xs = [model.input(shape, "int64" if kernel.kind == "embedding" else "float32") for shape in _activations(kernel)[:1]]
        xs = [model.quantized(x) if int8 else x for x in xs]
    else:
        xs = []
    for shape in _produced(kernel):
        x = model.producer(shape, layout, int8, barred=_is_barred(kernel))
        xs.append(model.quantized(x) if int8 else x)
    y = _CORES[kernel.kind](model, kernel, xs, int8)
    is_positive = False
    if int8 and kernel.kind in quantized_outputs and kernel.fused and kernel.fused[0] not in ("relu", "relu6", *_BINARY):
        y = model.quantized(y)
    for op in kernel.fused:
        y = model.fused(op, y, kernel.output, layout, int8)
        is_positive = op in ("relu", "relu6")
    y = model.quantized(y, zero=0 if is_positive else 128) if int8 else y
    return model.finish(*model.consumer(y, kernel.output, _consumer_layout(kernel), int8))


def _op(kernel: Kernel) -> str:
    return str(dict(kernel.attributes).get("op", ""))


def _base(shape: Shape, layout: str, precision: str, barred: bool = False) -> Kernel:
    attributes: tuple[tuple[str, int | str], ...] = (("barrier", 1), ("layout", layout)) if barred else (("layout", layout),)
    return Kernel("base", (shape,), shape, attributes=attributes, precision=precision)


def _is_fed(kernel: Kernel) -> bool:
    """Whether the first input is the program's own."""
    return kernel.kind == "embedding" or bool(dict(kernel.attributes).get("from_input"))


def _is_barred(kernel: Kernel) -> bool:
    """Whether a concatenation must keep the producer from swallowing the kernel (an element-wise map, a batch norm)."""
    return kernel.kind == "elementwise" or _op(kernel) == "batch_norm"


def _activations(kernel: Kernel) -> Sequence[Shape]:
    if kernel.kind in ("lstm", "gru", "embedding"):
        return kernel.inputs[:1]
    return kernel.inputs[:3] if kernel.kind == "attention" else kernel.inputs


def _produced(kernel: Kernel) -> Sequence[Shape]:
    return _activations(kernel)[1:] if _is_fed(kernel) else _activations(kernel)


def _consumer_layout(kernel: Kernel) -> str:
    return layout_of(kernel) if len(kernel.output) >= 3 else "plain"


def _smallest(shape: Shape, layout: str) -> Shape:
    """The tensor that the empty model reads: a small one, so that no reorder or conversion of a large one is part of it."""
    return (shape[0], PROBE_CHANNELS, *(1 for _ in shape[2:])) if layout == "channels" else (*shape[:-1], PROBE_CHANNELS)


class _Model:
    """An ONNX model that is being written: nodes and initializers, by generated names."""

    def __init__(self, quantized_inputs: frozenset[str], weight_range: int) -> None:
        self.quantized_inputs, self._range = quantized_inputs, weight_range
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._inputs: list[TensorSpec] = []
        self._rng = np.random.default_rng(0)
        self._count = 0

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def op(self, kind: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        name = self._name(kind.lower())
        names = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return name

    def constant(self, values: Any) -> str:
        name = self._name("constant")
        self._tensors.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def input(self, shape: Shape, dtype: str = "float32") -> str:
        name = self._name("x")
        self._inputs.append(TensorSpec(name, dtype, tuple(shape)))
        return name

    def weight(self, shape: Shape, int8: bool = False, axis: int = 0) -> str:
        """A weight: floats, or int8 with a scale for each index of `axis`, dequantized."""
        if not int8:
            return self.constant(self._rng.standard_normal(shape, np.float32) * np.float32(0.05))
        values = self.constant(self._rng.integers(-self._range, self._range + 1, shape, np.int8))
        scales, zeros = self.constant(np.full(shape[axis], 0.001, np.float32)), self.constant(np.zeros(shape[axis], np.int8))
        return self.op("DequantizeLinear", [values, scales, zeros], axis=axis)

    def quantized(self, x: str, zero: int = 128) -> str:
        scale, point = self.constant(np.float32(0.03)), self.constant(np.uint8(zero))
        return self.op("DequantizeLinear", [self.op("QuantizeLinear", [x, scale, point]), scale, point])

    def linear(self, x: str, rank: int, weight: Shape, has_bias: bool, int8: bool) -> str:
        """x @ W.T + b for a weight of shape (out, in).

        A bias of one axis makes ONNX Runtime fuse product and sum into `Gemm`, which has an int8 kernel only if its output is
        quantized, and none that is quick for a transposed weight: 1,850 us instead of 255 for 4 x (64, 384) x (384, 384).
        """
        out, inner = weight
        y = self.op("MatMul", [x, self.weight((inner, out), int8, axis=1)])
        return self.op("Add", [y, self.weight((*(1 for _ in range(rank - 1)), out) if rank > 2 else (out,))]) if has_bias else y

    def producer(self, shape: Shape, layout: str, int8: bool, barred: bool = False) -> str:
        """A fresh input, and what makes a tensor of `shape` of it; `barred`: two halves, concatenated."""
        axis = 1 if layout == "channels" else len(shape) - 1
        width = shape[axis]
        source = list(shape)
        source[axis] = PROBE_CHANNELS
        x = self.input(tuple(source))
        x = self.quantized(x) if int8 else x
        parts = []
        for part in (width - width // 2, width // 2) if barred and width > 1 else (width,):
            if layout == "channels":
                kernel = (part, PROBE_CHANNELS, *(1 for _ in shape[2:]))
                parts.append(self.op("Conv", [x, self.weight(kernel, int8), self.weight((part,))]))
            else:
                parts.append(self.linear(x, len(shape), (part, PROBE_CHANNELS), has_bias=True, int8=int8))
        if len(parts) == 1:
            return parts[0]
        return self.op("Concat", [self.quantized(part) for part in parts] if int8 else parts, axis=axis)

    def consumer(self, y: str, shape: Shape, layout: str, int8: bool) -> tuple[str, Shape]:
        """What reads one position of `y`, and the shape that comes out; in the channels layout a convolution whose stride is as wide as its input."""
        if layout == "channels":
            # 2 wide: OpenVINO moves the stride of a 1x1 convolution up through the kernel, which then computes one position only.
            weight = self.weight((PROBE_CHANNELS, shape[1], *(min(2, size) for size in shape[2:])), int8)
            y = self.op("Conv", [y, weight, self.weight((PROBE_CHANNELS,))], strides=list(shape[2:]))
            return self.quantized(y) if int8 else y, (shape[0], PROBE_CHANNELS, *(1 for _ in shape[2:]))
        if math.prod(shape[:-1]) == 1:
            return y, shape
        axes = list(range(len(shape) - 1))
        bounds = [np.zeros(len(axes), np.int64), np.ones(len(axes), np.int64), np.array(axes, np.int64)]
        y = self.op("Slice", [y, *(self.constant(b) for b in bounds)])
        return self.quantized(y) if int8 else y, (*(1 for _ in axes), shape[-1])

    def unary(self, name: str, x: str) -> str:
        if name in ("silu", "swish"):
            return self.op("Mul", [x, self.op("Sigmoid", [x])])
        for kind in _UNARY.get(name, ("Relu",)):
            x = self.op(kind, [x, self.constant(np.float32(0)), self.constant(np.float32(6))] if kind == "Clip" else [x])
        return x

    def fused(self, name: str, y: str, shape: Shape, layout: str, int8: bool) -> str:
        if name not in _BINARY:
            return self.unary(name, y)
        z = self.producer(shape, layout, int8)
        if int8:
            z = self.quantized(z)
            y = self.quantized(y) if "add" in self.quantized_inputs else y
        return self.op(_BINARY[name], [y, z])

    def finish(self, y: str, shape: Shape) -> tuple[bytes, Signature]:
        types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        inputs = [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in self._inputs]
        graph = helper.make_graph(
            self._nodes, "kernel", inputs, [helper.make_tensor_value_info(y, TensorProto.FLOAT, shape)], self._tensors
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, producer_name="planish")
        signature = Signature(tuple(self._inputs), (TensorSpec(y, "float32", tuple(shape)),), "tuple", "tensor")
        return model.SerializeToString(), signature


def _tuple(kernel: Kernel, name: str, rank: int, default: int) -> tuple[int, ...]:
    value = dict(kernel.attributes).get(name, default)
    if isinstance(value, str):
        raise UsageError(f"kernel: {name} must be ints; got {value!r}")
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _int(kernel: Kernel, name: str, default: int) -> int:
    return int(dict(kernel.attributes).get(name, default))  # type: ignore[arg-type]


def _conv(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    weight = kernel.weights[0]
    rank = len(weight) - 2
    stride, dilation = _tuple(kernel, "stride", rank, 1), _tuple(kernel, "dilation", rank, 1)
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
        pads = [(p, p) for p in _tuple(kernel, "padding", rank, 0)]
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


def _linear(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    out, inner = kernel.weights[0]
    if len(kernel.inputs[0]) == 2 and len(kernel.weights) > 1 and not int8:
        return model.op("Gemm", [xs[0], model.weight((out, inner)), model.weight((out,))], transB=1)
    return model.linear(xs[0], len(kernel.inputs[0]), (out, inner), len(kernel.weights) > 1, int8)


def _matmul(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    return model.op("MatMul", xs)


def _attention(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
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


def _recurrent(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    gates, name = (4, "LSTM") if kernel.kind == "lstm" else (3, "GRU")
    hidden, width = kernel.weights[1][1], kernel.weights[0][1]
    is_batch_first = _int(kernel, "batch_first", 0)
    x = model.op("Transpose", [xs[0]], perm=[1, 0, 2]) if is_batch_first else xs[0]
    inputs = [x, model.weight((1, gates * hidden, width)), model.weight((1, gates * hidden, hidden))]
    if len(kernel.weights) > 2:
        inputs.append(model.weight((1, 2 * gates * hidden)))
    more = {"linear_before_reset": 1} if name == "GRU" else {}
    direction = "reverse" if _int(kernel, "reverse", 0) else "forward"
    y = model.op(name, inputs, outputs=1, hidden_size=hidden, direction=direction, **more)
    y = model.op("Squeeze", [y, model.constant(np.array([1], np.int64))])
    return model.op("Transpose", [y], perm=[1, 0, 2]) if is_batch_first else y


def _embedding(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    return model.op("Gather", [model.weight(kernel.weights[0]), xs[0]], axis=0)


def _norm(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    name, shape = _op(kernel), kernel.inputs[0]
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


def _pool(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
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
        size = _tuple(kernel, "kernel_size", rank, 1)
        stride = _tuple(kernel, "stride", rank, 0)
        stride = size if not any(stride) else stride
        pads = _tuple(kernel, "padding", rank, 0)
        ceil = int(any((b + 2 * p - k) // s + 1 < a for b, p, k, s, a in zip(before[2:], pads, size, stride, after[2:], strict=True)))
        kind = "MaxPool" if "max" in _op(kernel) else "AveragePool"
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


def _other(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    if _op(kernel) not in ("cat", "concat"):
        raise UsageError(f"kernel: no model is built for {_op(kernel) or 'an operator without a name'!r}")
    axis = next((i for i, (a, b) in enumerate(zip(kernel.inputs[0], kernel.output, strict=True)) if a != b), 0)
    return model.op("Concat", xs, axis=axis)


def _softmax(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    return model.op("Softmax", xs[:1], axis=_int(kernel, "dim", -1))


def _elementwise(model: _Model, kernel: Kernel, xs: list[str], int8: bool) -> str:
    name = _op(kernel)
    if name in _BINARY:
        other = xs[1] if len(xs) > 1 else model.constant(np.float32(1.5))
        return model.op(_BINARY[name], [xs[0], other])
    return model.unary(name, xs[0])


_CORES: dict[str, Callable[[_Model, Kernel, list[str], bool], str]] = {
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
