"""The frame of the campaigns: every fault in a try is counted as that try's failure."""

import io
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
if not (TOOLS / "campaign").exists():
    pytest.skip("no checkout: the campaigns are not installed", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

from campaign import frame  # noqa: E402
from campaign.frame import (  # noqa: E402
    Campaign,
    Failed,
    leftovers,
    refusal,
    run,
    run_aside,
    success,
)


def crash(_):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_):
    while True:
        time.sleep(1)


def spin(_):
    while True:
        pass


def leak(_):
    os.open("/dev/null", os.O_RDONLY)
    return "fine"


def fail(_):
    raise Failed("a wrong number")


def stumble(_):
    return "fine" if [] else [][0]


def report_of(attempt, tmp_path, tries=5, **options):
    """Return the report of tries of which every third calls `attempt` and the others succeed."""

    def mixed(chance):
        return attempt(chance) if chance.number % 3 == 1 else "fine"

    return run(Campaign(mixed, tries, tries, **options), range(tries), 0, tmp_path)


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (crash, "ended by signal 9"),
        (leak, "fine, and 1 descriptors stay open"),
        (fail, "a wrong number"),
        (stumble, "IndexError"),
    ],
)
def test_a_failure_is_that_of_one_try(tmp_path, attempt, said):
    report = report_of(attempt, tmp_path)
    assert report.outcomes == {"fine": 3}
    assert list(report.failures) == [1, 4]
    assert all(said in failure for failure in report.failures.values())


def test_failures_are_told_when_they_come(tmp_path):
    log = io.StringIO()
    run(Campaign(fail, 2, 2, block=1), range(2), 0, tmp_path, log)
    assert log.getvalue() == "try 0 failed: a wrong number\ntry 1 failed: a wrong number\n"


@pytest.mark.slow
@pytest.mark.parametrize("endless", [hang, spin])
def test_a_try_that_hangs_is_ended(tmp_path, endless):
    report = report_of(endless, tmp_path, tries=3, seconds=0.1)
    assert report.outcomes == {"fine": 2}
    assert report.failures == {1: "no end within 0.1 s computed"}


def test_a_process_that_the_machine_keeps_waiting_does_not_hang():
    def wait():
        time.sleep(3 * seconds)
        return 5

    seconds = 0.3
    ended = run_aside(wait, seconds=seconds)
    assert (ended.code, ended.hung) == (5, False)


def test_a_process_that_waits_for_a_processor_does_not_hang(monkeypatch):
    def wait():
        time.sleep(1)
        return 5

    monkeypatch.setattr(frame, "_kept_waiting", lambda child: {child: time.monotonic()})
    ended = run_aside(wait, seconds=2)
    assert (ended.code, ended.hung) == (5, False)
    monkeypatch.setattr(frame, "_kept_waiting", lambda child: {child: 0.0})
    assert run_aside(wait, seconds=0.01).hung


def test_threads_that_share_a_processor_wait_for_it():
    def share():
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        children = [os.fork() or spin(None) for _ in range(2)]
        while not all(sum(frame._kept_waiting(child).values()) > 0 for child in children):
            time.sleep(0.01)
        whole = frame._kept_waiting(os.getpid())
        for child in children:
            os.kill(child, signal.SIGKILL)
        return 0 if set(children) < set(whole) else 1

    assert run_aside(share).code == 0


def test_a_try_has_the_random_numbers_of_its_number(tmp_path):
    def attempt(chance):
        return f"{chance.number} {chance.random.random()}"

    campaign = Campaign(attempt, 4, 4, block=3)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(campaign, range(4), 5, tmp_path / "a").outcomes
    assert run(campaign, [2], 5, tmp_path / "b").outcomes.keys() <= whole.keys()


def test_what_is_prepared_is_there_for_all_tries(tmp_path):
    def prepare(folder):
        (folder / "number").write_text("7")

    def attempt(chance):
        assert list(chance.folder.iterdir()) == []
        return (chance.shared / "number").read_text()

    assert run(Campaign(attempt, 2, 2, prepare), range(2), 0, tmp_path).outcomes == {"7": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_preparation_that_fails_ends_the_campaign(tmp_path):
    with pytest.raises(Failed, match="ZeroDivisionError"):
        run(Campaign(fail, 2, 2, lambda _: 1 / 0), range(2), 0, tmp_path)


@pytest.mark.slow
def test_a_command_aside_has_its_folder_limits_and_output(tmp_path):
    def work():
        print(os.getcwd(), os.environ["COLOUR"])
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], file=sys.stderr)
        return 3

    limits, variables = {resource.RLIMIT_NOFILE: 40}, {"COLOUR": "red"}
    ended = run_aside(work, folder=tmp_path, limits=limits, variables=variables)
    assert (ended.code, ended.signal, ended.hung) == (3, None, False)
    assert (ended.out, ended.err) == (f"{tmp_path} red\n", "40\n")
    assert run_aside(lambda: crash(None)).signal == signal.SIGKILL
    assert run_aside(lambda: hang(None), seconds=0.1).hung
    assert run_aside(lambda: spin(None), seconds=0.1).hung


def complain(code, *lines):
    def work():
        print(*lines, sep="\n", file=sys.stderr)
        return code

    return run_aside(work)


def test_a_refusal_is_one_line_and_exit_code_2():
    assert refusal(complain(2, "a warning", "error: no")) == "error: no"
    for ended in (
        complain(1, "error: no"),
        complain(2, "error: no", "and more"),
        complain(2, "error: no", "error: no"),
        complain(2, "error: " + "x" * 3000),
        complain(0),
    ):
        with pytest.raises(Failed):
            refusal(ended)
    assert success(complain(0, "all well")) == "all well\n"
    with pytest.raises(Failed):
        success(complain(2, "error: no"))


def test_temporary_files_are_leftovers(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".lock").touch()
    leftovers(tmp_path, known=(".lock",))
    with pytest.raises(Failed, match=r"deep/\.lock"):
        leftovers(tmp_path)


def test_a_child_that_ends_leaves_the_folder_of_its_try(tmp_path):
    def attempt(given):
        (given.folder / "kept").touch()
        run_aside(lambda: 0)
        return "there" if (given.folder / "kept").exists() else "gone"

    report = run(Campaign(attempt, 2, 2), range(2), 0, tmp_path)
    assert report.outcomes == {"there": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
