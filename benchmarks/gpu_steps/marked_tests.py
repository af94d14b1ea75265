"""The tests marked `gpu`, in a pytest of their own; warnings of other versions are no errors there."""

from __future__ import annotations

from xml.etree import ElementTree

from gpu_steps.session import ROOT, Session


def run(session: Session) -> None:
    """One row of counts, and one for every test that did not pass."""
    report = session.folder / "tests.xml"
    command = ["-m", "pytest", "-m", "gpu", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", "-o", "filterwarnings=default", f"--junitxml={report}"]
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*_gpu.py"))
    failure = ""
    try:
        session.run(*command, f"--accelerator={session.device.type}", *files)
    except Exception as error:  # what passed before counts
        failure = str(error)
    if not report.exists():
        raise RuntimeError(failure)
    outcomes = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        kind = next((each.tag for each in case if each.tag in ("failure", "error", "skipped")), "passed")
        outcomes["failed" if kind in ("failure", "error") else kind] += 1
        if kind in ("failure", "error"):
            message = next(each.get("message", "") for each in case if each.tag == kind)
            session.add(f"{case.get('classname')}::{case.get('name')}", ok=False, note=message[:200])
    session.add("all", outcomes, ok=not outcomes["failed"] and outcomes["passed"] > 0)
