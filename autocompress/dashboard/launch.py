"""How the dashboard is started: as a child process running Streamlit on this machine only."""

from __future__ import annotations

import sys
from pathlib import Path

ACCENT = "#0072B2"


def launch(store: str | Path, port: int = 8501, headless: bool = False) -> list[str]:
    """The command that serves the dashboard of ``store`` on ``http://localhost:port``.

    ``headless`` opens no browser. Streamlit's own defaults would listen on every network and send usage statistics.
    """
    options = {
        "server.address": "localhost",
        "server.port": str(port),
        "server.headless": str(headless).lower(),
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "theme.primaryColor": ACCENT,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    page = Path(__file__).with_name("app.py")
    return [sys.executable, "-m", "streamlit", "run", str(page), *flags, "--", "--store", str(store)]
