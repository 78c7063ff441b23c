"""A pytest plugin for CI: prints skips by reason, and fails the run on an unexpected one."""

from __future__ import annotations

from collections import Counter

import pytest

EXPECTED = {
    "no GPU",
    "fewer than two GPUs",
    "wandb is not installed",
    "mlflow is not installed",
    "trackio is not installed",
    "ray is not installed",
    "bitsandbytes is not installed",
    "mounting is not permitted",
    "no private mounts",
}
"""Reasons that a two-core machine without a GPU, with requirements/cpu.txt and the shared data, may give."""


class SkipReasons:
    """Counts the reasons of skipped tests and modules."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.seen: Counter[str] = Counter()

    @property
    def unexpected(self) -> list[str]:
        """Reasons that are not in `EXPECTED`, sorted."""
        return sorted(set(self.seen) - EXPECTED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a skipped test; an expected failure is none."""
        if report.skipped and not hasattr(report, "wasxfail"):
            self._count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a module that skipped itself."""
        if report.skipped:
            self._count(report)

    def _count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.seen[reason.removeprefix("Skipped: ")] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run that would pass fails when a skip has an unexpected reason."""
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print each reason with its count; the unexpected ones are marked."""
        terminalreporter.section("skips by reason")
        for reason, count in sorted(self.seen.items()):
            mark = "" if reason in EXPECTED else "   UNEXPECTED: fails the run (.ci/skip_reasons.py)"
            terminalreporter.line(f"{count:5d}  {reason}{mark}")
        if not self.seen:
            terminalreporter.line("    none")


def pytest_configure(config: pytest.Config) -> None:
    """Register the counter."""
    config.pluginmanager.register(SkipReasons(), "skip-reasons")
