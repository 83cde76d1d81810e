"""A step of the decoder: its time on this CPU against that of reading its weights once, and what it asks of an NPU.

    python3 tests/benchmarks/decode.py

The times are of the real architecture with random weights, for batches of 1 and 16; the launches and waits are counted
on the simulated NPU, for common.decode and for the generate of transformers.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "fake_npu")]
import common  # noqa: E402

FEW, MANY = 8, 72


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def time_steps(model: str | None, n_runs: int) -> None:
    """Print the milliseconds of a step and those of reading the weights; the measurements take turns."""
    import torch

    device = common.select_device("cpu")
    import random_model

    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            random_model.save(Path(folder))
        recognizer = common.load_model(model or folder, device, common.select_dtype("auto", device))
    recognizer = common.endless(recognizer)
    modules = [*recognizer.model.model.decoder.modules(), recognizer.model.proj_out]
    n_bytes = sum(m.weight.numel() * m.weight.element_size() for m in modules if isinstance(m, torch.nn.Linear))
    memory = torch.zeros(2**27)  # 512 MiB, which no cache holds
    work = {"read": memory.sum}
    for size in (1, 16):
        encoded = torch.randn(size, 1500, recognizer.model.config.d_model, dtype=recognizer.model.dtype)
        for n in (FEW, MANY):
            work[size, n] = lambda encoded=encoded, n=n: common.decode(recognizer, encoded, n)
    samples = {name: [] for name in work}
    with torch.inference_mode():
        for _ in range(n_runs + 1):
            for name, function in work.items():
                samples[name].append(seconds(function))
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    bandwidth = memory.nbytes / medians["read"]
    read_ms = 1000 * n_bytes / bandwidth
    print(f"{recognizer.model.dtype}, {torch.get_num_threads()} threads, medians of {n_runs}")
    print(f"reading the decoder's weights once: {n_bytes / 1e6:.0f} MB / {bandwidth / 1e9:.1f} GB/s = {read_ms:.2f} ms")
    for size in (1, 16):
        step_ms = 1000 * (medians[size, MANY] - medians[size, FEW]) / (MANY - FEW)
        ratio = step_ms / read_ms
        print(f"batch of {size}: {step_ms:.2f} ms a step, {step_ms / size:.2f} a token, {ratio:.2f} times the reading")


def count_launches() -> None:
    """Print what a token costs the host of an NPU."""
    import torch

    device = common.select_device("npu")
    import torch_npu
    from transformers.modeling_outputs import BaseModelOutput

    recognizer = common.load_model(str(TESTS / "tiny_whisper"), device, torch.float16)
    model, end = recognizer.model, recognizer.tokenizer.eos_token_id
    recognizer.token_mask[:, end] = -float("inf")
    model.generation_config.suppress_tokens = [*range(87), end]  # 88, as OpenAI's models have
    features = common.extract_features(recognizer.extractor, common.sweep()).to(device, torch.float16)

    def ours(n: int) -> None:
        common.decode(recognizer, encoded, n)

    def stock(n: int) -> None:
        model.generate(
            features, encoder_outputs=BaseModelOutput(encoded), attention_mask=torch.ones(1, 3000, device=device),
            language="ja", task="transcribe", return_timestamps=False, num_beams=1, do_sample=False, max_new_tokens=n,
            force_unique_generate_call=True,
        )  # fmt: skip

    with torch.inference_mode():
        encoded = common.encode(model, features)
        for name, function in (("common.decode", ours), ("generate of transformers", stock)):
            counts = []
            for n in (FEW, MANY):
                before = dict(torch_npu.STATS)
                function(n)
                counts.append({key: torch_npu.STATS[key] - before[key] for key in ("launches", "syncs")})
            launches, syncs = ((counts[1][key] - counts[0][key]) / (MANY - FEW) for key in ("launches", "syncs"))
            print(f"{name}: {launches:.2f} launches and {syncs:.3f} waits for the device a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="time this folder's model (default: the real architecture, random weights)")
    parser.add_argument("--runs", type=int, default=7, help="that count, after one (default: %(default)s)")
    args = parser.parse_args()
    count_launches()  # first: once the CPU is selected, there is no NPU
    time_steps(args.model, args.runs)
