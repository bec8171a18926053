"""Int8 after training on a CIFAR ResNet: planish beside NNCF and ONNX Runtime, from the same calibration images, in both runtimes.

python benchmarks/bench_ptq.py --data DIR --depth 20
python benchmarks/bench_ptq.py --data DIR --depth 56 --seeds 3 --rounding gptq

Nobody trains: each tool gets 300 images, others for each seed. Agreement is the share of test images on which the artifact's answer is the
fp32 net's; differences are paired over images, with 95 % intervals, of one seed and of all. Latencies are interleaved, at batch 1 and 32.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cifar
import numpy as np
import peers
from numpy.typing import NDArray

from planish import registry
from planish.data import Data, Split
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.measure.latency import interleaved, ratio
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.quantize.apply import quantize
from planish.quantize.subjects import everywhere
from planish.runtimes.contract import get_runtime
from planish.target import Target
from planish.workbench import outputs_of

IMAGES = 300
PEERS = {"planish openvino": "NNCF openvino", "planish onnxruntime": "quantize_static onnxruntime"}

Files = dict[str, tuple[Target, Path]]


def main() -> None:
    """Print a line for each tool and seed, the differences, and the latencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--seeds", type=int, default=3, help="sets of calibration images")
    parser.add_argument("--observer", default="mse")
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    job = cifar.job(arguments.depth, cifar.data_folder(arguments.data), calibration=arguments.seeds * IMAGES)
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    data = job.materialize(work / "data")
    graph = capture(job.model_module(), job.example_inputs)
    analysis = analyse(graph)
    targets = {target.runtime: target for target in available_targets("cpu", arguments.threads)}
    original: Files = {}
    for name in ("openvino", "onnxruntime"):
        (work / name).mkdir()
        original[f"fp32 {name}"] = targets[name], get_runtime(name).export(graph, work / name)
    expected = answers(original["fp32 openvino"], graph, data)
    print(
        f"{machine().processor}, ResNet-{arguments.depth}, {len(expected)} test images, observer {arguments.observer}, {arguments.rounding}"
    )
    equal: dict[str, list[NDArray[np.bool_]]] = {}
    files = original
    for seed in range(arguments.seeds):
        images = data.calibration.inputs[0][seed * IMAGES : (seed + 1) * IMAGES]
        (folder := work / str(seed)).mkdir()
        files = original | made(graph, analysis, targets, original["fp32 onnxruntime"][1], images, folder, arguments)
        for name, file in files.items():
            if name not in original:
                found = answers(file, graph, data)
                equal.setdefault(name, []).append(found == expected)
                right = np.mean(found == targets_of(data))
                print(f"seed {seed}: {name:28s} agreement {np.mean(found == expected):.4f}, accuracy {right:.4f}", flush=True)
    for ours, theirs in PEERS.items():
        each = [compared(one, two) for one, two in zip(equal[ours], equal[theirs], strict=True)]
        whole = compared(np.concatenate(equal[ours]), np.concatenate(equal[theirs]), arguments.seeds)
        print(f"{ours} over {theirs}: {shown(whole)} points of agreement; by seed {'; '.join(shown(one) for one in each)}")
    for batch in (1, 32):
        timed(files, graph, data, batch)


def made(
    graph: Graph,
    analysis: Analysis,
    targets: dict[str, Target],
    model: Path,
    images: NDArray[np.float32],
    folder: Path,
    arguments: argparse.Namespace,
) -> Files:
    """What each tool makes of the net with these calibration images."""
    entry = graph.signature.inputs[0].name
    reduce_range = targets["onnxruntime"].weight_range < 127
    found = {
        "NNCF openvino": (targets["openvino"], peers.nncf_int8(model, images, folder / "nncf.xml", entry)),
        "quantize_static onnxruntime": (
            targets["onnxruntime"],
            peers.onnxruntime_int8(model, images, folder / "static.onnx", entry, reduce_range),
        ),
    }
    precisions = everywhere(graph, analysis, registry.get("scheme", "int8"))
    for name in ("openvino", "onnxruntime"):
        runtime, target = get_runtime(name), targets[name]
        split = Split([images], None, len(images))
        done = quantize(
            graph, analysis, precisions, runtime, target, split, arguments.observer, rounding=arguments.rounding, equalization="smooth"
        )
        (folder / name).mkdir()
        found[f"planish {name}"] = target, runtime.export(done.graph, folder / name)
    return found


def answers(file: tuple[Target, Path], graph: Graph, data: Data) -> NDArray[np.int64]:
    """The class that an artifact names for each test image."""
    assert data.test is not None
    probe = Probe.open(*file, graph.signature)
    (logits,) = outputs_of(probe, data.test)
    probe.close()
    return np.asarray(logits.argmax(1))


def targets_of(data: Data) -> NDArray[np.int64]:
    """The labels of the test images."""
    assert data.test is not None and data.test.targets is not None
    return np.asarray(data.test.targets)


def compared(ours: NDArray[np.bool_], theirs: NDArray[np.bool_], repeats: int = 1) -> tuple[float, float, float]:
    """How many points more agree, with the 95 % bootstrap interval over images; the images of `repeats` seeds are drawn together."""
    difference = (ours.astype(float) - theirs).reshape(repeats, -1).mean(0)
    drawn = np.random.default_rng(0).integers(len(difference), size=(2000, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), (0.025, 0.975))
    return 100 * float(difference.mean()), 100 * float(low), 100 * float(high)


def shown(interval: tuple[float, float, float]) -> str:
    """A difference and its interval, in points."""
    return f"{interval[0]:+.2f} ({interval[1]:+.2f} to {interval[2]:+.2f})"


def timed(files: Files, graph: Graph, data: Data, batch: int) -> None:
    """Print the latencies of all files, interleaved, at a batch."""
    assert data.test is not None
    opened = {name: Probe.open(target, path, graph.signature) for name, (target, path) in files.items()}
    example = [np.ascontiguousarray(array[:batch]) for array in data.test.inputs]
    timings = interleaved(opened, example, seconds=5.0)
    for name, timing in timings.items():
        faster = ratio(timings["fp32 openvino"], timing)
        print(
            f"batch {batch:2d}: {name:28s} {timing.latency_s.median * 1e6:7.0f} µs, {faster.median:5.2f}x "
            f"({faster.low:.2f} to {faster.high:.2f}) OpenVINO's fp32"
        )
    for probe in opened.values():
        probe.close()


if __name__ == "__main__":
    main()
