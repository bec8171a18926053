"""The command line: parsing and printing only. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import difflib
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import planish
from planish.console import Console, open_standard_files
from planish.errors import PlanishError, UnknownName, UsageError
from planish.plan import DEFAULT_OBSERVER, DEFAULT_ROUNDING, DEFAULT_TECHNIQUES, ONE_SHOT, TECHNIQUES

if TYPE_CHECKING:
    from planish.result import Result

INTERRUPTED = 130
_DEMO, _DEMO_JOB = Path("out/demo.planish"), "digits"
_PASSED_ON = (
    *("search", "trials", "time_limit", "seed", "keep", "threads", "control", "overwrite", "accept_nearest"),
    *("saliency", "schedule", "masking", "observer", "rounding"),
)
F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Commands in the order in which they are used, and the nearest name for one that does not exist."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], list(self.commands), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`planish --help` lists them"
            raise click.UsageError(f"there is no command {args[0][:60]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


def _finite(_: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"give a number of seconds above zero; got {value:g}", param=parameter)
    return value


def _common(function: F) -> F:
    """The options that every command takes."""
    for option in (
        click.option("--threads", type=click.IntRange(1, 1024), help="Threads of one call, at most; all cores by default."),
        click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks."),
        click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of everything random."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr."),
    ):
        function = option(function)
    return function


def _example(*lines: str) -> str:
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


job_argument = click.argument("job", metavar="JOB.PY", type=click.Path(path_type=Path))
optional_job = click.argument("job", metavar="[JOB.PY]", required=False, type=click.Path(path_type=Path))
artifact_argument = click.argument("path", metavar="ARTIFACT", type=click.Path(path_type=Path))
target_option = click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="'cpu' takes the best of onnxruntime:cpu and openvino:cpu; these, torch:cpu and torch-compile:cpu can be asked for.",
)
keep_option = click.option("--keep", multiple=True, metavar="GLOB", help="Leave these parameters alone; may be repeated.")


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_example("planish optimize job.py --latency 0.5x --drop 1pt --out out/net.planish"),
)
@click.version_option(planish.__version__, prog_name="planish", message="%(prog)s %(version)s")
def cli() -> None:
    """A trained net, some data and a budget in; a faster artifact, measured on this machine, out.

    Exit codes: 0 met, 1 a bug of ours, 2 bad usage or input, 3 infeasible, 4 undecided, 130 interrupted.
    """


@cli.command(epilog=_example("planish doctor"))
@_common
@click.pass_obj
def doctor(console: Console, /, **_: Any) -> None:
    """What this machine can run: processor, runtimes, versions, known holes."""
    from planish.doctor import examine
    from planish.report import terminal

    data = examine()
    console.answer(data, terminal.doctor_text(data))


@cli.command(
    epilog=_example(
        "planish inspect job.py --target openvino:cpu",
        "planish inspect job.py -o groups.html",
        "planish inspect job.py --target onnxruntime:cpu --sensitivity",
    )
)
@job_argument
@target_option
@keep_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Also draw the net: one offline page in which the members of a group light up together.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also run each operator in each scheme on the job's data: what the outputs lose to it alone, and to all but it (two minutes at most, "
    "as a rule).",
)
@click.option(
    "--observer",
    metavar="NAME",
    default=DEFAULT_OBSERVER,
    show_default=True,
    help="How --sensitivity chooses ranges: mse, minmax, moving-average, percentile or entropy.",
)
@_common
@click.pass_obj
def inspect(
    console: Console, /, job: Path, target: str, keep: tuple[str, ...], output: Path | None, sensitivity: bool, observer: str, **_: Any
) -> None:
    """Operators, groups and costs; what can be pruned or quantized, what not, and why."""
    from planish import registry
    from planish.report.file import check_page, write_page
    from planish.report.inspection_text import inspection_text

    _check_target(target)
    registry.check("observer", observer)
    if output is not None:
        check_page(output, "inspect")
    workload = _load(console, job)
    from planish import flow

    data = flow.inspect(workload, target=target, keep=keep, events=console, sensitivity=sensitivity, observer=observer).to_json()
    text = inspection_text(data)
    if output is not None:
        from planish.report.groups_page import groups_page

        data |= {"page": str(write_page(groups_page(data), output, "inspect"))}
        text += f"\nwritten: {output}\n"
    console.answer(data, text)


def _budget_options(function: F) -> F:
    for name, example in reversed(
        {
            "latency": "0.5x or 5ms",
            "throughput": "2x or 200/s",
            "size": "0.25x or 2MB",
            "memory": "0.5x or 64MB",
            "macs": "0.5x or 20M",
            "energy": "0.5x or 3mJ",
        }.items()
    ):
        floor = "at least" if name == "throughput" else "at most"
        function = click.option(f"--{name}", metavar="LIMIT", help=f"{floor} this much: {example}.")(function)
    return function


@cli.command(
    epilog=_example(
        "planish optimize job.py --latency 0.5x --drop 1pt --out out/net.planish",
        "planish optimize job.py --target openvino:cpu --size 0.25x --drop 0.5pt --dry-run",
        "planish optimize job.py --size 0.15x --techniques prune,mask,quantize,distill --masking sparsegpt",
    )
)
@job_argument
@target_option
@_budget_options
@click.option("--drop", default="1pt", show_default=True, help="Quality that may be lost: 1pt, 1% or 0.01 (the metric's own unit).")
@click.option("--confidence", type=float, help="0.95 makes the upper end of the drop's interval count.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the artifact goes; NAME.planish by default.")
@click.option("--search", default="solver", show_default=True, help="How plans are found: solver or random.")
@click.option(
    "--trials",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Plans that the search proposes at most; a few are exported and measured, and the choice of the winner may try a few more.",
)
@click.option(
    "--time-limit",
    type=float,
    callback=_finite,
    metavar="SECONDS",
    help="For the whole call; without it recovery alone may take 25 minutes.",
)
@click.option(
    "--techniques",
    default=",".join(DEFAULT_TECHNIQUES),
    show_default=True,
    help="Which may be used; also adapt: blocks that go may leave a 1x1 or low-rank map; and mask, under a limit on the size: single weights "
    "become zero, which makes files smaller and nothing faster.",
)
@keep_option
@click.option(
    "--saliency",
    metavar="NAME",
    help="Which units go first: auto (the default: obs where that takes seconds, taylor elsewhere), taylor, magnitude, l1, fpgm, norm-scale, flap, obs, random; fisher or taylor-first, which need "
    "labels; several, as in taylor+flap; or which are merged: kmeans, dbscan, spectral, mixture, of weights or, as in kmeans:activations, "
    "of what they give.",
)
@click.option(
    "--schedule",
    metavar="NAME",
    default=ONE_SHOT,
    show_default=True,
    help="How units leave: one-shot; iterative (in rounds, with recovery between); growth (they may return); or by sparse training: l1, "
    "group-lasso, growing-l2, augmented-lagrangian. All but the first train longer before they are better.",
)
@click.option(
    "--masking",
    metavar="NAME",
    help="Which weights become zero: sparsegpt (the default), wanda or magnitude; with the one pattern that is offered, as in wanda:2:4 or "
    "sparsegpt:60%, instead of 50%, 75% and 90%.",
)
@click.option(
    "--schemes",
    metavar="NAMES",
    help="What operators may compute in besides fp32: int8 (static), int8-dynamic, int8-weights, int4-weights, codebook, codebook-mixture, bf16, w4a8, w4a4; by default all but those of w4 and the mixture, "
    "each where the runtime executes it and it was measured to pay.",
)
@click.option(
    "--observer",
    metavar="NAME",
    default=DEFAULT_OBSERVER,
    show_default=True,
    help="How ranges are chosen on calibration data: mse, minmax, moving-average, percentile or entropy.",
)
@click.option(
    "--rounding",
    metavar="NAME",
    default=DEFAULT_ROUNDING,
    show_default=True,
    help="Which grid point stands for each weight: nearest; gptq, adaround or brecq (they look at what the weight is for, which takes longer "
    "and helps most at four bits).",
)
@click.option("--control", is_flag=True, help="Tune the uncompressed net as long, and report the drop against it.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done, and how long it would take.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option("--accept-nearest", is_flag=True, help="Write the nearest artifact when nothing holds the budget.")
@_common
@click.pass_obj
def optimize(console: Console, /, job: Path, techniques: str, **options: Any) -> int:
    """Make a net faster within a budget, and write it as an artifact."""
    from planish import registry
    from planish.artifact import check_output, default_folder
    from planish.budget import QUANTITIES, Budget

    limits = {name: options[name] for name in QUANTITIES if options[name] is not None}
    budget = Budget(**limits, drop=options["drop"], confidence=options["confidence"])
    _check_target(options["target"])
    registry.check("search", options["search"])
    registry.check("schedule", options["schedule"])
    registry.check("observer", options["observer"])
    registry.check("rounding", options["rounding"])
    if options["saliency"] is not None:
        registry.check("saliency", options["saliency"])
    if options["masking"] is not None:
        from planish.prune.masks.pattern import parse_masking

        registry.check("masking", parse_masking(options["masking"])[0])
    chosen = _techniques(techniques)
    schemes = _listed(options["schemes"]) if options["schemes"] is not None else None
    for name in schemes or ():
        registry.check("scheme", name)
    out: Path | None = options["out"]
    if out is not None and not options["dry_run"]:
        check_output(out, options["overwrite"])
    workload = _load(console, job)
    if out is None:
        out = default_folder(workload.name)
        if not options["dry_run"]:
            check_output(out, options["overwrite"])
    from planish import flow

    arguments = {
        "target": options["target"],
        "budget": budget,
        "out": out,
        "events": console,
        "techniques": chosen,
        "schemes": schemes,
        **{name: options[name] for name in _PASSED_ON},
    }
    if options["dry_run"]:
        from planish.report import terminal

        data = flow.dry_run(workload, **arguments).to_json()
        console.answer(data, terminal.work_plan_text(data))
        return 0

    def work() -> Result:
        return flow.optimize(workload, **arguments)

    return _show_result(console, _resumable(console, work, out, job, options["time_limit"]))


@cli.command(
    epilog=_example(
        "planish shrink job.py --weights checkpoint/ --out llama.shrunk",
        "planish shrink job.py --weights model.safetensors --scheme int8-weights --prune 0.25",
    )
)
@job_argument
@click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="A safetensors file, or a folder of them, whose names are those of the model's parameters.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The artifact to write; NAME.shrunk by default.")
@click.option("--scheme", default="int4-weights", show_default=True, help="What weights are kept in: int4-weights or int8-weights.")
@click.option("--rounding", default="gptq", show_default=True, help="How they are rounded: gptq, adaround or nearest.")
@click.option("--prune", type=float, default=0.0, show_default=True, help="Share of the hidden units that leaves each feed-forward layer.")
@click.option("--observer", default=DEFAULT_OBSERVER, show_default=True, help="How scales are chosen.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@_common
@click.pass_obj
def shrink(console: Console, /, job: Path, weights: Path, **options: Any) -> None:
    """A Transformer that does not fit into memory: weights read, pruned, rounded and written part by part. The job's `model` is a function
    that builds the net; its weights are dropped as they are made."""
    from planish import registry
    from planish.report.shrunk_text import shrunk_text

    for kind in ("scheme", "rounding", "observer"):
        registry.check(kind, options[kind])
    workload = _load(console, job)
    from planish.streaming.shrink import shrink as run

    names = ("out", "scheme", "rounding", "prune", "observer", "overwrite", "seed", "threads")
    with console.running():
        found = run(workload, weights, events=console, **{name: options[name] for name in names})
    data = found.to_json()
    console.answer(data, shrunk_text(data))


@cli.command(epilog=_example("planish resume out/net.planish job.py"))
@artifact_argument
@optional_job
@click.option("--time-limit", type=float, callback=_finite, metavar="SECONDS", help="For the rest of the work.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option("--accept-nearest", is_flag=True, help="Write the nearest artifact when nothing holds the budget.")
@click.option("--fork", is_flag=True, help="The job has changed: start a new study from the old one's plans.")
@_common
@click.pass_obj
def resume(console: Console, /, path: Path, job: Path | None, **options: Any) -> int:
    """Carry on a search that was interrupted."""
    from planish import flow

    workload = _load(console, job) if job is not None else None

    def work() -> Result:
        return flow.resume(
            path,
            workload,
            time_limit=options["time_limit"],
            overwrite=options["overwrite"],
            accept_nearest=options["accept_nearest"],
            fork=options["fork"],
            threads=options["threads"],
            events=console,
        )

    return _show_result(console, _resumable(console, work, path, job, options["time_limit"]))


@cli.command(epilog=_example("planish verify out/net.planish job.py"))
@artifact_argument
@optional_job
@_common
@click.pass_obj
def verify(console: Console, /, path: Path, job: Path | None, threads: int | None, **_: Any) -> int:
    """Measure an artifact again, here, and compare with what it claims (quality too, with the job)."""
    from planish.artifact import open_artifact
    from planish.report import terminal

    open_artifact(path)
    workload = _load(console, job) if job is not None else None
    from planish import verification

    found = verification.verify(path, workload, threads=threads, events=console)
    console.answer(found.to_json(), terminal.verification_text(found.to_json()))
    return found.exit_code


@cli.command(epilog=_example("planish bench job.py out/*.planish"))
@job_argument
@click.argument("paths", metavar="ARTIFACT...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--seconds", type=float, default=5.0, show_default=True, callback=_finite, help="Measuring time for each row.")
@_common
@click.pass_obj
def bench(console: Console, /, job: Path, paths: tuple[Path, ...], seconds: float, threads: int | None, **_: Any) -> None:
    """Several artifacts and every runtime, measured in turn, in one table."""
    from planish.artifact import open_artifact
    from planish.report import terminal

    for path in paths:
        open_artifact(path)
    workload = _load(console, job)
    from planish import verification

    rows = [row.to_json() for row in verification.bench(workload, paths, threads=threads, seconds=seconds, events=console)]
    console.answer({"rows": rows}, terminal.bench_text(rows))


@cli.command(epilog=_example("planish report out/net.planish -o page.html"))
@artifact_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the page goes; beside the artifact by default.")
@_common
@click.pass_obj
def report(console: Console, /, path: Path, output: Path | None, **_: Any) -> None:
    """One offline page: the verdict, both nets, every trial, every operator."""
    from planish.artifact import beside
    from planish.report.file import read_summary, write_report

    page = write_report(read_summary(path), output or beside(path, ".html"))
    console.answer({"page": str(page)}, f"written: {page}\n")


@cli.command(epilog=_example("planish demo --out out/demo.planish"))
@click.option("--out", type=click.Path(path_type=Path), default=_DEMO, show_default=True, help="Where the artifact goes.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there; one that the demo made is replaced anyway.")
@_common
@click.pass_obj
def demo(console: Console, /, out: Path, overwrite: bool, seed: int, threads: int | None, **_: Any) -> int:
    """The main job on data that a dependency ships: train, optimize to half the latency, and show it."""
    from planish.artifact import beside, check_output
    from planish.report.file import write_report

    overwrite = overwrite or out == _DEMO or _is_made_by_demo(out)
    check_output(out, overwrite)
    from planish import demo as example

    result = example.run(out, events=console, seed=seed, threads=threads, overwrite=overwrite)
    page = write_report(result.summary, beside(out, ".html"))
    return _show_result(console, result, page)


def _is_made_by_demo(out: Path) -> bool:
    from planish.artifact.manifest import read_manifest

    try:
        return read_manifest(out).name == _DEMO_JOB
    except PlanishError:
        return False


def _show_result(console: Console, result: Result, page: Path | None = None) -> int:
    from planish.report import terminal

    data = result.to_json() | ({"page": str(page)} if page else {})
    console.answer(data, terminal.result_text(result.summary) + (f"page: {page}\n" if page else ""))
    code: int = result.summary.exit_code
    if code:
        console.say(f"planish: {result.summary.said}")
    return code


def _load(console: Console, path: Path) -> Any:
    from planish.jobfile import load_job, read_source

    read_source(path)
    console.stage(f"loading {path.name}")
    job = load_job(path)
    console.end_stage()
    return job


def _check_target(target: str) -> None:
    from planish import registry
    from planish.target import parse_target

    parse_target(target, registry.names("runtime"))


def _techniques(text: str) -> tuple[str, ...]:
    chosen = _listed(text)
    for name in chosen:
        if name not in TECHNIQUES:
            raise UnknownName("technique", name, TECHNIQUES)
    if not chosen:
        raise UsageError(f"techniques: give at least one of {', '.join(TECHNIQUES)}, separated by commas")
    return chosen


def _listed(text: str) -> tuple[str, ...]:
    """The names between commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


