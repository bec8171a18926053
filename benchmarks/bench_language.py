"""A small GPT-2 over characters with its linear maps in int4: what each rounding leaves of its perplexity, and of its bytes.

python benchmarks/bench_language.py --data DIR --minutes 8 --cache DIR
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path

import cifar
import language
import numpy as np
import torch

from planish import registry
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.measure.machine import machine
from planish.measure.memory import size_bytes
from planish.quantize.apply import quantize
from planish.quantize.subjects import unsupported
from planish.runtimes.contract import get_runtime
from planish.target import Target

RUNTIME = "onnxruntime"


def precisions(graph: Graph, analysis: Analysis) -> dict[str, str]:
    """Linear maps in int4, but the embeddings and the tied output layer, which is the most sensitive, in int8."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    tied = {found.weight for found in analysis.operators.values() if found.kind == "embedding"}
    chosen = {}
    for name, found in analysis.operators.items():
        scheme = "int8-weights" if found.weight in tied else "int4-weights"
        if not unsupported(nodes[found.node], registry.get("scheme", scheme)):
            chosen[name] = scheme
    return chosen


def judged(graph: Graph, rows: torch.Tensor, folder: Path) -> tuple[torch.Tensor, int]:
    """The logits that the exported file gives in its runtime, and its bytes."""
    folder.mkdir()
    runtime = get_runtime(RUNTIME)
    path = runtime.export(graph, folder)
    session = runtime.open(path, graph.signature, Target(RUNTIME))
    return language.logits(lambda tokens: session.run([np.ascontiguousarray(tokens)])[0], rows), size_bytes(path)


def main() -> None:
    """Train or load the net, quantize it with each rounding, export and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with tinyshakespeare.txt; PLANISH_DATA by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training")
    parser.add_argument("--cache", type=Path, default=None, help="folder where the trained net is kept; none by default")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128, help="stretches of text that the rounding sees")
    parser.add_argument("--judged", type=int, default=200, help="held-out stretches")
    parser.add_argument("--roundings", default="nearest,gptq")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    text = language.Text.read(cifar.data_folder(arguments.data) / "tinyshakespeare.txt")
    model = language.trained(text, arguments.cache or work, arguments.minutes, arguments.layers, arguments.width)
    rows = text.judged(arguments.judged)
    calibration = text.drawn(arguments.samples, torch.Generator().manual_seed(2)).numpy()
    graph = capture(model, (torch.from_numpy(calibration[:2]),))
    analysis = analyse(graph)
    print(f"{machine().processor}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(rows)} stretches of {language.CONTEXT}")
    original, whole = judged(graph, rows, work / "fp32")
    before = language.perplexity(original, rows)
    print(f"{'fp32':14s} perplexity {before:.4f}  {whole:>10,} bytes")
    carried_out = functools.partial(
        quantize,
        graph,
        analysis,
        precisions(graph, analysis),
        get_runtime(RUNTIME),
        Target(RUNTIME),
        Split([calibration], None, len(calibration)),
        samples=arguments.samples,
    )
    for name in arguments.roundings.split(","):
        began = time.monotonic()
        done = carried_out(rounding=name)
        seconds = time.monotonic() - began
        found, held = judged(done.graph, rows, work / name)
        after = language.perplexity(found, rows)
        print(
            f"int4 {name:9s} perplexity {after:.4f}  {100 * (after / before - 1):+.2f} %  KL {language.divergence(original, found):.2e}  {held:>10,} bytes  {held / whole:.3f}x  "
            f"{seconds:.1f} s  to nearest: {', '.join(done.nearest) or 'none'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
