"""Other machines: the agent alone in a folder, over a real sshd on loopback, and through an adb that runs commands here."""

from __future__ import annotations

import getpass
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from autocompress.cli import app
from autocompress.errors import MeasurementError, UsageError
from autocompress.hwprofiles import (
    HardwareProfile,
    Layout,
    agent,
    compare,
    load_profile,
    measure,
    measure_local,
    measure_one,
    open_target,
)
from autocompress.hwprofiles.device import Device, Lane, local_device
from autocompress.hwprofiles.references import residual_network
from autocompress.hwprofiles.timing import CHUNK, Samples
from autocompress.hwprofiles.transports import AGENT, SshLink
from autocompress.hwprofiles.unfinished import Traits, Unfinished
from autocompress.types import Kernel

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
KERNELS = [Kernel("linear", (8 * i,), (16,)) for i in range(1, CHUNK + 9)]
MODEL = residual_network([(16, 16)], size=8)[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(measure, "_PROBE_SECONDS", 0.01)  # all kernels, however little time there is


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter without numpy and onnxruntime."""
    return str(script(tmp_path_factory.mktemp("bare") / "python", f'exec "{sys.executable}" -I -S "$@"'))


# ---------------------------------------------------------------- the agent


def ask(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    lines = [json.dumps({"id": i, **request}) for i, request in enumerate(requests)]
    replies: list[dict[str, Any]] = []
    agent.serve(agent.Agent(), lines, replies.append)
    return replies


class TestAgent:
    def test_runs_alone_in_a_folder(self, tmp_path: Path) -> None:
        """No package of ours in sight; what it prints is protocol only."""
        shutil.copy(AGENT, tmp_path / "agent.py")
        requests = '{"id": 7, "do": "hello"}\n\n{"id": 8, "do": "stop"}\n{"id": 9, "do": "hello"}\n'
        command = [sys.executable, "-P", "agent.py"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, input=requests, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
        )
        hello, stop = map(json.loads, done.stdout.splitlines())
        assert (hello["id"], stop["id"]) == (7, 8) and hello["ok"]
        assert hello["value"]["onnxruntime"] == local_device().hello["onnxruntime"]
        assert hello["value"]["host"]["cores"] >= 1 and "CPUExecutionProvider" in hello["value"]["providers"]

    def test_imports_nothing_of_ours(self) -> None:
        assert "autocompress." not in "".join(
            line for line in AGENT.read_text().splitlines() if line.lstrip().startswith(("import", "from"))
        )

    def test_refuses_in_one_sentence(self) -> None:
        model = {"models": [{"model": "0" * 64, "name": "the model"}], "optimized": True, "inputs": {}}
        unknown, lost, broken = ask(
            {"do": "dance"}, {"do": "outputs", **model}, {"do": "put", "model": "0" * 64, "data": "AAAA"}
        )
        assert unknown["kind"] == "usage" and "got 'dance'" in unknown["error"]
        assert lost["kind"] == "measurement" and "was not" in lost["error"]
        assert "hash differs" in broken["error"]

    def test_reports_progress(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agent, "_REPORT_SECONDS", 0.0)
        seen: list[int] = []
        local_device().rounds([Lane(MODEL)], seconds=0.0, least=5, most=5, report=seen.append)
        assert seen == [0, 1, 2, 3, 4]

    def test_sessions_that_are_kept_are_opened_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[str] = []
        real = agent.open_session
        monkeypatch.setattr(agent, "open_session", lambda *a, **k: opened.append(a[1]) or real(*a, **k))
        device = open_target("local")
        lanes = [Lane(residual_network([(16, 16)], size=8, seed=5)[0], keep=True), Lane(MODEL)]
        for _ in range(2):
            device.rounds(lanes, seconds=0.0, least=2, most=2)
        assert len(opened) == 3

    def test_arrays_travel(self) -> None:
        for array in (np.arange(6, dtype=np.float16).reshape(2, 3), np.array(3, np.int64), np.zeros((0, 2), np.bool_)):
            again = agent.decode_array(json.loads(json.dumps(agent.encode_array(array))))
            assert again.dtype == array.dtype and np.array_equal(again, array)


@pytest.mark.parametrize(
    "text",
    ["", "remote", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://host:port", "adb://", "adb://-s", "cudas"],
)
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="A target is local, ssh"):
        open_target(text)


@pytest.mark.parametrize("text", ["cuda", "cuda:1"])
def test_a_gpu_is_a_target_of_profiles_alone(text: str) -> None:
    with pytest.raises(UsageError, match="profile measure"):
        open_target(text)


def test_clients_are_named_where_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    for target, client in (("ssh://host", "ssh"), ("adb://phone", "adb")):
        with pytest.raises(UsageError, match=f"needs the {client} client"):
            open_target(target)
    with pytest.raises(UsageError, match="--python names"):
        open_target("local", "python3")


# ---------------------------------------------------------------- ssh


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A target, and a folder whose ``ssh`` is the system's with a key of the tests'."""
    client = shutil.which("ssh")
    if SSHD is None or client is None:
        pytest.skip("needs OpenSSH's sshd and ssh (apt-get install openssh-server)")
    folder = tmp_path_factory.mktemp("sshd")
    if os.getuid() == 0:  # sshd insists on this folder when root starts it
        try:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            pytest.skip(f"root's sshd needs the folder /run/sshd, which cannot be made: {error}")
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = (
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "sshd_config").write_text(lines)
    key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}")
    (folder / "config").write_text(
        f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\n"
        "StrictHostKeyChecking yes\nLogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    script(folder / "bin" / "ssh", f'exec "{client}" -F "{folder}/config" "$@"')
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        if server.poll() is not None:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text().strip()[-300:]}")
        yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}", folder / "bin"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def far(sshd: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    target, folder = sshd
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return target


