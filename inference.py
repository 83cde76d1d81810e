"""Transcribe Japanese recordings with kotoba-whisper-v2.0 on an Ascend NPU or a CPU.

    python3 inference.py --audio meeting.mp3
    python3 inference.py --audio recordings/ --output-dir transcripts/ --output-format srt
    torchrun --nproc-per-node 8 inference.py --audio corpus/ --output-dir out/ --skip-existing

The transcript goes to stdout or to files in --output-dir, and everything else to stderr.
"""
import argparse
import contextlib
import itertools
import os
import re
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import common  # before torch: it sets how that is imported
import soundfile
import torch
from tqdm import tqdm

AUDIO_EXTENSIONS = (
    ".3gp", ".aac", ".ac3", ".aif", ".aiff", ".amr", ".au", ".avi", ".caf", ".flac", ".flv", ".m4a", ".m4b", ".m4v",
    ".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpg", ".mts", ".oga", ".ogg", ".opus", ".rf64", ".ts", ".w64",
    ".wav", ".weba", ".webm", ".wma", ".wmv",
)  # fmt: skip
FORMATS = ("txt", "srt", "vtt", "tsv", "json")
UNSPACED_LANGUAGES = ("ja", "zh", "yue", "th", "lo", "my")  # as in openai/whisper
COMPRESSION_RATIO_LIMIT = 2.4  # openai/whisper's; none of 14,746 true outputs of this model exceeds 2.12
STORE_KEY = f"inference.py {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
STORE_TIMEOUT_S = 60  # in which torchrun's store answers
SHORTEST_WAIT_S = 600  # for the other processes of torchrun, which all have about the same to do


@dataclass
class Segment:
    """What was said in one chunk; start and end in seconds from the beginning of the file."""

    start: float
    end: float
    text: str = ""
    compression_ratio: float = 0.0
    token_limit: bool = False  # decoding ended at the token limit: text may be missing

    @property
    def looping(self) -> bool:
        """The text repeats itself like that of a decoder caught in a loop."""
        return self.compression_ratio > COMPRESSION_RATIO_LIMIT


@dataclass(eq=False)
class Transcript:
    """One file: its segments in order, its length in seconds, its silent chunks, and why it failed if it did."""

    path: str
    segments: list[Segment] = field(default_factory=list)
    duration: float = 0.0
    silent: int = 0
    error: str | None = None


def program() -> str:
    """What messages begin with: the name of the script and, where there are several processes, which it is."""
    under_torchrun = {"TORCHELASTIC_RUN_ID", "RANK"} <= {*os.environ}
    return f"inference.py, rank {os.environ['RANK']}" if under_torchrun else "inference.py"


# --- Options, inputs and outputs ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="exit status: 0 every file was transcribed; 1 some were not; 2 wrong options, or a device or model that "
        "cannot be used or that fails on the way; 130 interrupted; 141 the reader of stdout has gone",
    )
    add = parser.add_argument
    add("--audio", nargs="+", action="extend", required=True, metavar="PATH",
        help="audio files, or folders to search for them")  # fmt: skip
    add("--language", default="ja", metavar="CODE", help="a language that the model knows (default: %(default)s)")
    add("--task", choices=["transcribe", "translate"], default="transcribe",
        help="translate into English or, with kotoba's bilingual model, --language (default: %(default)s)")  # fmt: skip
    common.add_model_options(add)
    add("--max-new-tokens", type=common.number(int, 1, common.MAX_NEW_TOKENS), default=256, metavar="N",
        help=f"token limit of a chunk, 1 to {common.MAX_NEW_TOKENS} (default: %(default)s)")  # fmt: skip
    add("--chunk-length", type=common.number(float, 1, 30), default=common.CHUNK_LENGTH_S, metavar="SECONDS",
        help="longest stretch decoded at once in files over 30 s, 1 to 30 (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=common.number(int, 1), metavar="N",
        help="chunks decoded together, across files too (default: 16, on a CPU 8)")  # fmt: skip
    add("--output-dir", "-o", metavar="DIR", help="write files there (default: write to stdout)")
    add("--output-format", "-f", choices=[*FORMATS, "all"], default="txt",
        help="of the transcripts; all, and srt, vtt and tsv of several files, need --output-dir (default: %(default)s)")
    add("--skip-existing", action="store_true", help="skip the files whose outputs are all in --output-dir")
    return parser.parse_args(argv)


