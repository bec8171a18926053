"""Latency tables: every kernel has models that run, their recipe adds up, the cache survives anything; closed forms for the fit."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter

import msgspec
import numpy as np
import onnx
import pytest
import torch

from planish.errors import RuntimeFailed, UsageError
from planish.graph.capture import capture
from planish.graph.windows import short_convolutions
from planish.measure import kernel_models, tables
from planish.measure.kernel_models import build, recipe
from planish.measure.kernels import Kernel
from planish.measure.plausible import excess
from planish.measure.probe import Process
from planish.measure.tables import Table
from planish.runtimes.contract import get_runtime
from planish.target import Target

CONV = Kernel("conv", ((1, 8, 12, 12),), (1, 16, 12, 12), ((16, 8, 3, 3), (16,)), (("padding", (1, 1)), ("stride", (1, 1))), ("relu",))


def _conv(inputs, output, weight, fused=(), precision="fp32", **attributes):
    return Kernel("conv", (inputs,), output, (weight, (output[1],)), tuple(sorted(attributes.items())), fused, precision)


def _of(kind, inputs, output, weights=(), fused=(), precision="fp32", **attributes):
    return Kernel(kind, inputs, output, weights, tuple(sorted(attributes.items())), fused, precision)


KERNELS = [
    CONV,
    _conv((1, 3, 12, 12), (1, 8, 6, 6), (8, 3, 3, 3), stride=(2, 2), padding=(1, 1), from_input=1),
    _conv((2, 8, 12, 12), (2, 8, 12, 12), (8, 1, 3, 3), padding=1, groups=8, fused=("relu6",)),
    _conv((1, 8, 12, 12), (1, 16, 8, 8), (16, 8, 3, 3), dilation=(2, 2)),
    _conv((1, 8, 20), (1, 12, 20), (12, 8, 5), padding=(2,), fused=("gelu",)),
    _conv((1, 4, 6, 6, 6), (1, 8, 6, 6, 6), (8, 4, 3, 3, 3), padding=(1, 1, 1)),
    _conv((1, 8, 6, 6), (1, 4, 12, 12), (8, 4, 4, 4), stride=(2, 2), padding=(1, 1), transposed=1),
    _conv((1, 8, 6, 6), (1, 4, 12, 12), (8, 4, 3, 3), stride=(2, 2), padding=(1, 1), transposed=1),
    _conv((1, 8, 12, 12), (1, 8, 12, 12), (8, 8, 3, 3), padding="same", fused=("add", "relu")),
    _conv((1, 8, 12, 12), (1, 8, 12, 12), (8, 8, 3, 3), padding=(1, 1), fused=("add", "relu"), precision="int8"),
    _conv((1, 3, 12, 12), (1, 8, 12, 12), (8, 3, 3, 3), padding=(1, 1), from_input=1, precision="int8"),
    _of("linear", ((4, 16),), (4, 10), ((10, 16), (10,))),
    _of("linear", ((4, 16),), (4, 10), ((10, 16), (10,)), precision="int8"),
    _of("linear", ((2, 6, 16),), (2, 6, 24), ((24, 16),), fused=("gelu",)),
    _of("linear", ((1, 6, 16),), (1, 6, 24), ((24, 16), (24,)), fused=("gelu",), precision="int8"),
    _of("linear", ((1, 6, 16),), (1, 6, 16), ((16, 16), (16,)), fused=("add",), precision="int8"),
    _of("matmul", ((1, 2, 6, 8), (1, 2, 8, 6)), (1, 2, 6, 6)),
    _of("matmul", ((1, 2, 6, 8), (1, 2, 8, 6)), (1, 2, 6, 6), precision="int8"),
    _of("attention", ((1, 2, 6, 8),) * 3, (1, 2, 6, 8)),
    _of("attention", (*((1, 2, 6, 8),) * 3, (1, 1, 1, 6)), (1, 2, 6, 8)),
    _of("lstm", ((5, 2, 8), (1, 2, 12), (1, 2, 12)), (5, 2, 12), ((48, 8), (48, 12), (48,), (48,))),
    _of("gru", ((2, 5, 8),), (2, 5, 12), ((36, 8), (36, 12)), batch_first=1, reverse=1),
    _of("embedding", ((2, 6),), (2, 6, 16), ((100, 16),)),
    *(_of("norm", ((1, 6, 16),), (1, 6, 16), ((16,), (16,)), op=op) for op in ("layer_norm", "rms_norm")),
    *(_of("norm", ((1, 8, 6, 6),), (1, 8, 6, 6), ((8,), (8,)), op=op) for op in ("batch_norm", "instance_norm")),
    _of("norm", ((1, 8, 6, 6),), (1, 8, 6, 6), ((8,), (8,)), op="group_norm", groups=2),
    _of("pool", ((1, 8, 12, 12),), (1, 8, 6, 6), op="max_pool2d", kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
    _of("pool", ((1, 8, 12, 12),), (1, 8, 6, 6), op="avg_pool2d", kernel_size=(2, 2)),
    _of("pool", ((1, 8, 12, 12),), (1, 8, 6, 6), op="max_pool2d", kernel_size=(2, 2), precision="int8"),
    _of("pool", ((1, 8, 12, 12),), (1, 8, 1, 1), op="adaptive_avg_pool2d"),
    _of("pool", ((1, 8, 12, 12),), (1, 8, 3, 3), op="adaptive_avg_pool2d"),
    _of("pool", ((1, 8, 12, 12),), (1, 8), op="mean"),
    _of("pool", ((2, 6, 16),), (2, 16), op="mean"),
    _of("softmax", ((1, 2, 6, 6),), (1, 2, 6, 6), dim=-1),
    *(_of("elementwise", ((1, 8, 6, 6),), (1, 8, 6, 6), op=op) for op in ("relu", "silu", "hardswish", "never_heard_of")),
    _of("elementwise", ((1, 8, 6, 6),) * 2, (1, 8, 6, 6), op="add"),
    _of("elementwise", ((1, 8, 6, 6),) * 2, (1, 8, 6, 6), op="add", precision="int8"),
    _of("elementwise", ((1, 8, 6, 6), (1, 8, 1, 1)), (1, 8, 6, 6), op="mul"),
    _of("elementwise", ((1, 6, 16),), (1, 6, 16), op="mul"),
    _of("other", ((1, 8, 6, 6), (1, 4, 6, 6)), (1, 12, 6, 6), op="cat"),
    *(_of("linear", ((1, 6, 48),), (1, 6, 16), ((16, 48), (16,)), precision=p) for p in ("int8-weights", "int4-weights")),
    _of("linear", ((4, 40),), (4, 16), ((16, 40),), precision="int4-weights"),
    _of("embedding", ((2, 6),), (2, 6, 16), ((100, 16),), precision="int8-weights"),
    _of("lstm", ((5, 2, 8),), (5, 2, 12), ((48, 8), (48, 12), (48,), (48,)), precision="int8-weights"),
    _of("gru", ((2, 5, 8),), (2, 5, 12), ((36, 8), (36, 12)), precision="int8-weights", batch_first=1),
    _of("conversion", ((1, 8, 6, 6),), (1, 8, 6, 6)),
    _of("conversion", ((1, 6, 16),), (1, 6, 16)),
]


DYNAMIC = [
    _of("linear", ((1, 6, 48),), (1, 6, 16), ((16, 48), (16,)), precision="int8-dynamic"),
    _of("linear", ((6, 48),), (6, 16), ((16, 48),), fused=("gelu",), precision="int8-dynamic"),
    _of("lstm", ((5, 2, 8),), (5, 2, 12), ((48, 8), (48, 12), (48,), (48,)), precision="int8-dynamic"),
    _of("lstm", ((2, 5, 8),), (2, 5, 12), ((48, 8), (48, 12)), precision="int8-dynamic", batch_first=1, reverse=1),
]


def _name(kernel: Kernel) -> str:
    op = dict(kernel.attributes).get("op", "")
    return "-".join(str(part) for part in (kernel.kind, op, len(kernel.output), *kernel.fused, kernel.precision) if part)


@pytest.fixture(scope="module")
def onnxruntime_table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(Target("onnxruntime"), tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("kernel", [*KERNELS, *DYNAMIC], ids=map(_name, [*KERNELS, *DYNAMIC]))
def test_models_of_every_kind_are_valid(kernel):
    runtime = get_runtime("onnxruntime")
    for _, model in recipe(kernel):
        blob, signature = build(model, runtime.quantize_inputs_of, runtime.quantize_outputs_of)
        proto = onnx.load_from_string(blob)
        onnx.checker.check_model(proto)
        if any(node.domain for node in proto.graph.node):  # ONNX knows no shapes of operators that are not its own
            continue
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}
        if model == kernel:
            assert kernel.output in shapes.values() or all(size == 1 for size in kernel.output[:-1])
        assert build(model, runtime.quantize_inputs_of, runtime.quantize_outputs_of)[0] == blob, "the same kernel gives the same bytes"
        assert all(isinstance(size, int) for spec in signature.inputs for size in spec.shape)


@pytest.mark.parametrize("name", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
def test_every_kind_is_measured(name, tmp_path, monkeypatch):
    if get_runtime(name, require=False).missing():
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(tables, "_SECONDS", 0.0)
    monkeypatch.setattr(tables, "_CALLS", 3)
    table = Table(Target(name), tmp_path)
    shares: list[float] = []
    kernels = [*KERNELS, *(DYNAMIC if "int8-dynamic" in get_runtime(name).schemes else ())]
    found = table.seconds(kernels, shares.append)
    assert table.failures() == {}
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert shares[-1] == 1.0


def test_a_recipe_counts_producers_and_consumers_once():
    def net(kernel: Kernel) -> dict[str, int]:
        """Operators of the combined models, by ONNX type, with their factors: what a recipe's figure stands for."""
        counts: dict[str, int] = {}
        for factor, model in recipe(kernel):
            for node in onnx.load_from_string(build(model)[0]).graph.node:
                counts[node.op_type] = counts.get(node.op_type, 0) + factor
        return {op: n for op, n in counts.items() if n}

    assert net(CONV) == {"Conv": 1, "Relu": 1}
    assert net(KERNELS[1]) == {"Conv": 1}
    assert net(msgspec.structs.replace(CONV, fused=("add", "relu"))) == {"Conv": 1, "Add": 1, "Relu": 1}
    assert net(_of("matmul", ((2, 6, 8), (2, 8, 6)), (2, 6, 6))) == {"MatMul": 1}
    assert net(_of("linear", ((2, 6, 8),), (2, 6, 9), ((9, 8),))) == {"MatMul": 1}
    assert net(_of("elementwise", ((1, 8, 6, 6),) * 2, (1, 8, 6, 6), op="add")) == {"Add": 1}
    assert net(_of("embedding", ((2, 6),), (2, 6, 16), ((100, 16),))) == {"Gather": 1}
    assert net(_of("conversion", ((1, 8, 6, 6),), (1, 8, 6, 6)))["QuantizeLinear"] < 2


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "padding", "positions", "lead", "taps"),
    [(4, 3, 1, 0, 2, (2, 2), 3), (1, 3, 1, 1, 1, (2,), 1), (2, 3, 2, 1, 1, (2,), 2), (7, 7, 1, 0, 1, (2,), 7)],
)
def test_a_short_convolution_is_measured_as_the_product_that_is_exported(length, kernel, stride, padding, positions, lead, taps):
    attributes = (("dilation", (1,)), ("from_input", 1), ("groups", 1), ("padding", (padding,)), ("stride", (stride,)))
    conv = Kernel("conv", ((2, 16, length),), (2, 24, positions), ((24, 16, kernel), (24,)), attributes, ("relu",))
    product = kernel_models.as_product(conv, 8)
    assert product == Kernel("linear", ((*lead, 16 * taps),), (*lead, 24), ((24, 16 * taps), (24,)), (("from_input", 1),), ("relu",))

    convolution = torch.nn.Conv1d(16, 24, kernel, stride, padding)
    net = torch.nn.Sequential(convolution, torch.nn.Flatten(), torch.nn.Linear(24 * positions, 3))
    exported = short_convolutions(capture(net, torch.zeros(2, 16, length)), 8)
    assert (24, 16 * taps) in [tuple(value.shape) for value in exported.module.parameters()]


