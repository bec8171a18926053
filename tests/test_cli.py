"""The command line: exit codes, one sentence on stderr, one object on stdout, no traceback, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import making
import planish
from planish import cli
from planish.errors import PlanishError, StudyError
from planish.result import Result

JOB = """
import torch, planish
net = torch.nn.Sequential(torch.nn.Linear(4, 3))
x = torch.randn(8, 4)
print("the job speaks on stdout")
job = planish.Workload(model=net, example_inputs=(x[:1],), calibration=[x], metric="agreement", name="net")
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A flow that notes how it was called and answers with a result that was prepared."""
    fake = types.ModuleType("planish.flow")
    calls: list[dict[str, Any]] = []
    answers: list[Any] = [Result(making.summary(), None, None)]

    def optimize(job: Any, **options: Any) -> Any:
        calls.append({"job": job, **options})
        options["events"].stage("measuring the original")
        options["events"].progress(1, 2)
        options["events"].say("a remark")
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return answers[0]

    def resume(out: Path, job: Any = None, **options: Any) -> Any:
        return optimize(job, out=out, **options)

    fake.__dict__.update(optimize=optimize, resume=resume, calls=calls, answers=answers)
    monkeypatch.setitem(sys.modules, "planish.flow", fake)
    monkeypatch.setattr(planish, "flow", fake, raising=False)
    return fake


def planish_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`planish ARGUMENTS` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "planish", *arguments], capture_output=True, text=True, check=False, **options)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "onnxruntime", "openvino", "sklearn", "scipy", "optuna", "plotly", "jinja2", "rich", "sqlalchemy")
    script = f"import sys; from planish.cli import main; main(['--help']); print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"

    def best(*arguments: str) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times.append(time.perf_counter() - began)
        return min(times)

    assert best("-m", "planish", "--help") < max(0.3, 12 * best("-c", "pass"))


@pytest.mark.parametrize("command", list(cli.cli.commands))
def test_every_command_has_an_example_and_the_common_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"planish {command}" in text.partition("Example")[2]
    for option in ("--json", "--seed", "--verbose", "--threads"):
        assert option in text


def test_the_design_s_options_exist() -> None:
    names = {name for parameter in cli.cli.commands["optimize"].params for name in parameter.opts}
    wanted = (
        "latency throughput size memory macs energy drop confidence target out search trials time-limit techniques keep saliency masking"
    )
    assert {f"--{name}" for name in wanted.split()} <= names
    assert {"--dry-run", "--overwrite", "--accept-nearest", "--control"} <= names
    assert "--fork" in {name for parameter in cli.cli.commands["resume"].params for name in parameter.opts}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["optimise"], "did you mean 'optimize'?"),
        (["optimize", "job.py", "--latncy", "0.5x"], "--latency"),
        (["optimize"], "JOB.PY"),
        (["optimize", "missing.py"], "does not exist; give the file"),
        (["optimize", "jobb.py"], "did you mean job.py?"),
        (["optimize", "page.html"], "web page"),
        (["optimize", "notes.txt"], "line 1 is not Python"),
        (["optimize", "data.bin"], "is not text"),
        (["optimize", "."], "is no file"),
        (["optimize", "nul.py"], "is not Python"),
        (["optimize", "empty.py"], "must define `job = planish.Workload(...)`; it defines none"),
        (["optimize", "wrong.py"], "its `job` is a int"),
        (["optimize", "fails.py"], "fails.py, line 2: ZeroDivisionError"),
        (["optimize", "leaves.py"], "ended the program with sys.exit(3)"),
        (["optimize", "job.py", "--latency=-1x"], "must be a finite number above zero"),
        (["optimize", "job.py", "--latency", "nan"], "give '5ms', '800us' or '0.5x'"),
        (["optimize", "job.py", "--latency", "5"], "a unit is missing"),
        (["optimize", "job.py", "--latency", "5MB"], "unknown unit 'MB'"),
        (["optimize", "job.py", "--latency", "2x"], "give one below 1"),
        (["optimize", "job.py", "--size", "0MB"], "above zero"),
        (["optimize", "job.py", "--drop", "lots"], "drop: give '1pt'"),
        (["optimize", "job.py", "--confidence", "95"], "confidence: give a share"),
        (["optimize", "job.py", "--target", "nowhere:cpu"], "no runtime named 'nowhere'"),
        (["optimize", "job.py", "--target", "opnvino:cpu"], "did you mean 'openvino'?"),
        (["optimize", "job.py", "--target", "openvino:gpu"], "this version drives 'cpu'"),
        (["optimize", "job.py", "--search", "sorcery"], "no search named 'sorcery'"),
        (["optimize", "job.py", "--saliency", "taylr"], "did you mean 'taylor' or 'taylor-first'?"),
        (["optimize", "job.py", "--masking", "wonda"], "no masking named 'wonda'; did you mean 'wanda'?"),
        (
            ["optimize", "job.py", "--masking", "wanda:4:2"],
            "a pattern is a share of zeros, as 75%, or N:M with N below M, as 2:4; got '4:2'",
        ),
        (["optimize", "job.py", "--techniques", "prune,quantise"], "did you mean 'quantize'?"),
        (["optimize", "job.py", "--techniques", ","], "at least one of"),
        (["optimize", "job.py", "--trials", "0"], "--trials"),
        (["optimize", "job.py", "--time-limit", "nan"], "seconds above zero"),
        (["optimize", "job.py", "--threads", "0"], "--threads"),
        (["optimize", "job.py", "--out", "there.planish"], "already there; give --overwrite"),
        (["optimize", "job.py", "--out", "home", "--overwrite"], "holds 'thesis.tex'"),
        (["verify", "broken.planish"], "broken.planish/manifest.json is not the manifest"),
        (["verify", "none.planish"], "none.planish does not exist"),
        (["report", "broken.planish"], "broken.planish/manifest.json is not the manifest"),
        (["report", "page.html"], "is a file"),
        (["bench", "job.py", "none.planish"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, job: Path, flow: types.ModuleType, capfd: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    files = {
        "page.html": "<!DOCTYPE html><p>404",
        "notes.txt": "this is no model",
        "empty.py": "x = 1\n",
        "wrong.py": "job = 3\n",
        "fails.py": "x = 1\nx / 0\n",
        "leaves.py": "import sys\nsys.exit(3)\n",
        "nul.py": "x = '\0'\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe\x00")
    for name in ("broken.planish", "there.planish"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    before = {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for as_json in (False, True):
        with making.working_in(tmp_path):
            assert cli.main([*arguments, *(["--json"] if as_json else [])]) == 2
        out, err = capfd.readouterr()
        assert text in err.splitlines()[-1]
        assert "Traceback" not in err
        if as_json:
            answer = json.loads(out)
            assert answer["exit_code"] == 2
            assert text in answer["error"]
        else:
            assert out in ("", "the job speaks on stdout\n")
    assert flow.calls == []
    assert {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_optimize_hands_everything_on(job: Path, flow: types.ModuleType, tmp_path: Path) -> None:
    arguments = "--target openvino:cpu --latency 5ms --size 0.25x --drop 1% --confidence 0.95 --search random --trials 7 --time-limit 60"
    more = "--techniques prune,quantize --keep head.* --keep stem.* --saliency taylor --masking wanda --control --overwrite --accept-nearest --seed 3 --threads 2"
    out = tmp_path / "x.planish"
    assert cli.main(["optimize", str(job), "--out", str(out), *arguments.split(), *more.split()]) == 0
    (call,) = flow.calls
    assert call["job"].name == "net"
    assert call["budget"] == planish.Budget(latency="5ms", size="0.25x", drop="1%", confidence=0.95)
    wanted = {
        "target": "openvino:cpu",
        "out": out,
        "search": "random",
        "trials": 7,
        "time_limit": 60.0,
        "techniques": ("prune", "quantize"),
        "keep": ("head.*", "stem.*"),
        "saliency": "taylor",
        "masking": "wanda",
        "control": True,
        "overwrite": True,
        "accept_nearest": True,
        "seed": 3,
        "threads": 2,
    }
    assert {name: call[name] for name in wanted} == wanted


def test_json_is_alone_on_stdout(job: Path, flow: types.ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["optimize", str(job), "--json", "--latency", "0.5x", "--out", str(tmp_path / "x.planish")]) == 0
    out, err = capfd.readouterr()
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert answer["verdict"] == "met"
    assert answer["ratios"]["latency"] == pytest.approx(0.443)
    assert set(answer) >= {
        "verdict",
        "target",
        "original",
        "optimized",
        "ratios",
        "drop",
        "drop_interval",
        "artifact",
        "plan",
        "trials",
        "seconds",
    }
    assert "the job speaks on stdout" in err
    assert "measuring the original" in err
    assert "a remark" in err


def test_the_table_says_what_matters(job: Path, flow: types.ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["optimize", str(job), "--out", str(tmp_path / "x.planish")]) == 0
    out = capfd.readouterr().out
    for part in ("met: every limit holds", "620 µs", "0.44×", "+0.0048", "3.54 MB", "812 kB", "torch:cpu", "out/net.planish"):
        assert part in out


@pytest.mark.parametrize(("verdict", "code"), [("met", 0), ("infeasible", 3), ("undecided", 4)])
def test_the_verdict_is_the_exit_code(
    job: Path, flow: types.ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path, verdict: str, code: int
) -> None:
    flow.answers[0] = Result(making.summary(verdict=verdict, reason="that is why", artifact=None, nearest=(2,)), None, None)
    assert cli.main(["optimize", str(job), "--json", "--out", str(tmp_path / "x.planish")]) == code
    out, err = capfd.readouterr()
    assert json.loads(out)["verdict"] == verdict
    assert (f"{verdict}: that is why" in err) == bool(code)


def test_errors_of_the_flow_have_their_exit_code(job: Path, flow: types.ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    flow.answers[0] = StudyError("the study belongs to another job: its parameters differ; give --fork")
    assert cli.main(["resume", "x.planish", str(job), "--json"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out) == {"error": "the study belongs to another job: its parameters differ; give --fork", "exit_code": 2}
    assert "Traceback" not in err
    assert cli.main(["resume", "x.planish", str(job), "-v"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_bugs_propagate_and_json_still_gets_an_object(job: Path, flow: types.ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    flow.answers[0] = AssertionError("ours")
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["resume", "x.planish", str(job), "--json"])
    assert json.loads(capfd.readouterr().out)["exit_code"] == 1


def test_an_interrupt_says_how_to_resume(job: Path, flow: types.ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flow.answers[0] = KeyboardInterrupt()
    out = tmp_path / "my net.planish"
    assert cli.main(["optimize", str(job), "--out", str(out)]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "planish: interrupted before anything was tried: nothing is kept"
    (tmp_path / "my net.study").mkdir()
    assert cli.main(["optimize", str(job), "--out", str(out)]) == 130
    assert f"resume with: planish resume '{out}' {job}" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_within_seconds(tmp_path: Path, number: int) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import sys, time\nprint('here', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "planish", "optimize", str(slow)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "here" not in process.stderr.readline():
        pass
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.strip() == "planish: interrupted"


def test_stdout_without_a_reader() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-m", "planish", "doctor"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["1", "2", "1,2", "0,1,2"])
def test_closed_standard_files(closed: str) -> None:
    script = f"import os\nfor n in ({closed},): os.close(n)\nos.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'planish', 'doctor', '--json'])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert out.returncode == 0
    assert "Traceback" not in out.stderr
    if "1" not in closed:
        assert json.loads(out.stdout)["planish"] == planish.__version__


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"COLUMNS": "60"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}]
)
def test_plain_surroundings(environment: dict[str, str], tmp_path: Path) -> None:
    making.artifact(tmp_path / "net.planish")
    out = planish_process("doctor", env=os.environ | environment)
    assert out.returncode == 0, out.stderr
    assert "\x1b" not in out.stdout + out.stderr
    if "COLUMNS" in environment:
        assert max(map(len, out.stdout.splitlines())) <= 60
    assert "onnxruntime:cpu" in out.stdout.replace("\n", "")


def test_a_terminal_of_sixty_columns_without_color(tmp_path: Path) -> None:
    """A real terminal (a pseudo one): with NO_COLOR nothing but text and line ends reaches it."""
    import pty

    script = textwrap.dedent("""
        import sys, making
        from planish.console import Console
        from planish.report import terminal
        console = Console()
        with console.running():
            console.stage("measuring")
            console.progress(1, 3)
            console.say("a remark with \\x1b[31m in it")
            console.answer({}, terminal.result_text(making.summary(name="net" * 60)))
    """)
    shown = {}
    for name, extra in {"plain": {"NO_COLOR": "1"}, "lively": {}}.items():
        leader, follower = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | extra
        environment |= {"TERM": "xterm", "COLUMNS": "60", "PYTHONPATH": str(Path(making.__file__).parent)}
        process = subprocess.Popen([sys.executable, "-c", script], stdin=follower, stdout=follower, stderr=follower, env=environment)
        os.close(follower)
        text = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:
                break
            if not piece:
                break
            text += piece
        assert process.wait(20) == 0
        os.close(leader)
        shown[name] = text.decode()
    assert "\x1b" not in shown["plain"]
    assert "a remark with ?[31m in it" in shown["plain"]
    assert max(map(len, shown["plain"].splitlines())) <= 60
    assert "\x1b[31m in it" not in shown["lively"]
    assert shown["lively"].rstrip().count("\x1b[?25l") == shown["lively"].count("\x1b[?25h")


def test_report_writes_a_page_and_only_over_a_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    making.artifact(tmp_path / "net.planish")
    assert cli.main(["report", str(tmp_path / "net.planish"), "--json"]) == 0
    page = Path(json.loads(capfd.readouterr().out)["page"])
    assert page == tmp_path / "net.html"
    assert cli.main(["report", str(tmp_path / "net.planish"), "-o", str(page)]) == 0
    other = tmp_path / "thesis.html"
    other.write_text("years of work")
    assert cli.main(["report", str(tmp_path / "net.planish"), "-o", str(other)]) == 2
    assert other.read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.html", "net.planish", "thesis.html"]


def test_inspect_draws_a_page_and_only_over_a_page(job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page, other = tmp_path / "deep" / "groups.html", tmp_path / "thesis.html"
    assert cli.main(["inspect", str(job), "-o", str(page), "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["page"] == str(page)
    assert [operator["name"] for operator in answer["operators"]] == ["0"]
    assert 'data-name="0"' in page.read_text()
    assert cli.main(["inspect", str(job), "-o", str(page)]) == 0
    assert f"written: {page}" in capfd.readouterr().out
    other.write_text("years of work")
    assert cli.main(["inspect", "missing.py", "-o", str(other)]) == 2
    assert "inspect: " in (err := capfd.readouterr().err) and "is no page of planish" in err
    assert other.read_text() == "years of work"


def test_inspect_says_what_each_operator_loses(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", str(job), "--target", "onnxruntime:cpu", "--sensitivity"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["sensitivity"]
    assert (found["target"], found["metric"], found["split"], found["samples"]) == ("onnxruntime:cpu", "agreement", "calibration", 8)
    (row,) = found["operators"]
    assert (row["name"], row["scheme"], row["sqnr_without_db"]) == ("0", "int8", 200.0)
    assert row["sqnr_alone_db"]["int8"] == pytest.approx(found["sqnr_db"], abs=0.01) and row["sqnr_alone_db"]["int8-weights"] > 20
    assert cli.main([*arguments, "--observer", "minmax"]) == 0
    text = capfd.readouterr().out
    assert "Sensitivity in onnxruntime:cpu" in text and "int8-dynamic" in text
    assert cli.main(["inspect", str(job), "--json"]) == 0
    assert "sensitivity" not in json.loads(capfd.readouterr().out)
    assert cli.main(["inspect", str(job), "--sensitivity", "--observer", "minimax"]) == 2
    assert "did you mean 'minmax'?" in capfd.readouterr().err


def test_report_of_a_run_that_wrote_no_artifact(tmp_path: Path) -> None:
    import msgspec

    study = tmp_path / "net.study"
    study.mkdir()
    (study / "result.json").write_bytes(msgspec.json.encode(making.summary(verdict="infeasible", artifact=None)))
    assert cli.main(["report", str(tmp_path / "net.planish")]) == 0
    assert "infeasible" in (tmp_path / "net.html").read_text()


def test_the_demo_replaces_only_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from planish import demo

    calls: list[tuple[Path, bool]] = []

    def run(out: Path, *, overwrite: bool, **_: Any) -> Result:
        calls.append((out, overwrite))
        return Result(making.summary(), None, None)

    monkeypatch.setattr(demo, "run", run)
    theirs, ours, fresh = (tmp_path / f"{name}.planish" for name in ("theirs", "ours", "fresh_0.5"))
    making.artifact(theirs)
    making.artifact(ours, name="digits")
    assert cli.main(["demo", "--out", str(theirs)]) == 2
    assert "already there; give --overwrite" in capfd.readouterr().err
    for arguments in ([str(theirs), "--overwrite"], [str(ours)], [str(fresh)]):
        assert cli.main(["demo", "--out", *arguments]) == 0
    with making.working_in(tmp_path):
        making.artifact(Path("out/demo.planish"))
        assert cli.main(["demo"]) == 0
    assert calls == [(theirs, True), (ours, True), (fresh, False), (Path("out/demo.planish"), True)]
    assert (tmp_path / "fresh_0.5.html").exists()


def test_every_error_has_a_documented_exit_code() -> None:
    def leaves(kind: type[PlanishError]) -> Iterator[type[PlanishError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from leaves(child)

    assert {kind.exit_code for kind in leaves(PlanishError)} <= {1, 2, 3, 130}
