"""`deploy.py`: the few lines that run an artifact with its runtime and nothing else."""

from __future__ import annotations

from planish.signature import Signature
from planish.target import Target

_ONNXRUNTIME = '''\
"""Runs this artifact with numpy and onnxruntime alone: predict({inputs}) gives {outputs}."""
from pathlib import Path
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = {threads}, 1
session = ort.InferenceSession(str(Path(__file__).with_name({model!r})), options, providers=["CPUExecutionProvider"])
def predict(*arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays in the order {inputs}: {shapes}."""
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays, strict=True)))
'''
_OPENVINO = '''\
"""Runs this artifact with numpy and openvino alone: predict({inputs}) gives {outputs}."""
from functools import lru_cache
from pathlib import Path
import numpy as np
import openvino as ov
settings = {{"INFERENCE_NUM_THREADS": {threads}, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": {floats!r}}}
core, path = ov.Core(), str(Path(__file__).with_name({model!r}))
@lru_cache(maxsize=8)
def compiled(*shapes):
    """A program for these shapes alone: it is quicker than one for any."""
    model = core.read_model(path)
    model.reshape(dict(enumerate(map(list, shapes))))
    return core.compile_model(model, "CPU", settings)
def predict(*arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays in the order {inputs}: {shapes}."""
    run = compiled(*(array.shape for array in arrays))
    result = run(list(arrays))
    return [result[port] for port in run.outputs]
'''
_ANY = '''\
"""Runs this artifact with planish and {runtime}: predict({inputs}) gives {outputs}."""
from pathlib import Path
import planish
model = planish.load(Path(__file__).parent, threads={threads})
def predict(*arrays):
    """Arrays in the order {inputs}: {shapes}."""
    return model(*arrays)
'''
_TEMPLATES = {"onnxruntime": _ONNXRUNTIME, "openvino": _OPENVINO}


def deploy_script(target: Target, model: str, signature: Signature, floats: str = "fp32") -> str:
    """The text of `deploy.py`; torch's program files are ours, so these, and a runtime from another package, go through `planish.load`."""
    shapes = ", ".join(f"{spec.dtype} {'x'.join(str(size) for size in spec.shape)}" for spec in signature.inputs)
    return _TEMPLATES.get(target.runtime, _ANY).format(
        runtime=target.runtime,
        threads=target.threads,
        floats="f32" if floats == "fp32" else floats,
        model=model,
        inputs=", ".join(_plain(spec.name) for spec in signature.inputs),
        outputs=", ".join(_plain(spec.name) for spec in signature.outputs),
        shapes=_plain(shapes),
    )


def _plain(text: str) -> str:
    """`text` without anything that could end a docstring: names come from the user's model."""
    return "".join(c if c.isalnum() or c in "_ ,." else "_" for c in text)[:200]
