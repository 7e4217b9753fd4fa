"""The report in a real browser: it opens offline without complaint, answers to pointer and keys, and is readable."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from matplotlib import image as png

from entropi.records import EntropySnapshot, RunStarted, SkippedUpdate
from entropi.report.page import write_report
from report import test_report as page_tests

browser = pytest.importorskip("browser", reason="the DevTools protocol needs aiohttp")
BROWSER = browser.find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser is installed (Debian: apt-get install chromium)"),
]

MARKUP = (
    "\"'></script><script>document.title='hacked'</script><img src=http://127.0.0.1:9/x onerror=alert(1)><b>bold</b>"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them with everything."""
    folder = tmp_path_factory.mktemp("page")
    everything = page_tests.full_folder(folder / "full")
    plain = [page_tests.renamed("SM+LN+G"), *page_tests.training(1.1, thresholds=False), page_tests.diagnosis()]
    return write_report([everything, page_tests.folder(folder / "plain", plain)], folder / "report.html")


def visit(page: Path, body: Callable[[Any], Awaitable[Any]], width: int = 1280, dark: bool = False) -> Any:
    """Open the page in a fresh browser, let `body` use it, and see that it asked nobody for anything."""

    async def go() -> Any:
        async with browser.browser_tab(BROWSER) as tab:
            await tab.look(width, dark=dark)
            await tab.open(page)
            result = await body(tab)
            assert [url for url in tab.requests if not url.startswith("data:image/png")] == [page.resolve().as_uri()]
            assert tab.complaints == []
            return result

    return asyncio.run(asyncio.wait_for(go(), 180))


def cell(layer: int, head: int, run: int = 0) -> str:
    return f'table[data-run="{run}"] td[data-layer="{layer}"][data-head="{head}"]'


async def text_of(tab: Any, selector: str) -> str:
    return str(await tab.evaluate(f"document.querySelector('{selector}').innerText"))


def test_hover_tells_everything_of_a_head(page: Path) -> None:
    async def body(tab: Any) -> None:
        assert await tab.evaluate("document.getElementById('tip').hidden")
        await tab.hover(cell(2, 3))
        entropy = page_tests.some_entropy()[2][3]
        told = await text_of(tab, "#tip")
        for fact in (
            "Layer 2, head 3",
            f"entropy {entropy:.3f} nats",
            f"{100 * entropy / math.log(page_tests.CONTEXT):.0f} % of log T",
            f"{100 * entropy / page_tests.causal_maximum(page_tests.CONTEXT):.0f} % of what a causal mask",
            "third quarter of M",
            "looks 13.0 tokens back on average (even attention: 32.2)",
            "first token 13 %, previous 25 %, itself 6 % of the weight",
            "threshold θ 0.",
        ):
            assert fact in told, fact
        inside = await tab.evaluate(
            "(() => { const b = document.getElementById('tip').getBoundingClientRect();"
            " return b.left >= 0 && b.top >= 0 && b.right <= innerWidth && b.bottom <= innerHeight; })()"
        )
        assert inside
        await tab.hover(cell(5, 3, run=1))
        told = await text_of(tab, "#tip")
        assert "lowest quarter of M: collapsed" in told
        assert "where it looks is not recorded" in told
        await tab.hover("h1")
        assert await tab.evaluate("document.getElementById('tip').hidden")

    visit(page, body)


def test_slider_goes_through_the_training(page: Path) -> None:
    snapshots = [r for r in page_tests.training() if isinstance(r, EntropySnapshot)]

    async def body(tab: Any) -> None:
        assert await text_of(tab, "#shown-step") == "end of training"
        await tab.evaluate("document.getElementById('step').focus()")
        for key, snapshot in (("Home", snapshots[0]), ("ArrowRight", snapshots[1]), ("ArrowRight", snapshots[2])):
            await tab.press(key)
            assert await text_of(tab, "#shown-step") == f"step {snapshot.step:,}"
            for run in (0, 1):
                assert await text_of(tab, cell(5, 3, run)) == f"{snapshot.entropy[5][3]:.2f}"
            assert await text_of(tab, ".frame") == f"step {snapshot.step:,}, training batch"
        early = await tab.evaluate(f"getComputedStyle(document.querySelector('{cell(5, 3)}')).backgroundColor")
        await tab.press("End")
        assert await text_of(tab, cell(5, 3)) == f"{page_tests.some_entropy()[5][3]:.2f}"
        late = await tab.evaluate(f"getComputedStyle(document.querySelector('{cell(5, 3)}')).backgroundColor")
        assert early != late

    visit(page, body)


