"""The page in a real browser: typing, streaming, a token's window, what cannot be seen, and what must not run."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.browser import CONTROL, Browser, chromium
from support.serving import post, scripted, serving

from myllm.config import ModelConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.inference.load import LanguageModel
from myllm.inference.server.http import PageServer
from myllm.model.transformer import Transformer

R50K = load_tokenizer()
TEXT = "<script>document.title='run'</script>\n\tand  🧬 <b>é"
SCRIPT = [*R50K.encode(TEXT).tolist(), R50K.end_of_text]
TOKENS = "[...document.querySelectorAll('.token')]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: Browser) -> Iterator[PageServer]:
    with serving(scripted(R50K, SCRIPT)) as server:
        yield server


@pytest.fixture(scope="module")
def endless(browser: Browser) -> Iterator[PageServer]:
    """A model that writes for as long as it may."""
    config = ModelConfig(max_seq_len=32, d_model=16, n_layers=1, n_heads=2, d_ff=32)
    with serving(LanguageModel(Transformer(config).eval(), R50K)) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_errors(browser: Browser) -> Iterator[None]:
    browser.errors.clear()
    yield
    assert browser.errors == []


def fill(browser: Browser, **values: object) -> None:
    """Type into the fields."""
    browser.run("document.getElementById('settings').open = true")  # on a narrow page they are folded away
    for name, value in values.items():
        browser.run(f"(e => {{ e.focus(); e.select(); }})(document.getElementById('{name}'))")
        browser.type(str(value))


def generated_text(browser: Browser) -> str:
    return browser.run("document.querySelector('.tokens').textContent")


def write(browser: Browser, **values: object) -> None:
    fill(browser, **values)
    browser.run("document.querySelector('.done').textContent = ''")
    browser.press("Enter", CONTROL)
    browser.wait("document.querySelector('.done').textContent")


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (400, True)])
def test_markup_and_split_or_invisible_characters(browser: Browser, server: PageServer, width: int, dark: bool) -> None:
    browser.open(server.address, width, dark=dark)
    write(browser, prompt="", temperature=0, max_new_tokens=60)
    *texts, last = browser.run(f"{TOKENS}.map(e => e.textContent)")
    assert last == "<|endoftext|>"
    assert len(texts) == len(SCRIPT) - 1
    # Marks are drawn, not written: the text is the model's own, but for what stands for the halves of a character.
    halves = browser.run(f"{TOKENS}.filter(e => e.matches('.broken')).map(e => e.textContent)")
    assert "".join(text for text in texts if text not in halves) == TEXT
    assert halves == ["a7"]  # the byte between the one that came with a space and the one that makes it whole
    assert browser.run("document.title") == "a <model> - MyLLM"  # and what it spells never ran
    assert browser.run("document.querySelectorAll('.output script, .output b').length") == 0
    marks = browser.run("[...document.querySelectorAll('.tokens .mark')].map(e => e.dataset.mark)")
    assert {"↵", "⇥"} <= set(marks)
    assert browser.run("document.querySelector('.done').textContent").endswith("the model ended the document")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 150) == dark


def test_popup_shows_token_probability_and_candidates(browser: Browser, server: PageServer) -> None:
    browser.open(server.address)
    write(browser, temperature=0, max_new_tokens=60)
    browser.point(f"{TOKENS}[1]")
    browser.wait("!document.getElementById('popup').hidden")
    # 14 against 50,256 zeros, by hand; the padding of the vocabulary takes no part.
    share = np.exp(14) / (np.exp(14) + 50_256)
    message = browser.run("document.getElementById('popup').innerText")
    assert f"{100 * share:.1f} %" in message
    assert f"rank 1 of 50,257, token {SCRIPT[1]}" in message
    assert "at temperature 1" in message
    rows = browser.run("[...document.querySelectorAll('#popup li')].map(e => [e.className, e.innerText])")
    assert len(rows) == 8
    assert [name for name, _ in rows] == ["own"] + [""] * 7
    assert f"{100 * share:.1f} %" in rows[0][1]
    browser.press("Escape")
    assert browser.run("document.getElementById('popup').hidden")


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (1400, 560), (1000, 480), (400, 620), (360, 500)])
def test_popup_never_covers_buttons(browser: Browser, endless: PageServer, width: int, height: int) -> None:
    browser.open(endless.address, width, height)
    write(browser, temperature=1, max_new_tokens=60)
    for index in (0, 20, 59):
        browser.point(f"{TOKENS}[{index}]")
        browser.wait("!document.getElementById('popup').hidden")
        popup, buttons = (
            browser.run(f"document.querySelector('{element}').getBoundingClientRect().toJSON()")
            for element in ("#popup", "#go")
        )
        apart = popup["top"] >= buttons["bottom"] or popup["bottom"] <= buttons["top"]
        apart |= popup["left"] >= buttons["right"] or popup["right"] <= buttons["left"]
        assert apart, (popup, buttons)
        assert popup["left"] >= 0
        assert popup["right"] <= width


@pytest.mark.parametrize("touch", [False, True])
def test_hint_matches_input_device(browser: Browser, server: PageServer, touch: bool) -> None:
    browser.call("Emulation.setTouchEmulationEnabled", enabled=touch)
    browser.open(server.address, 400)
    hint = browser.run("document.querySelector('.hint').innerText")
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert hint.startswith("Tap a token" if touch else "Hover over a token")


def test_keyboard_navigation(browser: Browser, server: PageServer) -> None:
    browser.open(server.address)
    assert browser.run("document.activeElement.id") == "prompt"
    browser.press("Enter", CONTROL)
    browser.wait("document.querySelector('.done').textContent")
    for _ in range(20):
        browser.press("Tab")
        if browser.run("document.activeElement.matches('.token')"):
            break
    assert browser.run(f"{TOKENS}.indexOf(document.activeElement)") == 0
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        browser.press(key)
        assert browser.run(f"{TOKENS}.indexOf(document.activeElement)") == at
        assert not browser.run("document.getElementById('popup').hidden")
        assert browser.run("document.activeElement.getAttribute('aria-describedby')") == "popup"
    browser.press("Tab")  # one stop for all tokens
    assert not browser.run("document.activeElement.matches('.token')")
    assert browser.run("document.getElementById('popup').hidden")


def test_streaming_and_stop(browser: Browser, endless: PageServer) -> None:
    browser.open(endless.address)
    fill(browser, max_new_tokens=100_000, prompt="on and on")
    browser.point("document.getElementById('go')", click=True)
    browser.wait(f"{TOKENS}.length > 2")
    assert browser.run("document.body.matches('.running') && !document.getElementById('stop').disabled")
    some = browser.run(f"{TOKENS}.length")
    browser.wait(f"{TOKENS}.length > {some}")  # they come while the text is being written
    status, (refusal,), _ = post(endless, {})
    assert (status, "being generated" in refusal["error"]) == (503, True)
    browser.point("document.getElementById('stop')", click=True)
    browser.wait("!document.body.matches('.running')")
    assert "stopped" in browser.run("document.querySelector('.done').textContent")
    kept = browser.run(f"{TOKENS}.length")
    assert kept >= some
    # The server has stopped too: the next text is written.
    write(browser, max_new_tokens=3)
    assert browser.run(f"{TOKENS}.length") == 3
    browser.point("document.querySelector('.extend')", click=True)
    assert browser.run("document.getElementById('prompt').value") == "on and on" + generated_text(browser)


def test_escape_stops_generation(browser: Browser, endless: PageServer) -> None:
    browser.open(endless.address)
    fill(browser, max_new_tokens=100_000, prompt="on and on")
    browser.press("Enter", CONTROL)
    browser.wait(f"{TOKENS}.length > 2")
    browser.point(f"{TOKENS}[0]")  # also while a token's window is open
    browser.press("Escape")
    browser.wait("!document.body.matches('.running')")
    assert browser.run("document.getElementById('popup').hidden")
    assert "stopped" in browser.run("document.querySelector('.done').textContent")


def test_tab_order_focus_and_labels(browser: Browser, server: PageServer) -> None:
    browser.open(server.address)
    write(browser, prompt="", temperature=0, max_new_tokens=60)
    browser.run("document.getElementById('prompt').focus()")
    stops = []
    while len(stops) < 40:
        browser.press("Tab")
        element = "document.activeElement"
        if browser.run(f"{element} === document.body"):
            break
        stops.append(browser.run(f"{element}.id || {element}.classList[{element}.classList.length - 1]"))
        assert browser.run(f"getComputedStyle({element}).outlineStyle") != "none", stops[-1]
    assert stops[:5] == ["go", "copy", "extend", "shown", "tint"]  # a token that has the focus is shown
    assert stops.index("temperature") < stops.index("temperature_slider") < stops.index("seed") < stops.index("reset")
    unnamed = browser.run(
        "[...document.querySelectorAll('main input, main textarea, main button')].filter(e => !e.labels?.length && "
        "!e.getAttribute('aria-label') && !e.textContent.trim()).map(e => e.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.parametrize(("width", "dark"), [(1400, True), (390, False)])
def test_two_models_side_by_side(browser: Browser, width: int, dark: bool) -> None:
    other = [*R50K.encode("another text").tolist(), R50K.end_of_text]
    with serving(scripted(R50K, SCRIPT), other=scripted(R50K, other)) as server:
        browser.open(server.address, width, dark=dark)
        fill(browser, prompt="", temperature=0, max_new_tokens=60)
        browser.press("Enter", CONTROL)
        browser.wait("[...document.querySelectorAll('.done')].every(e => e.textContent)")
        assert browser.run("[...document.querySelectorAll('h2')].map(e => e.textContent)") == ["a <model>", "other"]
        first, second = browser.run("[...document.querySelectorAll('.tokens')].map(e => e.textContent)")
        assert first.endswith("é<|endoftext|>")
        assert second == "another text<|endoftext|>"
        boxes = browser.run("[...document.querySelectorAll('.text')].map(e => e.getBoundingClientRect().toJSON())")
        assert (boxes[0]["top"] == boxes[1]["top"]) == (width > 1000)
        assert (boxes[0]["left"] == boxes[1]["left"]) == (width < 1000)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        browser.point("document.querySelectorAll('.tokens')[1].firstChild")
        browser.wait("!document.getElementById('popup').hidden")
        assert f"token {other[0]}" in browser.run("document.getElementById('popup').innerText")
        browser.point("document.querySelectorAll('.extend')[1]", click=True)
        assert browser.run("document.getElementById('prompt').value") == "another text"


def test_touch_target_sizes_on_phone(browser: Browser, server: PageServer) -> None:
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        browser.open(server.address, 390, 800)
        write(browser, prompt="", temperature=0, max_new_tokens=60)
        heights = browser.run("[...document.querySelectorAll('main button')].map(e => e.offsetHeight)")
        assert min(heights) >= 44
        sizes = browser.run(
            "[...document.querySelectorAll('textarea, input[type=number]')].map(e => getComputedStyle(e).fontSize)"
        )
        assert set(sizes) == {"16px"}  # below that, phones zoom in on a field
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_settings_affect_generation(browser: Browser, endless: PageServer) -> None:
    browser.open(endless.address)
    texts = []
    for seed in (1, 2, 1):
        write(browser, prompt="", temperature=1.5, top_k=0, seed=seed, max_new_tokens=10)
        texts.append(generated_text(browser))
    assert texts[0] == texts[2] != texts[1]
    browser.run("document.getElementById('top_p_slider').focus()")
    browser.press("ArrowLeft")
    assert browser.run("document.getElementById('top_p').value") == "0.99"
    browser.run("document.getElementById('reset').click()")
    assert browser.run("document.getElementById('top_p').value + document.getElementById('seed').value") == "10"


def test_errors_are_shown_and_preserve_text(browser: Browser, endless: PageServer) -> None:
    browser.open(endless.address)
    write(browser, prompt="word " * 50, max_new_tokens=2)
    assert "the first 20 are not read" in browser.run("document.querySelector('.note').textContent")
    before = generated_text(browser)
    fill(browser, top_p=7)
    browser.press("Enter", CONTROL)
    message = browser.wait("document.getElementById('problem').textContent")
    assert "top_p 7.0: give a number above 0 and at most 1" in message
    assert generated_text(browser) == before
    assert any("400" in error for error in browser.errors)  # the browser's own note of the refusal
    browser.errors.clear()


def test_stopped_server_shows_error(browser: Browser) -> None:
    with torch.no_grad(), serving(scripted(R50K, SCRIPT)) as server:
        browser.open(server.address)
    server.server_close()
    browser.press("Enter", CONTROL)
    message = browser.wait("document.getElementById('problem').textContent")
    assert "is myllm serve still running?" in message
    browser.errors.clear()
