"""The day a GPU is there: one command measures, in order of importance, what can be known only on one.

    python benchmarks/gpu.py --minutes 9                        # everything, the most important first
    python benchmarks/gpu.py --minutes 5 --steps a,c,c2         # some steps
    python benchmarks/gpu.py --minutes 5 --continue             # what the last call left out or found wrong
    python benchmarks/gpu.py --continue benchmarks/results/gpu.json --out NEW
    python benchmarks/gpu.py --device cpu --minutes 3           # dry run: every step, at reduced sizes

Every step runs in a process of its own, which starts while the step before it still measures (on a CPU, two
steps run at a time), and is ended with its children when its time is over; what a step does not need is
shared out over those after it. A failure is recorded and the next step follows. Results are written as they
come to OUT/results.json, with the log in OUT/log.txt and profiles in OUT/profile.txt; the table is printed
last, also on SIGTERM. The package need not be installed: the source tree does, with
the packages that it imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_steps.report import installed, save, tables  # noqa: E402
from gpu_steps.steps import STEPS, Step  # noqa: E402

KEPT = ("done", "skipped")
"""Steps of this status are not run again by `--continue`."""
NO_GPU = "PyTorch finds no GPU here; --device cpu makes a dry run"
FINISHED = "finished"
TABLE_SECONDS = 2.0
POLL_SECONDS = 0.2


class Child:
    """The process of one step: it imports what it needs, then waits to be told to go."""

    def __init__(self, step: Step, args: argparse.Namespace, work: Path, have: list[dict]) -> None:
        self.step, self.rows = step, work / f"{step.key}.jsonl"
        self.rows.write_text("")
        (work / f"{step.key}.have").write_text(json.dumps(have))
        command = [sys.executable, __file__, "--device", args.device, "--out", str(args.out)]
        self._log = (args.out / "log.txt").open("ab")
        self._process = subprocess.Popen(
            [*command, "--child", step.key, "--work", str(work)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            cwd=ROOT,
        )

    def ready(self) -> bool:
        """Whether it has imported what it needs."""
        return '"ready"' in self.rows.read_text()

    def go(self, seconds: float) -> None:
        """Start measuring, with so much time."""
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{seconds}\n".encode())
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has died; its exit code says so

    def results(self) -> tuple[list[dict], str]:
        """Returns the rows that the step has written, and its reason for failing or being skipped."""
        lines = [json.loads(line) for line in self.rows.read_text().splitlines() if line.endswith("}")]
        return [each for each in lines if "name" in each], next((e["end"] for e in lines if "end" in e), "")

    def ended(self) -> int | None:
        """The exit code, once it has one."""
        return self._process.poll()

    def kill(self) -> None:
        """Ends it with all that it started."""
        if self._log.closed:
            return
        for pid in [*descendants(self._process.pid), self._process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        self._log.close()


def descendants(root: int) -> list[int]:
    """Processes that a process started, and those of its session that lost their parent."""
    parents, members = {}, []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents[int(path.parent.name)] = int(fields[1])
        if int(fields[3]) == root:
            members.append(int(path.parent.name))
    found = [root, *members]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid and child not in found]
    return [pid for pid in found if pid != root]


def main() -> int:
    """Run the steps; 0 if all of them went well and found nothing wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listing = ", ".join(f"{step.key}: {step.title}" for step in STEPS)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, the table included")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/runs/gpu"), help="folder for results")
    parser.add_argument("--steps", help=f"some of them, with commas between ({listing})")
    parser.add_argument(
        "--continue",
        dest="earlier",
        nargs="?",
        type=Path,
        const=Path("results.json"),
        help="measure only what an earlier results file lacks (default: that in OUT)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = [step.key for step in STEPS]
    wanted = args.steps.split(",") if args.steps else known
    if unknown := [key for key in wanted if key not in known]:
        parser.error(f"--steps {args.steps}: no step {unknown[0]!r}; there are: {', '.join(known)}")
    args.out = args.out.resolve()
    if args.child:
        return child(args)

    if args.earlier:
        args.earlier = args.earlier.resolve() if args.earlier.exists() else args.out / args.earlier
        if not args.earlier.is_file():
            parser.error(f"--continue {args.earlier}: no such file; leave it out to begin anew")
    end = time.monotonic() + 60 * args.minutes - TABLE_SECONDS
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"format": 1, "steps": {}}
    if args.earlier:
        record = json.loads(args.earlier.read_text())
    else:
        for name in ("log.txt", "profile.txt"):
            (args.out / name).unlink(missing_ok=True)
    record |= {"device": args.device, "minutes": args.minutes, "command": sys.argv[1:]}
    steps = [
        step
        for step in STEPS
        if step.key in wanted and record["steps"].get(step.key, {}).get("status") not in KEPT
    ]
    if args.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the next step imports on another core meanwhile
    work = Path(tempfile.mkdtemp(prefix="gpu-steps-"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "benchmarks"), *installed(ROOT, work), os.environ.get("PYTHONPATH", "")]
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(steps, args, work, record, end)
    except (KeyboardInterrupt, SystemExit) as stop:
        print(f"stopped ({stop!r})", flush=True)
    finally:
        save(args.out, record)
        shutil.rmtree(work, ignore_errors=True)
        print(tables(record, STEPS), flush=True)
        print(f"\nresults: {args.out / 'results.json'}", flush=True)
    states = [record["steps"].get(step.key, {}).get("status") for step in steps]
    return 0 if all(state in KEPT for state in states) else 1


