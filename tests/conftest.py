"""What the tests share: the tiny model, sound files, and the scripts as their users start them."""
import atexit
import dataclasses
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs a process on each core
# A user without a home, whose packages are somebody else's, has no other place for what numba compiles.
os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"numba-{os.getuid()}"))
import common
import numpy as np
import pytest
import soundfile
import torch

import inference

TESTS = Path(__file__).parent
ROOT = TESTS.parent
MODEL = str(TESTS / "tiny_whisper")
FAKE_NPU = TESTS / "fake_npu"
# The simulated NPU is a device written in Python, which torch allows from 2.10 on.
needs_fake = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="torch before 2.10 has no Python device hook"
)
FAKE = {"PYTHONPATH": str(FAKE_NPU)}  # what makes the simulated torch_npu importable
NO_NPU = FAKE | {"FAKE_NPU_FAULT": "missing"}  # whatever this machine has
OFFLINE = {"HF_HUB_OFFLINE": "1"}
READ_AT_START = ("LD_", "LC_", "LANG", "PYTHONWARNINGS", "OMP_", "HF_", "NUMBA_")  # by Python or a package


def write(path: Path, waveform: np.ndarray, sampling_rate: int = 16_000, **options) -> str:
    """Write a sound file; in pieces, because libsndfile's vorbis encoder overflows its stack on long ones."""
    channels = 1 if waveform.ndim == 1 else waveform.shape[1]
    with soundfile.SoundFile(path, "w", sampling_rate, channels, **options) as file:
        for first in range(0, len(waveform), sampling_rate):
            file.write(waveform[first : first + sampling_rate])
    return str(path)


def command(script: str, *arguments: str) -> list[str]:
    """What Python is told: a script of the program, or -c and code, and the arguments."""
    return [script if script == "-c" else str(ROOT / script), *map(str, arguments)]


def start(script: str, *arguments: str, environment: dict | None = None, **options) -> subprocess.Popen:
    """Start a script as a user does, without a network."""
    return subprocess.Popen(
        [sys.executable, *command(script, *arguments)], text=True, encoding="utf-8",
        env={**os.environ, **OFFLINE, **(environment or {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def run_process(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a script to its end as a user does."""
    with start(script, *arguments, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@functools.cache
def fork_server() -> socket.socket:
    """The connection to this process's own fork_server.py, which ends when that is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, str(TESTS / "fork_server.py"), str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, **OFFLINE},
        )  # fmt: skip
    atexit.register(server.wait)  # after the next, which ends it
    atexit.register(ours.close)
    return ours


def run(script: str, *arguments: str, environment: dict | None = None, stdout=None) -> subprocess.CompletedProcess:
    """What run_process gives for a script, or for -c and Python code, without the 4 s that its imports take.

    stdout is a file or a descriptor, of which nothing comes back.
    """
    if any(name.startswith(READ_AT_START) for name in environment or {}):
        return run_process(script, *arguments, environment=environment, stdout=stdout or subprocess.PIPE)
    argv = command(script, *arguments)
    request = {"argv": argv, "cwd": os.getcwd(), "environment": {**os.environ, **OFFLINE, **(environment or {})}}
    connection = fork_server()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        outputs = [file if isinstance(file, int) else file.fileno() for file in (stdout or out, err)]
        socket.send_fds(connection, [json.dumps(request).encode()], outputs)
        status = int(connection.recv(99))
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(argv, status, out.read().decode(), err.read().decode())


@pytest.fixture(scope="session")
def recognizer() -> common.Recognizer:
    """The tiny model on the CPU in float32."""
    return common.load_model(MODEL, common.select_device("cpu"), torch.float32)


def options_of(**changes) -> inference.Options:
    """The options of inference.py on a CPU, all but the changed ones at their defaults."""
    args = inference.parse_arguments(["--audio", ""])
    defaults = inference.Options(8, args.chunk_length, args.max_new_tokens, args.no_speech_threshold, args.prompt)
    return dataclasses.replace(defaults, **changes)


@pytest.fixture
def transcribe(recognizer):
    """Transcribe files in this process: a list of Recordings."""

    def transcribe(*paths: str, on_chunk=lambda chunk: None, **options) -> list[inference.Recording]:
        return list(inference.transcribe(recognizer, paths, options_of(**options), on_chunk))

    return transcribe


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Run a script's main in this process, with the tiny model on the CPU: (exit status, stdout, stderr)."""

    def run_here(script, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
        capsys.readouterr()
        try:
            status = script.main(["--model", MODEL, "--device", "cpu", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run_here


@pytest.fixture
def infer(run_here):
    """Run inference.py in this process, in float32; stderr comes without the line that says what is loaded."""

    def infer(*arguments: str) -> tuple[int, str, str]:
        status, out, err = run_here(inference, "--dtype", "float32", *arguments)
        return status, out, re.sub(r"^inference\.py: loading \S+ on cpu in float32\n", "", err, flags=re.MULTILINE)

    return infer
