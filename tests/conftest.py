import pytest
from native_fixtures import cxx_compiler, native_library, plain_build
from shown import SHOWN

__all__ = ["cxx_compiler", "native_library", "plain_build"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == SHOWN:
                terminalreporter.write_line(f"{report.nodeid}\n{text}")
