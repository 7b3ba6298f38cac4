"""Rewards: mixes of metrics and of functions that a user brings."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lmdqn.background import in_background
from lmdqn.episodes import Episode, Example
from lmdqn.errors import UserError
from lmdqn.recipe import REWARD_TERMS, QLearningSection, RewardSection
from lmdqn.text import metrics
from lmdqn.text.rewards import Reward, centre

RESPONSES = ["The cat sat on the mat .", "a b c d a b c d", "nothing of it"]
REFERENCES = [["the cat is on the mat .", "a cat sat there"], ["a b c d"], ["all else by far", "and more of it"]]
SOURCES = ["one", "two", "three"]

USER_FUNCTIONS = """
import time

def shortness(responses, references, sources):
    return [-len(response) for response in responses]

def seen(responses, references, sources):
    assert references[0] == ["the cat is on the mat .", "a cat sat there"]
    assert references[1:] == [["a b c d"], ["all else by far", "and more of it"]]
    assert sources == ["one", "two", "three"]
    return [1.0 if response == "nothing of it" else 0.5 for response in responses]

def too_few(responses, references, sources):
    return [1.0]

def not_a_number(responses, references, sources):
    return [0.0, float("nan"), 1.0]

def stumbles(responses, references, sources):
    return [1 / (len(response) - len("nothing of it")) for response in responses]

def crowded(responses, references, sources):
    raise MemoryError if len(responses) > 1 else ValueError

def impatient(responses, references, sources):
    raise TimeoutError("no answer")

def sleeps(responses, references, sources):
    time.sleep(1e6)

def hangs(responses, references, sources):
    while True:
        pass

def infinite(responses, references, sources):
    return [0.0, 1.0, float("inf")]

