"""The exceptions that mean: the user can mend this; a number is none; the user asked to stop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input, told in one sentence that names the file, key or line and what would be right.

    The command line prints the sentence and exits with code 2; from Python it is an ordinary exception.
    """


class NotFinite(UserError):  # noqa: N818  (what was found)
    """A NaN or an infinity where a number is needed: a step is skipped for it, a run stops after too many.

    `episodes` are those of the step.
    """

    episodes: Sequence[Any] = ()


class Stopped(Exception):  # noqa: N818  (no error)
    """A signal ended the run after a whole step and a checkpoint; the sentence says how to go on.

    The command line prints the sentence and exits with 128 + the signal's number, as shells expect.
    """

    def __init__(self, sentence: str, signal_number: int):
        super().__init__(sentence)
        self.signal_number = signal_number


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell in one sentence that `path` cannot be written (a full disk, a read-only folder)."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
