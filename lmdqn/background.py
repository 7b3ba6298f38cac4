"""Work beside the main thread's, which may hang for ever and yet lets the process end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Begin work in a daemon thread (an executor's threads are waited for when Python ends).

    What it gives, or whatever it raises, is had from the future.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # nothing is lost: it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
