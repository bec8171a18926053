"""Masks on a CIFAR ResNet: every method at several patterns, right after masking and, with `--images`, after one recovery for all.

python benchmarks/bench_masks.py --data DIR --depth 20
python benchmarks/bench_masks.py --data DIR --depth 20 --only sparsegpt --patterns 75% 90% --images 20000

Every convolution but the first, and the linear head, are masked alike. Accuracies are on the test images, with the drop's paired 95 % interval
against the original; the size is that of the ONNX file against the original's, the latency ONNX Runtime's with one thread, interleaved.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import cifar
import numpy as np
import torch

from planish import registry
from planish.data import Split
from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.replay import Replay
from planish.measure.latency import interleaved, ratio
from planish.measure.machine import facts
from planish.measure.memory import size_bytes
from planish.measure.probe import Probe
from planish.metrics import get_metric, paired_interval
from planish.plan import Recovery
from planish.prune.masks.apply import mask_
from planish.prune.masks.subjects import masked_weights, subjects
from planish.runtimes.contract import get_runtime
from planish.target import Target


def main() -> None:
    """Print a line for every method and pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--patterns", nargs="+", default=["50%", "75%", "90%", "2:4"])
    parser.add_argument("--only", nargs="+", default=registry.names("masking"), help="methods")
    parser.add_argument("--images", type=int, default=0, help="of recovery; 0: none")
    parser.add_argument("--runtime", default="onnxruntime")
    arguments = parser.parse_args()

    job = cifar.job(arguments.depth, cifar.data_folder(arguments.data))
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    data = job.materialize(work / "data")
    assert data.test is not None and data.train is not None
    graph = capture(job.model_module(), job.example_inputs)
    analysis = analyse(graph)
    runtime, target = get_runtime(arguments.runtime), Target(arguments.runtime, threads=1, facts=facts())
    (work / "original").mkdir()
    before = runtime.export(graph, work / "original")
    example = [np.ascontiguousarray(value.numpy()) for value in graph.example]
    accuracy, original = get_metric("accuracy"), outputs(graph, data.test)
    names = [name for name, subject in subjects(Replay(graph.module), analysis).items() if subject.weight.shape[1] > 3]
    teacher = Teacher(graph, data.train, work) if arguments.images else None
    print(f"ResNet-{arguments.depth}: {accuracy.score(original, data.test.targets):.4f}, {size_bytes(before)} bytes", flush=True)
    for pattern in arguments.patterns:
        for method in arguments.only:
            masked, masks = graph.copy(), dict.fromkeys(names, pattern)
            began = time.monotonic()
            mask_(masked, analysis, masks, method, data.calibration)
            seconds = time.monotonic() - began
            if teacher is not None:
                at_once = accuracy.score(outputs(masked, data.test), data.test.targets)
                recover(masked, teacher, job, data, Recovery(samples=arguments.images), masked=masked_weights(analysis, masks))
                print(f"  {pattern:4s} {method:10s} {at_once:.4f} at once, then", flush=True)
            after = outputs(masked, data.test)
            lost = [100 * value for value in paired_interval(accuracy, original, after, data.test.targets)[:3]]
            folder = work / f"{method} {pattern}".replace(":", " of ")
            folder.mkdir()
            path = runtime.export(masked, folder)
            with Probe.open(target, path, graph.signature) as one, Probe.open(target, before, graph.signature) as other:
                found = interleaved({"masked": one, "original": other}, example, seconds=1.0)
            latency = ratio(found["masked"], found["original"])
            print(
                f"  {pattern:4s} {method:10s} {accuracy.score(after, data.test.targets):.4f}  lost {lost[0]:+6.2f} ({lost[1]:+.2f} to "
                f"{lost[2]:+.2f})  size {size_bytes(path) / size_bytes(before):.3f}x  latency {latency.median:.2f}x ({latency.low:.2f} to "
                f"{latency.high:.2f})  masked in {seconds:.1f} s",
                flush=True,
            )


@torch.inference_mode()
def outputs(graph: Graph, split: Split) -> list[np.ndarray]:
    """The class logits of a graph on a split."""
    return [np.concatenate([graph.module(torch.from_numpy(inputs[0]))[0].numpy() for inputs, _ in split.batches(250)])]


if __name__ == "__main__":
    main()
