"""Recipes and data sets that come with lmdqn: inside an installed package, or beside it in a checkout."""

from pathlib import Path

from lmdqn.errors import UserError
from lmdqn.recipe import nearest

_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """The folder `recipes` or `data`."""
    installed = _PACKAGE / "shipped_files" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by name."""
    return {file.stem: file for file in sorted(shipped_folder("recipes").glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """A recipe file by path, or a shipped one by name.

    Raises:
        UserError: neither; the nearest shipped name is given.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    recipes = shipped_recipes()
    name = name_or_path.removesuffix(".yaml")
    if name in recipes:
        return recipes[name]
    raise UserError(f"there is no recipe file or shipped recipe {name_or_path!r}{nearest(name, recipes)}")


def describe(recipe: Path) -> str:
    """The first sentence of a recipe's header comment."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()
