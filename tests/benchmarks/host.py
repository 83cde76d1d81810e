"""What one core needs to prepare 15 s of sound for the device: a chunk must come as fast as an NPU encodes one.

    python3 tests/benchmarks/host.py

Milliseconds of processor time for 15 s, stage by stage, of recordings of five minutes: 48 kHz stereo WAV, and, with the
ffmpeg program's own time, 44.1 kHz stereo m4a. The medians of several runs in one thread.
"""
import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import common  # noqa: E402
import librosa  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import transformers  # noqa: E402
from tone_speech import random_text, synthesize  # noqa: E402

import inference  # noqa: E402

STAGES = ("reading", "mixing", "cutting", "resampling", "speech?", "features")


def record(path: str, n_chunks: int) -> None:
    """Write speech in stereo with a pause after every 14 s, so that each chunk has little less than 15 s."""
    rng = np.random.default_rng(0)
    waveform = synthesize(random_text(rng, 35 * n_chunks, 35), 48_000, pause_s=0.8)
    noise = rng.normal(0, 0.001, (len(waveform), 2))
    soundfile.write(path, np.stack([waveform, 0.8 * waveform], 1) + noise, 48_000)


def cpu_s() -> float:
    """Seconds of processor time of this process and of the programs that it has started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(path: str, rate: int, extractor) -> dict[str, float]:
    """Milliseconds for 15 s of the recording by stage, which follow each other block by block as in inference.py."""
    costs, begun = Counter(), cpu_s()

    def timed(stage: str, items: Iterable) -> Iterator:
        """The same items; the time that they take, all stages before it included, is put down to the stage."""
        items = iter(items)
        while True:
            started = cpu_s()
            item = next(items, None)
            costs[stage] += cpu_s() - started
            if item is None:
                return
            yield item

    with common.open_sound(path, print) as sound:
        blocks = timed("mixing", common.mix_down(timed("reading", sound.blocks()), rate))
        waveforms = timed("cutting", common.split_at_pauses(blocks, rate, 15))
        resample = librosa.resample
        waveforms = timed("resampling", (resample(x, orig_sr=rate, target_sr=common.SAMPLING_RATE) for x in waveforms))
        moving = (x for x in waveforms if not common.is_steady(x, common.SAMPLING_RATE))
        heard = timed("speech?", ((x, inference.find_loud_frames(x)) for x in moving))
        n = sum(1 for _ in timed("features", (common.extract_features(extractor, x) for x, _ in heard)))
        ended = cpu_s()
    own = {stage: costs[stage] - costs[before] for before, stage in itertools.pairwise(["", *STAGES])}
    own["reading"] += cpu_s() - ended  # the time of ffmpeg counts when it has ended
    figures = {stage: 1000 * seconds / n for stage, seconds in own.items()}
    return figures | {"together": 1000 * (cpu_s() - begun) / n, "chunks": n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=20, help="of 15 s in a recording (default: %(default)s)")
    args = parser.parse_args()
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)  # as kotoba-whisper-v2.0 has
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        wav, m4a = (os.path.join(folder, name) for name in ("48-kHz.wav", "44.1-kHz.m4a"))
        record(wav, args.chunks)
        subprocess.run(["ffmpeg", "-v", "error", "-i", wav, "-ar", "44100", m4a], check=True)
        for path, rate in ((wav, 48_000), (m4a, 44_100)):
            measure(path, rate, extractor)  # the first run imports and compiles
            runs = [measure(path, rate, extractor) for _ in range(args.runs)]
            rows.append([os.path.basename(path), *(statistics.median(run[stage] for run in runs) for stage in runs[0])])
    print("| ms |", " | ".join(runs[0]), "|\n|" + "---|" * len(rows[0]))
    for name, *figures in rows:
        print(f"| {name} |", " | ".join(f"{figure:.1f}" for figure in figures), "|")


if __name__ == "__main__":
    main()