def find_audio(arguments: list[str]) -> tuple[dict[str, str], list[Transcript]]:
    """The files to transcribe, each with its path below the folder given, and those that cannot be.

    A folder is searched recursively, links to folders too. A file that is named twice, or a link to it, counts once.
    """
    found, failed = {}, []  # found: real path to path and relative path
    for argument in arguments:
        if not os.path.isdir(argument):
            try:
                common.check_file(argument)
                found.setdefault(os.path.realpath(argument), (argument, os.path.basename(argument)))
            except common.AudioError as error:
                failed.append(Transcript(argument, error=str(error)))
            continue
        n_found, searched, unreadable = 0, set(), []
        for folder, folders, names in os.walk(argument, onerror=unreadable.append, followlinks=True):
            folders.sort()
            if (real := os.path.realpath(folder)) in searched:  # a link to where the search has been
                folders.clear()
                continue
            searched.add(real)
            for name in sorted(names):
                if name.lower().endswith(AUDIO_EXTENSIONS) and not name.startswith("."):
                    path = os.path.join(folder, name)
                    found.setdefault(os.path.realpath(path), (path, os.path.relpath(path, argument)))
                    n_found += 1
        failed += [Transcript(error.filename, error=error.strerror) for error in unreadable]
        if not n_found and not unreadable:
            failed.append(Transcript(argument, error=f"no audio in this folder ({' '.join(AUDIO_EXTENSIONS)})"))
    return dict(found.values()), failed


def output_names(inputs: dict[str, str]) -> dict[str, str]:
    """A name for the outputs of each file, all different: a for a.wav, beside an a.mp3 a.wav, else the whole path."""
    names = {
        path: [os.path.splitext(relative)[0], relative, os.path.abspath(path).lstrip(os.sep)]
        for path, relative in inputs.items()
    }
    while len(counts := Counter(choices[0] for choices in names.values())) < len(names):
        for choices in names.values():
            if counts[choices[0]] > 1 and len(choices) > 1:
                choices.pop(0)
    return {path: choices[0] for path, choices in names.items()}


def plan_outputs(inputs: dict[str, str], many: bool, args: argparse.Namespace) -> dict[str, list[str]]:
    """The files to write for the path of each input, none for stdout. Raises SetupError."""
    if args.output_dir is None:
        if args.output_format == "all" or (many and args.output_format not in ("txt", "json")):
            raise common.SetupError(f"--output-format {args.output_format} needs --output-dir")
        return {path: [] for path in inputs}
    extensions = FORMATS if args.output_format == "all" else [args.output_format]
    outputs = {
        path: [os.path.join(args.output_dir, f"{name}.{extension}") for extension in extensions]
        for path, name in output_names(inputs).items()
    }
    common.check_outputs("--output-dir", args.output_dir, itertools.chain(*outputs.values()), inputs)
    return outputs


# --- Writing ---


def timestamp(seconds: float, decimal_mark: str = ".", hours_always: bool = False) -> str:
    """HH:MM:SS and milliseconds; unless hours_always, the hours only where there are some."""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    prefix = f"{hours:02d}:" if hours or hours_always else ""
    return f"{prefix}{minutes:02d}:{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"


def full_text(transcript: Transcript, language: str) -> str:
    """The text of all segments in one line."""
    return ("" if language in UNSPACED_LANGUAGES else " ").join(segment.text for segment in transcript.segments)


def render(transcript: Transcript, extension: str, language: str) -> str:
    """The content of an output file, in the format of openai/whisper's writers; language is that of the text."""
    segments = transcript.segments
    if extension == "txt":
        return "".join(f"{s.text}\n" for s in segments)
    if extension == "tsv":
        rows = (f"{round(1000 * s.start)}\t{round(1000 * s.end)}\t{s.text.replace(chr(9), ' ')}\n" for s in segments)
        return "start\tend\ttext\n" + "".join(rows)
    if extension == "json":
        rows = [
            {"id": i, "start": round(s.start, 3), "end": round(s.end, 3), "text": s.text,
             "compression_ratio": round(s.compression_ratio, 3), "token_limit": s.token_limit, "looping": s.looping}
            for i, s in enumerate(segments)
        ]  # fmt: skip
        content = {"text": full_text(transcript, language), "segments": rows, "language": language}
        content |= {"duration": round(transcript.duration, 3), "path": transcript.path}
        return common.to_json(content) + "\n"
    srt = extension == "srt"
    mark = "," if srt else "."
    cues = "" if srt else "WEBVTT\n\n"
    for i, s in enumerate(segments, start=1):
        times = f"{timestamp(s.start, mark, srt)} --> {timestamp(s.end, mark, srt)}"
        cues += (f"{i}\n" if srt else "") + f"{times}\n{s.text.replace('-->', '->')}\n\n"
    return cues


