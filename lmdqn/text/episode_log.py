"""A file of logged episodes: prompt, response, reward and, where known, the log-probabilities it was sampled with."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lmdqn.episodes import Episode, Example, SequenceFormat
from lmdqn.errors import UserError, writing
from lmdqn.recipe import QLearningSection, Recipe
from lmdqn.text.data import Row, read_file
from lmdqn.text.rewards import centre
from lmdqn.whole_files import whole_file


@dataclass
class EpisodeLog(Sequence[list[Episode]]):
    """Groups of the episodes that share a prompt, made from their rows when they are asked for.

    A prompt that is one of the training examples' takes that example, and with it its references.
    """

    origin: str
    rows: Sequence[Row]  # in memory, or an Arrow file of `datasets`
    tokenizer: Any
    layout: SequenceFormat
    examples: Sequence[Example]
    max_response_tokens: int
    recipe: QLearningSection  # its running baseline is here the log's mean
    _places: list[list[int]] = field(init=False)  # rows of each group
    _mean_reward: float = field(init=False)

    def __post_init__(self) -> None:
        self._by_prompt = {example.prompt: example for example in self.examples}
        places: dict[str, list[int]] = {}
        total = 0.0
        for i, row in enumerate(self.rows):
            places.setdefault(_text(row, "prompt", self._where(i)), []).append(i)
            total += _reward(row, self._where(i))
        if not places:
            raise UserError(f"{self.origin} holds no episodes")
        self._places = list(places.values())
        self._mean_reward = total / len(self.rows)
        if self.recipe.baseline == "group" and all(len(rows) == 1 for rows in self._places):
            raise UserError(
                f"{self.origin} holds one response a prompt, so that qlearning.baseline=group leaves no reward: "
                "set qlearning.baseline=running or none"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        """The group of that number.

        Raises:
            UserError: a row is not an episode; file and row are named.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        group = [self._episode(i, number) for i in self._places[number]]
        centre(group, self._mean_reward, self.recipe)
        return group

    def __iter__(self) -> Iterator[list[Episode]]:
        return (self[number] for number in range(len(self)))

    def _where(self, i: int) -> str:
        return _row(self.origin, i)

    def _episode(self, i: int, group: int) -> Episode:
        row, where = self.rows[i], self._where(i)
        response = _text(row, "response", where)
        logged = ids = row.get("response_ids")
        truncated = bool(row.get("truncated") or False)
        if ids is None:
            ids = list(self.tokenizer(text_target=response, add_special_tokens=False).input_ids)
            ids += [] if truncated else [self.layout.eos_ids[0]]
        if not ids or not self._are_tokens(ids):
            raise UserError(
                f"{where}: response_ids must be a list of at least one of this model's token ids; leave it and "
                "behaviour_log_probs out of the log where another model wrote it"
            )
        if logged and _letters(self.tokenizer.decode(ids, skip_special_tokens=True)) != _letters(response):
            raise UserError(
                f"{where}: response_ids do not spell the response in this model's tokens: train the model that wrote "
                "the log, or leave response_ids and behaviour_log_probs out of it"
            )
        behaviour = row.get("behaviour_log_probs")
        if behaviour is not None and (len(behaviour) != len(ids) or not all(map(_is_log_prob, behaviour))):
            raise UserError(
                f"{where}: behaviour_log_probs must be {len(ids)} numbers of at most 0, one for each token of the "
                "response with its end; where the tokens differ, log response_ids too"
            )
        ids = ids[: self.max_response_tokens]
        truncated = truncated or ids[-1] not in self.layout.eos_ids
        episode = Episode(self._example(row, where, len(ids)), ids, truncated, group, text=response)
        episode.reward = _reward(row, where)
        if behaviour is not None:
            episode.behaviour_log_probs = torch.tensor(behaviour[: len(ids)], dtype=torch.float32)
        return episode

    def _are_tokens(self, ids: Sequence[Any]) -> bool:
        return all(isinstance(token, int) and 0 <= token < len(self.tokenizer) for token in ids)

    def _example(self, row: Row, where: str, response_tokens: int) -> Example:
        prompt = row["prompt"]
        if (known := self._by_prompt.get(prompt)) is not None:
            return known
        ids = row.get("prompt_ids")
        if ids is None:
            ids = self.tokenizer(prompt).input_ids
        elif not self._are_tokens(ids):
            raise UserError(f"{where}: prompt_ids must be token ids of this model: leave them out if another wrote it")
        taken, context = len(ids) + (0 if self.layout.is_seq2seq else response_tokens), self.layout.context_tokens
        if context is not None and taken > context:
            raise UserError(f"{where}: {taken} tokens do not fit into the model's context of {context}")
        return Example("", (), tuple(ids), (), prompt)


