"""Four bits on a CIFAR ResNet: weights alone without training, and weights and activations trained back in at most eight epochs.

python benchmarks/bench_qat.py --data DIR
python benchmarks/bench_qat.py --data DIR --images 45000 --no-control

The first and the last operator compute in int8, as is usual. Accuracies are on the test images; drops are in points with the paired 95 % interval,
of W4A8 against the original, of W4A4 also against a dense control: the original, tuned with the same teacher on as many images. SQNR is that of the
exported artifact's outputs against the trained module's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cifar
import numpy as np
from numpy.typing import NDArray

from planish.data import Split
from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.measure.machine import facts
from planish.metrics import get_metric, paired_interval
from planish.plan import Recovery
from planish.quantize.apply import quantize
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.bits import bit_operations
from planish.runtimes.contract import get_runtime
from planish.target import Target
from planish.workbench import as_tensor, module_outputs

EPOCHS = 8


def main() -> None:
    """Print a line for each net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--images", type=int, default=EPOCHS * 45_000, help="of training, and of the control's")
    parser.add_argument("--rate", type=float, default=Recovery().learning_rate)
    parser.add_argument(
        "--runtime", nargs="+", default=["onnxruntime", "openvino"], help="of the artifacts; the first also places the quantizers"
    )
    parser.add_argument("--no-control", action="store_true", help="leave the dense control out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    job = cifar.job(arguments.depth, cifar.data_folder(arguments.data))
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    data = job.materialize(work / "data")
    assert data.test is not None and data.train is not None
    graph = capture(job.model_module(), job.example_inputs)
    analysis = analyse(graph)
    original = module_outputs(graph, data.test)
    show("original", original, original, data.test)

    runtime, target = get_runtime(arguments.runtime[0]), Target(arguments.runtime[0], threads=1, facts=facts())
    nets = {}
    for scheme in ("w4a8", "w4a4"):
        chosen = precisions(analysis, scheme)
        done = quantize(graph, analysis, chosen, runtime, target, data.calibration)
        assert not done.skipped, done.skipped
        nets[scheme] = done.graph
        show(f"{scheme} untrained", module_outputs(done.graph, data.test), original, data.test)
        whole, left = bit_operations(analysis), bit_operations(analysis, chosen)
        print(f"{'':20s} {whole / left:.1f}x fewer bit operations: {whole / 1e9:.4g} G to {left / 1e9:.4g} G", flush=True)

    teacher = Teacher(graph, data.train, work)
    settings = Recovery(samples=arguments.images, learning_rate=arguments.rate)
    net = nets["w4a4"]
    report = recover(net, teacher, job, data, settings, arguments.seed)
    trained = module_outputs(net, data.test)
    show("w4a4 trained", trained, original, data.test)
    assert report.fit is not None
    print(
        f"{report.samples} images, {report.fit.samples_per_s:.0f} images/s, kept {report.fit.kept}, loss {report.loss_before:.4f} -> "
        f"{report.loss_after:.4f}",
        flush=True,
    )
    for name in arguments.runtime:
        exported(net, name, data.test, trained, work)
    if not arguments.no_control:
        control = graph.copy()
        recover(control, teacher, job, data, settings, arguments.seed, is_control=True)
        tuned = module_outputs(control, data.test)
        show("dense control", tuned, original, data.test)
        show("w4a4 over control", trained, tuned, data.test)


def precisions(analysis: Analysis, scheme: str) -> dict[str, str]:
    """`scheme` for all convolutions and linear maps but the first and the last, which get int8."""
    names = [name for name, found in analysis.operators.items() if found.kind in ("conv", "linear")]
    return {name: "int8" if name in (names[0], names[-1]) else scheme for name in names}


def exported(net: Graph, name: str, split: Split, expected: list[NDArray[np.float32]], work: Path) -> None:
    """Print the SQNR of a runtime's artifact against the module it was made of."""
    runtime = get_runtime(name)
    (work / name).mkdir()
    session = runtime.open(runtime.export(net, work / name), net.signature, Target(name, threads=1, facts=facts()))
    found = np.concatenate([session.run(list(inputs))[0] for inputs, _ in split.batches(100)])
    session.close()
    show(f"w4a4 in {name}", [found], expected, split)
    print(f"{'':20s} SQNR against the module {sqnr_db(as_tensor(expected[0]), as_tensor(found)):.1f} dB", flush=True)


def show(name: str, outputs: list[NDArray[np.float32]], reference: list[NDArray[np.float32]], split: Split) -> None:
    """A line: accuracy, and the drop from a reference."""
    assert split.targets is not None
    accuracy = get_metric("accuracy")
    lost = paired_interval(accuracy, reference, outputs, split.targets)
    drop, low, high = (100 * value for value in lost)
    print(f"{name:20s} accuracy {accuracy.score(outputs, split.targets):.4f}  drop {drop:+.2f} ({low:+.2f} to {high:+.2f})", flush=True)


if __name__ == "__main__":
    main()