def test_every_measure_can_be_chosen(page: Path) -> None:
    expected = {
        "entropy": f"{page_tests.some_entropy()[1][2]:.2f}",
        "share": f"{100 * page_tests.some_entropy()[1][2] / math.log(page_tests.CONTEXT):.0f} %",
        "distance": "12.0",
        "on_first": "13 %",
        "on_previous": "25 %",
        "on_itself": "6 %",
        "threshold": f"{next(r for r in page_tests.training() if isinstance(r, EntropySnapshot)).threshold[1][2]:.2f}",
    }

    async def body(tab: Any) -> None:
        options = await tab.evaluate("Array.from(document.getElementById('measure').options, (o) => o.value)")
        assert options == list(expected)  # no temperatures are recorded in these runs
        for measure, shown in expected.items():
            await tab.evaluate(
                f"(() => {{ const m = document.getElementById('measure'); m.value = '{measure}';"
                " m.dispatchEvent(new Event('change')); })()"
            )
            assert await text_of(tab, cell(1, 2)) == shown, measure
            if measure not in ("entropy", "share"):
                assert await text_of(tab, cell(1, 2, run=1)) == "n/a"
                assert await text_of(tab, 'table[data-run="1"] .frame') == "not recorded in this run"

    visit(page, body)


def test_keys_move_through_the_heads(page: Path) -> None:
    async def body(tab: Any) -> None:
        await tab.evaluate(f"document.querySelector('{cell(0, 0)}').focus()")
        at = "document.activeElement.dataset.layer + ',' + document.activeElement.dataset.head"
        for key, place in (
            ("ArrowDown", "1,0"),
            ("ArrowRight", "1,1"),
            ("End", "1,3"),
            ("ArrowRight", "1,3"),
            ("ArrowUp", "0,3"),
            ("Home", "0,0"),
        ):
            await tab.press(key)
            assert await tab.evaluate(at) == place, key
            layer, head = place.split(",")
            assert (await text_of(tab, "#tip")).startswith(f"Layer {layer}, head {head}")
            assert await tab.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
        await tab.press("Escape")
        assert await tab.evaluate("document.getElementById('tip').hidden")
        assert await tab.evaluate('document.querySelectorAll(\'table[data-run="0"] td[tabindex="0"]\').length') == 1

    visit(page, body)


def test_a_screen_reader_finds_names_and_headings(page: Path) -> None:
    async def body(tab: Any) -> list[tuple[str, str]]:
        tree = await tab.call("Accessibility.getFullAXTree")
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in tree["nodes"]
            if not node.get("ignored") and "role" in node
        ]

    found = visit(page, body)
    assert ("slider", "Training step") in found
    assert ("combobox", "Show") in found
    roles = {role for role, _ in found}
    assert {"grid", "gridcell", "rowheader", "columnheader", "main", "navigation", "heading"} <= roles
    for role in ("image", "img", "slider", "combobox", "link", "heading", "grid", "region"):
        assert all(name for kind, name in found if kind == role), role