@pytest.mark.parametrize("change", [{"groups": 16}, {"dilation": (2,)}, {"transposed": 1}, {"padding": "same"}])
def test_other_convolutions_are_measured_as_they_are(change):
    attributes = {"dilation": (1,), "groups": 1, "padding": (1,), "stride": (1,), **change}
    conv = Kernel("conv", ((2, 16, 4),), (2, 16, 4), ((16, 16, 3),), tuple(sorted(attributes.items())))
    long = Kernel("conv", ((2, 16, 9),), (2, 16, 9), ((16, 16, 3),), (("padding", (1,)),))
    assert kernel_models.as_product(conv, 8) is conv and kernel_models.as_product(long, 8) is long


def test_kernels_without_a_model_are_nan_with_a_reason(onnxruntime_table):
    odd = [
        _of("other", ((1, 8),), (1, 8), op="cumsum"),
        _of("gargle", ((1, 8),), (1, 8)),
        _of("softmax", ((1, 8),), (1, 8), precision="int8"),
        _of("gru", ((5, 2, 8),), (5, 2, 12), ((36, 8), (36, 12)), precision="int8-dynamic"),
        _of("linear", ((1, 8),), (1, 8), ((8, 4),)),  # in and weight do not fit: the runtime refuses it
    ]
    found = onnxruntime_table.seconds([*odd, CONV])
    assert np.isnan(found[:-1]).all()
    assert np.isfinite(found[-1])
    assert len(onnxruntime_table.failures()) == len(odd)


