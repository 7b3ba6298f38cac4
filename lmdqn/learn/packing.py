"""Episodes packed into columns, end to end: a few bytes a token in the replay, in checkpoints and between processes.

As objects, 64 tokens take some 7 KB, most of it headers of tensors and Python's integers. Columns lose nothing: token
ids are int32, what was measured float32 as it came, rewards float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmdqn.episodes import Episode, Example

LOG_PROBS = ("behaviour_log_probs", "reference_log_probs", "first_log_probs")  # a number a token
SCALARS = {  # and their types; NaN is None
    "group": np.int64,
    "truncated": np.bool_,
    "demonstration": np.bool_,
    "reward": np.float64,
    "baseline": np.float64,
    "peers": np.float64,
}
MADE_AGAIN = {"weight"}  # of an episode, at each draw


@dataclass
class PackedEpisodes:
    """Episodes by column.

    `columns` holds "response_ids" and "text" (UTF-8), each from first to last with its episodes' first places and its
    end in "starts" and "text_starts"; the log-probabilities and "match_features" that any episode has, NaN for the
    others; "terms" (episodes, terms), NaN where there is no such term; and the scalars.
    """

    examples: list[Example]  # of each episode
    terms: list[str]
    columns: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, episodes: Sequence[Episode], match_features: bool = True) -> "PackedEpisodes":
        """Pack episodes, `match_features` only if wanted: they take most, and follow from the references."""
        lengths = [len(e.response_ids) for e in episodes]
        ids = chain.from_iterable(e.response_ids for e in episodes)
        texts = [e.text.encode("utf-8", "surrogatepass") for e in episodes]
        terms = list(dict.fromkeys(name for e in episodes for name in e.terms))
        columns: dict[str, NDArray[Any]] = {
            "starts": _starts(lengths),
            "response_ids": np.fromiter(ids, np.int32, sum(lengths)),
            "text_starts": _starts([len(text) for text in texts]),
            "text": np.frombuffer(bytearray(b"".join(texts)), np.uint8),
            "terms": np.array([[e.terms.get(name, np.nan) for name in terms] for e in episodes], np.float64),
        }
        for name, kind in SCALARS.items():
            values = [getattr(e, name) for e in episodes]
            columns[name] = np.array([np.nan if value is None else value for value in values], kind)
        packed = cls([e.example for e in episodes], terms, columns)
        packed.measured(0, episodes, (*LOG_PROBS, "match_features") if match_features else LOG_PROBS)
        return packed

    def measured(self, first: int, episodes: Sequence[Episode], names: Sequence[str] = LOG_PROBS) -> None:
        """Take what was measured of the episodes from number `first` on."""
        for name in names:
            for i, episode in enumerate(episodes, start=first):
                if (rows := getattr(episode, name)) is None:
                    continue
                if name not in self.columns:
                    count = self._span(name, len(self.examples) - 1)[1]
                    self.columns[name] = np.full((count, *rows.shape[1:]), np.nan, np.float32)
                begin, end = self._span(name, i)
                self.columns[name][begin:end] = rows.numpy()

    def forget(self, name: str) -> None:
        """Drop what was measured."""
        self.columns.pop(name, None)

    def episodes(self, first: int = 0, count: int | None = None) -> list[Episode]:
        """Those from number `first` on, all of them where no count is given."""
        last = len(self.examples) if count is None else first + count
        scalars = zip(*(self.columns[name][first:last].tolist() for name in SCALARS), strict=True)
        return [self._episode(i, dict(zip(SCALARS, of_one, strict=True))) for i, of_one in enumerate(scalars, first)]

    def _episode(self, i: int, scalars: dict[str, Any]) -> Episode:
        columns = self.columns
        if scalars["peers"] != scalars["peers"]:
            scalars["peers"] = None
        begin, end = columns["starts"][i : i + 2].tolist()
        text_begin, text_end = columns["text_starts"][i : i + 2].tolist()
        episode = Episode(self.examples[i], columns["response_ids"][begin:end].tolist(), **scalars)
        episode.text = columns["text"][text_begin:text_end].tobytes().decode("utf-8", "surrogatepass")
        terms = zip(self.terms, columns["terms"][i].tolist(), strict=True)
        episode.terms = {name: value for name, value in terms if value == value}
        for name in (*LOG_PROBS, "match_features"):
            if name in columns:
                begin, end = self._span(name, i)
                rows = torch.from_numpy(columns[name][begin:end].copy())
                setattr(episode, name, None if rows.flatten()[0].isnan() else rows)
        return episode

    def _span(self, name: str, i: int) -> tuple[int, int]:
        """Where episode `i` stands in a measured column; features are of one state more than there are tokens."""
        begin, end = self.columns["starts"][i : i + 2].tolist()
        return (begin + i, end + i + 1) if name == "match_features" else (begin, end)


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)
