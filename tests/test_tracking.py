"""What a person sees of a run's course: a live line in a terminal, plain lines in a pipe."""

import re
from io import StringIO

import pytest
from rich.console import Console

from lmdqn.results.tracking import Tracker

SHOWN = ("DQN", "step 40", "2.0/s", "reward 0.512", "loss 1.250", "KL 3.750", "validation 61.300")


def course(is_terminal: bool, max_steps: int = 100, max_seconds: float | None = None) -> str:
    """All that is written of a phase whose step 40, the 20th second, is the last one told."""
    written = StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=160)
    tracker = Tracker(console, plain_every_s=0.0)
    with tracker.phase("DQN", max_steps, max_seconds):
        tracker.log("dqn", {"step": 20, "seconds": 10.0, "validation_reward": 61.3})
        tracker.log("dqn", {"step": 40, "seconds": 20.0, "reward": 0.512, "loss": 1.25, "kl_nats": 3.75})
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written.getvalue())


@pytest.mark.parametrize("is_terminal", [True, False])
def test_phase_step_rate_reward_loss_kl_and_the_last_validation_are_shown(is_terminal: bool) -> None:
    last = course(is_terminal).strip().splitlines()[-1]
    for words in SHOWN:
        assert words in last


@pytest.mark.parametrize(("max_steps", "max_seconds", "left"), [(100, None, 30), (1000, 50.0, 30), (50, 500.0, 5)])
def test_a_pipe_is_told_the_time_left_to_the_nearer_limit(max_steps: int, max_seconds: float | None, left: int) -> None:
    lines = course(False, max_steps, max_seconds).splitlines()
    assert len(lines) == 2
    assert lines[-1].endswith(f"{left} s left")


def test_a_terminal_shows_time_gone_and_time_left() -> None:
    assert re.search(r"\d:\d\d:\d\d +(\d|-):(\d|-)", course(True))


def test_a_line_stays_as_it_is_however_narrow_the_pipe() -> None:
    written = StringIO()
    Tracker(Console(file=written, width=20)).say("a line of more than twenty letters [of/a/folder]")
    assert written.getvalue() == "a line of more than twenty letters [of/a/folder]\n"
