"""HTML pages: one self-contained file each, no network, all text escaped."""

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lmdqn.errors import UserError


def render(template: str, **content: Any) -> str:
    """A page of `results/pages/`; whatever is not marked as safe by our own code is escaped."""
    environment = Environment(
        loader=PackageLoader("lmdqn.results", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def write_page(file: Path, page: str) -> None:
    """Write beside and swap in.

    Raises:
        UserError: the file cannot be written.
    """
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
