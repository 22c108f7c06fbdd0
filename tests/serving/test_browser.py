"""The page in a real browser: a file, a voice, a bad file, a small screen, the keyboard; nothing asked of elsewhere.

With ACCENT_PLUGIN_SCREENSHOTS=FOLDER the pictures of these tests are kept there.
"""

import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.servers import serving

from accent_plugin.inference.classifier import AccentClassifier

pytestmark = pytest.mark.slow
# Milliseconds; the machine may have other work.
PATIENCE = 60_000
NARROW = {"width": 360, "height": 740}


def tone(seconds, hertz, rate=48_000):
    """A tone that swells and fades twice a second, as loud as speech."""
    at = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hertz * at) * (0.5 - 0.5 * np.cos(4 * np.pi * at)) ** 2).astype(np.float32)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    soundfile.write(folder / "clip.wav", tone(4.0, 300.0), 48_000)
    soundfile.write(folder / "long.flac", np.concatenate([tone(12.0, 150.0), tone(12.0, 900.0)]), 48_000)
    soundfile.write(folder / "voice.wav", tone(6.0, 440.0), 48_000)
    (folder / "bad.wav").write_bytes(b"this is no sound")
    return folder


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving("--model", tiny_bundle) as server:
        yield server


@pytest.fixture(scope="module")
def browser(sounds):
    """Chromium with a microphone that hears voice.wav."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("there is no Chromium: apt-get install chromium")
    words = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    words.append(f"--use-file-for-fake-audio-capture={sounds / 'voice.wav'}")
    # Chromium's own sandbox refuses root, which a container's user often is.
    words += ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=words)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Function: a browser's options -> the page, opened; with what it asked for and the errors of its scripts."""
    contexts = []

    def visit(**options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1000, "height": 900}, **options}))
        contexts[-1].grant_permissions(["microphone"], origin=server.url.rstrip("/"))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.asked, page.wrong = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#recording")
        return page

    yield visit
    for context in contexts:
        context.close()


def choose(page, path):
    page.get_by_role("tab", name="Choose a file").click()
    page.set_input_files("#file input[type=file]", str(path))
    page.wait_for_selector("#answer h2")
    return page.inner_text("#answer")


def keep(page, name):
    """A picture, for whoever wants to look at it."""
    if folder := os.environ.get("ACCENT_PLUGIN_SCREENSHOTS"):
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(folder, name), full_page=True)


def bars(page):
    """Accent -> (percent that is written, share of the track that its bar covers)."""
    found = {}
    for row in page.query_selector_all("#answer .bars tr"):
        track, bar = row.query_selector(".track").bounding_box(), row.query_selector(".bar").bounding_box()
        number = float(row.query_selector(".number").inner_text().removesuffix(" %"))
        found[row.query_selector("th").inner_text()] = number, bar["width"] / track["width"]
    return found


def test_a_file_and_its_bars(visit, sounds, tiny_bundle):
    page = visit()
    shown = choose(page, sounds / "clip.wav")
    expected = AccentClassifier.from_bundle(tiny_bundle, "cpu").predict_file(sounds / "clip.wav")
    found = bars(page)
    assert list(found) == list(expected.probabilities)
    for accent, probability in expected.probabilities.items():
        number, width = found[accent]
        assert number == pytest.approx(100 * probability, abs=0.06)
        assert width == pytest.approx(probability, abs=0.02)
    assert expected.accent in shown.splitlines()[0]
    assert "WAV PCM_16, 48,000 Hz, mono" in shown
    keep(page, "file.png")


def test_a_long_file_shows_its_windows(visit, sounds):
    page = visit()
    choose(page, sounds / "long.flac")
    assert len(page.query_selector_all("#answer svg rect")) == 4
    page.get_by_text("Windows as a table").click()
    assert page.locator("#answer details tbody tr").count() == 4
    keep(page, "windows.png")


def test_a_voice_through_the_microphone(visit):
    page = visit()
    page.get_by_role("button", name="Record").click()
    page.wait_for_timeout(4000)
    page.get_by_role("button", name="Stop").first.click()
    page.wait_for_selector("#answer h2")
    seconds = float(re.search(r"([\d.]+) s, of which [\d.]+ s are speech", page.inner_text("#answer"))[1])
    recorded = page.request.get(next(url for url in page.asked if "/file=" in url)).body()
    samples, rate = soundfile.read(io.BytesIO(recorded), always_2d=True)
    assert seconds == pytest.approx(len(samples) / rate, abs=0.06)
    # That of voice.wav, and not of the beeps that Chromium makes without it.
    assert np.abs(np.fft.rfft(samples[:, 0])).argmax() * rate / len(samples) == pytest.approx(440, abs=10)
    keep(page, "voice.png")


def test_a_bad_file_and_a_good_one_after_it(visit, sounds):
    page = visit()
    shown = choose(page, sounds / "bad.wav")
    assert "undecodable: bad.wav is a text file, not audio" in shown
    assert page.get_by_role("alert").inner_text().startswith("undecodable")
    keep(page, "bad.png")
    page.locator("#file").get_by_role("button", name="Clear").click()
    page.wait_for_selector("#answer h2", state="detached")
    assert "Probability by accent" in choose(page, sounds / "clip.wav")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(visit, sounds, scheme):
    page = visit(viewport=NARROW, color_scheme=scheme)
    choose(page, sounds / "long.flac")
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")
    keep(page, f"narrow_{scheme}.png")


def test_the_keyboard_is_enough(visit, sounds):
    page = visit()
    page.get_by_role("tab", name="Speak").focus()
    page.keyboard.press("Tab")
    for _ in range(12):
        if page.evaluate("document.activeElement.textContent.trim()") == "Record":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").first.wait_for()
    page.wait_for_timeout(2000)
    page.get_by_role("button", name="Stop").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer h2")


def test_a_screen_reader_is_told(visit, sounds):
    page = visit()
    assert page.get_attribute("#answer", "aria-live") == "polite"
    assert page.get_attribute("html", "lang") == "en"
    choose(page, sounds / "long.flac")
    assert page.locator("#answer").get_by_role("img").get_attribute("aria-label").startswith("Waveform of 24 seconds")
    assert page.locator("#answer .bars caption").inner_text() == "Probability by accent"
    assert page.locator("#answer .bars th[scope=row]").count() == 3


def test_nothing_is_asked_of_elsewhere(visit, sounds, server):
    page = visit()
    choose(page, sounds / "clip.wav")
    page.get_by_text("Model card").click()
    page.wait_for_timeout(1000)
    assert {url.split("/")[2] for url in page.asked if url.startswith("http")} == {f"{server.host}:{server.port}"}
    assert page.wrong == []
    keep(page, "card.png")
