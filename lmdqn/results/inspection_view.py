"""An inspected response as a person reads it: in the terminal, and as an HTML page."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.style import Style
from rich.table import Table
from rich.text import Text

from lmdqn.recipe import Recipe
from lmdqn.results.inspection import Choice, Inspected, Step
from lmdqn.results.page import render
from lmdqn.results.plots import Chart, Series, line_chart
from lmdqn.whole_files import write_whole

MOST_NATS, LEAST_NATS = 3.0, 0.1  # between these lies the |log(pi / pi_0)| that is coloured fully
LEAST_SHARE = 0.1  # of the full colour; a token with less has none in the terminal
ROSE, FELL = ((35, 30), (60, 140), (45, 75)), ((70, 185), (40, 50), (40, 50))  # darkest and brightest R, G, B
BARS = "▁▂▃▄▅▆▇█"
NO_REFERENCES = (
    "V was learnt seeing how the response matches the references, and here are none: V, and Q = V + A with it, are a "
    "guess outside of what it learnt from. A is exact."
)


def caveat(recipe: Recipe, inspected: Sequence[Inspected]) -> str:
    """What must be known before V is believed; nothing where it can be."""
    if recipe.qlearning.loss == "path":
        return "A path loss trains no value head: there is no V and no Q, but A."
    data = recipe.only_task.data
    learnt_with = data.references is not None or data.conversation is not None
    blind = any(not one.example.references for one in inspected)
    seeing = recipe.qlearning.has_value_head and recipe.qlearning.value_sees_references
    return NO_REFERENCES if seeing and learnt_with and blind else ""


def full_colour(inspected: Sequence[Inspected]) -> float:
    """|log(pi / pi_0)| in nats from which on a token is coloured fully: the largest that is shown, within limits."""
    largest = max(abs(step.nats) for one in inspected for step in one.steps)
    return min(MOST_NATS, max(LEAST_NATS, largest))


def terminal_parts(one: Inspected, full_nats: float) -> list[Text | Table]:
    """The response with each token on a ground of its advantage, the value's course, and every changed choice."""
    coloured = Text()
    for step in one.steps:
        coloured.append(shown(step.chosen.text), _style(step, full_nats))
    table = Table.grid("", "", padding=(0, 2))
    table.add_row("source", Text(one.example.source))
    for reference in one.example.references:
        table.add_row("reference", Text(reference))
    table.add_row("before", Text(one.before))
    table.add_row("after", coloured)
    values = [step.value for step in one.steps if step.value is not None]
    if values:
        table.add_row("value", f"{_bars(values)}  {values[0]:+.3f} to {values[-1]:+.3f}")
    return [table, _changes(one)]


def write_inspection(inspected: Sequence[Inspected], recipe: Recipe, run: str, file: Path) -> None:
    """The page: hovering, tapping or moving with Tab to a token shows what else there was."""
    full_nats = full_colour(inspected)
    page = render(
        "inspect.html.j2",
        title=f"{Path(run).name}, token by token",
        version=version("lmdqn"),
        beta=f"{recipe.qlearning.beta:g}",
        classic=recipe.qlearning.form == "classic",
        caveat=caveat(recipe, inspected),
        full_nats=f"{full_nats:.2g}",
        responses=[_response(one, number, full_nats) for number, one in enumerate(inspected, start=1)],
        data=[[_details(step) for step in one.steps] for one in inspected],
    )
    write_whole(file, page)


def shown(text: str) -> str:
    """A token's text with its line ends visible."""
    return text.replace("\r", "␍").replace("\n", "↵")


def _style(step: Step, full_nats: float) -> Style:
    """White on green where the policy rose, on red where it fell, the brighter the more; underlined where it chose."""
    share = min(1.0, abs(step.nats) / full_nats)
    if share < LEAST_SHARE:
        return Style(underline=step.instead_of is not None)
    toned = [int(dark + share * (bright - dark)) for dark, bright in (ROSE if step.nats > 0 else FELL)]
    return Style(color="white", bgcolor="#{:02x}{:02x}{:02x}".format(*toned), underline=step.instead_of is not None)


def _bars(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    width = (high - low) or 1.0
    return "".join(BARS[min(7, int(8 * (value - low) / width))] for value in values)


def _changes(one: Inspected) -> Table | Text:
    """A row for each token where the reference policy would have chosen another one."""
    changed = [(t, step) for t, step in enumerate(one.steps, start=1) if step.instead_of is not None]
    title = f"{len(changed)} of {len(one.steps)} choices changed"
    if not changed:
        return Text(title)
    table = Table(
        "token",
        "after",
        "before",
        "Q",
        "A",
        "nats",
        "p before",
        "p after",
        title=title,
        title_justify="left",
        title_style="",
    )
    for t, step in changed:
        chosen, instead = step.chosen, step.instead_of or ""
        q = "" if chosen.q is None else f"{chosen.q:+.3f}"
        numbers = (q, f"{chosen.advantage:+.4f}", f"{step.nats:+.2f}", f"{chosen.before:.3f}", f"{chosen.after:.3f}")
        table.add_row(str(t), Text(repr(chosen.text)), Text(repr(instead)), *numbers)
    return table


def _response(one: Inspected, number: int, full_nats: float) -> dict[str, Any]:
    tokens = [
        {
            "text": shown(step.chosen.text),
            "breaks": "\n" in step.chosen.text,
            "tone": "rose" if step.nats > 0 else "fell",
            "weight": f"{100 * min(1.0, abs(step.nats) / full_nats):.0f}%",
            "changed": step.instead_of is not None,
        }
        for step in one.steps
    ]
    changed = sum(step.instead_of is not None for step in one.steps)
    cut = "; cut at the length limit" if one.truncated else ""
    return {
        "number": number,
        "source": one.example.source,
        "references": one.example.references,
        "before": one.before,
        "tokens": tokens,
        "facts": f"{changed} of {len(one.steps)} choices changed{cut}",
        "chart": _chart(one, number),
    }


def _chart(one: Inspected, number: int) -> Chart:
    """V(s_t), and the sum of the advantages so far, which is what the policy itself says of V(s_t) - V(s_1)."""
    places = list(range(1, len(one.steps) + 1))
    total, sums = 0.0, []
    for step in one.steps:
        sums.append(total)
        total += step.chosen.advantage
    series = [Series("advantages so far", places, sums, "dqn")]
    if one.steps[0].value is not None:
        series.insert(0, Series("V", places, [step.value or 0.0 for step in one.steps], "mle"))
    return line_chart(f"value, response {number}", series, "token", zero=True)


def _details(step: Step) -> dict[str, Any]:
    """What hovering over a token shows."""

    def numbers(choice: Choice) -> dict[str, Any]:
        q = None if choice.q is None else round(choice.q, 4)
        return {
            "text": shown(choice.text),
            "q": q,
            "a": round(choice.advantage, 4),
            "before": round(choice.before, 4),
            "after": round(choice.after, 4),
        }

    return {
        "chosen": numbers(step.chosen),
        "value": None if step.value is None else round(step.value, 4),
        "nats": round(step.nats, 3),
        "instead": None if step.instead_of is None else shown(step.instead_of),
        "alternatives": [numbers(choice) for choice in step.alternatives],
    }
