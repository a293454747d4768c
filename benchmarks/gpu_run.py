"""Run a pack (`gpu_pack`) on a machine with a card: each step in a process of its own, written.

A step that fails, dies or takes too long is a record that says so, and the next one runs. After
each step its record and the summary are in the output folder:

    OUTPUT/summary.md            all steps in a table
    OUTPUT/NN-STEP.json          one record a step (StepRecord)
    OUTPUT/*-plan.txt            what polygraphy's inspect says of a plan, as it says it
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cxrgaze import children, command
from cxrgaze.benchmarks.gpu_pack import Pack, commit
from cxrgaze.benchmarks.gpu_steps import BUDGET_S, STEPS, Run, Step, last_line, missing, placeless
from cxrgaze.command import say
from cxrgaze.environment import now_utc
from cxrgaze.files import make_output_folder, render_json, temporary_folder, write_atomic
from cxrgaze.records import Frozen
from cxrgaze.spec import NOTICE


class StepRecord(Frozen):
    """What came of a step."""

    step: str
    what: str
    outcome: Literal["done", "left_out", "failed"]
    reason: str = ""
    """What is not here, or what went wrong in its own words."""
    seconds: float = 0.0
    begun_utc: str
    says: tuple[str, ...] = ()
    """What was found, in sentences."""
    figures: dict[str, Any] = {}


Execute = Callable[[Step, Run], StepRecord]


def run_all(
    run: Run, steps: Sequence[Step] = STEPS, execute: Execute | None = None
) -> tuple[StepRecord, ...]:
    """Run the steps, each written before the next begins.

    Args:
        execute: runs one; None: each in a process of its own.
    """
    execute = execute or in_child
    records: list[StepRecord] = []
    for number, step in enumerate(steps):
        begun, started = now_utc(), time.perf_counter()
        if run.left_s <= 0:
            spent = f"the time budget of {run.budget_s:g} s was spent"
            record = StepRecord(
                step=step.name, what=step.what, outcome="left_out", reason=spent, begun_utc=begun
            )
        else:
            say(f"{step.name} ...")
            record = execute(step, run)
        seconds = round(time.perf_counter() - started, 2)
        told = {"reason": placeless(record.reason, run), "seconds": seconds}
        told["says"] = tuple(placeless(words, run) for words in record.says)
        record = record.model_copy(update=told)
        say(f"  {record.outcome} in {record.seconds:.1f} s {record.reason}")
        records.append(record)
        name = f"{number:02d}-{step.name}.json"
        write_atomic(run.output / name, render_json(record.model_dump(mode="json")))
        write_atomic(run.output / "summary.md", summary(run, records, len(steps)).encode())
    return tuple(records)


def in_process(step: Step, run: Run) -> StepRecord:
    """Run a step here; whatever it raises is in its record."""
    begun = now_utc()
    record = partial(StepRecord, step=step.name, what=step.what, begun_utc=begun)
    try:
        if why := "; ".join(filter(None, (missing(need, run) for need in step.needs))):
            return record(outcome="left_out", reason=why)
        found = step.act(run)
        render_json(found.figures)
    except Exception as error:
        return record(outcome="failed", reason=f"{type(error).__name__}: {error}"[:2000])
    return record(outcome="done", says=found.says, figures=found.figures)


def in_child(step: Step, run: Run) -> StepRecord:
    """Run a step in a process of its own: what a card's error leaves behind dies with it."""
    limit = min(step.seconds, run.left_s)
    answer = run.work / f"{step.name}.json"
    command = children.python(
        "cxrgaze.benchmarks.gpu_run", str(run.pack.folder), "--output", str(run.output)
    )
    command += ["--step", step.name, "--work", str(run.work)]
    failed = partial(
        StepRecord, step=step.name, what=step.what, outcome="failed", begun_utc=now_utc()
    )
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _stop(child)
        return failed(reason=f"stopped after {limit:.0f} s")
    except BaseException:
        _stop(child)
        raise
    if not answer.is_file():
        return failed(reason=f"its process ended with {child.returncode}: {last_line(said)}")
    return StepRecord.model_validate_json(answer.read_bytes())


def _stop(child: subprocess.Popen[str]) -> None:
    """End a child of ours with its own children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def summary(run: Run, records: Sequence[StepRecord], count: int) -> str:
    """The page of a run, so far."""
    pack = run.pack.record
    lines = [
        "# A pack on a machine with a card" if _has_card(records) else "# A pack, without a card",
        "",
        f"{NOTICE}",
        "",
        f"Pack of {pack.created_utc}, commit {pack.commit[:12]}; run at commit {commit()[:12]}, "
        f"{len(records)} of {count} steps, budget {run.budget_s:g} s, spent "
        f"{run.budget_s - run.left_s:.0f} s. Pack made with "
        + ", ".join(f"{name} {number}" for name, number in pack.versions.items())
        + ".",
        "",
        "| step | outcome | seconds | what was found, or why not |",
        "| --- | --- | --- | --- |",
    ]
    for one in records:
        words = "<br>".join((*one.says, *([one.reason] if one.reason else [])))
        words = " ".join(words.replace("|", "\\|").split())
        outcome = one.outcome.replace("_", " ")
        lines.append(f"| `{one.step}`: {one.what} | {outcome} | {one.seconds:.1f} | {words} |")
    not_run = [one.step for one in records if one.outcome == "left_out"]
    if not_run:
        lines += ["", f"Not run here: {', '.join(not_run)}."]
    return "\n".join(lines) + "\n"


def _has_card(records: Sequence[StepRecord]) -> bool:
    return any(isinstance(one.figures.get("card"), list) for one in records)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m cxrgaze.benchmarks.gpu_run`."""
    parser = argparse.ArgumentParser(prog="gpu_run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pack", type=Path, nargs="?", default=Path("out/gpu-pack"), metavar="PACK")
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), metavar="DIR")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps alone")
    parser.add_argument("--step", choices=[step.name for step in STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return command.execute(parser, lambda args: _one(args) if args.step else _all(args), argv)


def _one(args: argparse.Namespace) -> int:
    """The step of a child process."""
    run = Run(Pack(args.pack), make_output_folder(args.output), args.work)
    sys.path.append(str(run.site))
    step = next(step for step in STEPS if step.name == args.step)
    record = in_process(step, run)
    write_atomic(run.work / f"{step.name}.json", render_json(record.model_dump(mode="json")))
    return 0


def _all(args: argparse.Namespace) -> int:
    output = make_output_folder(args.output)
    steps = [step for step in STEPS if not args.only or step.name in args.only]
    with temporary_folder("gpu") as work:
        run = Run(Pack(args.pack.resolve()), output.resolve(), work, args.budget)
        records = run_all(run, steps)
    print(f"summary  {output / 'summary.md'}")
    return int(any(record.outcome == "failed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
