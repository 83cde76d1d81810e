"""How fast is it, where does the time go, and what does the device bring over the CPU?

A run takes files through common's stages, one after another, to the text. It is timed as a whole and, in turns, stage
by stage; inference.py reads the next batch while an NPU decodes one. Synthetic audio is decoded to --max-new-tokens in
every chunk, because what a model finds in it, and so the work, would differ between devices.
"""
# ruff: noqa: E402  (the order of the imports matters)
import time

STARTED_S = time.perf_counter()
import argparse
import contextlib
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator

import common  # before torch: it sets how that is imported
import numpy as np
import soundfile
import torch

IMPORTS_S = time.perf_counter() - STARTED_S
PAUSE_S = 0.5  # between the sweeps of synthetic audio: where it is cut
STAGES = ("read and resample", "features", "copy to the device", "encoder", "decode", "text")


# --- Measuring ---


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was given."""
    torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def synthesize(path: str, duration_s: float) -> str:
    """Write sweeps with pauses between them, duration_s seconds in all; the path."""
    pattern = np.pad(common.sweep(), (0, round(PAUSE_S * common.SAMPLING_RATE)))
    n_left = round(duration_s * common.SAMPLING_RATE)
    with soundfile.SoundFile(path, "w", common.SAMPLING_RATE, 1) as file:
        while n_left > 0:
            file.write(pattern[:n_left])
            n_left -= len(pattern)
    return path


@torch.inference_mode()
def run_once(
    recognizer: common.Recognizer, paths: list[str], batch_size: int, max_new_tokens: int, timed: Callable
) -> tuple[float, int]:
    """Turn files into text, each stage in the context timed(stage): the seconds of audio, and the number of tokens.

    It holds all chunks in memory. Raises SetupError.
    """
    model, audio_s, n_tokens, chunks = recognizer.model, 0.0, 0, []
    with timed("read and resample"):
        for path in paths:
            try:
                chunks += common.read_chunks(path, common.CHUNK_LENGTH_S)
            except common.AudioError as error:
                raise common.SetupError(f"{path}: {error}") from error
            audio_s += chunks[-1][1]
    with timed("features"):
        features = [common.extract_features(recognizer.extractor, chunk) for *_, chunk in chunks if chunk is not None]
    for first in range(0, len(features), batch_size):
        with timed("copy to the device"):
            batch = torch.cat(features[first : first + batch_size]).to(model.device, model.dtype)
        with timed("encoder"):
            encoded = common.encode(model, batch)
        with timed("decode"):
            token_ids, _ = common.decode(recognizer, encoded, max_new_tokens)
        with timed("text"):
            recognizer.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        n_tokens += sum(map(len, token_ids))
    if n_tokens == 0:
        raise common.SetupError("there is nothing to measure: all of the audio is silent")
    return audio_s, n_tokens


def measure(recognizer: common.Recognizer, label: str, paths: list[str], batch_size: int, args) -> dict:
    """Warm up, then time runs as a whole and stage by stage in turns: what --json has of an input. Raises SetupError.

    Samples are in the order of the runs, without the warm-up; peak_bytes, of the device's memory, is None for a CPU.
    """
    device, samples_s, stages_s = recognizer.model.device, [], {stage: [] for stage in STAGES}
    work = recognizer, paths, batch_size, args.max_new_tokens
    memory = torch.get_device_module(device) if device.type != "cpu" else None
    if memory:
        memory.reset_peak_memory_stats(device)

    @contextlib.contextmanager
    def timed(stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to the last sample of a stage."""
        started_s = clock(device)
        yield
        stages_s[stage][-1] += clock(device) - started_s

    for _ in range(args.warmup + args.runs):
        started_s = clock(device)
        audio_s, n_tokens = run_once(*work, contextlib.nullcontext)
        samples_s.append(clock(device) - started_s)
        for samples in stages_s.values():
            samples.append(0.0)
        run_once(*work, timed)
    samples_s, first_s = samples_s[args.warmup :], samples_s[0]
    stages_s = {stage: samples[args.warmup :] for stage, samples in stages_s.items()}
    return {
        "label": label, "audio_s": audio_s, "n_tokens": n_tokens, "first_s": first_s, "samples_s": samples_s,
        "median_s": float(np.median(samples_s)), "stages_s": stages_s,
        "stage_medians_ms": {stage: 1000 * float(np.median(samples)) for stage, samples in stages_s.items()},
        "peak_bytes": memory.max_memory_allocated(device) if memory else None,
    }  # fmt: skip


