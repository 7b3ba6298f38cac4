"""What every part of a recipe is: typed, frozen, and strict about its keys."""

import difflib
import os
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _found(name: str) -> str:
    """A folder's whole path, so that nobody takes it for a name on the hub; such a name as it is."""
    place = os.path.expanduser(name)
    return os.path.abspath(place) if os.path.isdir(place) else place


Place = Annotated[str, AfterValidator(os.path.expanduser)]  # of a file or folder: ~ is the user's home
HubName = Annotated[str, AfterValidator(_found)]  # or a folder here, which comes first, as in transformers


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, numbers are finite, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint for the end of an error message: the choice that was probably meant, else all if they are few."""
    choices = list(choices)
    if close := difflib.get_close_matches(word, choices, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(choices)}" if len(choices) <= 20 else ""