def test_a_larger_kernel_takes_longer(onnxruntime_table):
    # 16 times the arithmetic: no noise makes the smaller one slower.
    small, large = (_conv((1, c, 24, 24), (1, c, 24, 24), (c, c, 3, 3), padding=(1, 1)) for c in (16, 64))
    found = onnxruntime_table.seconds([small, large])
    assert found[1] > 2 * found[0] > 0


class FakeProcess:
    """Times every model as its number of nodes in milliseconds, except that it dies at a model with a Tanh."""

    started = 0

    def __init__(self, target, what):
        FakeProcess.started += 1
        self.folder = self.root

    def ask(self, do, timeout_s, path, **rest):
        model = onnx.load(path)
        if any(node.op_type == "Tanh" for node in model.graph.node):
            raise RuntimeFailed("crashed", "the measuring process crashed with SIGSEGV")
        return {"cpu": [len(model.graph.node) * 1e-3] * 3, "wall": [1.0] * 3}

    def close(self):
        pass


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeProcess, "root", tmp_path, raising=False)
    monkeypatch.setattr(FakeProcess, "started", 0)
    monkeypatch.setattr(tables, "Process", FakeProcess)
    return tmp_path


def test_a_crash_skips_one_kernel(fake):
    table = Table(Target("onnxruntime"), fake / "cache")
    bad = msgspec.structs.replace(CONV, fused=("tanh",))
    found = table.seconds([CONV, bad, msgspec.structs.replace(CONV, fused=())])
    assert found[0] == pytest.approx(2e-3)
    assert np.isnan(found[1])
    assert found[2] == pytest.approx(1e-3)
    assert FakeProcess.started == 2
    assert ["SIGSEGV" in why for why in table.failures().values()] == [True]


