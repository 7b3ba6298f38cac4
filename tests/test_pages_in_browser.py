"""The pages in headless Chromium: no console errors, working controls, inert text, readable in light and dark.

Debian: apt-get install chromium chromium-driver. Where there is no browser these tests are skipped.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdqn.episodes import Example
from lmdqn.recipe import Recipe, validate
from lmdqn.results.compare import compare_runs, write_comparison
from lmdqn.results.inspection import Choice, Inspected, Step
from lmdqn.results.inspection_view import write_inspection
from lmdqn.results.report import write_report
from tests.conftest import HOSTILE, SOURCES

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
SWITCHES = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
DQN = ["a cat sat on the mat", "the cat sat", HOSTILE, ""]


class Browser:
    """One page at a time in Chromium, looked at through its DOM."""

    def __init__(self, profile: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for switch in [*SWITCHES, f"--user-data-dir={profile}"]:
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))

    def open(self, page: Path, width: int = 1200, dark: bool = False) -> None:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector)

    def hover(self, selector: str) -> None:
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.by import By

        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    def choose(self, identifier: str, value: str) -> None:
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            identifier,
            value,
        )

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture
def report(finished_run: Callable[..., Path]) -> Path:
    return write_report(finished_run("run", DQN))


def numbers(browser: Browser) -> list[str]:
    return [text.removeprefix("no. ") for text in browser.texts(".row.source .score")]


def test_the_report_sorts_and_searches(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert numbers(browser) == ["1", "2", "3", "4"]
    gains = browser.run(
        "const d = JSON.parse(document.getElementById('data').textContent);"
        "return d.samples.map((s) => [s.number, s.scores.rougeL[2] - s.scores.rougeL[1]])"
    )
    browser.choose("score", "rougeL")
    browser.choose("order", "loss")
    by_gain = [str(number) for number, _ in sorted(gains, key=lambda pair: pair[1])]
    assert numbers(browser) == by_gain
    browser.choose("order", "gain")
    assert numbers(browser)[-1] == by_gain[0]
    browser.choose("search", "BARKED")
    assert numbers(browser) == ["2"]
    assert browser.texts("#count") == ["1 example"]
    browser.choose("search", "no such words")
    assert numbers(browser) == []
    assert browser.complaints() == []


def test_only_twenty_responses_until_more_are_asked_for(browser: Browser, finished_run: Callable[..., Path]) -> None:
    sources = [f"source number {i}" for i in range(25)]
    browser.open(write_report(finished_run("run", sources, sources)))
    assert len(numbers(browser)) == 20
    browser.run("document.getElementById('more').click()")
    assert len(numbers(browser)) == 25
    assert browser.run("return getComputedStyle(document.getElementById('more')).display") == "none"


def test_words_that_are_new_are_marked(browser: Browser, finished_run: Callable[..., Path]) -> None:
    browser.open(
        write_report(finished_run("run", ["the old cat sat on a barn"], ["a cat"]))
    )  # MLE: the cat sat on a hill
    assert browser.texts(".sample mark") == ["old", "barn"]


def test_markup_in_texts_is_inert(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert "hacked" not in browser.driver.title
    assert browser.driver.title != "1"
    assert browser.run("return document.querySelectorAll('main img, main article script').length") == 0
    assert HOSTILE in browser.texts(".row.source .text")
    assert browser.complaints() == []


def test_hovering_a_chart_reads_its_values(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.hover(".chart .drawing")
    assert browser.texts(".chart output")[0] == "10: 250  250"  # the line, and the step that is kept
    assert browser.run("return document.querySelector('.chart .cursor').hidden") is False
    browser.hover("h1")
    assert browser.texts(".chart output")[0] == ""
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_overflows_at_any_width(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    table = (
        "const t = document.querySelector('.results'); return t.parentElement.scrollWidth - t.parentElement.clientWidth"
    )
    assert browser.run(table) == 0


def test_light_and_dark_keep_contrast(browser: Browser, report: Path) -> None:
    """WCAG's contrast ratio of body text and of a drawing's labels against their background: 4.5 is its AA."""
    seen = []
    for dark in (False, True):
        browser.open(report, dark=dark)
        paper = browser.run("return getComputedStyle(document.body).backgroundColor")
        card = browser.run("return getComputedStyle(document.querySelector('.chart')).backgroundColor")
        ink = browser.run("return getComputedStyle(document.body).color")
        label = browser.run("return getComputedStyle(document.querySelector('.chart svg text')).fill")
        assert contrast(ink, paper) > 7
        assert contrast(label, card) > 4.5
        seen.append(paper)
    assert seen[0] != seen[1]


def contrast(first: str, second: str) -> float:
    def luminance(color: str) -> float:
        channels = [int(c) / 255 for c in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_the_comparison_page_works_alike(browser: Browser, finished_run: Callable[..., Path], tmp_path: Path) -> None:
    comparison = compare_runs([finished_run("a", DQN), finished_run("b", SOURCES)])
    write_comparison(comparison, tmp_path / "page.html")
    browser.open(tmp_path / "page.html", width=360)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    browser.choose("order", "gain")
    assert set(numbers(browser)[-2:]) == {"1", "3"}  # those that both have right
    assert browser.texts(".sample .label")[-2:] == ["a", "b"]
    assert browser.complaints() == []


@pytest.fixture
def inspection(tmp_path: Path) -> Path:
    """Two responses; in the first the second token was " cat" before."""
    recipe: Recipe = validate({"model": {"name": "a/model"}, "data": {"path": "data"}}, "test")
    the, dog = Choice("the", 0.5, 0.01, 0.6, 0.8), Choice(" dog", 0.3, 0.02, 0.2, 0.7)
    cat, bad = Choice(" cat", 0.1, -0.02, 0.7, 0.2), Choice(HOSTILE, 0.0, -0.01, 0.1, 0.05)
    steps = [Step(the, 0.49, 0.29, [the], None), Step(dog, 0.28, 1.25, [dog, cat, bad], " cat")]
    example = Example(HOSTILE, (HOSTILE,), (1,), ((2,),), HOSTILE)
    first = Inspected(example, "the dog", "the cat", steps, False)
    second = Inspected(example, HOSTILE, HOSTILE, [Step(bad, -0.1, -0.7, [bad, the], None)], True)
    write_inspection([first, second], recipe, "runs/mine", tmp_path / "page.html")
    return tmp_path / "page.html"


def test_hovering_a_token_shows_what_else_there_was(browser: Browser, inspection: Path) -> None:
    browser.open(inspection)
    assert browser.texts(".response:first-of-type .panel p") == [
        "Token 2: V +0.280, log(π/π₀) +1.25 nats; before: “ cat”"
    ]
    browser.hover(".tokens .token")
    assert browser.texts(".response:first-of-type .panel p") == ["Token 1: V +0.490, log(π/π₀) +0.29 nats"]
    browser.hover(".tokens .token.changed")
    rows = browser.run(
        "const rows = document.querySelectorAll('.response:first-of-type .panel tr');"
        "return [...rows].map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    assert rows[:3] == [
        ["token", "Q", "A", "p before", "p after"],
        ["␣dog", "+0.300", "+0.0200", "0.200", "0.700"],
        ["␣cat", "+0.100", "-0.0200", "0.700", "0.200"],
    ]
    assert browser.texts(".panel tr.chosen td:first-child")[0] == "␣dog"
    assert browser.texts(".response:first-of-type .chart output") == ["2: 0.28  0.01"]
    assert browser.complaints() == []


def test_a_token_is_coloured_by_its_advantage(browser: Browser, inspection: Path) -> None:
    browser.open(inspection)
    each = "return [...document.querySelectorAll('.tokens .token')].map((token) => "
    weights = browser.run(each + "[token.className.includes('rose'), token.style.getPropertyValue('--weight')])")
    assert weights == [[True, "23%"], [True, "100%"], [False, "56%"]]
    assert len(set(browser.run(each + "getComputedStyle(token).backgroundColor)"))) == 3


@pytest.mark.parametrize("width", [360, 1200])
def test_the_inspection_is_inert_and_fits(browser: Browser, inspection: Path, width: int) -> None:
    browser.open(inspection, width, dark=True)
    browser.run("document.querySelectorAll('.tokens .token')[2].focus()")
    assert HOSTILE in browser.texts(".panel td:first-child")
    assert browser.driver.title == "mine, token by token"
    assert browser.run("return document.querySelectorAll('main img, main article script').length") == 0
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
