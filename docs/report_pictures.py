"""Take the pictures of docs/report.md: the page of a run of configs/tiny_math.toml, in Chromium.

uv run mlx-grpo.py --config configs/tiny_math.toml
uv run python docs/report_pictures.py outputs/tiny-math
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.run import page  # noqa: E402
from utils.run.page_source import Source  # noqa: E402

UPDATE = 9  # of the rollouts that are shown: some are right, some are wrong
TO_A_MIXED_GROUP = """() => {
  const run = page.runs[0];
  const wanted = rollouts.shown.find((i) => {
    const right = run.right(run.groupOf[i]);
    return run.numbers.correct[i] === 1 && right.right > 1 && right.right < right.known - 1;
  });
  rollouts.list.choose(rollouts.shown.indexOf(wanted ?? rollouts.shown[0]));
}"""


def main(folder: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        path = Path(place) / "report.html"
        page.write(path, [Source.at(folder)])
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        shown = browser.new_page(viewport={"width": 1360, "height": 820})
        shown.goto(f"{path.as_uri()}#curves")
        shown.wait_for_selector("canvas")
        shown.wait_for_timeout(500)
        shown.screenshot(path=ROOT / "docs" / "report_curves.png")
        shown.click("[data-tab=rollouts]")
        slide = "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')) }"
        shown.locator("#update").evaluate(slide, str(UPDATE - 1))
        shown.evaluate(TO_A_MIXED_GROUP)
        shown.click("[data-value=probability]")
        shown.wait_for_selector("#group .token")
        shown.wait_for_timeout(500)
        shown.screenshot(path=ROOT / "docs" / "report_rollouts.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
