"""What one core needs to prepare 15 s of sound for the device: a chunk must come as fast as an NPU encodes one.

    python3 tests/benchmarks/host.py

Milliseconds of processor time for 15 s, stage by stage, of recordings of five minutes: 48 kHz stereo WAV, and, with the
ffmpeg program's own time, 44.1 kHz stereo m4a. The medians of several runs in one thread.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import common  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import transformers  # noqa: E402
from tone_speech import random_text, synthesize  # noqa: E402

import inference  # noqa: E402

N_CHUNKS = 20


def record(path: str) -> None:
    """Write speech in stereo with a pause after every 14 s, so that each chunk has little less than 15 s."""
    rng = np.random.default_rng(0)
    waveform = synthesize(random_text(rng, 35 * N_CHUNKS, 35), 48_000, pause_s=0.8)
    noise = rng.normal(0, 0.001, (len(waveform), 2))
    soundfile.write(path, np.stack([waveform, 0.8 * waveform], 1) + noise, 48_000)


def cpu_s() -> float:
    """Seconds of processor time of this process and of the programs that it has started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(path: str, extractor) -> Counter:
    """Milliseconds for a chunk of the recording by stage."""
    costs, started = Counter(), cpu_s()

    def lap(stage: str, result):
        """The result, once its time has been put down to the stage."""
        nonlocal started
        costs[stage] += 1000 * (cpu_s() - started) / N_CHUNKS
        started = cpu_s()
        return result

    channels = lap("reading", list(common.read_channels(path, print)))
    [rate] = {rate for rate, _ in channels}
    blocks = lap("mixing", [block for _, block in common.mix_down(channels)])
    waveforms = lap("cutting", [waveform for _, waveform in common.split_at_pauses(blocks, rate, 15)])
    resample = common.import_librosa().resample
    waveforms = lap("resampling", [resample(x, orig_sr=rate, target_sr=common.SAMPLING_RATE) for x in waveforms])
    lap("speech?", [inference.find_loud_frames(x) for x in waveforms if not common.is_steady(x, common.SAMPLING_RATE)])
    lap("features", [common.extract_features(extractor, x) for x in waveforms])
    return costs | {"together": costs.total(), "chunks": len(waveforms)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="(default: %(default)s)")
    n_runs = parser.parse_args().runs
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)  # as kotoba-whisper-v2.0 has
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        wav, m4a = (os.path.join(folder, name) for name in ("48-kHz.wav", "44.1-kHz.m4a"))
        record(wav)
        subprocess.run(["ffmpeg", "-v", "error", "-i", wav, "-ar", "44100", m4a], check=True)
        for path in (wav, m4a):
            measure(path, extractor)  # the first run imports and compiles
            runs = [measure(path, extractor) for _ in range(n_runs)]
            rows.append([os.path.basename(path), *(statistics.median(run[stage] for run in runs) for stage in runs[0])])
    print("| ms |", " | ".join(runs[0]), "|\n|" + "---|" * len(rows[0]))
    for name, *figures in rows:
        print(f"| {name} |", " | ".join(f"{figure:.1f}" for figure in figures), "|")


if __name__ == "__main__":
    main()
