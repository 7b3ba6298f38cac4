"""HTML pages: one self-contained file each, no network, all text escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


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
