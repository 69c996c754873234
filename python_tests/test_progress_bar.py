"""Progress bars: drawn on a terminal only, and without a thread."""

import io
import sys
import threading

import pytest

from sae_fast.progress_bar import progress_bar


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_drawn_on_a_terminal_and_starts_no_thread(monkeypatch, is_terminal):
    monkeypatch.setattr(sys, "stderr", Stream(is_terminal))
    before = threading.enumerate()
    with progress_bar(total=4, unit="step", mininterval=0) as bar:
        for _ in range(4):
            bar.update(1)
        assert threading.enumerate() == before
    assert ("4/4" in sys.stderr.getvalue()) == is_terminal
