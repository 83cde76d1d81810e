"""What the tests share: the tiny model, sound files, and the scripts as their users start them."""
import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs a process on each core
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


def write(path: Path, waveform: np.ndarray, sampling_rate: int = 16_000, **options) -> str:
    """Write a sound file; in pieces, because libsndfile's vorbis encoder overflows its stack on long ones."""
    channels = 1 if waveform.ndim == 1 else waveform.shape[1]
    with soundfile.SoundFile(path, "w", sampling_rate, channels, **options) as file:
        for first in range(0, len(waveform), sampling_rate):
            file.write(waveform[first : first + sampling_rate])
    return str(path)


def start(script: str, *arguments: str, environment: dict | None = None, **options) -> subprocess.Popen:
    """Start a script as a user does, with the tiny model on the hub's place and no network."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)], text=True, encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def run(script: str, *arguments: str, environment: dict | None = None, **options) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    process = start(script, *arguments, environment=environment, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def recognizer() -> common.Recognizer:
    """The tiny model on the CPU in float32."""
    return common.load_model(MODEL, common.select_device("cpu"), torch.float32)


def options_of(**changes) -> argparse.Namespace:
    """The options of inference.py, all but the changed ones at their defaults."""
    args = inference.parse_arguments(["--audio", ""])
    vars(args).update(changes)
    return args


@pytest.fixture
def transcribe(recognizer):
    """Transcribe files in this process: a list of Recordings."""

    def transcribe(*paths: str, on_progress=lambda seconds: None, **options) -> list[inference.Recording]:
        return list(inference.transcribe(recognizer, paths, options_of(**options), on_progress))

    return transcribe


@pytest.fixture
def infer(capsys, monkeypatch):
    """Run inference.py in this process with the tiny model: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["inference.py"])

    def infer(*arguments: str) -> tuple[int, str, str]:
        options = ["--model", MODEL, "--device", "cpu", "--dtype", "float32"]
        capsys.readouterr()
        try:
            status = inference.main([*options, *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return infer
