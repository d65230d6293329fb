"""Ways to an agent on another machine: the system's ``ssh`` client, and Android's ``adb``.

Both carry the same requests. ``ssh`` keeps one agent running and talks to it through its pipes. ``adb`` pushes each
request as a file, runs the agent on it, and pulls the replies: an old ``adb shell`` is no clean pipe.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import queue
import secrets
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autocompress.errors import MeasurementError, UsageError
from autocompress.hwprofiles import agent

AGENT = Path(agent.__file__)
CONNECT_SECONDS = 10
PATIENCE = 600.0
"""Seconds without a word from an agent, after which it counts as gone (a model may take long to load)."""
_ENDING_SECONDS = 3.0
_TOO_OLD = "NEEDS-PYTHON-3.10"


def agent_hash() -> str:
    """SHA-256 of the agent's file: part of its name on the device."""
    return hashlib.sha256(AGENT.read_bytes()).hexdigest()


class SshLink:
    """An agent at the other end of ``ssh`` in BatchMode: it never asks, so keys or an ssh-agent must let it in.

    The agent's file goes into a folder of the user's own below ``TMPDIR`` or ``/tmp`` there, under its hash; models go
    through the pipe. Raises ``MeasurementError`` when it cannot be reached or lacks what the agent needs.
    """

    def __init__(self, host: str, port: int | None = None, python: str = "python3") -> None:
        self.name = f"ssh://{host}" + (f":{port}" if port else "")
        self._python, self._number, self._busy = python, 0, False
        alive = ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")
        limits = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
        self._ssh = (_client("ssh"), "-T", *limits, *alive, *(("-p", str(port)) if port else ()), "--", host)
        path = self._push()
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 – closed with the link
        # A session of its own: Ctrl-C stops the measurement in order, and not ssh below it.
        self._process = subprocess.Popen(
            (*self._ssh, f"{_checked_python(python)} -u {shlex.quote(path)}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            start_new_session=True,
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """The process id of the ssh client."""
        return self._process.pid

    def call(self, request: dict[str, Any], report: Callable[[int], None]) -> Any:
        """The value of the agent's reply."""
        self._number += 1
        self._busy = True
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):  # the agent may have left a last word
            pipe.write(json.dumps({"id": self._number, **request}).encode() + b"\n")
            pipe.flush()
        while True:
            try:
                line = self._lines.get(timeout=PATIENCE)
            except queue.Empty:
                raise MeasurementError(
                    f"{self.name} has said nothing for {PATIENCE:.0f} s; is it still there?"
                ) from None
            if not line:
                raise MeasurementError(self._gone())
            if line.startswith(b"{"):  # what a login prints is not for us
                reply = json.loads(line)
                if "progress" in reply:
                    report(reply["progress"])
                else:
                    self._busy = False
                    return _value(reply, self.name, self._python)

    def put(self, digest: str, data: bytes) -> None:
        """Send a model through the pipe."""
        request = {"do": "put", "model": digest, "data": base64.b64encode(data).decode()}
        self.call(request, lambda done: None)

    def close(self) -> None:
        """Ask the agent to stop; end the client when it does not, or is in the middle of something."""
        if self._messages.closed:
            return
        if self._busy:  # the agent notices at its next word, which comes within about a second
            self._process.kill()
        pipe, stream = self._process.stdin, self._process.stdout
        assert pipe is not None and stream is not None
        with contextlib.suppress(OSError):
            pipe.write(b'{"id": 0, "do": "stop"}\n')
        with contextlib.suppress(OSError):
            pipe.close()
        try:
            self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        stream.close()
        self._messages.close()

    def _push(self) -> str:
        """Bring the agent's file there, unless it is; returns its path."""
        name = f"agent-{agent_hash()[:16]}.py"
        # A folder that somebody else made could hold somebody else's agent.
        script = (
            'umask 077; d="${TMPDIR:-/tmp}/autocompress-$(id -u)"; mkdir -p "$d" && [ -O "$d" ] && '
            f'cat > "$d/.{name}.$$" && mv "$d/.{name}.$$" "$d/{name}" && printf "AGENT %s\\n" "$d/{name}"'
        )
        command = (*self._ssh, f"exec sh -c {shlex.quote(script)}")
        done = subprocess.run(command, input=AGENT.read_bytes(), capture_output=True, check=False)
        for line in done.stdout.decode(errors="replace").splitlines():
            if line.startswith("AGENT "):
                return line.removeprefix("AGENT ")
        reason = _last_line(done.stderr) or f"ssh ended with code {done.returncode}"
        if done.returncode == 255:
            raise MeasurementError(
                f"{self.name} cannot be reached without a password ({reason}); try 'ssh {self._ssh[-1]} true'."
            )
        raise MeasurementError(f"The agent needs a folder in /tmp or TMPDIR on {self.name}, and has none ({reason}).")

    def _listen(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        for line in iter(stream.readline, b""):
            self._lines.put(line)
        self._lines.put(b"")

    def _gone(self) -> str:
        """One sentence for an agent that has ended."""
        code = self._process.wait()
        self._messages.seek(0)
        reason = _last_line(self._messages.read())
        if code == 127 or _TOO_OLD in reason:
            return _needs(self.name, self._python, reason)
        # ssh ends with 255 for an agent that was killed, too, but has nothing to say about it then.
        killed = code == 255 and not reason
        what = (
            "The agent was killed"
            if killed
            else "The connection was cut"
            if code in (255, -9, -15)
            else "The agent ended"
        )
        return (
            f"{self.name} vanished while it was measured. {what} ({reason or f'ssh ended with code {code}'}); the same "
            "command goes on from what is kept."
        )


class AdbLink:
    """An agent on a phone, through ``adb``: every request is pushed as a file, and the replies are pulled.

    A phone needs a Python with numpy and onnxruntime: Termux's is found, another one is named by ``python``. Nothing
    lives between requests but files, so sessions are opened anew in each. Raises ``MeasurementError`` as ``SshLink``.
    """

    FOLDER = "/data/local/tmp/autocompress"
    TERMUX = "/data/data/com.termux/files/usr/bin/python3"

    def __init__(self, serial: str, python: str = "") -> None:
        self.name = f"adb://{serial}"
        self._adb = (_client("adb"), "-s", serial)
        self._here = tempfile.TemporaryDirectory(prefix="autocompress-")
        self._folder = f"{self.FOLDER}-{secrets.token_hex(4)}"
        self._agent = f"{self._folder}/agent-{agent_hash()[:16]}.py"
        self._number = 0
        try:
            self._shell(f"mkdir -p {self._folder}")
            self._python = python or self._find_python()
            self._push(AGENT, self._agent)
        except BaseException:
            self.close()
            raise

    def call(self, request: dict[str, Any], report: Callable[[int], None]) -> Any:
        """The value of the agent's reply."""
        self._number += 1
        asked, replies = (Path(self._here.name) / name for name in ("requests.jsonl", "replies.jsonl"))
        asked.write_text(json.dumps({"id": self._number, **request}) + "\n", encoding="utf-8")
        there = [f"{self._folder}/{path.name}" for path in (asked, replies)]
        self._push(asked, there[0])
        files = f"--folder {self._folder} --requests {there[0]} --replies {there[1]}"
        said = self._shell(
            f"rm -f {there[1]}; TMPDIR={self._folder} {_checked_python(self._python)} {self._agent} {files}; echo CODE $?"
        )
        code = said.strip().rpartition("CODE ")[2]
        for line in said.splitlines():
            if line.startswith("{"):  # without numpy or onnxruntime it never comes to the files
                _value(json.loads(line), self.name, self._python)
        if code != "0":
            reason = _last_line(said.rpartition("CODE ")[0].encode()) or f"code {code}"
            if code in ("126", "127") or _TOO_OLD in said:
                raise MeasurementError(_needs(self.name, self._python, reason))
            raise MeasurementError(
                f"{self.name} vanished while it was measured. The agent ended ({reason}); the same command goes on from "
                "what is kept."
            )
        self._run(("pull", there[1], str(replies)))
        answers = [json.loads(line) for line in replies.read_text(encoding="utf-8").splitlines()]
        return _value(next(reply for reply in answers if "progress" not in reply), self.name, self._python)

    def put(self, digest: str, data: bytes) -> None:
        """Push a model beside the agent."""
        path = Path(self._here.name) / f"{digest}.onnx"
        path.write_bytes(data)
        self._push(path, f"{self._folder}/{digest}.onnx")
        path.unlink()

    def close(self) -> None:
        """Remove what was pushed, as far as the device is still there."""
        with contextlib.suppress(MeasurementError):
            self._shell(f"rm -rf {self._folder}")
        self._here.cleanup()

    def _find_python(self) -> str:
        found = self._shell(f"command -v python3 || ls {self.TERMUX}").strip().splitlines()
        if not found or not found[-1].startswith("/"):
            raise MeasurementError(_needs(self.name, "python3", "no python3 in PATH, and no Termux"))
        return found[-1].strip()

    def _shell(self, command: str) -> str:
        return self._run(("shell", command))

    def _push(self, source: Path, target: str) -> None:
        self._run(("push", str(source), target))

    def _run(self, words: Sequence[str]) -> str:
        done = subprocess.run((*self._adb, *words), capture_output=True, check=False, stdin=subprocess.DEVNULL)
        said = done.stdout.decode(errors="replace")
        if (done.returncode and words[0] != "shell") or (done.returncode and not said.strip()):
            reason = _last_line(done.stderr) or f"code {done.returncode}"
            raise MeasurementError(
                f"{self.name} does not answer to 'adb {words[0]}' ({reason}); is it plugged in and listed by 'adb devices'?"
            )
        return said


def _client(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UsageError(f"This target needs the {name} client, which is not in PATH; install it.")
    return os.fspath(found)


def _checked_python(python: str) -> str:
    """The command without its file, refused with a word of ours where the interpreter is too old to read the agent."""
    check = f"import sys; sys.version_info < (3, 10) and sys.exit('{_TOO_OLD}, this is %d.%d' % sys.version_info[:2])"
    return f"{shlex.quote(python)} -c {shlex.quote(check)} && {shlex.quote(python)}"


def _needs(name: str, python: str, reason: str) -> str:
    return (
        f"The agent needs Python 3.10 with numpy and onnxruntime on {name}, and {python} there cannot run it ({reason}); "
        "install them, or name another interpreter with --python."
    )


def _value(reply: dict[str, Any], name: str, python: str) -> Any:
    if reply["ok"]:
        return reply["value"]
    if reply["kind"] == "missing":
        raise MeasurementError(_needs(name, python, reply["error"]))
    raise agent.AgentError(reply["error"], reply["kind"])


def _last_line(text: bytes) -> str:
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""
