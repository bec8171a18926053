"""Models larger than memory: what comes out is what the whole net would give, and memory holds a part of it at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import streamed
import torch
from safetensors.torch import save_file
from torch import nn

import planish
from planish.artifact import open_artifact
from planish.errors import ArtifactError, DataError, PlanishError, RuntimeFailed, UsageError
from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.measure.machine import facts
from planish.measure.probe import Probe
from planish.quantize.apply import quantize
from planish.report.file import read_summary
from planish.runtimes.contract import get_runtime
from planish.streaming.hollow import stored_names
from planish.streaming.shrink import shrink
from planish.streaming.weights import Weights
from planish.target import Target
from planish.verification import bench


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return streamed.llama().eval()


@pytest.fixture(scope="module")
def weights(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and their index, in bfloat16 and float32."""
    folder = tmp_path_factory.mktemp("weights")
    state = {name: value.detach().contiguous() for name, value in net.named_parameters()}
    names = list(state)
    shards = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, of in shards.items():
        save_file({name: state[name] for name in of}, folder / file)
    index = {"weight_map": {name: file for file, of in shards.items() for name in of}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def outputs(path: Path, inputs: torch.Tensor, net: nn.Module) -> np.ndarray:  # type: ignore[type-arg]
    graph = capture(net, (inputs[:1],))
    probe = Probe.open(Target("onnxruntime", threads=1, facts=facts()), path, graph.signature)
    found = probe.outputs([inputs.numpy()], 8, 600.0)[0]
    probe.close()
    return found


def loss(found: np.ndarray, net: nn.Module, inputs: torch.Tensor) -> float:  # type: ignore[type-arg]
    with torch.no_grad():
        expected = net(inputs).numpy()
    return float(np.square(found - expected).sum() / np.square(expected).sum())


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_what_streams_past_is_what_the_whole_net_gives(net: nn.Module, weights: Path, tmp_path: Path, rounding: str) -> None:
    inputs = streamed.tokens()
    found = shrink(streamed.job(streamed.llama), weights, tmp_path / "net.shrunk", rounding=rounding)
    assert {"model.onnx", "model.onnx.data", "shrunk.json"} < {file.name for file in found.path.iterdir()}
    assert json.loads((found.path / "shrunk.json").read_text())["held_out"] == found.held_out == 6
    graph = capture(net, (inputs[:1],))
    analysis = analyse(graph)
    schemes = {"linear": "int4-weights", "embedding": "int8-weights"}
    chosen = {name: schemes[operator.kind] for name, operator in analysis.operators.items() if operator.kind in schemes}
    assert {one.name for one in found.operators} == set(chosen) and len(chosen) == 16
    data = streamed.job(lambda: net, inputs[:42]).materialize(tmp_path / "data")
    runtime = get_runtime("onnxruntime")
    whole = quantize(
        graph,
        analysis,
        chosen,
        runtime,
        Target("onnxruntime", facts=facts()),
        data.calibration,
        rounding=rounding,
        bias_correction=False,
        equalization="none",
    )
    (tmp_path / "whole").mkdir()
    expected = outputs(runtime.export(whole.graph, tmp_path / "whole"), inputs[42:], net)
    got = outputs(found.path / "model.onnx", inputs[42:], net)
    assert loss(got, net, inputs[42:]) > 1e-4, "nothing was rounded"
    difference = np.square(got - expected).sum() / np.square(expected).sum()
    # to nearest it is the same net. GPTQ's second moments are of all positions here and of some that are drawn there, if there are many;
    # a column on the border of two steps then tips, and others with it
    assert difference < (1e-9 if rounding == "nearest" else 0.3 * loss(expected, net, inputs[42:]))
    assert found.cosine == pytest.approx(found.streamed_cosine, abs=1e-5)
    assert found.bytes_after < 0.32 * found.bytes_before  # the program is a third of so small a file


def test_gptq_is_nearer_than_nearest_and_eight_bits_than_four(weights: Path, tmp_path: Path) -> None:
    job = streamed.job(streamed.llama)
    cosine = {}
    for scheme, rounding in (("int4-weights", "nearest"), ("int4-weights", "gptq"), ("int8-weights", "nearest")):
        found = shrink(job, weights, tmp_path / f"{scheme}-{rounding}", scheme=scheme, rounding=rounding)
        assert found.cosine is not None
        cosine[scheme, rounding] = found.cosine
    assert cosine["int4-weights", "nearest"] < cosine["int4-weights", "gptq"] < cosine["int8-weights", "nearest"]


def test_units_leave_and_the_rest_makes_up_for_them(net: nn.Module, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, inputs = streamed.job(streamed.llama), streamed.tokens()[42:]
    found = shrink(job, weights, tmp_path / "net.shrunk", scheme="int8-weights", prune=0.5)
    assert list(found.units.values()) == [(192, 96), (192, 96)]
    assert {one.outputs for one in found.operators if "up_proj" in one.name or "gate_proj" in one.name} == {96}
    down = [one for one in found.operators if "down_proj" in one.name]
    assert [one.inputs for one in down] == [96, 96] and all(0.0 < one.error < 0.5 for one in down)
    monkeypatch.setattr("planish.streaming.stream.refitted", lambda weight, gram, kept: weight[:, torch.from_numpy(kept)])
    without = shrink(job, weights, tmp_path / "without.shrunk", scheme="int8-weights", prune=0.5)
    kept, lost = (loss(outputs(one.path / "model.onnx", inputs, net), net, inputs) for one in (found, without))
    assert kept < lost
    assert found.bytes_after < shrink(job, weights, tmp_path / "wide.shrunk", scheme="int8-weights").bytes_after


def test_a_head_that_is_tied_to_its_embedding_is_kept_in_a_form_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = streamed.llama(tied=True).eval()
    state = {name: value.detach().half() for name, value in net.named_parameters()}
    save_file(state, tmp_path / "half.safetensors")
    net.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    found = shrink(
        streamed.job(lambda: streamed.llama(tied=True)), tmp_path / "half.safetensors", tmp_path / "net.shrunk", scheme="int8-weights"
    )
    state["model.lm_head.weight"] = state["model.model.embed_tokens.weight"] + 1
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="one tensor in the model"):
        shrink(streamed.job(lambda: streamed.llama(tied=True)), tmp_path / "other.safetensors", tmp_path / "other.shrunk")
    assert len(found.operators) == 16 and not found.skipped
    assert (found.path / "model.onnx.data").stat().st_size < 0.3 * 2 * found.bytes_before, "the file is in 16 bits"
    inputs = streamed.tokens()[42:]
    assert loss(outputs(found.path / "model.onnx", inputs, net), net, inputs) < 1e-3


@pytest.mark.parametrize("layers", [9, pytest.param(24, marks=pytest.mark.slow)])
def test_memory_holds_a_part_at_a_time(layers: int, tmp_path: Path) -> None:
    # what is spared is for the second moments of one layer and what is made of them (up to 15 matrices of 8 MB), its weights, and so long a program
    width, spare = 1024, 110_000_000 + layers * 3_000_000
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    streamed.write(tmp_path / "small" / "model.safetensors", 2, 64)
    size = streamed.write(tmp_path / "large" / "model.safetensors", layers, width)
    assert size > 1.2 * spare

    def run(mode: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, streamed.__file__, mode, str(tmp_path), str(layers), str(width), str(spare)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    at_once = run("at once")
    assert at_once.returncode != 0 and "allocate memory" in at_once.stderr, at_once.stderr[-2000:]
    assert at_once.stdout == "limited\n", "it failed before there was a limit"
    done = run("shrink")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["operators"]) == 7 * layers + 2
    assert found["bytes_after"] < 0.2 * size


def _spoil(weights: Path, folder: Path, name: str, value: torch.Tensor | None) -> Path:
    from safetensors.torch import load_file

    state = {key: tensor for file in weights.glob("*.safetensors") for key, tensor in load_file(file).items()}
    del state[name]
    if value is not None:
        state[name] = value
    save_file(state, folder / "spoiled.safetensors")
    return folder / "spoiled.safetensors"


UP = "model.model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "must hold parameter"), (torch.ones(3, 3), "must have shape"), (torch.full((192, 64), float("nan")), "must be finite")],
)
def test_weights_that_do_not_fit_are_refused_by_name(weights: Path, tmp_path: Path, value: torch.Tensor | None, said: str) -> None:
    with pytest.raises(PlanishError, match=said) as raised:
        shrink(streamed.job(streamed.llama), _spoil(weights, tmp_path, UP, value), tmp_path / "net.shrunk")
    assert "up_proj" in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["spoiled.safetensors"], "something half done was left"


