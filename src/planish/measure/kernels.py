"""The key of a latency table: `Kernel`.

A `Kernel` is one operator with what the runtime fuses into it, at fixed shapes. Shapes are those of torch, at the batch that
latency is measured at. Attributes that are not listed are ignored; one that is missing takes the value in brackets. All
attribute values are ints, strings or tuples of ints; a boolean is 0 or 1.

kind         inputs                          output           weights                       attributes
conv         (N, C, *space)                  (N, O, *space')  (O, C/groups, *k)[, (O,)]     stride [1..], padding [from the shapes],
             transposed: the same                             (C, O/groups, *k)[, (O,)]     dilation [1..], groups [1], transposed [0]
linear       (*lead, I)                      (*lead, O)       (O, I)[, (O,)]
matmul       (*b, M, K), (*b, K, N)          (*b, M, N)
attention    q (*b, T, D), k (*b, S, D),     (*b, T, V)
             v (*b, S, V)[, mask (.., T, S)]
lstm, gru    (T, B, I) or, batch_first, (B, T, I)             (g*H, I), (g*H, H)[, biases]  batch_first [0]; one layer, one direction;
             (further inputs ignored)        (.., H)          with g = 4 (lstm), 3 (gru)    reverse [0]
embedding    (*lead) of int64                (*lead, D)       (V, D)
norm         (N, C, *space) or (*lead, D)    as the input     scale and shift or none       op: "layer_norm", "rms_norm", "group_norm",
                                                                                            "batch_norm", "instance_norm"; groups [1]
pool         (N, C, *space)                  (N, C, *space')  none                          op: "max_pool2d", "avg_pool2d", ...;
                                                                                            kernel_size, stride [kernel_size], padding [0];
                                                                                            without kernel_size or with op "adaptive_..."
                                                                                            or "mean": the mean over space
softmax      any                             as the input     none                          dim [-1]
elementwise  one or two                      broadcast        none                          op: "relu", "gelu", "silu", "sigmoid", "tanh",
                                                                                            "hardswish", "hardsigmoid", "relu6", "exp",
                                                                                            "sqrt", "add", "sub", "mul", "div", ...
other        any                             concatenation  none                          op: "cat" alone; anything else has no figure
conversion   any                             as the input     none                          quantize and dequantize, once each

For every kind: `from_input` [0]: 1 where the first input is the program's own input (no layout to inherit); `layout`: "channels"
(the producer is a convolution, N C *space) or "plain" [channels for conv, pool, for norms other than layer and RMS norm, and
for element-wise operators of rank 4 and 5].

`fused` are short names of element-wise operators ("relu", "add", "mul", ...) that follow and that the runtime may fuse; "add" and
"mul" take a second operand of the output's shape, whose producer is not part of the figure. `precision` "int8" puts the kernel
in a sandwich that is int8 throughout, so that no conversion is part of the figure
(except with `from_input`: then quantizing the input is). "int8" is for conv, linear, matmul, attention, pool,
cat and element-wise add; other schemes, whose kernels take and give floats, are for linear, for lstm and, weights alone, for gru and embedding.
"""

from __future__ import annotations

import msgspec

Shape = tuple[int, ...]


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One fused kernel at fixed shapes: the key of a latency table. Hashable, JSON both ways. See the top of this file.

    Args:
        kind: a kind of the table above.
        inputs: shapes of the activation inputs, without the operands of `fused`.
        output: shape of the output.
        weights: shapes of the parameters, weight first.
        attributes: sorted pairs of name and value.
        fused: short names of what follows and may be fused, in order.
        precision: "fp32", or the name of a scheme; "int8" for all static ones.
    """

    kind: str
    inputs: tuple[Shape, ...]
    output: Shape
    weights: tuple[Shape, ...] = ()
    attributes: tuple[tuple[str, int | str | tuple[int, ...]], ...] = ()
    fused: tuple[str, ...] = ()
    precision: str = "fp32"
