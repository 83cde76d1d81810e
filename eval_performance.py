"""How fast is it, where does the time go, and what does the device bring over the CPU?

    python3 eval_performance.py                                  # a sweep of 3 s, 128 tokens, on the CPU and the NPU
    python3 eval_performance.py --audio meeting.wav              # recordings, as inference.py transcribes them
    python3 eval_performance.py --batch-sizes 1,4,8,16           # throughput against batch size
    python3 eval_performance.py --durations 3,15,60,600          # time against length

A run goes from the files to the text, with common's own stages one after another, and no work is left on the device
when the clock is read. It is timed as a whole and, in turns, stage by stage; inference.py reads the next batch while an
NPU decodes one. The first run is told apart: on an NPU it prepares kernels. Synthetic audio is decoded to exactly
--max-new-tokens in every chunk, because what a model finds in it, and so the work, would differ between devices.
"""
import argparse
import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import common
import numpy as np
import soundfile

RATE = common.SAMPLING_RATE
PAUSE_S = 0.5  # between its sweeps: where it is cut
STAGES = ("read and resample", "features", "copy to the device", "encoder", "decode", "text")
TOLERANCE = 0.05  # by which the stages may miss the end-to-end time without a word


@dataclass
class Measurement:
    """One input on one device, times in seconds; the samples in the order of the runs, without the warm-up."""

    label: str
    audio_s: float
    n_tokens: int = 0
    first_s: float = 0.0
    samples_s: list[float] = field(default_factory=list)
    stages_s: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    peak_bytes: int | None = None  # of the device's memory; None for a CPU

    @property
    def median_s(self) -> float:
        """The steady state."""
        return float(np.median(self.samples_s))


@dataclass
class Column:
    """What was measured on one device."""

    name: str
    environment: dict[str, object]
    start_s: float | None  # of the device; None for a CPU
    load_s: float
    measurements: list[Measurement]


# --- Measuring ---


def clock(device) -> float:
    """The time in seconds, once the device has done all that it was given."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()


def synthesize(path: str, duration_s: float) -> str:
    """Write sweeps with pauses between them, duration_s seconds in all; the path."""
    pattern = np.pad(common.sweep(), (0, round(PAUSE_S * RATE)))
    n_left = round(duration_s * RATE)
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        while n_left > 0:
            file.write(pattern[:n_left])
            n_left -= len(pattern)
    return path


def transcribe(
    recognizer: common.Recognizer, paths: list[str], batch_size: int, max_new_tokens: int, timed: Callable
) -> tuple[float, int]:
    """Transcribe files, each stage in the context timed(stage): the seconds of audio, and the number of tokens.

    It holds all chunks in memory. Raises SetupError.
    """
    import torch

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
    with torch.inference_mode(), common.device_errors(model.device):
        for first in range(0, len(features), batch_size):
            with timed("copy to the device"):
                batch = torch.cat(features[first : first + batch_size]).to(model.device, model.dtype)
            with timed("encoder"):
                encoded = common.encode(model, batch)
            with timed("decode"):
                token_ids, _ = common.decode(recognizer, encoded, max_new_tokens)
            with timed("text"):
                for ids in token_ids:
                    recognizer.tokenizer.decode(ids, skip_special_tokens=True)
            n_tokens += sum(map(len, token_ids))
    return audio_s, n_tokens


def measure(recognizer: common.Recognizer, label: str, paths: list[str], batch_size: int | None, args) -> Measurement:
    """Warm up, then time runs as a whole and stage by stage in turns. Raises SetupError."""
    import torch

    device = recognizer.model.device
    work = recognizer, paths, batch_size or common.default_batch_size(device), args.max_new_tokens
    if device.type != "cpu":
        getattr(torch, device.type).reset_peak_memory_stats(device)
    result, stages_s = Measurement(label, audio_s=0.0), {}

    @contextlib.contextmanager
    def timed(stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of a stage."""
        started = clock(device)
        yield
        stages_s[stage] = stages_s.get(stage, 0.0) + clock(device) - started

    for i in range(args.warmup + args.runs):
        started = clock(device)
        result.audio_s, result.n_tokens = transcribe(*work, contextlib.nullcontext)
        sample_s = clock(device) - started
        if result.n_tokens == 0:
            raise common.SetupError("there is nothing to measure: all of the audio is silent")
        stages_s.clear()
        transcribe(*work, timed)
        if i == 0:
            result.first_s = sample_s
        if i >= args.warmup:
            result.samples_s.append(sample_s)
            for stage, stage_s in stages_s.items():
                result.stages_s[stage].append(stage_s)
    if device.type != "cpu":
        result.peak_bytes = getattr(torch, device.type).max_memory_allocated(device)
    return result