def deliver(transcript: Transcript, outputs: list[str], args: argparse.Namespace, many: bool) -> None:
    """Write a transcript to its output files, or to stdout where it has none; what fails becomes its error."""
    if not outputs and many and args.output_format == "txt":
        path = common.one_line(transcript.path)
        common.write_stdout(f"{path}\t{full_text(transcript, args.text_language)}\n")
    elif not outputs:
        common.write_stdout(render(transcript, args.output_format, args.text_language))
    for output in outputs:
        try:
            common.write_whole(output, render(transcript, output.rpartition(".")[2], args.text_language))
        except OSError as error:
            transcript.error = f"cannot write {output}: {error.strerror}"


def closing_line(totals: Counter, load_s: float = 0.0, taken_s: float = 0.0, model=None) -> str:
    """What was done, how fast and on what, and what to be careful with."""
    n_files, audio_s = totals["done"] + totals["failed"] + totals["skipped"], totals["audio_s"]
    line = f"{n_files} file{'s' * (n_files != 1)}, {totals['failed']} failed"
    line += f", {totals['skipped']} skipped" if totals["skipped"] else ""
    if model is None:
        return line
    rtf = f", RTF {taken_s:.2f} / {audio_s:.2f} = {taken_s / audio_s:.3f}" if audio_s else ""
    return (
        f"{line}; {audio_s:.1f} s of audio in {taken_s:.1f} s{rtf} (and {load_s:.1f} s to load) on {model.device} in "
        f"{str(model.dtype)[6:]}; chunks: {totals['segments']} decoded, {totals['silent']} silent, {totals['cut']} cut "
        f"at the token limit, {totals['looping']} looping"
    )


def notice(message: str) -> None:
    """One line on stderr."""
    common.notice(f"{program()}: {message}")


def record(transcript: Transcript, totals: Counter) -> None:
    """Count a file, and say it where it failed."""
    totals["failed" if transcript.error is not None else "done"] += 1
    totals["audio_s"] += transcript.duration
    totals["segments"] += len(transcript.segments)
    totals["silent"] += transcript.silent
    totals["cut"] += sum(segment.token_limit for segment in transcript.segments)
    totals["looping"] += sum(segment.looping for segment in transcript.segments)
    if transcript.error is not None:
        notice(f"error: {transcript.path}: {transcript.error}")


def progress_bar(paths: list[str], window_s: float) -> tqdm:
    """A bar in seconds of audio on a terminal of its own, where there is more than one chunk to wait for."""
    if not sys.stderr.isatty() or torchrun_place()[1] > 1:
        return tqdm(disable=True)
    total = None  # of several files, or of one that only ffmpeg can read
    with contextlib.suppress(soundfile.SoundFileError, TypeError, OSError), open(paths[0], "rb") as file:
        total = soundfile.info(file).duration if len(paths) == 1 else None
    short = total is not None and total <= window_s
    done = "{n:.0f} s of audio" if total is None else "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of audio"
    return tqdm(total=total, disable=short, unit=" s", bar_format=done + " [{elapsed}, {rate_noinv_fmt}]")


# --- The pipeline: files -> chunks -> batches -> segments ---


def read_files(paths: Iterable[str], extractor, chunk_length_s: float) -> Iterator[tuple]:
    """The chunks of each file, (transcript, segment, features), and at its end (transcript, None, None).

    features is None where the chunk is silent. Whatever goes wrong while a file is read is that file's error.
    """
    for path in paths:
        transcript = Transcript(path)
        try:
            for start, end, waveform in common.read_chunks(path, chunk_length_s):
                features = None if waveform is None else common.extract_features(extractor, waveform)
                yield transcript, Segment(start, end), features
        except common.AudioError as error:
            transcript.error = str(error)
        except MemoryError:
            transcript.error = "there is not enough memory to read it"
        except Exception as error:
            transcript.error = f"cannot be read ({type(error).__name__}: {common.first_line(error)})"
        yield transcript, None, None


def ahead(items: Iterable, n: int) -> Iterator:
    """The same items, of which a background thread makes n before they are asked for."""
    iterator, end = iter(items), object()
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        futures = deque(thread.submit(next, iterator, end) for _ in range(n))
        while (item := futures.popleft().result()) is not end:
            futures.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def batches(chunks: Iterable[tuple], batch_size: int) -> Iterator[list[tuple]]:
    """Chunks as read_files yields them, in lists with batch_size to decode among them; a file ends with its last."""
    batch, n_features = [], 0
    for chunk in chunks:
        if chunk[2] is not None and n_features == batch_size:
            yield batch
            batch, n_features = [], 0
        batch.append(chunk)
        n_features += chunk[2] is not None
    yield batch


