"""How fast is it, where does the time go, and what does the device bring over the CPU?

    .venv/bin/python eval_performance.py                         # 3 s, on CPU and NPU
    .venv/bin/python eval_performance.py --audio meeting.wav     # real speech
    .venv/bin/python eval_performance.py --batch-sizes 1,4,16    # full windows

A run is what inference.py does, from the file to the text. The stages are timed
in runs of their own, in which each stage waits for the one before it to end;
inference.py itself reads ahead while an NPU computes.
Synthetic audio is decoded to --max-new-tokens in every chunk, because what a
model finds in it, and so the work, would differ between devices.

Exit status: 0 measured; 1 the devices decoded unequal numbers of tokens, so that
their times cannot be compared; 2 nothing could be measured; 128 + n ended by signal n.
"""
import argparse
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # Python leaves that out with -P and -I
import common  # before torch: it sets how that is imported
import numpy as np
import soundfile
import torch
from tqdm import tqdm

import inference

SILENCE_S = 0.4  # at the end of each second of synthetic audio: there it is cut, and so no chunk of it is steady
STAGES = ("read and resample", "features", "copy to the device", "encoder", "decode", "text", "times")


# --- Command ---


def batch_sizes(text: str) -> list[int]:
    """A type for argparse: numbers with commas between them."""
    return [common.number(int, 1, 1024)(part) for part in text.split(",")]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = common.number(int, 1)
    add = parser.add_argument_group("input").add_argument
    add("--audio", nargs="+", action="extend", default=[], type=os.path.expanduser, metavar="PATH",
        help="Audio files, which are decoded to the end of their text. (default: a sweep, which is a tone that rises "
        "from 200 to 800 Hz in 3 s)")  # fmt: skip
    add("--batch-sizes", type=batch_sizes, default=[], metavar="N,N...",
        help="Measure batches of N windows of 30 s too.")  # fmt: skip
    common.add_model_options(parser, max_new_tokens=128)
    add = parser.add_argument_group("measurement").add_argument
    add("--batch-size", type=count, metavar="N", help="How many chunks are decoded together. (default: 16, on a CPU 8)")
    add("--warmup", type=count, default=2, metavar="N",
        help="How many runs come before those that count; the first is the cold one. (default: %(default)s)")
    add("--runs", type=count, default=10, metavar="N", help="How many runs count. (default: %(default)s)")
    add("--json", action="store_true", help="Print everything that was measured as JSON, in place of the table.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return common.run_script(run, parse_arguments(argv))


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments say; the exit status. Raises SetupError."""
    device = common.select_device(args.device)
    from transformers import WhisperForConditionalGeneration  # noqa: F401  (its import counts for no device)

    columns = [measure_device(torch.device("cpu"), args)]
    if device.type != "cpu":
        columns.append(measure_device(device, args))
    counts = [[m["n_tokens"] for m in column["measurements"]] for column in columns]
    report = {
        "model": args.model, "comparable": counts[0] == counts[-1], "columns": columns,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # on macOS it is in bytes already
    }  # fmt: skip
    common.write_stdout(common.report_json(report) if args.json else format_report(report, args))
    return 0 if report["comparable"] else 1


# --- Measuring ---


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was given."""
    torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def synthesize(path: str, duration_s: float) -> str:
    """Write sweeps of 3 s, with SILENCE_S at the end of each second, to a file of duration_s seconds; the path."""
    pattern = common.sweep()
    pattern.reshape(3, -1)[:, -round(SILENCE_S * common.SAMPLING_RATE) :] = 0
    n_left = round(duration_s * common.SAMPLING_RATE)
    with soundfile.SoundFile(path, "w", common.SAMPLING_RATE, 1) as file:
        while n_left > 0:
            file.write(pattern[:n_left])
            n_left -= len(pattern)
    return path


class Stopwatch:
    """Adds up the seconds of each stage: called with its name when it ends, it counts what has passed since the last
    call."""

    def __init__(self, device: torch.device):
        """Start it."""
        self.device, self.last_s, self.stages_s = device, clock(device), dict.fromkeys(STAGES, 0.0)

    def __call__(self, stage: str) -> None:
        """Take the time of a stage."""
        now_s = clock(self.device)
        self.stages_s[stage] += now_s - self.last_s
        self.last_s = now_s


def run_once(recognizer: common.Recognizer, paths: list[str], options: inference.Options) -> list[inference.Recording]:
    """Transcribe recordings as inference.py does, up to the text that it would write. Raises SetupError."""
    recordings = []
    for recording in inference.transcribe(recognizer, paths, options):
        if recording.error is not None:
            raise common.SetupError(f"{recording.path}: {recording.error}")
        inference.render(recording, "txt", "ja")
        recognizer.lap("text")
        recordings.append(recording)
    if not any(recording.n_tokens for recording in recordings):
        raise common.SetupError("there is nothing to measure: all of the audio is silence or steady sound")
    return recordings


def measure(
    recognizer: common.Recognizer, label: str, paths: list[str], options: inference.Options, args: argparse.Namespace
) -> dict:  # fmt: skip
    """Warm up, then time whole runs and runs stage by stage in turns. Raises SetupError.

    samples_s are in the order of the runs, without the warm-up; peak_bytes, of the device's memory, is None for a CPU.
    """
    device, n_runs, samples_s, stopwatches = recognizer.model.device, args.warmup + args.runs, [], []
    memory = torch.get_device_module(device) if device.type != "cpu" else None
    if memory:
        memory.reset_peak_memory_stats(device)
    is_closed = sys.stderr is None
    often_s = 0.1 if not is_closed and sys.stderr.isatty() else 60  # a log gets a line a minute
    with tqdm(total=2 * n_runs, desc=f"{label} on {device}", unit="run", mininterval=often_s, disable=is_closed) as bar:
        for _ in range(n_runs):
            started_s = clock(device)
            recordings = run_once(recognizer, paths, options)
            samples_s.append(clock(device) - started_s)
            bar.update()
            stopwatches.append(Stopwatch(device))
            run_once(replace(recognizer, lap=stopwatches[-1]), paths, options)
            bar.update()
    samples_s, first_s = samples_s[args.warmup :], samples_s[0]
    stages_s = {stage: [watch.stages_s[stage] for watch in stopwatches[args.warmup :]] for stage in STAGES}
    return {
        "label": label, "audio_s": sum(recording.duration for recording in recordings),
        "n_windows": sum(recording.n_windows for recording in recordings),
        "n_tokens": sum(recording.n_tokens for recording in recordings),
        "first_s": first_s, "samples_s": samples_s, "median_s": float(np.median(samples_s)), "stages_s": stages_s,
        "stage_medians_s": {stage: float(np.median(samples)) for stage, samples in stages_s.items()},
        "peak_bytes": memory.max_memory_allocated(device) if memory else None,
    }  # fmt: skip


def measure_device(device: torch.device, args: argparse.Namespace) -> dict:
    """Load the model on a device and measure every input on it. Raises SetupError."""
    batch_size, dtype = args.batch_size or common.default_batch_size(device), common.select_dtype(args.dtype, device)
    with common.device_errors(device), tempfile.TemporaryDirectory() as folder:
        started_s = clock(device)
        recognizer = common.load_model(args.model, device, dtype)
        loaded_in_s = clock(device) - started_s
        endless = common.endless(recognizer)
        inputs = [(recognizer, "recordings", args.audio, batch_size)]
        if not args.audio:
            inputs = [(endless, "sweep", [synthesize(f"{folder}/sweep.wav", 3)], batch_size)]
        window = synthesize(f"{folder}/window.wav", common.WINDOW_S)
        inputs += [(endless, f"batch of {n}", [window] * n, n) for n in args.batch_sizes]
        rest = args.chunk_length, args.max_new_tokens, inference.NO_SPEECH_THRESHOLD, ""  # as inference.py's defaults
        measurements = [  # only real audio is decoded again
            measure(model, label, paths, inference.Options(n, *rest, fixed_work=model is endless), args)
            for model, label, paths, n in inputs
        ]
        return {
            "name": f"{device}, {common.dtype_name(dtype)}", "environment": common.environment(device),
            "loaded_in_s": loaded_in_s, "measurements": measurements,
        }  # fmt: skip


# --- Report ---


def describe(column: dict, cpu: dict) -> dict[str, str]:
    """A column of the table, by the name of the row: the first input in detail, and the throughput of the others."""
    m, *others = column["measurements"]
    stages_s, median_s, audio_s, n_tokens = m["stage_medians_s"], m["median_s"], m["audio_s"], m["n_tokens"]
    cpu_s, n_cpu_tokens = cpu["measurements"][0]["median_s"], cpu["measurements"][0]["n_tokens"]
    speed_up = f"{cpu_s:.3f} / {median_s:.3f} = {cpu_s / median_s:.2f}"
    if n_tokens != n_cpu_tokens:
        speed_up = f"void: {n_tokens} tokens, not {n_cpu_tokens}"
    rows = {
        "time, median (s)": f"{median_s:.3f}",
        "speed-up over the CPU": "" if column is cpu else speed_up,
        "RTF": f"{median_s:.3f} / {audio_s:.1f} = {median_s / audio_s:.4f}",
        "tokens": f"{n_tokens}",
        "time, 90th percentile (s)": f"{np.percentile(m['samples_s'], 90):.3f}",
        "time, minimum (s)": f"{min(m['samples_s']):.3f}",
        "first run, cold (s)": f"{m['first_s']:.3f}",
        "loaded in (s)": f"{column['loaded_in_s']:.1f}",
    }
    rows |= {f"{stage} (ms)": f"{1000 * seconds:.1f}" for stage, seconds in stages_s.items() if seconds}
    rows["encoder (ms)"] += f", {1000 * stages_s['encoder'] / m['n_windows']:.1f} a window"
    rows["decode (ms)"] += f", {1000 * stages_s['decode'] / n_tokens:.2f} a token"
    sum_s = sum(stages_s.values())
    rows["sum of the stages (ms)"] = f"{1000 * sum_s:.1f}, {100 * sum_s / median_s:.0f} % of the time"
    rows["peak memory (MB)"] = f"{m['peak_bytes'] / 1e6:.0f}" if m["peak_bytes"] else ""
    for other in others:
        audio_s, median_s = other["audio_s"], other["median_s"]
        rows[f"times real time, {other['label']}"] = f"{audio_s:.1f} / {median_s:.3f} = {audio_s / median_s:.2f}"
    return rows


def format_report(report: dict, args: argparse.Namespace) -> str:
    """The report for a person: a Markdown table with a column for each device, and what the figures depend on."""
    columns, first = report["columns"], report["columns"][0]["measurements"][0]
    details = [describe(column, columns[0]) for column in columns]
    title = f"{first['label']}, {first['audio_s']:.1f} s, {args.runs} runs after {args.warmup}"
    rows = [[title, *(column["name"] for column in columns)]]
    rows += [[name, *cells] for name in details[0] if any(cells := [detail[name] for detail in details])]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text = "\n".join(lines) + "\n\n"
    for column in columns:
        e = column["environment"]
        text += f"{column['name']}: {e['device_name']}, {e['threads']} threads on {e['cpus']} CPUs"
        text += f", torch {e['torch']}, transformers {e['transformers']}"
        text += f", torch-npu {e['torch_npu']}, CANN {e['cann']}\n" if e["torch_npu"] else "\n"
    return text + f"peak memory of the process: {report['peak_rss_bytes'] / 1e6:.0f} MB\n"


if __name__ == "__main__":
    sys.exit(main())