def measure_device(device: torch.device, start_s: float | None, args: argparse.Namespace) -> dict:
    """Load the model on a device and measure every input on it: what --json has of a device. Raises SetupError."""
    size = args.batch_size or common.default_batch_size(device)
    with common.device_errors(device), tempfile.TemporaryDirectory() as folder:
        started_s = clock(device)
        dtype = common.select_dtype(args.dtype, device)
        recognizer = common.load_model(args.model, device, dtype)
        load_s = clock(device) - started_s
        inputs = [] if args.audio else [("sweep", [synthesize(f"{folder}/sweep.wav", 3)], size)]
        window = synthesize(f"{folder}/window.wav", common.WINDOW_S)
        inputs += [(f"batch of {n}", [window] * n, n) for n in args.batch_sizes]
        inputs += [(f"{s:g} s", [synthesize(f"{folder}/{s:g}.wav", s)], size) for s in args.durations]
        measurements = [measure(recognizer, "audio", args.audio, size, args)] if args.audio else []
        measurements += [measure(common.endless(recognizer), *given, args) for given in inputs]
    return {
        "name": f"{device}, {str(dtype)[6:]}", "environment": common.environment(device), "start_s": start_s,
        "load_s": load_s, "measurements": measurements,
    }  # fmt: skip


# --- Report ---


def describe(column: dict, cpu: dict, imports_s: float) -> dict[str, str]:
    """A column of the table, by the name of the row: the first input in detail, and the throughput of the others."""
    m, *others = column["measurements"]
    stages_ms, median_s, audio_s, n_tokens = m["stage_medians_ms"], m["median_s"], m["audio_s"], m["n_tokens"]
    cpu_s, n_cpu_tokens = cpu["measurements"][0]["median_s"], cpu["measurements"][0]["n_tokens"]
    speed_up, void = f"{cpu_s:.3f} / {median_s:.3f} = {cpu_s / median_s:.2f}", f"void: {n_tokens} tokens, not "
    sum_ms, host_ms = sum(stages_ms.values()), stages_ms["read and resample"] + stages_ms["features"]
    rows = {
        "imports (s)": f"{imports_s:.2f}",
        "start of the device (s)": "" if column["start_s"] is None else f"{column['start_s']:.2f}",
        "load (s)": f"{column['load_s']:.2f}",
        "first run, cold (s)": f"{m['first_s']:.3f}",
        "steady state, median (s)": f"{median_s:.3f}",
        "  90th percentile (s)": f"{np.percentile(m['samples_s'], 90):.3f}",
        "  minimum (s)": f"{min(m['samples_s']):.3f}",
        "RTF, steady state": f"{median_s:.3f} / {audio_s:.1f} = {median_s / audio_s:.4f}",
        "tokens": f"{n_tokens}",
        "speed-up over the CPU": speed_up if n_tokens == n_cpu_tokens else f"{void}{n_cpu_tokens}",
    }
    rows |= {f"{stage} (ms)": f"{stage_ms:.1f}" for stage, stage_ms in stages_ms.items()}
    rows["decode (ms)"] += f", {stages_ms['decode'] / n_tokens:.2f} a token"
    rows |= {
        "sum of the stages (ms)": f"{sum_ms:.1f}, {sum_ms / median_s / 10:.1f} % of a run",
        "the host alone can feed": f"{1000 * audio_s / host_ms:.0f} times real time",
        "peak memory of the device (MB)": "" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 1e6:.0f}",
    }
    for other in others:
        audio_s, median_s = other["audio_s"], other["median_s"]
        rows[f"RTFx, {other['label']}"] = f"{audio_s:.1f} / {median_s:.3f} = {audio_s / median_s:.2f}"
    return rows