def test_the_cache_spares_measuring_and_keeps_apart_what_differs(fake):
    first = Table(Target("onnxruntime"), fake / "cache")
    figure = first.seconds([CONV])
    second = Table(Target("onnxruntime"), fake / "cache")
    assert (second.seconds([CONV]) == figure).all()
    assert FakeProcess.started == 1
    assert Table(Target("onnxruntime", threads=2), fake / "cache").path != first.path
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name], "no temporary file is left"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b'{"a": "b", "c": NaN, "d": null}', b'{"x": 1.0, "{}": 2.0}', b""])
def test_a_corrupted_cache_is_measured_again(fake, caplog, content):
    table = Table(Target("onnxruntime"), fake / "cache")
    table.path.parent.mkdir(parents=True)
    table.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert Table(Target("onnxruntime"), fake / "cache").seconds([CONV])[0] == pytest.approx(2e-3)
    if not content.startswith((b'{"a"', b'{"x"')):
        assert "measuring again" in caplog.text
    assert all(isinstance(value, float) for value in json.loads(table.path.read_text()).values())


def test_a_cache_that_cannot_be_written_costs_a_warning(fake, caplog):
    (fake / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert Table(Target("onnxruntime"), fake / "file").seconds([CONV])[0] == pytest.approx(2e-3)
    assert "cannot be written" in caplog.text


def test_two_processes_add_to_one_cache(fake):
    one, two = (Table(Target("onnxruntime"), fake / "cache") for _ in range(2))
    one.seconds([CONV])
    two.seconds([_of("softmax", ((1, 6),), (1, 6))])
    assert len(json.loads(two.path.read_text())) == 4


def test_the_environment_moves_the_cache(fake, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE", str(fake / "elsewhere"))
    assert Table(Target("onnxruntime")).path.is_relative_to(fake / "elsewhere")


def test_a_torch_target_has_no_table(tmp_path):
    with pytest.raises(UsageError, match=r"torch:cpu runs no ONNX models, .*use MACs"):
        Table(Target("torch"), tmp_path)


def test_a_kernel_is_hashable_and_json_both_ways():
    for kernel in KERNELS:
        assert msgspec.json.decode(msgspec.json.encode(kernel), type=Kernel) == kernel
    assert len(set(KERNELS)) == len(KERNELS)


def test_process_and_models_agree_on_what_is_measured(tmp_path):
    """The sandwich of an int8 convolution really runs in int8 throughout, so that no conversion is part of its figure."""
    runtime, kernel = get_runtime("onnxruntime"), msgspec.structs.replace(CONV, precision="int8")
    blob, signature = kernel_models.build(kernel, runtime.quantize_inputs_of, runtime.quantize_outputs_of)
    (tmp_path / "m.onnx").write_bytes(blob)
    process = Process(Target("onnxruntime"), "test")
    try:
        given = {"target": msgspec.to_builtins(Target("onnxruntime")), "signature": msgspec.to_builtins(signature)}
        process.ask("open", 60, path=str(tmp_path / "m.onnx"), memory_limit_bytes=None, **given)
        proof = process.ask("proof", 60)
    finally:
        process.close()
    assert (proof["int8_kernels"], proof["float_kernels"]) == (3, 0)


def test_after_the_deadline_nothing_more_is_measured(fake):
    table = Table(Target("onnxruntime"), fake / "cache")
    assert np.isnan(table.seconds([CONV], deadline=0.0)).all()
    assert np.isfinite(table.seconds([CONV], deadline=math.inf)).all()
    assert np.isfinite(table.seconds([CONV], deadline=0.0)).all()


def test_a_slow_moment_of_the_machine_leaves_no_trace(fake, monkeypatch):
    """It is 1.7 times slower during the first three visits: those kernels are visited until two figures agree."""
    visits = []

    def ask(self, do, timeout_s, path, **rest):
        visits.append(path)
        slow = 1.7 if len(visits) <= 3 else 1.0
        seconds = [len(onnx.load(path).graph.node) * 1e-3] * 3
        return {"cpu": seconds, "wall": [slow * s for s in seconds]}

    monkeypatch.setattr(FakeProcess, "ask", ask)
    kernels = [msgspec.structs.replace(CONV, fused=fused) for fused in ((), ("relu",), ("add",), ("add", "relu"))]
    calm = Table(Target("onnxruntime"), fake / "calm").seconds(kernels)
    visits.clear()
    found = Table(Target("onnxruntime", threads=2), fake / "cache").seconds(kernels)
    assert found == pytest.approx(calm)
    wanted = len(set(visits))
    assert len(visits) == 2 * wanted + 3
    assert visits[:wanted] != visits[wanted : 2 * wanted], "another order each time"
    assert set(visits[:wanted]) == set(visits[wanted : 2 * wanted]), "all others lie between two visits"


def test_a_figure_of_one_visit_does_not_outlive_its_run(fake, monkeypatch):
    """Time runs out in the second round: what was visited once is used now, and measured again by the next table."""
    calm = Table(Target("onnxruntime"), fake / "calm")
    kernels = [CONV, _of("softmax", ((1, 6),), (1, 6)), _of("linear", ((4, 16),), (4, 10), ((10, 16), (10,)))]
    calm.seconds(kernels)
    clock = iter(range(10_000))
    monkeypatch.setattr(tables.time, "monotonic", lambda: float(next(clock)))
    table = Table(Target("onnxruntime"), fake / "cache")
    deadline = 2.0 * len(calm._known) + 5  # the clock is read twice a visit
    assert np.isfinite(table.seconds(kernels, deadline=deadline)).all()
    kept = json.loads(table.path.read_text())
    assert 0 < len(kept) < len(table._known)
    again = Table(Target("onnxruntime"), fake / "cache")
    assert np.isfinite(again.seconds(kernels)).all()
    assert set(json.loads(table.path.read_text())) == set(table._known)


def test_a_kernel_that_was_disturbed_twice_is_found_by_others_of_its_kind(fake, monkeypatch):
    """Both of its first visits take 1.5 times too long, so they agree; figures of other widths say that they cannot be right."""
    kernels = [_of("conv", ((1, 16, 8, 8),), (1, width, 8, 8), ((width, 16, 3, 3), (width,))) for width in range(8, 136, 8)]
    visits = Counter()
    victim = []

    def ask(self, do, timeout_s, path, **rest):
        visits[path] += 1
        model = onnx.load(path)
        seconds = 1e-5 + 1e-8 * sum(math.prod(weight.dims) for weight in model.graph.initializer)
        if not victim and (72, 16, 3, 3) in [tuple(weight.dims) for weight in model.graph.initializer]:
            victim.append(path)
        slow = 1.5 if path in victim and visits[path] <= 2 else 1.0
        return {"cpu": [slow * seconds] * 3, "wall": [slow * seconds] * 3}

    monkeypatch.setattr(FakeProcess, "ask", ask)
    table = Table(Target("onnxruntime"), fake / "cache")
    found = table.seconds(kernels)
    assert np.diff(found) == pytest.approx(np.full(len(kernels) - 1, np.diff(found).mean()), rel=0.02)
    assert visits[victim[0]] > 2
    assert sum(count > 2 for count in visits.values()) == 1, "nothing else is doubted"


def test_an_interrupt_loses_no_figure_that_was_settled(fake, monkeypatch):
    kernels = [_of("conv", ((1, 16, 8, 8),), (1, width, 8, 8), ((width, 16, 3, 3), (width,))) for width in range(8, 72, 8)]
    visits = Counter()

    def ask(self, do, timeout_s, path, **rest):
        visits[path] += 1
        if visits.total() == 2 * len(visits) - 1 > len(kernels):
            raise KeyboardInterrupt
        return {"cpu": [1e-5] * 3, "wall": [1e-5] * 3}

    monkeypatch.setattr(FakeProcess, "ask", ask)
    table = Table(Target("onnxruntime"), fake / "cache")
    with pytest.raises(KeyboardInterrupt):
        table.seconds(kernels)
    assert len(json.loads(table.path.read_text())) == len(visits) - 2


def test_a_kernel_that_fails_on_its_second_visit_leaves_no_figure_of_one(fake, monkeypatch):
    visits = Counter()

    def ask(self, do, timeout_s, path, **rest):
        visits[path] += 1
        if visits[path] == 2:
            raise RuntimeFailed("hung", "it took too long")
        return {"cpu": [1e-5] * 3, "wall": [1e-5] * 3}

    monkeypatch.setattr(FakeProcess, "ask", ask)
    table = Table(Target("onnxruntime"), fake / "cache")
    table.seconds([CONV])
    assert table.failures() and json.loads(table.path.read_text()) == {}


def test_work_counts_the_batch_and_a_transposed_convolutions_input():
    """What takes as long as its work says is nowhere doubted, whatever the batch, the stride or the groups."""
    kernels, seconds = [], []
    for batch in (1, 32):
        for width in range(8, 72, 8):
            plain = _of("conv", ((batch, 16, 8, 8),), (batch, width, 8, 8), ((width, 16, 3, 3),))
            up = _of("conv", ((batch, 16, 8, 8),), (batch, width, 16, 16), ((16, width, 2, 2),), transposed=1, stride=2)
            apart = _of("conv", ((batch, width, 8, 8),), (batch, width, 8, 8), ((width, 1, 3, 3),), groups=width)
            kernels += [plain, up, apart]
            seconds += [64 * batch * width * 16 * 9, 64 * batch * width * 16 * 4, 1e3 * 64 * batch * width * 9]
    assert excess(kernels, np.array(seconds) * 1e-9 + 1e-6) == pytest.approx(np.ones(len(kernels)), rel=0.03)


def test_a_base_that_was_always_disturbed_disturbs_no_kernel_of_its_shape(tmp_path):
    """In one run a base of 23 instead of 15 µs was taken off three convolutions, which then took half in fp32 of what they took in int8."""
    kernels = [_conv((1, width, 8, 8), (1, 32, 8, 8), (32, width, 3, 3)) for width in range(8, 72, 8)]
    table = Table(Target("onnxruntime"), tmp_path)
    models = {model for kernel in kernels for _, model in recipe(kernel)}
    figures = {model: (15 if model.kind == "base" else 30) * 1e-6 for model in models}
    figures[next(model for model in models if model.kind == "base" and model.inputs[0][1] == 40)] *= 1.5
    table.path.parent.mkdir(parents=True)
    table.path.write_text(json.dumps({tables._key(model): seconds for model, seconds in figures.items()}))
    found = Table(Target("onnxruntime"), tmp_path).seconds(kernels)
    assert found == pytest.approx(np.full(len(kernels), 15e-6), rel=0.1)


def test_what_a_layout_or_a_size_costs_is_no_disturbance(tmp_path):
    """Bases behind convolutions take longer than those behind linear maps, barred ones longer still, and one size 2.7 times as long: all believed."""

    def cost(model):
        known = dict(model.attributes)
        return (
            (14 if known.get("layout") == "channels" else 6) + (5 if known.get("barrier") else 0) + (24 if model.inputs[0][1] == 40 else 0)
        )

    bases = [
        Kernel("base", (shape,), shape, attributes=tuple(sorted({"layout": layout, **({"barrier": 1} if barred else {})}.items())))
        for layout, barred in (("channels", False), ("plain", False), ("channels", True))
        for shape in [(1, width, 8, 8) for width in range(8, 72, 8)]
    ]
    table = Table(Target("onnxruntime"), tmp_path)
    table.path.parent.mkdir(parents=True)
    table.path.write_text(json.dumps({tables._key(base): cost(base) * 1e-6 for base in bases}))
    table = Table(Target("onnxruntime"), tmp_path)
    believed = table._believed({tables._key(base): base for base in bases})
    assert [believed[tables._key(base)] for base in bases] == pytest.approx([cost(base) * 1e-6 for base in bases])
    alone = table._believed({tables._key(base): base for base in bases[:8]})
    assert all(alone[key] == believed[key] for key in alone), "what else is known changes nothing"
