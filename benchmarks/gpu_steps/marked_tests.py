"""The tests marked `gpu`, in a pytest of their own; warnings of other versions are no errors there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

from gpu_steps.session import ROOT, Session

OUTCOME = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?::.+?) - (.*)", re.MULTILINE)


def run(session: Session) -> None:
    """One row of counts, and one for every test that did not pass."""
    files = sorted((str(path) for path in (ROOT / "tests").rglob("test_gpu.py")), reverse=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--no-header"]
    command += ["-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command += [f"--accelerator={session.device.type}", *files]
    log, note = session.folder / "tests.txt", ""
    with log.open("wb") as file:
        try:
            subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, timeout=max(session.left() - 2, 1))
        except subprocess.TimeoutExpired:
            note = "there was no time for the others"
    said = log.read_text()
    print(said[-6000:], flush=True)
    outcomes, reasons = OUTCOME.findall(said), dict(REASON.findall(said))
    for name, outcome in outcomes:
        if outcome in ("FAILED", "ERROR"):
            session.add(name.removeprefix("tests/"), ok=False, note=reasons.get(name, outcome)[:200])
    counts = Counter(outcome.lower() for _, outcome in outcomes)
    right = counts["passed"] > 0 and not counts["failed"] + counts["error"] and not reasons
    session.add("all", {name: counts[name] for name in ("passed", "failed", "skipped")}, ok=right, note=note)
