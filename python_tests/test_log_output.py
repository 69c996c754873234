"""Log lines: above the bar, in a file, or as the program that uses the package has set them up."""

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_fast.log_output import BESIDE_BAR, command_output, has_log_file, show_log

PACKAGE = logging.getLogger("sae_fast")
LOGGER = logging.getLogger("sae_fast.somewhere")


@pytest.fixture
def bare() -> Iterator[None]:
    """Leave the package's logger without handlers and level, as in a new process."""
    before = list(PACKAGE.handlers), PACKAGE.level, PACKAGE.propagate
    yield
    PACKAGE.handlers[:], level, PACKAGE.propagate = before
    PACKAGE.setLevel(level)


def forget_setup(*, propagate: bool = False) -> None:
    """Remove handlers and level of the package's logger, also the handlers of pytest's.

    pytest adds them when the test is called. Without `propagate` its handlers further up are not
    seen either.
    """
    PACKAGE.handlers[:] = []
    PACKAGE.setLevel(logging.NOTSET)
    PACKAGE.propagate = propagate


pytestmark = pytest.mark.usefixtures("bare")


def test_lines_are_shown_where_nothing_is_set_up(capsys):
    forget_setup()
    show_log()
    show_log()
    LOGGER.info("a line")
    LOGGER.info("a figure", extra={BESIDE_BAR: True})
    assert capsys.readouterr().err == "a line\n"


def test_a_program_that_has_set_up_its_log_keeps_it(capsys):
    forget_setup(propagate=True)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    show_log()
    LOGGER.info("too quiet for it")
    LOGGER.warning("a warning")
    logging.getLogger().removeHandler(handler)
    assert PACKAGE.handlers == []
    assert stream.getvalue() == "a warning\n"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_command_shows_warnings_alone_and_its_file_has_all(
    capsys, tmp_path: Path, quiet: bool
):
    forget_setup()
    path = tmp_path / "deep" / "run.log"
    for _ in range(2):  # the second time it is appended to
        with command_output() as output:
            output.configure(quiet=quiet, log_file=path)
            assert has_log_file()
            output.say("a plan\nof two lines")
            LOGGER.info("a line")
            LOGGER.warning("a warning")
    assert not has_log_file()
    printed = capsys.readouterr()
    assert printed.out == ("" if quiet else "a plan\nof two lines\n" * 2)
    assert printed.err == ("a warning\n" * 2 if quiet else "a line\na warning\n" * 2)
    lines = path.read_text().splitlines()
    expected = ["INFO a plan", "INFO of two lines", "INFO a line", "WARNING a warning"]
    assert [" ".join(line.split()[2:]) for line in lines] == expected * 2


def test_a_command_after_a_quiet_one_is_not_quiet(capsys):
    forget_setup()
    for quiet in (True, False):
        with command_output() as output:
            output.configure(quiet=quiet, log_file=None)
            LOGGER.info("line %s", quiet)
    assert capsys.readouterr().err == "line False\n"


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    forget_setup()
    (tmp_path / "file").touch()
    with command_output() as output, pytest.raises(OSError, match="file"):
        output.configure(quiet=False, log_file=tmp_path / "file" / "run.log")
    assert not has_log_file()


def test_a_stream_that_is_replaced_gets_the_lines(monkeypatch):
    forget_setup()
    show_log()
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    LOGGER.info("a line")
    assert stream.getvalue() == "a line\n"
