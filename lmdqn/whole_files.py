"""Files, folders and links that are there whole or not at all: filled beside their place and swapped in."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from lmdqn.errors import writing


def beside(path: Path) -> Path:
    """Where a path's new content waits until it is complete."""
    return path.with_name(f".{path.name}.new")


def leaving(path: Path) -> Path:
    """Where a folder's old content goes until the new one is in place."""
    return path.with_name(f".{path.name}.old")


@contextmanager
def whole_file(file: Path) -> Iterator[TextIO]:
    """A text file to fill, in its place once it is complete.

    Raises:
        UserError: it cannot be written.
    """
    fresh = beside(file)
    with writing(file):
        text = fresh.open("w", encoding="utf-8")
    try:
        with text:
            yield text
        with writing(file):
            os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write a text file at once.

    Raises:
        UserError: it cannot be written.
    """
    with writing(file), whole_file(file) as lines:
        lines.write(text)


def write_link(link: Path, to: str) -> None:
    """A symbolic link, in the place of the one that was there."""
    fresh = beside(link)
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(to)
    os.replace(fresh, link)


def swap_in(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a fresh folder and put it in place of the old one only when it is complete and on the disk."""
    fresh, old = beside(folder), leaving(folder)
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    fresh.mkdir()
    try:
        fill(fresh)
        for file in fresh.rglob("*"):
            if file.is_file():
                _sync(file)
    except (OSError, SafetensorError):
        shutil.rmtree(fresh)  # a full disk is not kept full
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    if old.exists():
        shutil.rmtree(old)


def _sync(file: Path) -> None:
    """Wait until what was written has reached the disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
