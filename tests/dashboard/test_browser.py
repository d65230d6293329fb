"""End to end: the command that users run, in a real headless Chromium, with a real worker for the export."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from autocompress.dashboard.launch import launch
from autocompress.service.store import Job, JobStore
from autocompress.service.worker import work
from tests.dashboard import sample
from tests.dashboard.exporter import export_something
from tests.dashboard.filled import fill

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (chromium-driver) installed"),
]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.1)
    return found


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, JobStore, Job]]:
    store, job = fill(tmp_path / "jobs.sqlite")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(launch(store.path, port, headless=True), stdout=log, stderr=log)
    address = f"http://localhost:{port}"
    try:
        wait_for(lambda: _healthy(address), "the server")
        yield address, store, job
    finally:
        server.terminate()
        server.wait()
        log.close()
        store.close()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/_stcore/health") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    size = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield driver
    driver.quit()


def shows(browser: webdriver.Chrome, text: str) -> bool:
    return text in browser.execute_script("return document.body.innerText")


def element(browser: webdriver.Chrome, css: str) -> Any:
    return wait_for(lambda: next(iter(browser.find_elements(By.CSS_SELECTOR, css)), None), css)


def test_from_the_list_to_the_files(
    served: tuple[str, JobStore, Job], browser: webdriver.Chrome, tmp_path: Path
) -> None:
    address, store, job = served
    browser.get(address)
    wait_for(lambda: shows(browser, job.id), "the job in the list")
    assert all(shows(browser, word) for word in ("succeeded", "failed", "running", "cancelled", "search 120 of 400"))
    element(browser, f".st-key-open-{job.id} button").click()
    element(browser, ".js-plotly-plot .scatterlayer .point")
    wait_for(lambda: shows(browser, "16 of 18 sites are compressed"), "the best plan")
    move_mouse(browser, 5, 5).perform()  # away from the tables, which show tools under a mouse
    time.sleep(1.0)  # fonts and animations, for the picture
    picture = os.environ.get("AUTOCOMPRESS_SCREENSHOT", str(tmp_path / "job.png"))
    assert browser.save_screenshot(picture) and Path(picture).stat().st_size > 20_000

    click_point(browser, sample.result().original.id)
    wait_for(lambda: shows(browser, "0 of 18 sites are compressed"), "the original's plan")
    front = [p.id for p in sample.result().points if p.fidelity == "refitted" and p.feasible]
    plan = next(name for name in front if name != sample.result().best)
    click_point(browser, plan)
    wait_for(lambda: shows(browser, plan[:8]), "the clicked plan")

    wait_for(lambda: shows(browser, "Export this plan"), "the button")
    element(browser, ".st-key-export button").click()
    (export,) = wait_for(lambda: store.list(kind="export"), "the export job")
    assert export.request == {"job": job.id, "pick": plan, "out": None}
    work(store, once=True, poll_seconds=0.05, runner=export_something)
    element(browser, ".st-key-download-onnx button").click()  # the page found the files by itself
    model = tmp_path / "downloads" / f"{plan[:8]}.onnx"
    wait_for(model.exists, "the ONNX file")
    onnx.checker.check_model(onnx.load(model))
    element(browser, ".st-key-download-certificate button").click()
    certificate = tmp_path / "downloads" / "certificate.json"
    wait_for(certificate.exists, "the certificate")
    assert json.loads(certificate.read_text())["plan"] == plan


def click_point(browser: webdriver.Chrome, point_id: str) -> None:
    """Click where plotly drew the point, with a real mouse."""
    place = wait_for(lambda: browser.execute_script(PLACE, point_id), "the point's place")
    move_mouse(browser, *place).pause(0.5).click().perform()


def move_mouse(browser: webdriver.Chrome, x: float, y: float) -> ActionChains:
    mouse = ActionChains(browser)
    mouse.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    return mouse


PLACE = """
const plot = document.querySelector('.js-plotly-plot');
if (!plot || !plot._fullLayout) return null;
for (const trace of plot._fullData) {
  const i = (trace.customdata || []).findIndex(row => row[0] === arguments[0]);
  if (i < 0) continue;
  const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
  return [box.left + xaxis._offset + xaxis.d2p(trace.x[i]), box.top + yaxis._offset + yaxis.d2p(trace.y[i])];
}
return null;
"""