def recognize(recognizer: common.Recognizer, batch: list[tuple], max_new_tokens: int, batch_size: int) -> int:
    """Give the segments of a batch, as read_files yields them, their texts; the batch size that fits the device.

    Raises DeviceError.
    """
    features, token_ids = [features for *_, features in batch], []
    while len(token_ids) < len(features):
        part = features[len(token_ids) : len(token_ids) + batch_size]
        try:
            token_ids += common.generate(recognizer, part, max_new_tokens)[0]
            continue
        except common.OutOfMemoryError:
            if len(part) == 1:
                raise
        batch_size = len(part) // 2
        if recognizer.model.device.type != "cpu":
            getattr(torch, recognizer.model.device.type).empty_cache()  # here, where no error holds the tensors
    for (transcript, segment, _), ids in zip(batch, token_ids, strict=True):
        text = recognizer.tokenizer.decode(ids, skip_special_tokens=True)
        segment.text = re.sub(common.CONTROL, " ", text).strip()
        data = segment.text.encode()
        segment.compression_ratio = len(data) / len(zlib.compress(data))
        segment.token_limit = ids[-1] != recognizer.tokenizer.eos_token_id
        transcript.segments.append(segment)
    return batch_size


def transcribe(
    recognizer: common.Recognizer, paths: Iterable[str], max_new_tokens: int, chunk_length_s: float, batch_size: int,
    on_progress: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Transcript]:  # fmt: skip
    """The transcript of each file, in order; on_progress is told the seconds of audio done since it was last called.

    Chunks of several files share a batch, and an accelerator decodes one while the next is read. Where the device
    fails, the files of the batch have failed, for nothing that comes back from it can be believed, and then DeviceError
    is raised.
    """
    device, fitting = recognizer.model.device, batch_size
    chunks = read_files(paths, recognizer.extractor, chunk_length_s)
    if device.type != "cpu":  # whose OpenMP threads would wait for each other: half the speed
        chunks = ahead(chunks, batch_size)
    for batch in batches(chunks, batch_size):
        before = fitting
        try:
            fitting = recognize(recognizer, [chunk for chunk in batch if chunk[2] is not None], max_new_tokens, before)
        except common.DeviceError as error:
            for transcript in dict.fromkeys(transcript for transcript, *_ in batch):
                transcript.error = transcript.error or str(error)
                yield transcript
            raise
        if fitting < before:
            notice(f"warning: {device} is out of memory in batches of {before}: --batch-size {fitting} from here on")
        for transcript, segment, features in batch:
            if segment is None:
                yield transcript
                continue
            transcript.duration = segment.end
            transcript.silent += features is None
            on_progress(segment.end - segment.start)


# --- Command ---


