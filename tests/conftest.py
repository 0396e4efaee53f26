"""What holds for all tests, and the table of what the parity tests measured at the end of the run."""

import os

import jax
import pytest
from reference import REPORT

if os.environ.get("INSTSEG_STRICT"):  # nothing is broadcast by rank alone
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_sessionfinish(session):
    output = getattr(session.config, "workeroutput", None)  # of one process of several
    if output is not None:
        output["parity"] = [list(row) for row in REPORT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    REPORT.extend(tuple(row) for row in getattr(node, "workeroutput", {}).get("parity", ()))


def pytest_terminal_summary(terminalreporter):
    if not REPORT:
        return
    terminalreporter.section("parity with the reference")
    width = max(len(case) for case, _, _ in REPORT)
    for case, what, figure in REPORT:
        terminalreporter.write_line(f"{case:{width}s}  {what:34s} {figure}")