def inputs_of(args: argparse.Namespace, folder: str) -> Iterator[tuple[str, list[str], int]]:
    """Label, paths and batch size of each input; the synthetic ones are written to the folder."""
    if args.audio:
        yield "audio", args.audio, args.batch_size
    else:
        yield "sweep", [synthesize(f"{folder}/sweep.wav", 3)], args.batch_size
    for size in args.batch_sizes:
        yield f"batch of {size}", [synthesize(f"{folder}/window.wav", common.WINDOW_S)] * size, size
    for duration_s in args.durations:
        yield f"{duration_s:g} s", [synthesize(f"{folder}/{duration_s:g}.wav", duration_s)], args.batch_size


def measure_device(device, start_s: float | None, args: argparse.Namespace) -> Column:
    """Load the model on a device and measure every input on it. Raises SetupError."""
    started = clock(device)
    dtype = common.select_dtype(args.dtype, device)
    recognizer = common.load_model(args.model, device, dtype)
    load_s = clock(device) - started
    endless = replace(recognizer, bias=recognizer.bias.clone())
    endless.bias[:, recognizer.tokenizer.eos_token_id] = -float("inf")
    with tempfile.TemporaryDirectory() as folder:
        measurements = [
            measure(recognizer if paths is args.audio else endless, label, paths, batch_size, args)
            for label, paths, batch_size in inputs_of(args, folder)
        ]
    return Column(f"{device}, {str(dtype)[6:]}", common.environment(device), start_s, load_s, measurements)


# --- Report ---


def format_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them the header, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def stage_medians(measurement: Measurement) -> dict[str, float]:
    """The median of each stage in milliseconds."""
    return {stage: 1000 * float(np.median(samples)) for stage, samples in measurement.stages_s.items()}


def describe(column: Column, cpu: Column, imports_s: float, args: argparse.Namespace) -> dict[str, str]:
    """A column of the first table: what was measured with the first input, by the name of the row."""
    m, reference = column.measurements[0], cpu.measurements[0]
    stages = stage_medians(m)
    share = sum(stages.values()) / (1000 * m.median_s)
    rows = {
        "imports (s)": f"{imports_s:.2f}",
        "start of the device (s)": "" if column.start_s is None else f"{column.start_s:.2f}",
        "load (s)": f"{column.load_s:.2f}",
        "first run, cold (s)": f"{m.first_s:.3f}",
        "steady state, median (s)": f"{m.median_s:.3f}",
        "  90th percentile (s)": f"{np.percentile(m.samples_s, 90):.3f}",
        "  minimum (s)": f"{min(m.samples_s):.3f}",
        "RTF, steady state": f"{m.median_s:.3f} / {m.audio_s:.1f} = {m.median_s / m.audio_s:.4f}",
        "tokens": f"{m.n_tokens}",
        "speed-up over the CPU": f"{reference.median_s:.3f} / {m.median_s:.3f} = {reference.median_s / m.median_s:.2f}",
    }
    if m.n_tokens != reference.n_tokens:
        rows["speed-up over the CPU"] = f"void: {m.n_tokens} tokens, not {reference.n_tokens}"
    rows |= {f"{stage} (ms)": f"{stage_ms:.1f}" for stage, stage_ms in stages.items()}
    rows["decode (ms)"] += f", {stages['decode'] / m.n_tokens:.2f} a token"
    rows["sum of the stages (ms)"] = f"{sum(stages.values()):.1f}, {100 * share:.1f} % of a run"
    host_ms = stages["read and resample"] + stages["features"]
    rows["the host alone can feed"] = f"{1000 * m.audio_s / host_ms:.0f} times real time"
    rows["peak memory of the device (MB)"] = "" if m.peak_bytes is None else f"{m.peak_bytes / 1e6:.0f}"
    return rows


def throughput_table(columns: list[Column], first: int, last: int) -> str:
    """A row for each of the measurements from first to last: time, RTFx, and its growth over the first of them."""
    rows = [["input", "tokens"]]
    for column in columns:
        rows[0] += [f"{column.name}: median (s)", "RTFx", "growth"]
    for i in range(first, last):
        measurements = [column.measurements[i] for column in columns]
        row = [measurements[0].label, " ".join(dict.fromkeys(str(m.n_tokens) for m in measurements))]
        for column, m in zip(columns, measurements, strict=True):
            base = column.measurements[first]
            growth = (m.audio_s / m.median_s) / (base.audio_s / base.median_s)
            rtfx = f"{m.audio_s:.0f} / {m.median_s:.2f} = {m.audio_s / m.median_s:.2f}"
            row += [f"{m.median_s:.3f}", rtfx, f"{growth:.2f}"]
        rows.append(row)
    return format_table(rows)


