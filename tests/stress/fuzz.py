"""Mutated sound files: each must end in text or in one line, within a time limit, and none may end the program.

    python3 tests/stress/fuzz.py --files 2000 --seed 0
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
import hostile  # noqa: E402
from tone_speech import random_text, synthesize  # noqa: E402

TIME_LIMIT_S = 600  # for a file, on a busy machine too; the first waits for the start of the program
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


def run_on(folder: Path, names: list[str]) -> dict[str, str | None]:
    """Transcribe a folder: the error of each file, None where there is a text, and the other lines on stderr as "".

    Exits where a file takes too long or the program falls.
    """
    out, done, last = folder / "out", -1, time.monotonic()
    with open(folder / "stderr", "w+b") as stderr:
        command = [*COMMAND, "--audio", str(folder), "--output-dir", str(out)]
        process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.05)
            now = os.fstat(stderr.fileno()).st_size + (len(os.listdir(out)) if out.exists() else 0)
            if now > done:
                done, last = now, time.monotonic()
            elif time.monotonic() - last > TIME_LIMIT_S:
                process.kill()
                process.wait()
                sys.exit(f"no answer within {TIME_LIMIT_S} s")
        stderr.seek(0)
        err = stderr.read().decode(errors="replace")
    said = dict(re.findall(rf"^inference\.py: error: {re.escape(str(folder))}/([^:]*): (.*)$", err, re.M))
    outcome = {name: said.get(name) for name in names}
    texts = {path.stem for path in out.glob("*.json")}
    silent = [name for name, error in outcome.items() if error is None and Path(name).stem not in texts]
    if process.returncode not in (0, 1) or "Traceback" in err or silent:
        keep = tempfile.mkdtemp()
        subprocess.run(["cp", "-r", str(folder), keep], check=True)
        sys.exit(f"status {process.returncode}, neither text nor error: {silent}, see {keep}:\n{err[-2000:]}")
    return outcome | {"": sum(not line.startswith("inference.py") for line in err.splitlines())}


def fuzz(n_files: int, seed: int) -> Counter:
    """Make files and transcribe them: how many gave text or which error, and how much others wrote to stderr."""
    rng, counts = np.random.default_rng(seed), Counter()
    originals = list(seeds(rng).items())
    for first in range(0, n_files, FILES_PER_RUN):
        with tempfile.TemporaryDirectory() as folder:
            names = []
            for i in range(first, min(n_files, first + FILES_PER_RUN)):
                name, data = originals[i % len(originals)]
                names.append(f"{i:05d}-{name}")
                (Path(folder) / names[-1]).write_bytes(mutate(data, rng))
            outcome = run_on(Path(folder), names)
        counts["lines of libraries on stderr"] += outcome.pop("")
        counts.update("text" if error is None else "error" for error in outcome.values())
        counts.update(error.split(" (")[0].split(" after ")[0][:60] for error in outcome.values() if error)
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