def run(steps: list[Step], args: argparse.Namespace, work: Path, record: dict, end: float) -> None:
    """Runs one step after another, each with its share of the time that is left.

    On a GPU the next step imports what it needs while the current one measures. On a CPU, where no timing
    matters, two steps run at a time.
    """
    lanes = 2 if args.device == "cpu" else 1
    waiting, lock, stop = list(steps), threading.Lock(), threading.Event()
    children: list[Child] = []
    rows = {  # what was wrong is measured again
        step.key: [
            row for row in record["steps"].get(step.key, {}).get("results", []) if row["ok"] is not False
        ]
        for step in steps
    }

    def start(step: Step) -> Child:
        children.append(Child(step, args, work, rows[step.key]))
        return children[-1]

    def lane() -> None:
        following: Child | None = None
        while not stop.is_set():
            with lock:
                if not waiting:
                    return
                needs = [each.dry_seconds if args.device == "cpu" else each.seconds for each in waiting]
                step = waiting.pop(0)
            running, following = following or start(step), None
            begun = time.monotonic()
            while not running.ready() and running.ended() is None and time.monotonic() < (begun + end) / 2:
                if stop.wait(POLL_SECONDS):
                    return
            left = end - time.monotonic()
            if left < 1.0:
                return
            if lanes == 1 and waiting:
                following = start(waiting[0])
            share = min(left, lanes * left * needs[0] / sum(needs))
            follow(running, share, args, record, rows[step.key], lock, stop)
            running.kill()
            if record["steps"][step.key].get("error") == NO_GPU:
                return

    threads = [threading.Thread(target=lane, daemon=True) for _ in range(lanes)]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(POLL_SECONDS)
    finally:
        stop.set()
        for thread in threads:
            thread.join(1.0)
        for each in children:
            each.kill()


def follow(
    running: Child,
    seconds: float,
    args: argparse.Namespace,
    record: dict,
    have: list[dict],
    lock: threading.Lock,
    stop: threading.Event,
) -> None:
    """Lets a step run for so long at most, and writes its results as they come."""
    step, began = running.step, time.monotonic()
    running.go(seconds)
    entry = {"title": step.title, "status": "stopped", "limit": round(seconds, 1), "results": have}
    with lock:
        record["steps"][step.key] = entry
    print(f"[{step.key}] {step.title}, at most {seconds:.0f} s", flush=True)
    shown, code = 0, None
    while code is None and time.monotonic() - began < seconds:
        if stop.wait(POLL_SECONDS):
            return
        code = running.ended()
        found, end = running.results()
        code = 0 if code is None and end == FINISHED else code  # its imports may take long to be undone
        merged = {row["name"]: row for row in [*have, *found]}  # a later one replaces an earlier one
        for row in found[shown:]:
            values = ", ".join(f"{name} {value}" for name, value in row["values"].items())
            verdict = "" if row["ok"] is not False else " WRONG"
            print(f"[{step.key}]{verdict} {row['name']}: {values} {row['note']}".rstrip(), flush=True)
        with lock:
            entry |= {"seconds": round(time.monotonic() - began, 1), "results": list(merged.values())}
            if found[shown:] or code is not None:
                save(args.out, record)
        shown = len(found)
    end = running.results()[1]
    outcome: dict[str, Any] = {}
    if code is None:
        outcome = {"status": "timed out", "error": f"ended after {seconds:.0f} s"}
    elif code == 0:
        outcome["status"] = "wrong" if any(row["ok"] is False for row in entry["results"]) else "done"
    elif end.startswith("skipped: "):
        outcome = {"status": "skipped", "error": end.removeprefix("skipped: ")}
    else:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        outcome = {"status": "failed", "error": end or how}
    if args.device == "cpu" and outcome["status"] in ("done", "wrong"):
        outcome["variant"] = step.on_cpu
    with lock:
        entry |= outcome
        save(args.out, record)


def child(args: argparse.Namespace) -> int:
    """In the process of a step: import, wait for the word, measure."""
    rows = args.work / f"{args.child}.jsonl"

    def say(end: str) -> None:
        with rows.open("a") as file:
            file.write(json.dumps({"end": end}) + "\n")

    try:
        step = next(step for step in STEPS if step.key == args.child)
        import torch
        from gpu_steps.session import Result, Session, Skip

        module, _, function = step.where.partition(":")
        action = getattr(importlib.import_module(f"gpu_steps.{module}"), function)
        with rows.open("a") as file:
            file.write(json.dumps({"ready": True}) + "\n")
        line = sys.stdin.readline()
        if not line:
            return 1
        if args.device == "cuda" and not torch.cuda.is_available():
            say(NO_GPU)
            return 1
        folder = args.work / args.child
        folder.mkdir(exist_ok=True)
        have = [Result(**each) for each in json.loads((args.work / f"{args.child}.have").read_text())]
        session = Session(torch.device(args.device), float(line), folder, args.out, rows, have)
        print(f"\n==== {args.child}: {step.title}", flush=True)
        try:
            action(session)
        except Skip as reason:
            say(f"skipped: {reason}")
            return 1
        say(FINISHED)
    except BaseException:
        lines = traceback.format_exc().strip().splitlines()
        print("\n".join(lines), flush=True)
        say(" | ".join(line.strip() for line in lines[-3:])[:600])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
