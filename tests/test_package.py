"""The package as a whole: light imports, imports that form a tree, every file says what it is, public names exist."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import planish

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "planish"
HEAVY = ("torch", "onnxruntime", "openvino", "onnx", "sklearn", "scipy", "optuna", "plotly", "jinja2", "rich", "sqlalchemy", "transformers")


def loaded_after(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after a statement."""
    script = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import planish",
        "import planish.cli",
        "import planish; planish.Budget, planish.Plan, planish.Target, planish.Estimate, planish.PlanishError",
        "import planish; planish.load, planish.Artifact",
        "import planish.runtimes.contract",
        "import planish.measure.machine, planish.measure.child",
        "import planish.result, planish.report.terminal",
    ],
)
def test_imports_load_nothing_heavy(statement: str) -> None:
    assert loaded_after(statement) == set()


def test_a_workload_can_be_described_without_torch() -> None:
    assert "torch" not in loaded_after("import planish; planish.Workload")


def test_every_public_name_exists() -> None:
    for name in planish.__all__:
        assert getattr(planish, name) is not None
    assert set(planish.__all__) <= set(dir(planish))
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        planish.optimise  # noqa: B018


def test_no_submodule_shadows_a_public_function() -> None:
    modules = {path.stem for path in SOURCE.iterdir()}
    assert modules & (set(planish.__all__) - {"__version__"}) == set()


def test_every_file_says_what_it_is() -> None:
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        first = path.read_text(encoding="utf-8").splitlines()[:1]
        assert first and first[0].startswith('"""'), path


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(names) == sorted(set(names))


def imports_of(path: Path) -> set[str]:
    """What a file imports at its top level, as dotted names."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_top_level_imports_have_no_circles() -> None:
    files = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCE.rglob("*.py")
    }
    edges = {name: {other for other in imports_of(path) if other in files and other != name} for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle of imports: {' > '.join((*way, name))}"
        if name not in done:
            for below in sorted(edges.get(name, ())):
                visit(below, (*way, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_minimum_versions_exclude_known_holes() -> None:
    """torch before 2.10 and onnx before 1.21 have known holes; no torch above the tested one is pulled in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {line.split(">=")[0]: line for line in project["dependencies"]}
    assert wanted["torch"] == "torch>=2.10,<=2.13"
    assert wanted["onnx"] == "onnx>=1.21"
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pinned["torch"] == "2.13.0"
    assert {name.split("[")[0].lower() for name in wanted} <= {name.lower() for name in pinned}