a_constant = 3
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is also importable as the module `my_rewards`."""
    file = tmp_path / "my_rewards.py"
    file.write_text(USER_FUNCTIONS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return file


def scores(
    mix: dict[str, float], responses: Sequence[str] = RESPONSES, max_seconds: float | None = None
) -> list[float]:
    return Reward(RewardSection(mix=mix, max_seconds=max_seconds))(responses, REFERENCES, SOURCES)


def test_every_term_is_its_metric() -> None:
    rouges = metrics.rouge(RESPONSES, REFERENCES, metrics.ROUGE_TYPES)
    wanted = {
        "bleu": metrics.sentence_bleu(RESPONSES, REFERENCES),
        "chrf": metrics.sentence_chrf(RESPONSES, REFERENCES),
        **rouges,
        "length": [pytest.approx(11 / 14), 0.5, 3 / 4],
        "repetition": [0.0, pytest.approx(0.2), 0.0],
    }
    assert set(wanted) == set(REWARD_TERMS)
    found = Reward(RewardSection(mix=dict.fromkeys(REWARD_TERMS, 1.0))).terms(RESPONSES, REFERENCES, SOURCES)
    assert found == wanted
    for name in REWARD_TERMS:
        assert scores({name: 1.0}) == found[name]


def test_a_mix_is_the_weighted_sum() -> None:
    """Lengths 11/14 (5.5 words are usual, 7 were written), 1/2 and 3/4; repeated 0, 1/5 and 0."""
    assert scores({"length": 0.5, "repetition": -2.0}) == pytest.approx([11 / 28, 0.25 - 0.4, 0.375])


def test_weights_stay_with_their_terms_whatever_the_order() -> None:
    terms = {name: scores({name: 1.0}) for name in ("repetition", "rougeL", "bleu")}
    wanted = [
        3 * repetition + 5 * rouge + 7 * bleu
        for repetition, rouge, bleu in zip(terms["repetition"], terms["rougeL"], terms["bleu"], strict=True)
    ]
    assert scores({"repetition": 3, "rougeL": 5, "bleu": 7}) == pytest.approx(wanted)


def test_the_default_mix_is_bleu_and_rouge_l_in_halves() -> None:
    wanted = [(b + r) / 2 for b, r in zip(scores({"bleu": 1}), scores({"rougeL": 1}), strict=True)]
    assert Reward(RewardSection())(RESPONSES, REFERENCES, SOURCES) == pytest.approx(wanted)


@pytest.mark.parametrize("smoothing", ["exp", "floor", "add-k", "none"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_smoothing_and_case_are_passed_on(smoothing: str, lowercase: bool) -> None:
    section = RewardSection.model_validate(
        {"mix": {"bleu": 1, "chrf": 1}, "bleu_smoothing": smoothing, "lowercase": lowercase}
    )
    assert Reward(section).terms(RESPONSES, REFERENCES, SOURCES) == {
        "bleu": metrics.sentence_bleu(RESPONSES, REFERENCES, smoothing, lowercase),
        "chrf": metrics.sentence_chrf(RESPONSES, REFERENCES, lowercase),
    }


def test_without_references_only_repetition_and_ones_own(user_file: Path) -> None:
    reward = Reward(RewardSection(mix={"repetition": -1, "my_rewards:shortness": 1}))
    assert reward(["a a a a a", "b"], [(), ()], ["x", "y"]) == pytest.approx([-9.5, -1.0])


def test_user_function_of_a_module(user_file: Path) -> None:
    assert scores({"my_rewards:shortness": 2}) == [-2.0 * len(response) for response in RESPONSES]


def test_user_function_of_a_file(user_file: Path) -> None:
    assert scores({f"{user_file}:shortness": 1}) == [-len(response) for response in RESPONSES]


def test_user_function_of_a_file_here(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_file.parent)
    assert scores({"my_rewards.py:shortness": 1}) == [-len(response) for response in RESPONSES]


def test_user_function_sees_references_and_sources(user_file: Path) -> None:
    assert scores({"my_rewards:seen": 1, "length": 1}) == pytest.approx([0.5 + 11 / 14, 1.0, 1.75])


def test_files_of_one_name_do_not_mix(user_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "my_rewards.py"
    other.parent.mkdir()
    other.write_text(
        "def constant(responses, references, sources):\n    return [4] * len(responses)\n", encoding="utf-8"
    )
    assert scores({f"{user_file}:seen": 1, f"{other}:constant": 1}) == [4.5, 4.5, 5.0]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("too_few", "gave 1 scores for 3 responses"),
        ("not_a_number", "gave nan for response 1 of 3, 'a b c d a b c d' to 'two'"),
        ("infinite", "gave inf for response 2 of 3, 'nothing of it' to 'three'"),
        (
            "stumbles",
            r"failed with ZeroDivisionError: .* \(line \d+ of .*my_rewards.py\), for response 2 of 3, "
            "'nothing of it' to 'three'",
        ),
    ],
)
def test_user_function_that_gives_no_scores(user_file: Path, function: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"^reward 'my_rewards:{function}' {complaint}$"):
        scores({f"my_rewards:{function}": 1})


def test_a_timeout_of_ones_own_is_a_failure(user_file: Path) -> None:
    with pytest.raises(UserError, match=r"impatient' failed with TimeoutError: no answer .*, for response 0 of 3"):
        scores({"my_rewards:impatient": 1})


def test_user_function_that_hangs(user_file: Path) -> None:
    with pytest.raises(UserError, match=r"longer than reward\.max_seconds=0\.05 for 3 responses, the first response 0"):
        scores({"my_rewards:hangs": 1}, max_seconds=0.05)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("name", ["sleeps", "stumbles", "shortness", "not_a_number", "impatient"])
def test_in_a_thread_it_ends_as_in_the_main_one(user_file: Path, name: str) -> None:
    """Within the time it has, with the same scores or the same words."""

    def outcome() -> Any:
        try:
            return scores({f"my_rewards:{name}": 1}, max_seconds=0.2)
        except UserError as told:
            return type(told), str(told)

    assert in_background(outcome).result() == outcome()


def test_metrics_in_a_thread_are_the_same_to_the_bit() -> None:
    mix = dict.fromkeys(REWARD_TERMS, 0.1)
    assert in_background(lambda: scores(mix)).result() == scores(mix)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("no_such_module:f", "no_such_module"),
        (":f", "':f'"),
        ("no_such_file.py:f", "no_such_file.py"),
        ("my_rewards:no_such_function", "no function 'no_such_function'"),
        ("my_rewards:a_constant", "no function 'a_constant'"),
        ("my_rewards:", "no function ''"),
    ],
)
def test_user_function_that_is_not_there(user_file: Path, name: str, missing: str) -> None:
    with pytest.raises(UserError) as refused:
        Reward(RewardSection(mix={name: 1}))
    assert f"reward.mix term {name!r}" in str(refused.value)
    assert missing in str(refused.value)


def test_user_file_with_a_syntax_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.py:f': cannot load .*broken\.py"):
        Reward(RewardSection(mix={f"{tmp_path}/broken.py:f": 1}))


# --- what an episode is measured against --------------------------------------------------------------------------


def a_group(*rewards: float) -> list[Episode]:
    """Samples with those rewards, and a demonstration with reward 1."""
    example = Example("", ("",), (5,), ((2,),), "")
    samples = [Episode(example, [2], False, 0, reward=reward) for reward in rewards]
    return [*samples, Episode(example, [2], False, 0, demonstration=True, reward=1.0)]


@pytest.mark.parametrize(("baseline", "centre_of_all"), [("group", 0.5), ("running", 0.3), ("none", 0.0)])
def test_peers_are_the_other_samples(baseline: Any, centre_of_all: float) -> None:
    group = a_group(0.25, 0.5, 0.75)
    centre(group, 0.3, QLearningSection(baseline=baseline))
    assert [e.baseline for e in group] == [centre_of_all] * 4
    assert [e.peers for e in group] == [0.625, 0.5, 0.375, 0.5]


def test_a_sample_alone_has_no_peers_and_a_value_head_that_ranks_may_see_none() -> None:
    alone, blind = a_group(0.25), a_group(0.25, 0.5)
    centre(alone, 0.3, QLearningSection(baseline="running"))
    centre(blind, 0.3, QLearningSection(value_sees_references=False))
    assert [e.peers for e in alone] == [None, 0.25]
    assert [e.peers for e in blind] == [None] * 3
