"""Prints what the parity tests measured, as a table, at the end of the run."""

from reference import REPORT


def pytest_terminal_summary(terminalreporter):
    if not REPORT:
        return
    terminalreporter.section("parity with the reference")
    width = max(len(case) for case, _, _ in REPORT)
    for case, what, figure in REPORT:
        terminalreporter.write_line(f"{case:{width}s}  {what:34s} {figure}")
