"""Results as a person reads them in the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmdqn.episodes import Example
from lmdqn.results.evaluate import Evaluation

COLUMNS = {
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "chrf": "chrF",
    "reward": "reward",
    "length_words": "length (words)",
    "distinct2": "distinct-2",
    "repeated_4grams": "repeated 4-grams",
}
PHASES = {"start": "start", "mle": "MLE", "dqn": "DQN"}


def result_tables(results: Mapping[str, Evaluation], title: str) -> list[Table]:
    """The table of results; of several tasks one for each, and that of their mean."""
    tasks = next(iter(results.values())).tasks
    tables = []
    for task, of_task in tasks.items():
        own = {phase: evaluation.tasks[task] for phase, evaluation in results.items()}
        tables.append(results_table(own, f"{task}: {len(of_task.responses)} examples"))
    return [*tables, results_table(results, f"mean over the tasks: {title}" if tasks else title)]


def results_table(results: Mapping[str, Evaluation], title: str) -> Table:
    """A row a system, a column a metric."""
    known = [name for name in COLUMNS if all(name in evaluation.metrics for evaluation in results.values())]
    table = Table("", *(COLUMNS[name] for name in known), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for phase, evaluation in results.items():
        table.add_row(PHASES.get(phase, phase), *(f"{evaluation.metrics[name]:.1f}" for name in known))
    return table


def p_value_line(p_values: Mapping[str, float], before: str) -> str:
    """One line: how likely a difference as large is by chance."""
    shown = ", ".join(f"{COLUMNS[name]} {p_text(p_values[name])}" for name in COLUMNS if name in p_values)
    return f"DQN against {PHASES[before]}, paired bootstrap on the test split: p {shown}"


def samples_table(results: Mapping[str, Evaluation], examples: Sequence[Example], rows: Sequence[int]) -> Table:
    """Source, first reference and every system's response, side by side."""
    table = Table("source", "reference", *(PHASES.get(phase, phase) for phase in results), show_lines=True)
    for row in rows:
        example = examples[row]
        reference = example.references[0] if example.references else ""
        texts = [example.source, reference, *(evaluation.responses[row] for evaluation in results.values())]
        table.add_row(*(Text(_shortened(text)) for text in texts))
    return table


def show(console: Console, *parts: Table | Text | str) -> None:
    """Print parts; text from models and data is never read as markup."""
    for part in parts:
        folded = console.is_terminal or not isinstance(part, str)  # in a pipe a path must stay in one piece
        console.print(part, markup=False, highlight=False, soft_wrap=not folded)


def signed(gain: float) -> str:
    """One digit and a sign, none where it rounds to nothing."""
    return f"{gain:+.1f}" if abs(gain) >= 0.05 else "0.0"


def p_text(p: float) -> str:
    """As in `p = 0.012`, without the p."""
    return f"= {p:.3f}" if p >= 0.001 else "< .001"


def _shortened(text: str, limit: int = 280) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