def torchrun_place() -> tuple[int, int, int, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of torchrun; 0, 1, 0, 1 in a process that it did not start.

    Raises SetupError where they contradict each other, whoever set them.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    started = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun; clusters set some of the others on their own
    try:
        rank, size, local_rank, local_size = (int(given.get(name, 1 if "SIZE" in name else 0)) for name in names)
        agree = (rank < size or "WORLD_SIZE" not in given) and (local_rank < local_size or len(given) < 4)
        agree &= min(rank, local_rank) >= 0 and min(size, local_size) > 0 and (len(given) == 4 or not started)
    except ValueError:
        agree = False
    if not agree:
        given |= {"TORCHELASTIC_RUN_ID": os.environ["TORCHELASTIC_RUN_ID"]} if started else {}
        said = " ".join(f"{name}={text}" for name, text in given.items())
        raise common.SetupError(f"{said}: not what torchrun sets: unset {' '.join(given)}, or start with torchrun")
    return (rank, size, local_rank, local_size) if started else (0, 1, 0, 1)


def share(paths: Iterable[str], rank: int, world_size: int) -> list[str]:
    """The files of one of world_size processes, the longest first, all of them together about as long as the others'.

    Their length is taken to be that in bytes: to open them all would take too long.
    """

    def n_bytes(path: str) -> int:
        """The size of a file, 0 where it has gone."""
        with contextlib.suppress(OSError):
            return os.path.getsize(path)
        return 0

    loads, mine = [0] * world_size, []
    for size, path in sorted(((n_bytes(path), path) for path in paths), reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += size + 1
        if lightest == rank:
            mine.append(path)
    return mine


def transcribe_files(paths: list[str], outputs: dict[str, list[str]], many: bool, totals: Counter, args) -> bool:
    """Load the model, transcribe files and deliver their transcripts; whether all were reached. Raises SetupError."""
    started = time.perf_counter()
    device, warning = common.select_device(args.device, *torchrun_place()[2:])
    if warning:
        notice(f"warning: {warning}")
    dtype = common.select_dtype(args.dtype, device)
    recognizer = common.load_model(args.model, device, dtype, args.language, args.task)
    loaded, stopped, n_left = time.perf_counter(), None, len(paths)
    with progress_bar(paths, recognizer.extractor.chunk_length) as bar:
        results = transcribe(
            recognizer, paths, args.max_new_tokens, args.chunk_length,
            args.batch_size or common.default_batch_size(device), on_progress=bar.update,
        )  # fmt: skip
        try:
            for transcript in results:
                if transcript.error is None:
                    deliver(transcript, outputs[transcript.path], args, many)
                record(transcript, totals)
                n_left -= 1
        except common.DeviceError as error:
            stopped = error
    notice(closing_line(totals, loaded - started, time.perf_counter() - loaded, recognizer.model))
    if stopped:
        notice(f"error: {stopped}; files not reached: {n_left} (--output-dir and --skip-existing go on with them)")
    return stopped is None


def run(args: argparse.Namespace) -> int:
    """Transcribe what the arguments name; the exit status. Raises SetupError."""
    rank, world_size, *_ = torchrun_place()
    for option, given in (("--skip-existing", args.skip_existing), ("more than one process", world_size > 1)):
        if given and args.output_dir is None:
            raise common.SetupError(f"{option} needs --output-dir")
    inputs, failed = find_audio(args.audio)
    many = len(inputs) + len(failed) > 1
    outputs = plan_outputs(inputs, many, args)
    mine = list(inputs)
    if world_size > 1:
        mine, failed = share(inputs, rank, world_size), failed if rank == 0 else []
    bilingual = "bilingual" in args.model
    args.text_language = args.language if args.task == "transcribe" or bilingual else "en"
    if args.task == "translate" and not bilingual:
        notice("kotoba-whisper-v2.0 was trained for Japanese transcription only; to translate, use --model "
               "kotoba-tech/kotoba-whisper-bilingual-v1.0 with --language en (or ja, from English)")  # fmt: skip
    totals = Counter()
    for transcript in failed:
        record(transcript, totals)
    paths = [path for path in mine if not (args.skip_existing and all(map(os.path.isfile, outputs[path])))]
    totals["skipped"] = len(mine) - len(paths)
    if paths and not transcribe_files(paths, outputs, many, totals, args):
        return 2
    if not paths and (totals["skipped"] or world_size > 1):
        notice(closing_line(totals))
    return int(totals["failed"] > 0)


def open_store():
    """The store that torchrun holds for its processes, on all machines; None without torchrun. Raises SetupError."""
    rank, world_size, *_ = torchrun_place()
    if world_size == 1:
        return None
    from torch.distributed import TCPStore

    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT_S))
        n_processes = store.add(f"{STORE_KEY} rank {rank}", 1)
    except (RuntimeError, ValueError) as error:
        raise common.SetupError(
            f"torchrun's store at {address}:{port} does not answer ({common.first_line(error)}): unset what an earlier "
            "torchrun left in the environment, or start with torchrun"
        ) from error
    if n_processes > 1:
        raise common.SetupError(f"{n_processes} processes have RANK={rank}: start each with torchrun")
    return store


def shared_status(store, status: int, bound_s: float) -> int:
    """The exit status of all processes of torchrun, on all machines: the worst of theirs, once the last has ended.

    torchrun ends the others as soon as one fails, and its store with the first machine: so all wait for each other,
    but no longer than bound_s seconds.
    """
    try:
        store.add(f"{STORE_KEY} status {status}", 1)
        if store.add(f"{STORE_KEY} ended", 1) == torchrun_place()[1]:
            worst = next((s for s in (2, 141, 1) if store.add(f"{STORE_KEY} status {s}", 0)), 0)
            store.set(f"{STORE_KEY} status", str(worst))
        store.set_timeout(timedelta(seconds=bound_s))
        return int(store.get(f"{STORE_KEY} status"))
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        notice(f"error: the other processes do not end ({common.first_line(error)})")
        return status or 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args, started, store = parse_arguments(argv), time.monotonic(), None

    def run_in_store(args: argparse.Namespace) -> int:
        """Run the command once the other processes of torchrun are known."""
        nonlocal store
        store = open_store()
        return run(args)

    status = common.run_script(program(), run_in_store, args)
    if store is None or status == 130:
        return status
    return shared_status(store, status, max(SHORTEST_WAIT_S, time.monotonic() - started))


if __name__ == "__main__":
    sys.exit(main())