CONTRASTS = """(() => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (c) => { const l = c.map((v) => linear(v / 255));
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const worst = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("script,[hidden]")) continue;
    let behind = element;
    while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const below = behind ? parse(getComputedStyle(behind).backgroundColor).slice(0, 3) : [255, 255, 255];
    const [a, b] = [luminance(parse(getComputedStyle(element).color).slice(0, 3)), luminance(below)];
    worst.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return worst.sort((x, y) => x[0] - y[0]).slice(0, 3);
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_readable(page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    """No band of the page is empty, nothing is wider than the window, and all text has a contrast of at least 4.5."""

    async def body(tab: Any) -> None:
        await tab.hover(cell(1, 1))
        contrasts = await tab.evaluate(CONTRASTS)
        assert contrasts[0][0] >= 4.5, contrasts
        assert await tab.evaluate("document.documentElement.scrollWidth") <= width
        await tab.screenshot(tmp_path / "page.png")

    visit(page, body, width, dark)
    seen = png.imread(tmp_path / "page.png")[..., :3]
    assert seen.shape[1] == width
    assert (seen[2, 2] < 0.2).all() if dark else (seen[2, 2] > 0.9).all()
    bands = np.array_split(seen, max(len(seen) // 500, 4))
    assert min(band.var() for band in bands) > 1e-4


def test_a_large_model_fits_a_narrow_window(tmp_path: Path) -> None:
    """36 x 20 heads have no room for numbers; of a diagnosis alone there are no steps to slide through."""
    entropy = np.random.default_rng(0).uniform(0.1, 6.0, (36, 20))
    alone = msgspec.structs.replace(page_tests.diagnosis(), entropy=entropy.tolist(), context_length=1024)
    page = write_report([page_tests.folder(tmp_path / "large", [alone])], tmp_path / "report.html")

    async def body(tab: Any) -> None:
        assert await tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert await tab.evaluate("document.getElementById('step').checkVisibility()") is False
        await tab.hover(cell(30, 2))
        assert f"entropy {entropy[30, 2]:.3f} nats" in await text_of(tab, "#tip")
        tree = await tab.call("Accessibility.getFullAXTree")
        said = [n.get("name", {}).get("value") for n in tree["nodes"] if n.get("role", {}).get("value") == "gridcell"]
        assert len(said) == 720
        assert f"{entropy[30, 2]:.2f}" in said  # to be heard where it is not seen

    visit(page, body, 390)


def test_heads_have_colours(page: Path, tmp_path: Path) -> None:
    """What the eye sees is what the records say: lighter where the entropy is higher."""

    async def body(tab: Any) -> Any:
        await tab.screenshot(tmp_path / "page.png")
        return await tab.evaluate(
            "Array.from(document.querySelectorAll('table[data-run=\"0\"] td'), (c) => {"
            " const b = c.getBoundingClientRect(); return [b.x + 3 + scrollX, b.y + 3 + scrollY]; })"
        )

    places = np.array(visit(page, body)).round().astype(int)
    seen = png.imread(tmp_path / "page.png")
    lightness = [float(seen[y, x, :3] @ [0.299, 0.587, 0.114]) for x, y in places]
    entropies = np.array(page_tests.some_entropy()).ravel()
    order = np.argsort(entropies)
    assert np.all(np.diff(np.array(lightness)[order]) >= -0.01)
    assert max(lightness) - min(lightness) > 0.3


def test_without_scripts_the_tables_remain(page: Path) -> None:
    async def body(tab: Any) -> None:
        await tab.call("Emulation.setScriptExecutionDisabled", value=True)
        await tab.open(page)
        document = await tab.call("DOM.getDocument", depth=0)
        found = await tab.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=cell(5, 3))
        html = (await tab.call("DOM.getOuterHTML", nodeId=found["nodeId"]))["outerHTML"]
        assert f"{page_tests.some_entropy()[5][3]:.2f}" in html
        assert "background:" in html
        controls = await tab.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector="#controls")
        attributes = (await tab.call("DOM.getAttributes", nodeId=controls["nodeId"]))["attributes"]
        assert "hidden" in attributes

    visit(page, body)


def test_text_stays_text(tmp_path: Path) -> None:
    """Names, prompts, answers and reasons come from anywhere; they are shown and never obeyed."""
    private = page_tests.private(prompt=MARKUP, text=MARKUP)
    private.trust = private.server = MARKUP
    started: RunStarted = page_tests.renamed(MARKUP)
    diagnosed = msgspec.structs.replace(page_tests.diagnosis(verdict=MARKUP), source=MARKUP)
    contents = [started, *page_tests.training(), diagnosed, SkippedUpdate(step=3, reason=MARKUP), private]
    run = page_tests.folder(tmp_path / "run", contents, config_yaml=f"# {MARKUP}\nname: x\n")
    page = write_report([run], tmp_path / "report.html")

    async def body(tab: Any) -> None:
        await tab.hover(cell(0, 0))
        assert "</script>" in await text_of(tab, "#tip")  # the frame's label is the diagnosis' source
        assert MARKUP in await text_of(tab, ".said.answer")
        title = await tab.evaluate("document.title")
        assert title.startswith("entropi report: ")
        assert await tab.evaluate("document.scripts.length") == 2
        assert await tab.evaluate("document.querySelectorAll('b, img:not([src^=\"data:image/png\"])').length") == 0

    visit(page, body)


def test_the_policy_of_the_page_stops_scripts_that_are_not_its_own(page: Path, tmp_path: Path) -> None:
    """The second line of defence, should a text ever get through the first."""
    source = page.read_text().replace("</main>", "<script>document.title = 'hacked'</script></main>")
    (tmp_path / "broken.html").write_text(source)

    async def go() -> None:
        async with browser.browser_tab(BROWSER) as tab:
            await tab.open(tmp_path / "broken.html")
            assert await tab.evaluate("document.title") != "hacked"
            assert any("Content Security Policy" in complaint for complaint in tab.complaints)

    asyncio.run(go())
