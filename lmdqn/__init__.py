"""Fine-tune language models with token-level DQN: `load_recipe`, `train`, `evaluate` and `generate`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdqn.answering import evaluate, generate
    from lmdqn.errors import UserError
    from lmdqn.pipeline import train
    from lmdqn.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "UserError", "evaluate", "generate", "load_recipe", "train"]

_HOMES = {
    "Recipe": "lmdqn.recipe",
    "UserError": "lmdqn.errors",
    "evaluate": "lmdqn.answering",
    "generate": "lmdqn.answering",
    "load_recipe": "lmdqn.recipe",
    "train": "lmdqn.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import each public name on first use: `import lmdqn` itself stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmdqn' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
