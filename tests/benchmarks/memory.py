"""Peak memory of inference.py on recordings of 10 minutes, 1 hour and 10 hours, with the tiny model on the CPU.

    python3 tests/benchmarks/memory.py

Each recording is speech and pauses, generated into a temporary folder (1.2 GB for 10 hours).
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
from tone_speech import random_text, synthesize  # noqa: E402

RATE = 16_000


def record(path: str, seconds: int) -> None:
    """Write seconds of speech as 16-bit wav, minute by minute."""
    minute = np.zeros(60 * RATE, np.float32)
    speech = synthesize(random_text(np.random.default_rng(0), 110, 7), RATE)
    minute[: len(speech)] = speech[: len(minute)]
    with soundfile.SoundFile(path, "w", RATE, 1, subtype="PCM_16") as file:
        for _ in range(seconds // 60):
            file.write(minute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", nargs="+", type=int, default=[600, 3600, 36_000], help="of the recordings")
    seconds_of_each = parser.parse_args().seconds
    print("audio (s)  file (MB)  time (s)  peak memory (MB)")
    for seconds in seconds_of_each:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "speech.wav")
            record(path, seconds)
            size_mb = os.path.getsize(path) / 1e6
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, TESTS.parent / "inference.py", "--audio", path, "--device", "cpu", "--model",
                 TESTS / "tiny_whisper", "--output-dir", folder]
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                sys.exit(f"inference.py ended with status {process.returncode}")
            taken = time.perf_counter() - started
            print(f"{seconds:9d}  {size_mb:9.1f}  {taken:8.1f}  {usage.ru_maxrss / 1e3:16.0f}", flush=True)


if __name__ == "__main__":
    main()