def test_a_prefix_too_many_or_too_few_is_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"under the name 'model'"):
        shrink(streamed.job(lambda: streamed.llama().model), weights, tmp_path / "net.shrunk")
    around = nn.ModuleDict({"around": streamed.llama()})
    with pytest.raises(UsageError, match=r"module 'around' of that model alone"):
        stored_names(around, Weights(weights))


@pytest.mark.parametrize("keep", [4, 20, 300, -100])
def test_files_that_are_cut_off_are_refused(weights: Path, tmp_path: Path, keep: int) -> None:
    whole = (weights / "first.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:keep])
    with pytest.raises(DataError, match=r"cut\.safetensors"):
        shrink(streamed.job(streamed.llama), tmp_path / "cut.safetensors", tmp_path / "net.shrunk")


def test_arguments_that_cannot_be_are_refused(weights: Path, tmp_path: Path) -> None:
    job = streamed.job(streamed.llama)
    for more in ({"scheme": "int8"}, {"rounding": "brecq"}, {"prune": 1.0}, {"scheme": "codebook"}):
        with pytest.raises(UsageError, match=next(iter(more))):
            shrink(job, weights, tmp_path / "net.shrunk", **more)  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="no part of an artifact" if overwrite else "--overwrite"):
            shrink(job, weights, tmp_path / "there", overwrite=overwrite)
        for held in (weights, weights.parent):
            with pytest.raises(UsageError, match="holds the weights"):
                shrink(job, weights, held, overwrite=overwrite)
    with pytest.raises(UsageError, match=r"must be a safetensors file or a folder"):
        shrink(job, tmp_path / "there", tmp_path / "net.shrunk")
    (tmp_path / "there" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(DataError, match="gone"):
        shrink(job, tmp_path / "there", tmp_path / "net.shrunk")
    plain = nn.Sequential(nn.Linear(4, 4))
    save_file(dict(plain.named_parameters()), tmp_path / "plain.safetensors")
    one = planish.Workload(model=lambda: nn.Sequential(nn.Linear(4, 4)), example_inputs=(torch.ones(1, 4),), calibration=[torch.ones(8, 4)])
    with pytest.raises(UsageError, match="feed-forward"):
        shrink(one, tmp_path / "plain.safetensors", tmp_path / "net.shrunk", prune=0.5)
    with pytest.raises(UsageError, match="32 units"):
        shrink(job, weights, tmp_path / "net.shrunk", prune=0.1)


class Scaled(nn.Module):
    """Two linear maps with a saved and an unsaved buffer, and a map of a parameter; the batch is fixed if asked for."""

    def __init__(self, batch: int = 0) -> None:
        super().__init__()
        self.first, self.last, self.learned = nn.Linear(16, 64), nn.Linear(64, 4), nn.Linear(16, 16)
        self.query = nn.Parameter(torch.ones(1, 16))
        self.register_buffer("scale", torch.ones(64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.full((64,), 0.1), persistent=False)
        self.batch = batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.batch:
            x = x.view(self.batch, 16)
        return self.last(torch.relu(self.first(x + self.learned(self.query)) * self.scale + self.shift))  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [0, 4])
def test_buffers_are_read_and_held_out_samples_are_the_same_ones(batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Scaled(batch).eval()
    net.get_buffer("scale").uniform_(0.1, 5.0)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    inputs = torch.randn(54, 16)
    job = planish.Workload(model=lambda: Scaled(batch), example_inputs=(inputs[: batch or 1],), calibration=[inputs], name="scaled")
    found = shrink(job, tmp_path / "net.safetensors", tmp_path / "net.shrunk", scheme="int8-weights")
    assert list(found.skipped.values()) == ["it multiplies a parameter"]
    assert found.held_out == (4 if batch else 6)
    assert found.cosine is not None and found.cosine > 0.999
    few = inputs[: batch or 8]
    with torch.no_grad():
        expected = net(few).numpy()
    session = onnxruntime.InferenceSession(str(found.path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: few.numpy()})[0]
    assert np.square(got - expected).sum() < 1e-3 * np.square(expected).sum()
    state = {name: value for name, value in net.state_dict().items() if name != "scale"}
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(UsageError, match="must hold buffer 'scale'"):
        shrink(job, tmp_path / "less.safetensors", tmp_path / "less.shrunk")


def test_an_interrupted_run_leaves_nothing(weights: Path, tmp_path: Path) -> None:
    class Impatient:
        def stage(self, title: str) -> None: ...
        def say(self, text: str) -> None: ...
        def progress(self, done: int, total: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrink(streamed.job(streamed.llama), weights, tmp_path / "net.shrunk", events=Impatient())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shrunk(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with half of the hidden units."""
    folder = tmp_path_factory.mktemp("shrunk") / "net.shrunk"
    return shrink(streamed.job(streamed.llama), weights, folder, scheme="int8-weights", prune=0.5, threads=1).path


def test_what_is_written_is_an_artifact_like_any_other(net: nn.Module, shrunk: Path) -> None:
    account = json.loads((shrunk / "shrunk.json").read_text())
    assert account["latency_s"]["median"] > 0 and account["threads"] == 1
    artifact = open_artifact(shrunk)
    claimed = artifact.measurements["optimized"]
    assert artifact.plan.widths and set(artifact.plan.widths.values()) == {96}
    assert len(artifact.plan.precisions) == 16 and set(artifact.plan.precisions.values()) == {"int8-weights"}
    assert claimed.macs < macs(analyse(capture(net, (streamed.tokens()[:1],)))) and claimed.size_bytes == account["bytes_after"]
    assert claimed.sqnr_db is not None and claimed.sqnr_db > 30
    tokens = streamed.tokens()[42:45]
    got = planish.load(shrunk)(tokens)
    assert loss(got.numpy(), net, tokens) == pytest.approx(loss(outputs(shrunk / "model.onnx", tokens, net), net, tokens), rel=1e-3)
    found = planish.verify(shrunk, streamed.job(lambda: pytest.fail("the original was built")))
    assert found.holds and any("none is claimed" in said for said in found.findings), found.findings
    with pytest.raises(ArtifactError, match="keeps its weights in"):
        artifact.weights()
    with pytest.raises(ArtifactError, match=r"shrunk\.json says what was done"):
        read_summary(shrunk)


def test_an_artifact_is_replaced_when_that_is_asked_for(shrunk: Path, weights: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite"):
        shrink(streamed.job(streamed.llama), weights, shrunk)
    before = open_artifact(shrunk).plan
    found = shrink(streamed.job(streamed.llama), weights, shrunk, scheme="int8-weights", prune=0.5, rounding="nearest", overwrite=True)
    assert open_artifact(found.path).plan != before
    assert not [file for file in shrunk.parent.iterdir() if file != shrunk]


@pytest.mark.parametrize("fault", ["it cannot run", "it computes something else"])
def test_what_cannot_run_is_left_beside_and_named(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def refuse(*_: object) -> object:
        raise RuntimeFailed("out of memory", "onnxruntime:cpu, model.onnx: no memory")

    if fault == "it cannot run":
        monkeypatch.setattr("planish.streaming.judge.Probe.open", refuse)
    else:
        monkeypatch.setattr("planish.streaming.judge.outputs_of", lambda _, split: [np.zeros((split.n, 16, 64), np.float32)])
    with pytest.raises(RuntimeFailed, match=r"net\.shrunk\.unrun1") as raised:
        shrink(streamed.job(streamed.llama), weights, tmp_path / "net.shrunk")
    assert raised.value.kind == ("out of memory" if fault == "it cannot run" else "mismatch")
    assert [file.name for file in tmp_path.iterdir()] == ["net.shrunk.unrun1"]
    assert sorted(file.name for file in (tmp_path / "net.shrunk.unrun1").iterdir()) == ["model.onnx", "model.onnx.data"]


class Odd(nn.Module):
    """A small net with a head, and what a case does with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head, self.last = nn.Linear(32, 50, bias=False), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.full((3,), 7.0))
        if kind == "tied, in one part":
            self.head.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> object:
        inner = self.down(torch.relu(self.up(self.words(x))))
        logits = self.head(inner)
        cases = {
            "a parameter is given back": lambda: (logits, self.bias),
            "tied, in one part": lambda: (self.last(inner + 2 * self.words(x)), logits),
            "masked logits": lambda: logits.masked_fill(torch.arange(50) > 45, -torch.inf),
            "flat": lambda: logits.view(-1, 50),
            "one number": logits.mean,
            "classes": lambda: logits.argmax(-1),
        }
        return cases[self.kind]()


def odd(kind: str, folder: Path) -> tuple[nn.Module, planish.Workload, Path]:
    torch.manual_seed(0)
    net, inputs = Odd(kind).eval(), torch.randint(0, 50, (32, 6), generator=torch.Generator().manual_seed(1))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(state, folder / "net.safetensors")
    job = planish.Workload(model=lambda: Odd(kind), example_inputs=(inputs[:1],), calibration=[inputs], name="odd")
    return net, job, folder / "net.safetensors"


@pytest.mark.parametrize("kind", ["a parameter is given back", "tied, in one part", "masked logits"])
def test_unusual_nets_come_out_right(kind: str, tmp_path: Path) -> None:
    net, job, file = odd(kind, tmp_path)
    found = shrink(job, file, tmp_path / "net.shrunk", scheme="int8-weights", threads=1)
    assert found.held_out == 4 and found.cosine is not None and found.cosine > 0.99
    inputs = torch.arange(18).view(3, 6)
    with torch.no_grad():
        expected, got = net(inputs), planish.load(found.path)(inputs)
    for one, other in zip(*((of if isinstance(of, tuple) else (of,)) for of in (expected, got)), strict=True):
        one = one.detach()
        assert torch.equal(one.isinf(), other.isinf())
        wanted, is_finite = one.double()[one.isfinite()], one.isfinite()
        assert float((wanted - other.double()[is_finite]).square().sum()) < 0.01 * float(wanted.square().sum())


@pytest.mark.parametrize("kind", ["flat", "one number", "classes"])
def test_a_net_that_cannot_be_judged_is_refused_before_the_work(kind: str, tmp_path: Path) -> None:
    _, job, file = odd(kind, tmp_path)
    with pytest.raises(UsageError, match="first output must be floats"):
        shrink(job, file, tmp_path / "net.shrunk")
    assert [one.name for one in tmp_path.iterdir()] == ["net.safetensors"]


def test_what_cannot_be_written_is_left_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, job, file = odd("masked logits", tmp_path)
    out = tmp_path / "net.shrunk"

    class Meanwhile:
        def say(self, text: str) -> None: ...
        def progress(self, done: int, total: int) -> None: ...
        def stage(self, title: str) -> None:
            if title == "measuring":
                out.mkdir()

    with pytest.raises(RuntimeFailed, match=r"already there.*net\.shrunk\.unrun1"):
        shrink(job, file, out, scheme="int8-weights", threads=1, events=Meanwhile())
    out.rmdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("planish.artifact.writing._put", full)
    with pytest.raises(RuntimeFailed, match=r"No space left.*net\.shrunk\.unrun2"):
        shrink(job, file, out, scheme="int8-weights", threads=1)
    for number in (1, 2):
        assert {"model.onnx", "model.onnx.data", "shrunk.json"} <= {one.name for one in (tmp_path / f"net.shrunk.unrun{number}").iterdir()}
    assert not out.exists()


def test_types_that_are_not_read_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="as F8_E4M3, which is not read"):
        shrink(streamed.job(streamed.llama), _spoil(weights, tmp_path, UP, torch.zeros(192, 64).to(torch.float8_e4m3fn)), tmp_path / "out")


def test_bench_does_not_set_it_beside_random_weights(shrunk: Path) -> None:
    with pytest.raises(UsageError, match="original need not fit"):
        bench(streamed.job(streamed.llama), [shrunk])
