import gc
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from native_fixtures import cxx_compiler, native_library, plain_build
from shown import SHOWN

__all__ = ["cxx_compiler", "native_library", "plain_build"]


# Few tests each, and minutes: begun last, one of them would run alone while the other processes of the session wait.
BEGUN_FIRST = (
    "test_scale_out.py",
    "test_native_sanitized.py",
    "test_recipes.py",
    "test_run.py",
    "test_decode_case.py",
    "test_fuzz_files.py",
    "test_operator_recipe.py",
    "test_native_build.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in BEGUN_FIRST)


def pytest_collection_finish() -> None:
    """What the imports made stays: left out, the collections of garbage during an export take a tenth of its time less."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all processes of a session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def shared_traces(request: pytest.FixtureRequest) -> Iterator[None]:
    if "torch" not in sys.modules:  # the tests of the operators do without
        yield
        return
    from shared_traces import sharing_traces, torchlib_read_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ort_ops.export.trace", sharing_traces(request.getfixturevalue("session_folder")))
        torchlib_read_once(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def translations_read_once() -> Iterator[None]:
    """LanguageIdDataModule reads thousands of files; they are read once per process."""
    if "lightning" not in sys.modules:
        yield
        return
    from lightning_modules.data import language_id

    read = cache(language_id.load_translations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_id, "load_translations", lambda min_length: list(read(min_length)))
        yield


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that change how a module is traced."""
    from ort_ops.tracing import trace

    monkeypatch.setattr("ort_ops.export.trace", trace)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == SHOWN:
                terminalreporter.write_line(f"{report.nodeid}\n{text}")
