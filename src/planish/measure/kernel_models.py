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

from collections.abc import Sequence

from planish.errors import UsageError
from planish.measure.kernel_cores import CORES, integers, operation
from planish.measure.kernels import Kernel, Shape
from planish.measure.model_writer import BINARY, PROBE_CHANNELS, Model
from planish.plan import FULL_PRECISION
from planish.quantize.contract import scheme_named
from planish.signature import Signature

STATIC = "int8"
_STATIC_KINDS = ("conv", "linear", "matmul", "attention", "pool", "other")


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
    if not _is_run(kernel):
        raise UsageError(f"kernel: {kernel.kind} {operation(kernel)} is not run in {kernel.precision}")
    if kernel.kind not in CORES:
        raise UsageError(f"kernel: there is no kind {kernel.kind!r}")
    at_end = _consumer_layout(kernel)
    around = STATIC if kernel.precision == STATIC else FULL_PRECISION
    empty = Kernel("empty", (), _smallest(kernel.output, at_end), attributes=(("layout", at_end),), precision=around)
    plain_inputs = [(shape, _is_barred(kernel)) for shape in _produced(kernel)]
    plain_inputs += [(kernel.output, False) for op in kernel.fused if op in BINARY]
    bases = [_base(shape, layout, around, barred) for shape, barred in plain_inputs]
    terms = [(1, kernel), *((-1, base) for base in bases)]
    if len(bases) != 1:
        terms.append((len(bases) - 1, empty))
    return terms


def _is_run(kernel: Kernel) -> bool:
    """Whether there is a kernel of this kind in its precision. All precisions but static int8 take floats and give floats."""
    if kernel.precision == STATIC:
        return kernel.kind in _STATIC_KINDS or (kernel.kind == "elementwise" and operation(kernel) == "add")
    return kernel.precision == FULL_PRECISION or kernel.kind in scheme_named(kernel.precision).kinds


def as_product(kernel: Kernel, most: int) -> Kernel:
    """What a runtime executes that gets convolutions with at most `most` positions of output as products (`graph/windows.py`); or the same."""
    given = dict(kernel.attributes)
    if kernel.kind != "conv" or kernel.precision != "fp32" or len(kernel.output) != 3 or kernel.output[2] > most:
        return kernel
    if given.get("transposed") or given.get("groups", 1) != 1 or isinstance(given.get("padding", ""), str):
        return kernel
    stride, padding, dilation = (integers(kernel, name, 1, 1)[0] for name in ("stride", "padding", "dilation"))
    if dilation != 1:
        return kernel
    from planish.graph.windows import live_taps  # imports torch

    (batch, channels, length), (_, outputs, positions) = kernel.inputs[0], kernel.output
    inner = channels * len(live_taps(length, positions, kernel.weights[0][2], stride, padding))
    lead = (batch, positions) if positions > 1 else (batch,)
    kept = tuple((name, value) for name, value in kernel.attributes if name == "from_input")
    weights = ((outputs, inner), *kernel.weights[1:])
    return Kernel("linear", ((*lead, inner),), (*lead, outputs), weights, kept, kernel.fused) if inner else kernel


def layout_of(kernel: Kernel) -> str:
    """ "channels" where the producer is a convolution, "plain" where it is a linear map."""
    given = dict(kernel.attributes).get("layout")
    if given is not None:
        return str(given)
    rank = len(kernel.inputs[0]) if kernel.inputs else len(kernel.output)
    if kernel.kind == "conv" or (kernel.kind == "pool" and rank >= 3):
        return "channels"
    if kernel.kind == "norm":
        return "plain" if operation(kernel) in ("layer_norm", "rms_norm") or rank < 3 else "channels"
    return "channels" if kernel.kind in ("elementwise", "conversion", "other") and rank >= 4 else "plain"


def build(
    kernel: Kernel,
    quantized_inputs: frozenset[str] = frozenset(),
    quantized_outputs: frozenset[str] = frozenset(),
    weight_range: int = 63,
    floats: str = "fp32",
) -> tuple[bytes, Signature]:
    """The ONNX model that a kernel (or a model of `recipe`) names, all shapes fixed, and its signature.

    Args:
        quantized_inputs: the runtime's `quantize_inputs_of`: with "add", fused additions in an int8 sandwich get a quantizer too.
        quantized_outputs: the runtime's `quantize_outputs_of`.
        weight_range: largest magnitude of an int8 weight.
        floats: what the model asks its floating-point operators to be computed in.

    Raises:
        UsageError: a kernel that no model can be built for.
    """
    model = Model(quantized_inputs, weight_range, floats)
    layout, int8 = layout_of(kernel), kernel.precision == STATIC
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
        xs = [model.quantized(x) if int8 else x for x in xs]  # no transposed convolution: its input must be at least zero
    else:
        xs = []
    for shape in _produced(kernel):
        x = model.producer(shape, layout, int8, barred=_is_barred(kernel))
        if int8 and "signed" in quantized_inputs and kernel.kind in ("matmul", "attention") and not kernel.weights:
            x = model.signed(x)
        elif int8:
            x = model.quantized(x, zero=0 if dict(kernel.attributes).get("transposed") else 128)
        xs.append(x)
    y = CORES[kernel.kind](model, kernel, xs, int8)
    is_positive = False
    if int8 and kernel.kind in quantized_outputs and kernel.fused and kernel.fused[0] not in ("relu", "relu6", *BINARY):
        y = model.quantized(y)
    for op in kernel.fused:
        y = model.fused(op, y, kernel.output, layout, int8)
        is_positive = op in ("relu", "relu6")
    y = model.quantized(y, zero=0 if is_positive else 128) if int8 else y
    return model.finish(*model.consumer(y, kernel.output, _consumer_layout(kernel), int8))


def _base(shape: Shape, layout: str, precision: str, barred: bool = False) -> Kernel:
    attributes: tuple[tuple[str, int | str], ...] = (("barrier", 1), ("layout", layout)) if barred else (("layout", layout),)
    return Kernel("base", (shape,), shape, attributes=attributes, precision=precision)


def _is_fed(kernel: Kernel) -> bool:
    """Whether the first input is the program's own."""
    return kernel.kind == "embedding" or bool(dict(kernel.attributes).get("from_input"))


def _is_barred(kernel: Kernel) -> bool:
    """Whether a concatenation must keep the producer from swallowing the kernel (an element-wise map, a batch norm)."""
    return kernel.kind == "elementwise" or operation(kernel) == "batch_norm"


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
