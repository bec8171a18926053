"""An ONNX model that is being written: operators by generated names, quantizers, and the two ends of a sandwich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from planish.measure.kernels import Shape
from planish.quantize.contract import group_size
from planish.runtimes.storage import FLOATS
from planish.signature import Signature, TensorSpec

PROBE_CHANNELS = 8
UNARY: dict[str, tuple[str, ...]] = {
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
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min"}


class Model:
    """Nodes and initializers of one model of fixed shapes."""

    def __init__(self, quantized_inputs: frozenset[str], weight_range: int, floats: str = "fp32") -> None:
        self.quantized_inputs, self._range, self._floats = quantized_inputs, weight_range, floats
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
        return self._rounded(x, np.uint8(zero))

    def signed(self, x: str) -> str:
        return self._rounded(x, np.int8(0))

    def _rounded(self, x: str, zero: np.integer[Any]) -> str:
        scale, point = self.constant(np.float32(0.03)), self.constant(zero)
        return self.op("DequantizeLinear", [self.op("QuantizeLinear", [x, scale, point]), scale, point])

    def linear(self, x: str, rank: int, weight: Shape, has_bias: bool, int8: bool) -> str:
        """x @ W.T + b for a weight of shape (out, in).

        A bias of one axis makes ONNX Runtime fuse product and sum into `Gemm`, which has an int8 kernel only if its output is
        quantized, and none that is quick for a transposed weight: 1,850 us instead of 255 for 4 x (64, 384) x (384, 384).
        """
        out, inner = weight
        y = self.op("MatMul", [x, self.weight((inner, out), int8, axis=1)])
        return self.op("Add", [y, self.weight((*(1 for _ in range(rank - 1)), out) if rank > 2 else (out,))]) if has_bias else y

    def integers(self, shape: Shape, dtype: type[np.generic], largest: int = 127) -> str:
        """A constant of random integers from 0 to `largest`."""
        return self.constant(self._rng.integers(0, largest + 1, shape).astype(dtype))

    def dynamic_linear(self, x: str, out: int, inner: int, has_bias: bool) -> str:
        """x @ W.T + b in int8, x in the range that it has."""
        integers = self.op("DynamicQuantizeLinear", [x], outputs=3)
        sums = self.op("MatMulInteger", [integers, self.integers((inner, out), np.int8, self._range), f"{integers}_2"])
        scales = self.op("Mul", [f"{integers}_1", self.constant(np.full(out, 0.001, np.float32))])
        y = self.op("Mul", [self.op("Cast", [sums], to=TensorProto.FLOAT), scales])
        return self.op("Add", [y, self.weight((out,))]) if has_bias else y

    def dynamic_lstm(self, x: str, width: int, hidden: int, bias: str, direction: str) -> str:
        """An LSTM in int8, whose input and hidden state are rounded in the ranges that they have at every step."""
        rows = 4 * hidden
        matrices = [self.integers((1, inner, rows), np.int8, self._range) for inner in (width, hidden)]
        scales, zeros = self.constant(np.full((1, rows), 0.001, np.float32)), self.constant(np.zeros((1, rows), np.int8))
        inputs = [x, *matrices, bias, "", "", "", "", scales, zeros, scales, zeros]
        return self.op("DynamicQuantizeLSTM", inputs, domain="com.microsoft", hidden_size=hidden, direction=direction)

    def grouped_linear(self, x: str, out: int, inner: int, has_bias: bool, bits: int, group: int) -> str:
        """x @ W.T + b with W in `bits` bits, a scale for each `group` inputs."""
        group = group_size(group, inner)
        groups = -(-inner // group)
        packed = self.integers((out, groups, group * bits // 8), np.uint8, 255)
        zeros = self.integers((out, -(-groups * bits // 8)), np.uint8, 255)
        scales = self.constant(np.full((out, groups), 0.001, np.float32))
        shape = {"K": inner, "N": out, "bits": bits, "block_size": group, "accuracy_level": 0}
        y = self.op("MatMulNBits", [x, packed, scales, zeros], domain="com.microsoft", **shape)
        return self.op("Add", [y, self.weight((out,))]) if has_bias else y

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
        for kind in UNARY.get(name, ("Relu",)):
            x = self.op(kind, [x, self.constant(np.float32(0)), self.constant(np.float32(6))] if kind == "Clip" else [x])
        return x

    def fused(self, name: str, y: str, shape: Shape, layout: str, int8: bool) -> str:
        if name not in BINARY:
            return self.unary(name, y)
        z = self.producer(shape, layout, int8)
        if int8:
            z = self.quantized(z)
            y = self.quantized(y) if "add" in self.quantized_inputs else y
        return self.op(BINARY[name], [y, z])

    def finish(self, y: str, shape: Shape) -> tuple[bytes, Signature]:
        types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        inputs = [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in self._inputs]
        graph = helper.make_graph(
            self._nodes, "kernel", inputs, [helper.make_tensor_value_info(y, TensorProto.FLOAT, shape)], self._tensors
        )
        domains = {node.domain for node in self._nodes if node.domain}
        opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="planish")
        if self._floats != "fp32":
            helper.set_model_props(model, {FLOATS: self._floats})
        signature = Signature(tuple(self._inputs), (TensorSpec(y, "float32", tuple(shape)),), "tuple", "tensor")
        return model.SerializeToString(), signature
