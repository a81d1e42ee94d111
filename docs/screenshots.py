"""Draw the pictures of README.md and docs/ into assets/: `python docs/screenshots.py`, or `make screenshots`.

All are of the run `debug`, which ./run_pre_training_e2e_debug.sh trains first if it is not complete (five minutes). It
is compared with a run of half as many steps with Muon, trained here too (two minutes). Needs Chromium on the PATH and
the packages of the tests.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from support.browser import CONTROL, Browser, chromium  # noqa: E402 (the path is set above)

from myllm.paths import RunPaths  # noqa: E402
from myllm.runs.compare.page import write_comparison  # noqa: E402
from myllm.runs.report.html import write_report  # noqa: E402

PROMPT = "class Reader:\n    def __init__(self, path):\n        self"
SETTINGS = {"prompt": PROMPT, "max_new_tokens": 70, "seed": 4}
MYLLM = [sys.executable, "-m", "myllm"]
VARIANT = ["debug", "--name", "debug-muon", "--optim.optimizer", "muon", "--train.max-steps", "300"]


def main() -> None:
    run = RunPaths.of("debug")
    if not is_complete("debug"):
        subprocess.run([ROOT / "run_pre_training_e2e_debug.sh"], check=True)
    if not is_complete("debug-muon"):
        subprocess.run([sys.executable, ROOT / "pretrain.py", *VARIANT], check=True)
    report, comparison = write_report(run), write_comparison([run, RunPaths.of("debug-muon")])
    shutil.copy(run.plots / "loss.png", ASSETS / "debug_loss.png")
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        browser.call("Emulation.setScrollbarsHidden", hidden=True)
        browser.open(report.as_uri(), 1280, 1640, ready="true")
        browser.screenshot(ASSETS / "debug_report.png")
        browser.open(comparison.as_uri(), 1280, 1010, ready="document.querySelector('.chart svg')")
        browser.run("[...document.querySelectorAll('button')].find(e => e.textContent == 'Tokens').click()")
        browser.screenshot(ASSETS / "comparison.png")
        with page("debug") as address:
            generate(browser, address, 1240, 880)
            browser.point("[...document.querySelectorAll('.token')].slice(-18)[0]")
            browser.run("scrollTo(0, 0)")
            browser.screenshot(ASSETS / "serve.png")
        first = sorted(run.checkpoints.glob("step_*"))[0]
        with page(f"debug/checkpoints/{first.name}", "debug") as address:
            generate(browser, address, 1400, 880)
            browser.screenshot(ASSETS / "serve_two_models.png")
    for picture in ("debug_loss", "debug_report", "comparison", "serve", "serve_two_models"):
        print(ASSETS / f"{picture}.png")


def is_complete(name: str) -> bool:
    return not subprocess.run([*MYLLM, "status", name], stderr=subprocess.DEVNULL).returncode


@contextmanager
def page(*models: str) -> Iterator[str]:
    """The address of `myllm serve`."""
    command = [*MYLLM, "serve", *models, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            found = re.search(r"at (http://\S+)", server.stdout.readline())
            assert found, "myllm serve did not start"
            yield found[1]
        finally:
            server.terminate()


def generate(browser: Browser, address: str, width: int, height: int) -> None:
    browser.open(address, width, height)
    for name, value in SETTINGS.items():
        browser.run(f"(e => {{ e.focus(); e.select(); }})(document.getElementById('{name}'))")
        browser.type(str(value))
    browser.press("Enter", CONTROL)
    browser.wait("[...document.querySelectorAll('.done')].every(e => e.textContent)")
    browser.run("document.getElementById('prompt').focus()")


if __name__ == "__main__":
    main()
