"""Thousands of clips with the tiny model on the CPU: does a clip's time, or memory, grow with their number?

    python3 tests/benchmarks/corpus.py

Clips of 1 to 10 s.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "stress")]
from kills import make_corpus  # noqa: E402

COMMAND = [sys.executable, str(TESTS.parent / "inference.py"), "--device", "cpu"]
COMMAND += ["--model", str(TESTS / "tiny_whisper")]


def run(*options: object) -> tuple[float, float, str]:
    """Seconds, peak memory in MB and the last line of a run."""
    started = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *map(str, options)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    err = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(err)
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6, err.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=5, help="that get one clip each (default: %(default)s)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus"
        make_corpus(corpus, args.clips, seed=0)
        clips = sorted(corpus.rglob("*.wav"))
        for n in filter(None, (args.clips // 10, args.clips)):
            out = Path(temporary) / f"out{n}"
            _, memory_mb, line = run("--audio", *clips[:n], "--output-dir", out)
            written_s = sorted(path.stat().st_mtime for path in out.rglob("*.txt"))
            quarters = " ".join(f"{1000 * np.diff(part).mean():.1f}" for part in np.array_split(written_s, 4))
            print(f"{n} clips: {quarters} ms a clip in each quarter of them, {memory_mb:.0f} MB at most")
            print(f"  {line}")
        seconds, _, line = run("--audio", *clips, "--output-dir", out, "--skip-existing")
        print(f"all of them there: {seconds:.1f} s, {line}")
        many_s = [run("--audio", clip)[0] for clip in clips[: args.processes]]
        print(f"a process for each clip: {np.median(many_s):.1f} s a clip (median of {len(many_s)})")


if __name__ == "__main__":
    main()
