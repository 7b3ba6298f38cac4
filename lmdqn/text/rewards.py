"""Rewards: a weighted mix of metrics and of functions that a user brings, scoring whole responses."""

import importlib
import importlib.util
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from lmdqn.background import in_background
from lmdqn.errors import NotFinite, UserError
from lmdqn.recipe import QLearningSection, RewardSection, TaskSection
from lmdqn.text import metrics

if TYPE_CHECKING:
    from lmdqn.episodes import Episode  # whose import of torch would take seconds

RewardFunction = Callable[..., Sequence[float]]


class _OverdueError(Exception):
    """A function that a user brings was still at work when its time was up. (One may raise a TimeoutError itself.)"""


class _Texts(NamedTuple):
    """What is scored, one entry for each response."""

    responses: Sequence[str]
    references: metrics.References
    sources: Sequence[str]

    def arguments(self) -> dict[str, list[Any]]:
        """As a user's function gets them: copies, which it may change."""
        references = [list(texts) for texts in self.references]
        return {"responses": list(self.responses), "references": references, "sources": list(self.sources)}

    def one(self, i: int) -> "_Texts":
        return _Texts(self.responses[i : i + 1], self.references[i : i + 1], self.sources[i : i + 1])

    def describe(self, i: int) -> str:
        """Which one it is, for a person."""
        return f"response {i} of {len(self.responses)}, {self.responses[i][:80]!r} to {self.sources[i][:80]!r}"


class Reward:
    """Scores responses by the recipe's mix; every term is kept beside the weighted sum.

    A user's term is a function `f(responses, references, sources) -> list of float`, called by keyword with a
    list of texts, a list of lists of texts and a list of texts; it gives one finite number for each response.
    """

    def __init__(self, recipe: RewardSection):
        self.recipe = recipe
        self._own = {name: _load_function(name) for name in recipe.mix if ":" in name}

    def terms(
        self, responses: Sequence[str], references: metrics.References, sources: Sequence[str]
    ) -> dict[str, list[float]]:
        """Each term of the mix, unweighted, for each response.

        Raises:
            UserError: a user's function failed, took too long, or gave another number of scores.
            NotFinite: it gave one that is not finite.
        """
        recipe = self.recipe
        rouges = [name for name in recipe.mix if name in metrics.ROUGE_TYPES]
        found = dict(metrics.rouge(responses, references, rouges)) if rouges else {}
        for name in recipe.mix:
            if name == "bleu":
                found[name] = metrics.sentence_bleu(responses, references, recipe.bleu_smoothing, recipe.lowercase)
            elif name == "chrf":
                found[name] = metrics.sentence_chrf(responses, references, recipe.lowercase)
            elif name == "length":
                found[name] = metrics.length_match(responses, references)
            elif name == "repetition":
                found[name] = metrics.repeated_4grams(responses)
            elif name in self._own:
                texts = _Texts(responses, references, sources)
                found[name] = _call_own(name, self._own[name], texts, recipe.max_seconds)
        return found

    def mix(self, terms: dict[str, list[float]]) -> list[float]:
        """The weighted sum of the terms for each response."""
        columns = [[self.recipe.mix[name] * score for score in scores] for name, scores in terms.items()]
        return [sum(parts) for parts in zip(*columns, strict=True)]

    def score(self, episodes: Sequence["Episode"]) -> None:
        """Write each episode's reward, and the terms it is mixed from, into it.

        Raises:
            NotFinite: a score is not finite; it has the episodes.
        """
        texts = [e.text for e in episodes]
        try:
            terms = self.terms(texts, [e.example.references for e in episodes], [e.example.source for e in episodes])
        except NotFinite as problem:
            problem.episodes = episodes
            raise
        for i, (episode, total) in enumerate(zip(episodes, self.mix(terms), strict=True)):
            episode.reward = total
            episode.terms = {name: scores[i] for name, scores in terms.items()}

    def __call__(self, responses: Sequence[str], references: metrics.References, sources: Sequence[str]) -> list[float]:
        """The reward of each response."""
        return self.mix(self.terms(responses, references, sources))


