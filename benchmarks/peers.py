"""Today's tools on the same net and data: NNCF's and ONNX Runtime's int8, Torch-Pruning. They live in the extra `bench` only."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn


def nncf_int8(model: Path, samples: NDArray[np.float32], out: Path, input_name: str) -> Path:
    """NNCF's post-training int8 of an ONNX file, as OpenVINO's own format (its defaults, one sample a call)."""
    import nncf
    import openvino

    quantized = nncf.quantize(openvino.Core().read_model(model), nncf.Dataset([{input_name: sample[None]} for sample in samples]))
    openvino.save_model(quantized, out)
    return out


class _Reader:
    def __init__(self, name: str, samples: Sequence[NDArray[np.float32]]) -> None:
        self._batches = iter([{name: sample[None]} for sample in samples])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


def onnxruntime_int8(model: Path, samples: NDArray[np.float32], out: Path, input_name: str, reduce_range: bool) -> Path:
    """ONNX Runtime's static QDQ int8 of an ONNX file: per-channel weights, u8 activations, min-max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static

    class Reader(_Reader, CalibrationDataReader): ...

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(out),
        Reader(input_name, list(samples)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    onnx.checker.check_model(str(out))
    return out


def nncf_transformer(model: Path, samples: Sequence[Mapping[str, NDArray[np.generic]]], out: Path) -> Path:
    """NNCF's post-training int8 of a Transformer (its model type says so: SmoothQuant, attention's products in float), one sample a call."""
    import nncf
    import openvino

    read = openvino.Core().read_model(model)
    quantized = nncf.quantize(read, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, out, compress_to_fp16=False)
    return out


def onnxruntime_dynamic(model: Path, out: Path, reduce_range: bool) -> Path:
    """ONNX Runtime's dynamic int8 of an ONNX file, weights per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(model), str(out), per_channel=True, reduce_range=reduce_range, weight_type=QuantType.QInt8)
    return out


def torch_pruned_to(model: nn.Module, example: torch.Tensor, macs: float, criterion: str) -> nn.Module:
    """Torch-Pruning over the whole net (DepGraph, global ranking), a little at a time until it has at most that many MACs.

    Args:
        model: a net that its groups do not corrupt.
        example: one sample.
        macs: of one sample, by its own count.
        criterion: "l2" (group magnitude), "bn-scale" or "lamp".
    """
    import torch_pruning

    importance = {
        "l2": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
        "bn-scale": torch_pruning.importance.BNScaleImportance,
        "lamp": lambda: torch_pruning.importance.LAMPImportance(p=2),
    }[criterion]()
    net = copy.deepcopy(model)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)]
    pruner = torch_pruning.pruner.BasePruner(
        net, example, importance, global_pruning=True, pruning_ratio=0.8, iterative_steps=200, ignored_layers=last, round_to=4
    )
    while torch_pruning.utils.count_ops_and_params(net, example)[0] > macs:
        pruner.step()
    return net.eval()


def torch_pruned(model: nn.Module, example: torch.Tensor, ratio: float) -> nn.Module:
    """Torch-Pruning's magnitude pruner on the channels inside the blocks; its groups of the padding shortcuts would corrupt the net."""
    import torch_pruning

    net = copy.deepcopy(model)
    inner = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d) and "." in name and name.endswith("conv1")}
    kept = [module for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in inner]
    pruner = torch_pruning.pruner.MagnitudePruner(
        net, example, torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=ratio, ignored_layers=kept, round_to=8
    )
    pruner.step()
    return net.eval()
