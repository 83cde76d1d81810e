"""Runs that are killed at random moments and started again with --skip-existing end as if nothing had happened.

    python3 tests/stress/kills.py --kills 20
"""
import argparse
import os
import random
import shutil
import signal
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

COMMAND = [sys.executable, str(TESTS.parent / "inference.py"), "--device", "cpu", "--dtype", "float32"]
COMMAND += ["--model", str(TESTS / "tiny_whisper"), "--batch-size", "1", "--output-format", "all"]


def make_corpus(folder: Path, n_files: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for i in range(n_files):
        (folder / str(i % 7)).mkdir(exist_ok=True, parents=True)
        text = random_text(rng, 2 + int(rng.integers(22)))
        soundfile.write(folder / str(i % 7) / f"{i}.wav", synthesize(text), 16_000)


def outputs(folder: Path) -> list[Path]:
    """The paths of the outputs in a folder."""
    return [path for path in folder.rglob("*") if path.suffix[1:] in ("txt", "srt", "vtt", "tsv", "json")]


def contents(folder: Path) -> dict[str, bytes]:
    """The outputs in a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in outputs(folder)}


def transcribe(corpus: Path, out: Path) -> subprocess.Popen:
    command = [*COMMAND, "--audio", str(corpus), "--output-dir", str(out), "--skip-existing"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run(n_kills: int, n_files: int, seed: int) -> int:
    """Kill and start again, with a look at every output in between; how many kills hit a run. Exits where one is lost.

    A kill comes a moment after a random number of outputs of its run, so that it does not only hit the start.
    """
    rng, n_hit = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        corpus, out, undisturbed = (Path(folder) / name for name in ("corpus", "out", "undisturbed"))
        make_corpus(corpus, n_files, seed)
        transcribe(corpus, undisturbed).communicate()
        expected = contents(undisturbed)
        if len(expected) != 5 * n_files:
            sys.exit(f"{len(expected)} outputs of {n_files} files")
        while n_hit < n_kills:
            n_wanted = len(outputs(out)) + rng.randint(1, len(expected) // max(4, n_kills))
            process = transcribe(corpus, out)
            while process.poll() is None and len(outputs(out)) < n_wanted:
                time.sleep(0.005)
            time.sleep(0.02 * rng.random())
            if process.poll() is not None:  # it was done before the kill: begin anew
                process.communicate()
                shutil.rmtree(out)
                continue
            n_parts = len([*out.rglob("*.part")])
            process.send_signal([signal.SIGKILL, signal.SIGTERM][n_hit % 2])  # of which the second can be answered
            _, err = process.communicate()
            if n_hit % 2 and ("Traceback" in err or len([*out.rglob("*.part")]) > n_parts):
                sys.exit(f"ended by SIGTERM with {process.returncode}, and files are left over or:\n{err}")
            n_hit += 1
            there = contents(out)
            wrong = [name for name, data in there.items() if expected.get(name) != data]
            print(f"kill {n_hit}: {len(there)} of {len(expected)} outputs are there", file=sys.stderr)
            if wrong:
                sys.exit(f"not whole: {wrong}")
        process = transcribe(corpus, out)
        _, err = process.communicate()
        if process.returncode != 0 or contents(out) != expected:
            sys.exit(f"the last run ended with {process.returncode} and {len(contents(out))} outputs:\n{err}")
        left = [path.name for path in out.rglob("*") if path.is_file() and str(path.relative_to(out)) not in expected]
        if len(left) > n_kills or not all(name.startswith(".") and name.endswith(".part") for name in left):
            sys.exit(f"left over: {left}")
    return n_hit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--files", type=int, default=150, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"{run(args.kills, args.files, args.seed)} kills survived, {args.files} files, all outputs whole and equal")