class TaskRewards:
    """The rewards of a recipe's tasks: each episode is scored by its own task's."""

    def __init__(self, tasks: Mapping[str, TaskSection]):
        self.of_task = {name: Reward(task.reward) for name, task in tasks.items()}

    def score(self, episodes: Sequence["Episode"]) -> None:
        """Write each episode's reward, and the terms it is mixed from, into it; raises as `Reward.score`."""
        for name, reward in self.of_task.items():
            if of_task := [episode for episode in episodes if episode.example.task == name]:
                reward.score(of_task)


def _load_function(name: str) -> RewardFunction:
    """`package.module:function`, or `path/to/file.py:function`."""
    origin, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except (Exception, SystemExit) as error:  # a module that is not ours may do anything
        raise UserError(f"reward.mix term {name!r}: cannot load {origin} ({_told(error)})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward.mix term {name!r}: {origin} has no function {attribute!r}")
    return function


def _load_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    name = f"lmdqn_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _call_own(
    name: str,
    function: RewardFunction,
    texts: _Texts,
    max_seconds: float | None,
) -> list[float]:
    """The scores of a function that a user wrote, of which anything must be expected."""
    scores = _guarded(name, function, texts, max_seconds)
    try:
        scores = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name!r} must give a list of numbers, one for each response ({error})") from error
    if len(scores) != len(texts.responses):
        raise UserError(f"reward {name!r} gave {len(scores)} scores for {len(texts.responses)} responses")
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise NotFinite(f"reward {name!r} gave {score} for {texts.describe(i)}")
    return scores


def _guarded(name: str, function: RewardFunction, texts: _Texts, max_seconds: float | None) -> Sequence[float]:
    try:
        return _within(max_seconds, partial(function, **texts.arguments()))
    except _OverdueError as error:
        raise UserError(
            f"reward {name!r} took longer than reward.max_seconds={max_seconds:g} for {len(texts.responses)} "
            f"responses, the first {texts.describe(0)}"
        ) from error
    except Exception as error:  # a function that is not ours may raise anything
        raise UserError(
            f"reward {name!r} failed with {_told(error)}, for {_culprit(function, texts, max_seconds)}"
        ) from error


def _told(error: BaseException) -> str:
    """What went wrong in a user's code, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if not frame.filename.startswith("<") and frame.filename != __file__]
    where = f" (line {lines[-1].lineno} of {lines[-1].filename})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def centre(group: Sequence["Episode"], overall: float, recipe: QLearningSection) -> None:
    """Write what each episode of a prompt is measured against: its baseline, and for the value head its peers.

    The baseline moves V by a constant of the prompt and leaves the advantages alone. Without knowing how the prompt's
    other samples fared (the leave-one-out mean; Kool et al. 2019) no value head could tell what a good
    prefix is worth beyond that baseline. Only sampled rewards count, so that demonstrations, which are better, push no
    sample down. `overall` is the mean reward over prompts.
    """
    sampled = [episode.reward for episode in group if not episode.demonstration]
    baseline = {"group": fmean(sampled), "running": overall, "none": 0.0}[recipe.baseline]
    for episode in group:
        episode.baseline = baseline
        others = len(sampled) - (not episode.demonstration)
        if recipe.value_sees_references and others:
            own = 0.0 if episode.demonstration else episode.reward
            episode.peers = (sum(sampled) - own) / others


def _culprit(function: RewardFunction, texts: _Texts, max_seconds: float | None) -> str:
    """The first response for which the function fails when it is called for that one alone."""
    for i in range(len(texts.responses)):
        try:
            _within(max_seconds, partial(function, **texts.one(i).arguments()))
        except Exception:
            return texts.describe(i)
    return f"{len(texts.responses)} responses together, and for none of them alone"


def _within(seconds: float | None, call: Callable[[], Sequence[float]]) -> Sequence[float]:
    """What a call gives, if it does so in time.

    In the main thread a signal breaks in, outside compiled code. Others have no signals: there it is left to itself.

    Raises:
        _OverdueError: so many seconds have passed.
    """
    if seconds is None:
        return call()
    if threading.current_thread() is not threading.main_thread():
        future = in_background(call)
        if not wait([future], seconds).done:
            raise _OverdueError
        return future.result()

    def ring(number: int, frame: FrameType | None) -> None:
        raise _OverdueError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
