"""Seconds for one 30 s window on the CPU: the full-size architecture with random weights, float32 against auto.

    python3 tests/benchmark_window.py

The dtypes take turns, so that what else the machine does falls on both.
"""
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

RUNS, TOKENS = 5, 128


def main() -> None:
    import torch

    device, _ = common.select_device("cpu")
    dtypes = {name: common.select_dtype(name, device) for name in ("float32", "auto")}
    recognizers = {name: common.random_recognizer(device, dtype) for name, dtype in dtypes.items()}
    noise = np.random.default_rng(0).normal(0, 0.1, 30 * 16_000).astype(np.float32)
    seconds = {name: [] for name in dtypes}
    for run in range(RUNS + 1):
        for name, recognizer in recognizers.items():
            started = time.perf_counter()
            features = common.extract_features(recognizer.extractor, noise)
            [row] = common.generate(recognizer, [features], "ja", "transcribe", TOKENS)
            if len(row) != TOKENS:
                sys.exit(f"{len(row)} tokens instead of {TOKENS}: the times cannot be compared")
            if run:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    print(f"one 30 s window, {TOKENS} tokens, {torch.get_num_threads()} threads, {RUNS} runs after one warm-up")
    for name, dtype in dtypes.items():
        samples = " ".join(f"{s:.2f}" for s in seconds[name])
        print(f"{name} ({str(dtype)[6:]}): median {statistics.median(seconds[name]):.2f} s of {samples}")
    ratio = statistics.median(seconds["float32"]) / statistics.median(seconds["auto"])
    print(f"float32 / auto: {ratio:.2f}")


if __name__ == "__main__":
    main()
