"""What holds for all tests, and the table of what the parity tests measured at the end of the run."""

import os
import shutil
import tempfile

import jax
import pytest
from reference import REPORT

from instseg_jax import cli

cli.compile_quickly()  # as the command line does; commands that the tests start inherit it
# What one test compiled is there for all others, also of the other process and in the commands that they start.
MADE = None if "INSTSEG_COMPILED" in os.environ else tempfile.mkdtemp(prefix="instseg-compiled-")
COMPILED = os.environ.setdefault("INSTSEG_COMPILED", str(MADE))
if COMPILED:
    jax.config.update("jax_compilation_cache_dir", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

if os.environ.get("INSTSEG_STRICT"):  # nothing is broadcast by rank alone
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_sessionfinish(session):
    output = getattr(session.config, "workeroutput", None)  # of one process of several
    if output is not None:
        output["parity"] = [list(row) for row in REPORT]
    if MADE:
        shutil.rmtree(MADE, ignore_errors=True)


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
