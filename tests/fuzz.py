"""Mutated sound files: each must end in text or in one line, within a time limit, and none may end the program.

    python3 tests/fuzz.py --files 2000 --seed 0
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hostile
import numpy as np
from tone_speech import random_text, synthesize

TESTS = Path(__file__).parent
TIME_LIMIT_S = 60  # for a file; the first waits for the start of the program too
FILES_PER_RUN = 250
COMMAND = [sys.executable, "-X", "faulthandler", str(TESTS.parent / "inference.py"), "--device", "cpu"]
COMMAND += ["--model", str(TESTS / "tiny_whisper"), "--max-new-tokens", "16", "--output-format", "json"]


def seeds(rng: np.random.Generator) -> dict[str, bytes]:
    """A sound file in each of several formats."""
    waveform = synthesize(random_text(rng, 5))
    stereo = np.stack([waveform, -waveform], 1)
    return {
        "pcm.wav": hostile.encode("WAV", waveform), "float.wav": hostile.encode("WAV", stereo, subtype="FLOAT"),
        "adpcm.wav": hostile.encode("WAV", waveform, subtype="MS_ADPCM"), "a.flac": hostile.encode("FLAC", waveform),
        "stereo.flac": hostile.encode("FLAC", stereo), "a.ogg": hostile.encode("OGG", waveform),
        "opus.ogg": hostile.encode("OGG", waveform, subtype="OPUS"), "a.mp3": hostile.encode("MP3", waveform),
    }  # fmt: skip


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four of: bits flipped, bytes overwritten, a piece cut out, doubled or moved, the end cut off."""
    for _ in range(rng.integers(1, 5)):
        if len(data) < 2:
            return data
        limit = min(len(data), 128) if rng.random() < 0.5 else len(data)  # half of them in the header
        first = int(rng.integers(limit))
        n = int(min(len(data) - first, 2 ** rng.integers(0, 12)))
        piece, rest = data[first : first + n], data[first + n :]
        kind = rng.integers(6)
        if kind == 0:
            flipped = bytes([data[first] ^ (1 << int(rng.integers(8)))])
            data = data[:first] + flipped + data[first + 1 :]
        elif kind == 1:
            value = [b"\x00", b"\xff", b"\x7f", b"\x80"][rng.integers(4)]
            data = data[:first] + value * min(n, 8) + data[first + min(n, 8) :]
        elif kind == 2:
            data = data[:first] + rng.bytes(n) + rest
        elif kind == 3:
            data = data[:first] + rest
        elif kind == 4:
            data = data[:first] + piece + piece + rest
        else:
            data = data[: first + 1]
    return data


def run_on(folder: Path, n_files: int) -> tuple[str, list[dict]]:
    """Transcribe a folder: stderr and the report. Exits where a file takes too long or the program falls."""
    report = folder / "report.jsonl"
    with open(folder / "stderr", "w+b") as stderr:
        command = [*COMMAND, "--audio", str(folder), "--output-dir", str(folder / "out"), "--report", str(report)]
        process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
        n_done, last = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.05)
            n_lines = report.read_bytes().count(b"\n") if report.exists() else 0
            if n_lines > n_done:
                n_done, last = n_lines, time.monotonic()
            elif time.monotonic() - last > TIME_LIMIT_S:
                process.kill()
                sys.exit(f"after {n_done} of {n_files} files no answer within {TIME_LIMIT_S} s")
        stderr.seek(0)
        err = stderr.read().decode(errors="replace")
    lines = [json.loads(line) for line in report.read_bytes().splitlines()] if report.exists() else []
    if process.returncode not in (0, 1) or "Traceback" in err or len(lines) != n_files:
        keep = tempfile.mkdtemp()
        subprocess.run(["cp", "-r", str(folder), keep], check=True)
        sys.exit(f"status {process.returncode}, {len(lines)} of {n_files} files, see {keep}:\n{err[-2000:]}")
    return err, lines


def fuzz(n_files: int, seed: int) -> Counter:
    """Make files and transcribe them: how many gave text or which error, and how much others wrote to stderr."""
    rng, counts = np.random.default_rng(seed), Counter()
    originals = list(seeds(rng).items())
    for first in range(0, n_files, FILES_PER_RUN):
        names = range(first, min(n_files, first + FILES_PER_RUN))
        with tempfile.TemporaryDirectory() as folder:
            for i in names:
                name, data = originals[i % len(originals)]
                (Path(folder) / f"{i:05d}-{name}").write_bytes(mutate(data, rng))
            err, lines = run_on(Path(folder), len(names))
        counts.update("error" if line["error"] is not None else "text" for line in lines)
        counts.update(line["error"].split(" (")[0].split(" after ")[0][:60] for line in lines if line["error"])
        counts["lines of libraries on stderr"] += sum(not line.startswith("inference.py") for line in err.splitlines())
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.monotonic()
    for name, count in fuzz(args.files, args.seed).most_common():
        print(f"{count:6} {name}")
    print(f"{args.files} files in {time.monotonic() - started:.0f} s")