class _Interrupted(PlanishError):
    """An interrupted run that can be carried on; its text says how."""

    exit_code = INTERRUPTED


def _resumable(console: Console, work: Callable[[], Result], out: Path, job: Path | None, time_limit: float | None) -> Result:
    console.limit_s = time_limit
    try:
        return work()
    except KeyboardInterrupt as err:
        from planish.artifact import study_folder

        if not study_folder(out).exists():
            raise _Interrupted("interrupted before anything was tried: nothing is kept") from err
        limit = [] if time_limit is None else ["--time-limit", f"{time_limit:g}"]
        command = shlex.join(["planish", "resume", str(out), *([str(job)] if job else []), *limit])
        raise _Interrupted(f"interrupted; finished trials are kept; resume with: {command}") from err


def _terminate(number: int, _: object) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; the process's own by default.

    Returns:
        The exit code: 0 met, 1 a bug of ours, 2 bad usage or input, 3 infeasible, 4 undecided, 130 interrupted.
    """
    open_standard_files()
    # torch's OpenMP threads wait by spinning; on a shared machine that costs several times what a short spin does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGTERM, _terminate)
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = any(word in ("-v", "--verbose") for word in given)
    console = Console(as_json="--json" in given, verbose=verbose)
    with console.running():
        try:
            code = cli.main(args=given, prog_name="planish", standalone_mode=False, obj=console)
            return code if isinstance(code, int) else 0
        except click.ClickException as err:
            console.error(_click_message(err), 2)
            return 2
        except PlanishError as err:
            if verbose:
                traceback.print_exc()
            console.error(str(err), err.exit_code)
            return err.exit_code
        except (KeyboardInterrupt, click.Abort):
            console.error("interrupted", INTERRUPTED)
            return INTERRUPTED
        except BrokenPipeError:
            return 0
        # Bugs propagate with their traceback; with --json the reader of stdout still gets an object.
        except Exception as err:
            if console.as_json:
                console.error(f"a bug in planish: {type(err).__name__}: {err}", 1)
            raise


def _click_message(err: click.ClickException) -> str:
    command = err.ctx.command_path if isinstance(err, click.UsageError) and err.ctx is not None else "planish"
    text = err.format_message()
    return f"{text[:1].lower()}{text[1:].rstrip('.')}; see `{command} --help`"