def read_logs(recipe: Recipe) -> dict[str, Sequence[Row]]:
    """Rows of the logs that the recipe names, by the key that names each.

    Raises:
        UserError: there is no such file, it is malformed, or a row lacks the behaviour's log-probabilities that the
            recipe needs.
    """
    logs: dict[str, Sequence[Row]] = {}
    offline, continued = recipe.offline, recipe.continued
    needed_by = "" if recipe.qlearning.importance == "none" else "qlearning.importance"
    if offline is not None:
        rows = logs["offline.path"] = read_log_rows(Path(offline.path), offline.in_memory)
        needed = "offline.boltzmann_js_nats" if offline.boltzmann_js_nats is not None else needed_by
        if needed and offline.behaviour == "logged":
            estimate = "let the reference estimate them with offline.behaviour=reference"
            _check_behaviour(rows, offline.path, needed, estimate)
    if continued is not None and continued.episodes is not None:
        rows = logs["continued.episodes"] = read_log_rows(Path(continued.episodes), True, "continued.episodes")
        if needed_by:
            _check_behaviour(rows, continued.episodes, needed_by, "set qlearning.importance=none")
    return logs


def _check_behaviour(rows: Sequence[Row], origin: str, needed_by: str, otherwise: str) -> None:
    for i, row in enumerate(rows):
        if row.get("behaviour_log_probs") is None:
            raise UserError(
                f"{_row(origin, i)} has no behaviour_log_probs, which {needed_by} needs: log them, or {otherwise}"
            )


def read_log_rows(file: Path, in_memory: bool, key: str = "offline.path") -> Sequence[Row]:
    """Rows of a .jsonl or .parquet file: a list, or a memory-mapped Arrow table of `datasets`; `key` named the file.

    Raises:
        UserError: there is no such file, or it is malformed.
    """
    if file.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{key} {file} must be a .jsonl or .parquet file")
    if not file.is_file():
        raise UserError(f"{key}: there is no file {file}")
    if in_memory:
        return [row for _, row in read_file(file)]
    import datasets

    kind = "json" if file.suffix == ".jsonl" else "parquet"
    try:
        return datasets.load_dataset(kind, data_files=str(file), split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise UserError(f"{key} {file} is not a valid {file.suffix} file ({error})") from error


def write_log(file: Path, episodes: Iterable[Episode]) -> tuple[int, float]:
    """Write episodes as JSONL, a line each, as they come; gives how many they were, and their mean reward.

    Raises:
        UserError: the file is already there, or cannot be written.
    """
    if file.exists():
        raise UserError(f"{file} is already there: choose another name")
    rewards = []
    with whole_file(file) as lines:
        for episode in episodes:
            with writing(file):
                lines.write(json.dumps(_as_row(episode), ensure_ascii=False) + "\n")
            rewards.append(episode.reward)
    return len(rewards), fmean(rewards)


def _as_row(episode: Episode) -> Row:
    row: Row = {"prompt": episode.example.prompt, "response": episode.text, "reward": episode.reward}
    if episode.behaviour_log_probs is not None:
        row["behaviour_log_probs"] = [round(x, 6) for x in episode.behaviour_log_probs.tolist()]
    row |= {"response_ids": episode.response_ids, "truncated": episode.truncated}
    return row | {"prompt_ids": list(episode.example.prompt_ids)}  # a chat template's tokens are not in the text


def _row(origin: str, i: int) -> str:
    return f"{origin}, row {i + 1}"


def _letters(text: str) -> str:
    """Without white space, which tokenizers and logs keep differently."""
    return "".join(text.split())


def _text(row: Row, name: str, where: str) -> str:
    if not isinstance(row.get(name), str):
        raise UserError(f"{where}: an episode needs {name!r}, a text")
    return row[name]


def _reward(row: Row, where: str) -> float:
    reward = row.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise UserError(f"{where}: an episode needs 'reward', a finite number")
    return float(reward)


def _is_log_prob(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= 0
