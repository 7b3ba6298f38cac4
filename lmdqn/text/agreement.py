"""How well responses agree with other responses to the same prompt, each taken for a reference in its turn."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from lmdqn.episodes import Episode, by_group
from lmdqn.text.rewards import TaskRewards


def agreement(candidates: Sequence[Episode], judges: Sequence[Episode], rewards: TaskRewards) -> list[float]:
    """Each candidate's mean reward, as if each judge of its group but itself were the prompt's one reference.

    Where judges are drawn from what references are drawn from, this is the expected reward, without the noise of the
    one reference at hand: minus the Bayes risk (Kumar and Byrne 2004; Eikema and Aziz 2022). Every
    candidate needs one judge other than itself in its group.

    Raises:
        UserError, NotFinite: as `Reward.terms`.
    """
    judges_of = {group[0].group: group for group in by_group(judges)}
    trials: dict[tuple[int, str, str], Episode] = {}  # of equal samples one is scored, against one of equal judges

    def trial_of(candidate: Episode, judge: Episode) -> Episode:
        key = candidate.group, candidate.text, judge.text
        if key not in trials:
            trials[key] = _judged(candidate, judge)
        return trials[key]

    of_each = [
        [trial_of(candidate, judge) for judge in judges_of[candidate.group] if judge is not candidate]
        for candidate in candidates
    ]
    rewards.score(list(trials.values()))
    return [fmean(trial.reward for trial in of_candidate) for of_candidate in of_each]


def _judged(candidate: Episode, judge: Episode) -> Episode:
    return replace(candidate, example=replace(candidate.example, references=(judge.text,)))
