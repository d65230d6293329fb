"""``--target``: what a user calls a device -> the device."""

from __future__ import annotations

import re

from autocompress.errors import UsageError
from autocompress.hwprofiles.device import Device, local_device
from autocompress.hwprofiles.transports import AdbLink, SshLink

_SSH = re.compile(r"ssh://(?P<host>(?:[\w.-]+@)?(?:[\w][\w.-]*))(?::(?P<port>\d{1,5}))?/?")
_ADB = re.compile(r"adb://(?P<serial>\w[\w.:-]*)")


def open_target(text: str = "local", python: str = "") -> Device:
    """The device named ``local``, ``ssh://user@host[:port]`` or ``adb://serial``; close it after use.

    ``python`` is the interpreter there (``python3`` where it is empty). Raises ``UsageError`` for other names,
    ``MeasurementError`` for a device that cannot be reached.
    """
    if text == "local":
        if python:
            raise UsageError("--python names an interpreter on another machine; on this one it is the running one.")
        return local_device()
    if found := _SSH.fullmatch(text):
        port = int(found["port"]) if found["port"] else None
        return Device(SshLink(found["host"], port, python or "python3"))
    if found := _ADB.fullmatch(text):
        return Device(AdbLink(found["serial"], python))
    if text.partition(":")[0] == "cuda":
        raise UsageError(
            "'cuda' is a target of 'autocompress profile measure' alone: ONNX files are timed on processors."
        )
    raise UsageError(f"A target is local, ssh://user@host[:port] or adb://serial, got {text!r}.")
