"""A Transformer whose weights are larger than the memory that its process may have, shrunk: sizes, memory, agreement and latency.

    python benchmarks/bench_streaming.py [--layers 24] [--width 1024] [--share 0.4]

Its weights are random, and written to a temporary folder; `--share` of their bytes is what the process may have besides its libraries, which is
too little to load them at once: that is tried too, and must fail.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests" / "streaming"
sys.path.insert(0, str(TESTS))

import streamed  # noqa: E402


def main() -> None:
    """Prints the model and its limit, then what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024, help="of the stream, and of the feed-forward layers")
    parser.add_argument("--share", type=float, default=0.4, help="of the weights' bytes that the process may have besides its libraries")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="planish-bench-") as folder:
        for name, layers, width in (("small", 2, 64), ("large", arguments.layers, arguments.width)):
            (Path(folder) / name).mkdir()
            size = streamed.write(Path(folder) / name / "model.safetensors", layers, width)
        limit = int(arguments.share * size)
        print(f"{arguments.layers} layers of {arguments.width}: weights {size / 1e6:.0f} MB, memory besides libraries {limit / 1e6:.0f} MB")

        def run(mode: str) -> subprocess.CompletedProcess[str]:
            sizes = (arguments.layers, arguments.width, limit)
            return subprocess.run(
                [sys.executable, streamed.__file__, mode, folder, *map(str, sizes)], capture_output=True, text=True, check=False
            )

        at_once = run("at once")
        print(f"loaded at once: {'fits' if at_once.returncode == 0 else at_once.stderr.strip().splitlines()[-1][-120:]}")
        done = run("shrink")
        if done.returncode:
            print(done.stderr.strip().splitlines()[-1])
            sys.exit(1)
        found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"shrunk: {found['bytes_before'] / 1e6:.0f} -> {found['bytes_after'] / 1e6:.0f} MB in {found['seconds']:.0f} s; cosine {found['cosine']:.4f}, "
        f"agreement {found['agreement']:.4f} on {found['held_out']} samples; {1e3 * found['latency_s']['median']:.1f} ms a call; "
        f"resident {found['memory_before_bytes'] / 1e6:.0f} MB before, {found['peak_memory_bytes'] / 1e6:.0f} MB at most"
    )


if __name__ == "__main__":
    main()