def format_report(columns: list[Column], imports_s: float, args: argparse.Namespace) -> str:
    """The report for a person: a table in detail, tables of throughput, and what to be careful with."""
    m = columns[0].measurements[0]
    details = [describe(column, columns[0], imports_s, args) for column in columns]
    title = f"{m.label}, {m.audio_s:.1f} s, {len(m.samples_s)} runs after {args.warmup}"
    rows = [[title] + [column.name for column in columns]]
    rows += [[name, *cells] for name in details[0] if any(cells := [detail[name] for detail in details])]
    report = format_table(rows)
    middle = 1 + len(args.batch_sizes)
    if args.batch_sizes:
        report += "\n" + throughput_table(columns, 1, middle)
    if args.durations:
        report += "\n" + throughput_table(columns, middle, middle + len(args.durations))
    report += "\n"
    for column in columns:
        e, m = column.environment, column.measurements[0]
        report += f"{column.name}: {e['device_name']}, {e['threads']} threads on {e['cpus']} CPUs, torch {e['torch']}"
        report += f", torch-npu {e['torch_npu']}, CANN {e['cann']}\n" if e["torch_npu"] else "\n"
        missing_ms = 1000 * m.median_s - sum(stage_medians(m).values())
        if abs(missing_ms) > TOLERANCE * 1000 * m.median_s:
            report += f"{column.name}: the stages' sum misses the time of a run by {abs(missing_ms):.1f} ms\n"
    return report + f"peak memory of the process: {peak_rss_bytes() / 1e6:.0f} MB\n"


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- Command ---


def numbers(kind: type, high: float) -> Callable[[str], list]:
    """An argparse type: numbers from 1 to high, with commas between them."""
    parse = common.number(kind, 1, high)
    return lambda text: [parse(part) for part in text.split(",")]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="exit status: 0 measured; 1 the devices decoded unequal numbers of tokens, which voids the comparison; "
        "2 nothing could be measured; 130 interrupted",
    )
    add = parser.add_argument
    add("--audio", nargs="+", action="extend", default=[], metavar="PATH",
        help="audio files, decoded to their natural end (default: a sweep of 3 s, 200 to 800 Hz)")  # fmt: skip
    common.add_model_options(add)
    add("--max-new-tokens", type=common.number(int, 1, common.MAX_NEW_TOKENS), default=128, metavar="N",
        help=f"token limit of a chunk, 1 to {common.MAX_NEW_TOKENS}; synthetic audio is decoded to it (default: "
        "%(default)s)")  # fmt: skip
    add("--batch-size", type=common.number(int, 1), metavar="N",
        help="chunks decoded together, of which the sweep is one (default: 16, on a CPU 8)")  # fmt: skip
    add("--batch-sizes", type=numbers(int, 1024), default=[], metavar="N,N...",
        help="also measure batches of so many full windows")  # fmt: skip
    add("--durations", type=numbers(float, 36_000), default=[], metavar="S,S...",
        help="also measure synthetic audio of so many seconds")  # fmt: skip
    add("--warmup", type=common.number(int, 1), default=2, metavar="N",
        help="runs before those that count; the first is the cold one (default: %(default)s)")  # fmt: skip
    add("--runs", type=common.number(int, 1), default=10, metavar="N", help="runs that count (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything measured there, with every sample")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments say; the exit status. Raises SetupError."""
    if args.json:
        common.check_report(args.json, args.audio)
    started = time.perf_counter()
    import torch

    imports_s = time.perf_counter() - started
    device, warning = common.select_device(args.device)
    start_s = time.perf_counter() - started - imports_s
    if warning:
        common.notice(f"eval_performance.py: warning: {warning}")
    started = time.perf_counter()
    common.import_transformers()
    imports_s += time.perf_counter() - started
    starts = {torch.device("cpu"): None} | ({device: start_s} if device.type != "cpu" else {})
    columns = [measure_device(device, start_s, args) for device, start_s in starts.items()]
    counts = [[m.n_tokens for m in column.measurements] for column in columns]
    common.write_stdout(format_report(columns, imports_s, args))
    if args.json:
        report = {
            "model": args.model, "comparable": counts[0] == counts[-1], "imports_s": imports_s,
            "peak_rss_bytes": peak_rss_bytes(), "columns": [asdict(column) for column in columns],
        }  # fmt: skip
        common.write_report(args.json, report)
    return int(counts[0] != counts[-1])


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return common.run_script("eval_performance.py", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
