"""Artifacts: written whole or not at all, checked by hash, loaded without torch, and nothing in them is unpickled."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import making
from planish.artifact import beside, check_output, default_folder, load, open_artifact, study_folder, writing
from planish.artifact.external import check_external_data
from planish.artifact.manifest import LARGEST_JSON, MANIFEST
from planish.errors import ArtifactError, DataError, MissingFile, OutputExists, UsageError
from planish.graph.capture import capture
from planish.measure.machine import machine
from planish.plan import Plan
from planish.report.file import read_summary
from planish.runtimes.contract import get_runtime
from planish.target import Target

WRITES_BYTECODE = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file below `folder`."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    making.artifact(tmp_path / "net.planish", overwrite=True)
    return tmp_path / "net.planish"


def test_a_result_from_before_there_were_diagnoses_is_read(tmp_path: Path) -> None:
    old = json.loads(msgspec.json.encode(making.summary(name="net")))
    del old["diagnosis"]
    making.artifact(tmp_path / "net.planish", result_json=json.dumps(old).encode())
    found = read_summary(tmp_path / "net.planish")
    assert found.diagnosis is None and found == making.summary(name="net", diagnosis=None)


def test_a_diagnosis_comes_back_as_it_was_written(folder: Path) -> None:
    assert read_summary(folder).diagnosis == making.diagnosis()


def test_what_was_written_comes_back(folder: Path) -> None:
    found = open_artifact(folder)
    assert found.plan.widths == {"a": 8}
    assert found.signature == making.SIGNATURE
    assert found.measurements["original"] == making.measurement()
    assert found.manifest.target.name == "onnxruntime:cpu"
    np.testing.assert_array_equal(found.weights()["weight"], making.WEIGHT)
    assert sorted(p.name for p in folder.iterdir()) == [
        "check",
        "deploy.py",
        "manifest.json",
        "measurements.json",
        "model.onnx",
        "plan.json",
        "result.json",
        "weights.safetensors",
    ]
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_it_answers_in_kind(folder: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    with load(folder, threads=1) as net:
        assert net.notes == ()
        np.testing.assert_allclose(net(x), x @ making.WEIGHT, rtol=1e-5)
        np.testing.assert_allclose(net(images=x), x @ making.WEIGHT, rtol=1e-5)
        np.testing.assert_allclose(net({"images": x}), x @ making.WEIGHT, rtol=1e-5)
        answer = net(torch.from_numpy(x).requires_grad_())
        assert isinstance(answer, torch.Tensor)
        np.testing.assert_allclose(answer.numpy(), x @ making.WEIGHT, rtol=1e-5)


def test_tuples_and_dicts_come_back_as_such(tmp_path: Path) -> None:
    for gives, kind in (("tuple", tuple), ("dict", dict)):
        signature = msgspec.structs.replace(making.SIGNATURE, gives=gives, takes="dict")
        making.artifact(tmp_path / f"{gives}.planish", signature=signature)
        with load(tmp_path / f"{gives}.planish") as net:
            answer = net({"images": np.ones((1, 4), np.float32)})
        assert isinstance(answer, kind)
        assert len(answer) == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (np.ones((2, 4)), "'images' must be float32; got float64"),
        (np.ones((2, 5), np.float32), "must have shape"),
        (np.ones((0, 4), np.float32), "'images' is empty"),
        ({"image": np.ones((2, 4), np.float32)}, r"missing \['images'\]"),
        ((np.ones(1), np.ones(1)), "takes 1 tensors"),
        (torch.ones(2, 4, dtype=torch.bfloat16), "bfloat16 have no numpy counterpart"),
        ("images", "got str"),
    ],
)
def test_wrong_inputs_are_named(folder: Path, given: object, text: str) -> None:
    with load(folder) as net, pytest.raises(DataError, match=text):
        net(given)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_must_be_a_positive_number(folder: Path, threads: object) -> None:
    with pytest.raises(UsageError, match="threads: give a whole number"):
        load(folder, threads=threads)  # type: ignore[arg-type]


def test_one_flipped_byte_anywhere_is_found(folder: Path) -> None:
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ArtifactError, match=file.name) as caught:
                open_artifact(folder)
            assert file.name == MANIFEST or "SHA-256" in str(caught.value)
        file.write_bytes(whole[:-1])
        with pytest.raises(ArtifactError, match=file.name):
            open_artifact(folder)
        file.write_bytes(whole)
    open_artifact(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"<!doctype html><p>no", b"\xff\xfe", b"[" * 100_000, b'{"format": 99}'])
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(folder)


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST, LARGEST_JSON + 1)
    with pytest.raises(ArtifactError, match="at most"):
        open_artifact(folder)


def test_missing_things_are_named(folder: Path) -> None:
    with pytest.raises(MissingFile, match=r"none\.planish does not exist"):
        load(folder.with_name("none.planish"))
    with pytest.raises(ArtifactError, match="is a file"):
        load(folder / MANIFEST)
    with pytest.raises(ArtifactError, match="is no artifact"):
        load(folder.parent)
    (folder / "plan.json").unlink()
    with pytest.raises(ArtifactError, match=r"plan\.json is missing"):
        load(folder)


def test_links_and_unknown_files_are_refused(folder: Path, tmp_path: Path) -> None:
    model = folder / "model.onnx"
    whole = model.read_bytes()
    elsewhere = tmp_path / "elsewhere.onnx"
    elsewhere.write_bytes(whole)
    for link in (os.symlink, os.link):
        model.unlink()
        link(elsewhere, model)
        with pytest.raises(ArtifactError, match=r"model\.onnx is a (symbolic|hard) link"):
            open_artifact(folder)
    model.unlink()
    model.write_bytes(whole)
    (folder / "weights.pt").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"weights\.pt is not in the manifest"):
        open_artifact(folder)
    (folder / "weights.pt").unlink()
    shutil.move(folder / "check", tmp_path / "check")
    os.symlink(tmp_path / "check", folder / "check")
    with pytest.raises(ArtifactError, match="symbolic link"):
        open_artifact(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "a\\b", "a\0b", "", "a//b", ".hidden", "x" * 300, "ä"])
def test_file_names_that_leave_the_artifact_are_refused(folder: Path, name: str) -> None:
    from planish.artifact.manifest import Entry, Manifest

    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    for changed in (
        msgspec.structs.replace(manifest, files=manifest.files | {name: Entry("0" * 64, 1)}),
        msgspec.structs.replace(manifest, model=name),
    ):
        (folder / MANIFEST).write_bytes(changed.encode())
        with pytest.raises(ArtifactError, match="file names are letters"):
            open_artifact(folder)


class Canary:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_no_pickle_is_ever_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = pickle.dumps(Canary(canary))
    array = np.empty(1, object)
    array[0] = Canary(canary)
    for name in ("weights.safetensors", "plan.json", "measurements.json", "result.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(evil)
        making.rewrite_manifest(folder)
        read = read_summary if name == "result.json" else lambda path: open_artifact(path).weights()
        with pytest.raises(ArtifactError, match=name.partition(".")[0]):
            read(folder)
        (folder / name).write_bytes(whole)
    np.save(folder / "check" / "input_0.npy", array, allow_pickle=True)
    making.rewrite_manifest(folder)
    with pytest.raises(ArtifactError, match=r"input_0\.npy is not a plain"):
        open_artifact(folder).check_arrays()
    (folder / "model.onnx").write_bytes(evil)
    making.rewrite_manifest(folder)
    with pytest.raises(ArtifactError, match=r"model\.onnx is not an ONNX file"):
        load(folder)
    assert not canary.exists()


@pytest.mark.parametrize("location", ["../x", "/etc/passwd", "a/../../b", "weights.bin", "", "check/input_0.npy"])
def test_external_data_must_be_listed_and_beside(tmp_path: Path, folder: Path, location: str) -> None:
    (folder / "model.onnx").write_bytes(making.model_bytes(external=location))
    making.rewrite_manifest(folder)
    with pytest.raises(ArtifactError, match="external data at"):
        open_artifact(folder)
    with pytest.raises(ArtifactError, match="external data at"):
        making.artifact(tmp_path / "new.planish", model_data=making.model_bytes(external=location))
    assert not (tmp_path / "new.planish").exists()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("offset", "99", "ends past"),
        ("length", "9" * 40, "needs offset and length"),
        ("offset", "-1", "needs offset"),
        ("script", "x", "with the key 'script'"),
    ],
)
def test_external_data_stays_in_bounds(tmp_path: Path, key: str, value: str, text: str) -> None:
    import onnx

    model = onnx.load_from_string(making.model_bytes(external="weights.bin"))
    model.graph.initializer[0].external_data.add(key=key, value=value)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=text):
        check_external_data(path, {"weights.bin": 48})


def test_listed_external_data_is_found_everywhere(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    outside = onnx.load_from_string(making.model_bytes(external="w.bin")).graph.initializer[0]
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=outside)], "inner", [], [])
    graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)], "outer", [], [])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    check_external_data(path, {"w.bin": 48})
    with pytest.raises(ArtifactError, match=r"external data at 'w\.bin'"):
        check_external_data(path, {})


@pytest.mark.parametrize("seed", range(20))
def test_a_fuzzed_model_gives_an_error_or_nothing(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(making.model_bytes())
    for at in rng.integers(0, len(data), 5):
        data[at] = rng.integers(0, 256)
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(data))
    with contextlib.suppress(ArtifactError):
        check_external_data(path, {})


def test_an_artifact_that_is_there_is_not_touched(folder: Path) -> None:
    before = tree(folder)
    with pytest.raises(OutputExists, match="--overwrite"):
        making.artifact(folder)
    assert tree(folder) == before


def test_overwriting_swaps_whole_artifacts(folder: Path) -> None:
    making.artifact(folder, name="second", overwrite=True)
    assert open_artifact(folder).manifest.name == "second"
    assert [p.name for p in folder.parent.iterdir() if "tmp" in p.name or "old" in p.name] == []


def test_overwriting_without_the_swap_of_linux(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    making.artifact(folder, name="second", overwrite=True)
    assert open_artifact(folder).manifest.name == "second"
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_only_artifacts_are_overwritten(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExists, match=r"thesis\.tex"):
        check_output(home, overwrite=True)
    (tmp_path / "file.planish").write_text("x")
    with pytest.raises(OutputExists, match="is a file"):
        check_output(tmp_path / "file.planish", overwrite=True)
    (tmp_path / "link.planish").symlink_to(home)
    with pytest.raises(OutputExists, match="symbolic link"):
        check_output(tmp_path / "link.planish", overwrite=True)
    broken = tmp_path / "broken.planish"
    broken.mkdir()
    (broken / MANIFEST).write_text("{}")
    check_output(broken, overwrite=True)
    check_output(tmp_path / "new" / "deep.planish")


@pytest.mark.parametrize("path", ["\0.planish", "/", "x" * 250])
def test_places_that_cannot_be(path: str) -> None:
    with pytest.raises(UsageError, match="out: "):
        check_output(Path(path))


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written"):
        check_output(tmp_path / "file" / "net.planish")


def test_a_place_that_takes_no_directory() -> None:
    with pytest.raises(UsageError, match=r"/proc/x\.planish could not be written|cannot be written to"):
        making.artifact(Path("/proc/x.planish"))


def test_a_full_disk_leaves_the_old_artifact(folder: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the middle, as it would there."""
    before = tree(folder)
    script = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(making.__file__).parent)!r})
        import numpy as np
        import making
        from pathlib import Path
        from planish.errors import ArtifactError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            making.artifact(Path({str(folder)!r}), weights={{"w": np.zeros(1 << 20, np.float32)}}, overwrite=True)
        except ArtifactError as err:
            print(err)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert "could not be written: File too large; what was there before is unchanged" in out.stdout
    assert tree(folder) == before
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_loading_needs_numpy_msgspec_and_the_runtime_only(folder: Path) -> None:
    script = f"""
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {{"torch", "onnx", "onnxscript", "safetensors", "scipy", "sklearn", "sqlalchemy", "optuna",
                                              "click", "rich", "jinja2", "plotly", "openvino", "cloudpickle", "platformdirs", "psutil"}}:
                    raise ImportError(name + " is not installed")
        sys.meta_path.insert(0, Missing())
        import numpy as np, planish
        net = planish.load({str(folder)!r}, threads=1)
        print(net(np.ones((1, 4), np.float32)).tolist())
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str((np.ones((1, 4), np.float32) @ making.WEIGHT).tolist())


def test_the_deploy_script_runs_by_itself(folder: Path) -> None:
    script = "import deploy, numpy, sys; print(deploy.predict(numpy.ones((1, 4), 'f'))[0].tolist()); print('planish' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True, env={"PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert out.stdout.split("\n")[:2] == [str((np.ones((1, 4), np.float32) @ making.WEIGHT).tolist()), "False"]
    assert len((folder / "deploy.py").read_text().splitlines()) <= 12


def test_the_deploy_script_of_a_torch_target_runs(tmp_path: Path) -> None:
    net = torch.nn.Linear(4, 3, bias=False)
    model = get_runtime("torch").export(capture(net, (torch.ones(2, 4),)), tmp_path)
    target = Target("torch", threads=1)
    x = torch.ones(2, 4)
    making.artifact(
        tmp_path / "net.planish", model=model, target=target, plan=Plan("torch:cpu"), check=([x.numpy()], [net(x).detach().numpy()])
    )
    script = "import deploy, numpy; print(deploy.predict(numpy.ones((1, 4), 'f'))[0].tolist())"
    for _ in range(2):
        out = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path / "net.planish", capture_output=True, text=True, check=False, env=WRITES_BYTECODE
        )
        assert out.returncode == 0, out.stderr
        np.testing.assert_allclose(ast.literal_eval(out.stdout), net(x[:1])[0].tolist(), rtol=1e-5)


def test_what_importing_the_deploy_script_leaves_is_no_change(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", "import deploy"], cwd=folder, check=True, env=WRITES_BYTECODE)
    assert (folder / "__pycache__").exists()
    open_artifact(folder)
    check_output(folder, overwrite=True)
    (folder / "__pycache__" / "numpy.pyc").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"numpy\.pyc is not in the manifest"):
        open_artifact(folder)


def test_hostile_tensor_names_cannot_leave_the_docstring(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(making.SIGNATURE.inputs[0], name='"""\nimport os; os.system("touch canary")\n"""')
    signature = msgspec.structs.replace(making.SIGNATURE, inputs=(spec,))
    found = making.artifact(tmp_path / "net.planish", signature=signature)
    text = (found.path / "deploy.py").read_text()
    harmless = (making.artifact(tmp_path / "harmless.planish").path / "deploy.py").read_text()
    kinds = [[type(node).__name__ for node in ast.parse(source).body] for source in (text, harmless)]
    assert kinds[0] == kinds[1]


def test_another_machine_is_noted_after_a_check(tmp_path: Path) -> None:
    other = msgspec.structs.replace(machine(), isa="neon")
    measured = {"original": making.measurement(), "optimized": making.measurement(machine=other, versions={"onnxruntime": "0.0.1"})}
    making.artifact(tmp_path / "net.planish", measurements=measured)
    with load(tmp_path / "net.planish") as net:
        assert any("made for neon" in note for note in net.notes)
        assert any("made with onnxruntime 0.0.1" in note for note in net.notes)
        assert any("agree to" in note for note in net.notes)


def test_another_machine_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    other = msgspec.structs.replace(machine(), isa="neon")
    inputs = np.ones((2, 4), np.float32)
    making.artifact(
        tmp_path / "net.planish",
        measurements={"original": making.measurement(), "optimized": making.measurement(machine=other)},
        check=([inputs], [inputs @ making.WEIGHT * 1.5]),
    )
    with pytest.raises(ArtifactError, match="agree to 10 dB only"):
        load(tmp_path / "net.planish")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("net", "net.planish"), ("../../etc", "etc.planish"), ("", "net.planish"), ("a b/c\0", "a_b_c.planish"), ("ü" * 300, "net.planish")],
)
def test_default_folders_stay_in_the_working_directory(name: str, wanted: str) -> None:
    assert default_folder(name) == Path(wanted)


def test_every_artifact_has_a_study_of_its_own() -> None:
    outs = ["out/net_0.5", "out/net_0.6", "out/net.planish", "out/net.planish.v2", "out/net"]
    wanted = ["net_0.5.study", "net_0.6.study", "net.study", "net.planish.v2.study", "net.study"]
    assert [study_folder(out) for out in outs] == [Path("out") / name for name in wanted]
    assert beside("net_0.5", ".html") == Path("net_0.5.html")


def test_write_refuses_links_as_model(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_bytes(making.model_bytes())
    (tmp_path / "model.onnx").symlink_to(tmp_path / "real.onnx")
    with pytest.raises(ArtifactError, match="symbolic link"):
        making.artifact(tmp_path / "net.planish", model=tmp_path / "model.onnx")
    assert not (tmp_path / "net.planish").exists()