def format_report(report: dict, args: argparse.Namespace) -> str:
    """The report for a person: a Markdown table with a column for each device, and what the figures depend on."""
    columns, first = report["columns"], report["columns"][0]["measurements"][0]
    details = [describe(column, columns[0], report["imports_s"]) for column in columns]
    title = f"{first['label']}, {first['audio_s']:.1f} s, {args.runs} runs after {args.warmup}"
    rows = [[title, *(column["name"] for column in columns)]]
    rows += [[name, *cells] for name in details[0] if any(cells := [detail[name] for detail in details])]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text = "\n".join(lines) + "\n\n"
    for column in columns:
        e = column["environment"]
        text += f"{column['name']}: {e['device_name']}, {e['threads']} threads on {e['cpus']} CPUs, torch {e['torch']}"
        text += f", torch-npu {e['torch_npu']}, CANN {e['cann']}\n" if e["torch_npu"] else "\n"
    return text + f"peak memory of the process: {report['peak_rss_bytes'] / 1e6:.0f} MB\n"


# --- Command ---


def numbers(kind: type, high: float) -> Callable[[str], list]:
    """An argparse type: numbers from 1 to high, with commas between them."""
    parse = common.number(kind, 1, high)
    return lambda text: [parse(part) for part in text.split(",")]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    epilog = "exit status: 0 measured; 1 the devices decoded unequal numbers of tokens, which voids the comparison; "
    epilog += "2 nothing could be measured; 130 interrupted"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog)
    add, count = parser.add_argument, common.number(int, 1)
    add("--audio", nargs="+", action="extend", default=[], metavar="PATH",
        help="audio files, decoded to their natural end (default: a sweep of 3 s, 200 to 800 Hz)")  # fmt: skip
    common.add_model_options(add)
    add("--max-new-tokens", type=common.number(int, 1, common.MAX_NEW_TOKENS), default=128, metavar="N",
        help=f"of a chunk, up to {common.MAX_NEW_TOKENS}; synthetic audio gets all (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=count, metavar="N", help="chunks decoded together (default: 16, on a CPU 8)")
    add("--batch-sizes", type=numbers(int, 1024), default=[], metavar="N,N...", help="also batches of N full windows")
    add("--durations", type=numbers(float, 36_000), default=[], metavar="S,S...", help="also sweeps of S seconds")
    add("--warmup", type=count, default=2, metavar="N",
        help="runs before those that count; the first is the cold one (default: %(default)s)")  # fmt: skip
    add("--runs", type=count, default=10, metavar="N", help="runs that count (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything measured there, with every sample")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments say; the exit status. Raises SetupError."""
    if args.json:
        common.check_report(args.json, args.audio)
    started_s = time.perf_counter()
    device, warning = common.select_device(args.device)
    selected_s = time.perf_counter()
    if warning:
        common.notice(f"eval_performance.py: warning: {warning}")
    common.import_transformers()
    imports_s = IMPORTS_S + time.perf_counter() - selected_s
    columns = [measure_device(torch.device("cpu"), None, args)]
    if device.type != "cpu":
        columns.append(measure_device(device, selected_s - started_s, args))
    counts = [[m["n_tokens"] for m in column["measurements"]] for column in columns]
    report = {
        "model": args.model, "comparable": counts[0] == counts[-1], "imports_s": imports_s,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "columns": columns,
    }  # fmt: skip
    common.write_stdout(format_report(report, args))
    if args.json:
        common.write_report(args.json, report)
    return 0 if report["comparable"] else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return common.run_script("eval_performance.py", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
