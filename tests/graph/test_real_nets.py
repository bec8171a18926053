"""Real nets under the contract of the families: groups, surgery equals masking, exported equals module, in bounded time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import parity
import real_nets
from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.surgery import prune

pytestmark = pytest.mark.slow

GROUPS = {
    # the stem, four streams, and two inner widths in each of 16 blocks; with excitation a third
    "resnet50": 37,
    "seresnet50": 53,
    "resnext50_32x4d": 37,
    # the stem, what each of 58 layers squeezes to and what it adds, three transitions
    "densenet121": 120,
    # the channels of six convolutions
    "crepe": 6,
    "resemblyzer": 3,
    # in each of six layers the heads, the places of queries and keys, those of values, and the inner width; the stream is the output
    "minilm": 24,
    # frequencies, four convolutions, cells
    "silero": 6,
}
_ANALYSED_S = 60.0


@pytest.mark.parametrize("name", list(real_nets.PACKAGES))
def test_a_real_net_is_analysed_pruned_and_exported(name: str, tmp_path: Path) -> None:
    if why := real_nets.missing(name):
        pytest.skip(why)
    net = real_nets.build(name)
    graph = capture(net.module, net.inputs(2), net.state)
    began = time.process_time()
    analysis = analyse(graph)
    assert time.process_time() - began < _ANALYSED_S
    assert len(analysis.groups) == GROUPS.get(name, len(analysis.groups)) > 0
    assert not analysis.unknown

    removed = parity.at_random(analysis, 0.3)
    error, effect = parity.surgery(graph, analysis, removed, graph.signature.flatten(net.inputs(parity.batches(graph)[:2][-1])))
    assert error < parity.SURGERY
    assert effect > 1e-3, "nothing that matters was removed"
    for smaller in (graph, prune(graph, analysis, removed).graph):
        for batch, error in parity.exported(smaller, net.inputs, tmp_path / "net.onnx").items():
            # Eighty random layers may magnify what rounding does to the first: what one change of the input does bounds it.
            assert error < parity.EXPORT or error < 2 * parity.noise(smaller, net.inputs(batch)) < 1e-2, batch


def test_silero_as_described_computes_what_the_published_model_does() -> None:
    if why := real_nets.missing("silero"):
        pytest.skip(why)
    net = real_nets.build("silero").module
    reference = np.load(Path(os.environ["PLANISH_DATA"]) / "silero_vad_16k_reference.npz")
    before, h, c = torch.zeros(1, 64), torch.zeros(1, 128), torch.zeros(1, 128)
    found = []
    for chunk in torch.from_numpy(reference["audio"].astype(np.float32))[:, None]:
        with torch.no_grad():
            out = net(torch.cat([before, chunk], 1), h, c)
        before, h, c = chunk[:, -64:], out["h_next"], out["c_next"]
        found.append(float(out["probability"]))
    np.testing.assert_allclose(found, reference["probability"], atol=1e-5)
    np.testing.assert_allclose(h[0], reference["last_h"], atol=1e-5)
    np.testing.assert_allclose(c[0], reference["last_c"], atol=1e-4)