def ssh_pid(device: Device) -> int:
    assert isinstance(device._link, SshLink)
    return device._link.pid


def agent_pid(device: Device) -> int:
    return int(device.hello["pid"])


def started(device: Device) -> Unfinished:
    """A measurement whose device is known already, which saves the tests some seconds."""
    unfinished = Unfinished(device, 1, 1)
    unfinished.write(Traits(Layout(), "u8u8", {"u8u8_ms": 1.5}, 0.01), Samples())
    return unfinished


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestSsh:
    @pytest.mark.slow
    def test_gives_a_profile_that_loads(self, far: str, tmp_path: Path) -> None:
        with open_target(far, sys.executable) as device:
            profile = measure_local(KERNELS[:6], seconds=1.0, device=device, name="far")
            assert device.name == profile.how["target"] == far and agent_pid(device) != os.getpid()
        profile.save(tmp_path / "far.json")
        again = HardwareProfile.load(tmp_path / "far.json")
        assert again == profile and len(again.entries) == 6
        assert again.host == local_device().host and again.runtime_version == local_device().hello["onnxruntime"]

    def test_times_models_and_says_what_is_wrong_with_them(self, far: str, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(MODEL)
        with open_target(far, sys.executable) as device:
            assert compare(path, MODEL, seconds=0.2, device=device).rounds >= 10
            assert measure_one(path, seconds=0.1, device=device).p50_ms > 0
            with pytest.raises(UsageError, match=f"{far}: The model cannot be run on the given inputs"):
                measure_one(path, inputs={"x": np.zeros((1, 3, 4, 4), np.float32)}, seconds=0.1, device=device)
            with pytest.raises(UsageError, match="must be an ONNX file"):
                measure_one(AGENT, seconds=0.1, device=device)
            assert measure_one(path, seconds=0.1, device=device).runs >= 10  # a refusal ends nothing

    @pytest.mark.slow
    def test_from_the_command_line(self, far: str, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(MODEL)
        there = ["--target", far, "--python", sys.executable, "--json"]
        timed = CliRunner().invoke(app, ["bench", str(tmp_path / "model.onnx"), "--seconds", "0.1", *there])
        assert timed.exit_code == 0 and json.loads(timed.stdout)["target"] == far
        measured = CliRunner().invoke(app, ["profile", "measure", "--name", "far", "--minutes", "0.01", *there])
        assert measured.exit_code == 0, measured.output
        assert files(tmp_path / "home") == [tmp_path / "home" / "profiles" / "far.json"]
        assert load_profile("far").how["target"] == far

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("who", "says"), [(ssh_pid, "The connection was cut"), (agent_pid, "The agent was killed")]
    )
    def test_cut_in_the_middle_it_keeps_and_resumes(
        self, far: str, tmp_path: Path, who: Callable[[Device], int], says: str
    ) -> None:
        with open_target(far, sys.executable) as device:
            unfinished = started(device)

            def cut(done: int, total: int) -> None:
                os.kill(who(device), signal.SIGKILL)

            with pytest.raises(MeasurementError, match=rf"^{far} vanished while it was measured\. {says}") as error:
                measure_local(KERNELS, seconds=1.0, device=device, progress=cut, unfinished=unfinished)
            assert "\n" not in str(error.value) and "goes on from what is kept" in str(error.value)
        assert files(tmp_path / "home") == [unfinished.path]
        kept = unfinished.read()
        assert kept is not None and len(kept[1].kernels) == CHUNK
        steps: list[tuple[int, int]] = []
        with open_target(far, sys.executable) as device:
            profile = measure_local(
                KERNELS,
                seconds=1.0,
                device=device,
                progress=lambda *step: steps.append(step),
                unfinished=Unfinished(device, 1, 1),
            )
        assert steps == [(len(KERNELS), len(KERNELS))], "only the second chunk was left"
        assert {e.kernel for e in profile.entries} == set(KERNELS) and profile.int8_evidence == kept[0].evidence

    def test_hosts_that_are_not_there(self, far: str) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers
            with pytest.raises(MeasurementError, match=r"cannot be reached without a password \(.*refused"):
                open_target(f"ssh://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(MeasurementError, match="cannot be reached"):
            open_target(far.replace(getpass.getuser(), "nobody-of-this-name"))

    @pytest.mark.slow
    def test_no_onnxruntime_and_no_python(self, far: str, bare_python: str) -> None:
        with pytest.raises(
            MeasurementError, match=r"needs Python 3\.10 with numpy and onnxruntime on ssh://.*No module"
        ):
            open_target(far, bare_python)
        with pytest.raises(MeasurementError, match=r"needs Python 3\.10.*no/such/python there cannot run it"):
            open_target(far, "/no/such/python")

    def test_too_old_a_python(self, far: str, tmp_path: Path) -> None:
        old = script(tmp_path / "python", 'echo "NEEDS-PYTHON-3.10, this is 3.8" >&2; exit 1')
        with pytest.raises(MeasurementError, match=r"needs Python 3\.10.*this is 3\.8"):
            open_target(far, str(old))

    def test_too_noisy_a_far_end(self, far: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(measure, "MAX_NOISE", 1e-12)
        says = pytest.raises(MeasurementError, match=rf"timed twice differs by \d+% on {far}")
        with open_target(far, sys.executable) as device, says:
            measure.measure_default(minutes=0.01, device=device)
        assert files(tmp_path / "home") == []

    @pytest.mark.parametrize("busy", [False, True])
    def test_nothing_runs_on_after_the_end(self, far: str, busy: bool) -> None:
        def interrupt(done: int) -> None:
            raise KeyboardInterrupt

        with open_target(far, sys.executable) as device:
            pids = ssh_pid(device), agent_pid(device)
            if busy:
                with pytest.raises(KeyboardInterrupt):
                    device.rounds([Lane(MODEL)], seconds=600, least=1, most=10**9, report=interrupt)
        for pid in pids:
            for _ in range(100):
                if not Path(f"/proc/{pid}").exists():
                    break
                time.sleep(0.05)
            assert not Path(f"/proc/{pid}").exists()


# ---------------------------------------------------------------- adb

ADB = r"""
[ "$1" = -s ] || exit 2
[ "$2" = phone ] || { echo "adb: device '$2' not found" >&2; exit 1; }
[ -e "ROOT/unplugged" ] && { echo "adb: device 'phone' not found" >&2; exit 1; }
shift 2
there() { echo "$1" | sed "s#/data/#ROOT/data/#g"; }
case "$1" in
  push) cp "$2" "$(there "$3")" ;;
  pull) cp "$(there "$2")" "$3" ;;
  shell) shift; exec sh -c "$(there "$*")" ;;
  *) exit 2 ;;
esac
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that an ``adb`` of ours takes for the phone; no phone was at hand."""
    root = tmp_path / "phone"
    (root / "data" / "local" / "tmp").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "adb", ADB.replace("ROOT", str(root)))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return root


class TestAdb:
    def test_pushes_runs_and_pulls(self, phone: Path) -> None:
        with open_target("adb://phone", sys.executable) as device:
            profile = measure_local(KERNELS[:4], seconds=0.5, device=device, name="phone", unfinished=started(device))
            assert len(profile.entries) == 4 and profile.how["target"] == "adb://phone"
            with pytest.raises(UsageError, match="adb://phone: The model cannot be run"):
                measure_one(MODEL, inputs={"x": np.zeros((1, 3, 4, 4), np.float32)}, seconds=0.1, device=device)
        assert files(phone) == [], "what was pushed is removed"

    @pytest.mark.slow
    def test_unplugged_in_the_middle_it_keeps_what_it_has(self, phone: Path) -> None:
        with open_target("adb://phone", sys.executable) as device:
            unfinished = started(device)
            with pytest.raises(MeasurementError, match=r"adb://phone does not answer to 'adb push' .*is it plugged in"):
                measure_local(
                    KERNELS,
                    seconds=2.0,
                    device=device,
                    progress=lambda done, total: (phone / "unplugged").touch(),
                    unfinished=unfinished,
                )
        kept = unfinished.read()
        assert kept is not None and len(kept[1].kernels) == CHUNK

    def test_refusals(self, phone: Path, bare_python: str) -> None:
        with pytest.raises(MeasurementError, match="adb://other does not answer"):
            open_target("adb://other")
        with pytest.raises(MeasurementError, match=r"numpy and onnxruntime on adb://phone.*No module"):
            open_target("adb://phone", bare_python)
        with pytest.raises(MeasurementError, match=r"numpy and onnxruntime on adb://phone, and /no/such"):
            open_target("adb://phone", "/no/such/python")
        assert files(phone) == []


def test_unusable_files_of_what_is_kept_are_measured_again() -> None:
    unfinished = Unfinished(local_device(), 1, 1)
    assert unfinished.read() is None
    unfinished.path.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"layout": {"block": 1}}'):
        unfinished.path.write_text(text)
        assert unfinished.read() is None


def test_the_wire_skips_nothing_but_empty_lines() -> None:
    stream = io.StringIO('{"a": 1}\n\n{"b": 2}\n')
    assert list(agent._lines(stream)) == ['{"a": 1}\n', "\n", '{"b": 2}\n']
