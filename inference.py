"""Transcribe Japanese recordings with kotoba-whisper-v2.0 on an Ascend NPU or a CPU.

    python3 inference.py --audio meeting.mp3
    python3 inference.py --audio recordings/ --output-dir transcripts/ --output-format srt
    torchrun --nproc-per-node 8 inference.py --audio corpus/ --output-dir out/ --skip-existing

The transcript goes to stdout or to files in --output-dir, and everything else to stderr.
"""
import argparse
import contextlib
import errno
import fcntl
import io
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from itertools import chain

import soundfile
from tqdm import tqdm

import common

AUDIO_EXTENSIONS = (
    ".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".oga",
    ".ogg", ".opus", ".rf64", ".w64", ".wav", ".weba", ".webm", ".wma",
)  # fmt: skip
FORMATS = ("txt", "srt", "vtt", "tsv", "json")
UNSPACED_LANGUAGES = ("ja", "zh", "yue", "th", "lo", "my")  # as in openai/whisper


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="exit status: 0 every file was transcribed; 1 some were not; 2 wrong options, or an unusable device or "
        "model; 130 interrupted",
    )
    add = parser.add_argument
    add("--audio", nargs="+", required=True, metavar="PATH", help="audio files, or folders to search for them")
    add("--language", default="ja", metavar="CODE", help="a language that the model knows (default: %(default)s)")
    add("--task", choices=["transcribe", "translate"], default="transcribe", help="(default: %(default)s)")
    common.add_model_options(add)
    add("--max-new-tokens", type=common.number(int, 1, common.MAX_NEW_TOKENS), default=256, metavar="N",
        help=f"token limit of a chunk, 1 to {common.MAX_NEW_TOKENS} (default: %(default)s)")  # fmt: skip
    add("--chunk-length", type=common.number(float, 1, 30), default=common.CHUNK_LENGTH_S, metavar="SECONDS",
        help="longest stretch decoded at once in files over 30 s, 1 to 30 (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=common.number(int, 1), default=8, metavar="N",
        help="chunks decoded together, across files too (default: %(default)s)")  # fmt: skip
    add("--output-dir", "-o", metavar="DIR", help="write files there (default: write to stdout)")
    add("--output-format", "-f", choices=[*FORMATS, "all"], default="txt", help="(default: %(default)s)")
    add("--skip-existing", action="store_true", help="skip the files whose outputs are all there")
    add("--report", metavar="FILE", help="write a line of JSON about each file there, as soon as it is done")
    return parser.parse_args(argv)


def find_audio(arguments: list[str]) -> tuple[dict[str, str], list[common.Transcript]]:
    """The files to transcribe, path and output name without extension, and those that cannot be.

    A folder is searched recursively, links to folders too, and its tree is kept in the output names.
    """
    inputs, failed = {}, []
    for argument in arguments:
        if not os.path.isdir(argument):
            try:
                common.check_file(argument)
                inputs.setdefault(argument, os.path.splitext(os.path.basename(argument))[0])
            except common.AudioError as error:
                failed.append(common.Transcript(argument, error=str(error)))
            continue
        found, searched, unreadable = {}, set(), []
        for folder, folders, names in os.walk(argument, onerror=unreadable.append, followlinks=True):
            folders.sort()
            if (real := os.path.realpath(folder)) in searched:  # a link to where the search has been
                folders.clear()
                continue
            searched.add(real)
            for name in sorted(names):
                if name.lower().endswith(AUDIO_EXTENSIONS) and not name.startswith("."):
                    path = os.path.join(folder, name)
                    found[path] = os.path.splitext(os.path.relpath(path, argument))[0]
        inputs |= found | inputs  # whose first mention names their outputs
        failed += [common.Transcript(error.filename, error=error.strerror) for error in unreadable]
        if not found and not unreadable:
            message = f"no audio in this folder ({' '.join(AUDIO_EXTENSIONS)})"
            failed.append(common.Transcript(argument, error=message))
    return inputs, failed


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


def plan_outputs(inputs: dict[str, str], many: bool, args: argparse.Namespace) -> dict[str, list[str]]:
    """The files to write for the path of each input, none for stdout. Raises SetupError where two would be one."""
    if args.output_dir is None:
        if args.output_format == "all" or (many and args.output_format not in ("txt", "json")):
            raise common.SetupError(f"--output-format {args.output_format} needs --output-dir")
        return {path: [] for path in inputs}
    extensions = FORMATS if args.output_format == "all" else [args.output_format]
    owners = {os.path.abspath(path): path for path in inputs}
    planned = {}
    for path, name in inputs.items():
        planned[path] = [os.path.join(args.output_dir, f"{name}.{extension}") for extension in extensions]
        for output in planned[path]:
            if owner := owners.get(os.path.abspath(output)):
                raise common.SetupError(
                    f"the transcript of {path} would overwrite {output}, which belongs to {owner}: rename one of "
                    "them, or use another --output-dir"
                )
            owners[os.path.abspath(output)] = path
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except FileExistsError:
        raise common.SetupError(f"--output-dir {args.output_dir}: there is a file of that name") from None
    except OSError as error:
        raise common.SetupError(f"--output-dir {args.output_dir}: {error.strerror}") from error
    if not os.access(args.output_dir, os.W_OK):
        raise common.SetupError(f"--output-dir {args.output_dir}: no permission to write in this folder")
    return planned


def timestamp(seconds: float, decimal_mark: str = ".", hours_always: bool = False) -> str:
    """HH:MM:SS and milliseconds; unless hours_always, the hours only where there are some."""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    prefix = f"{hours:02d}:" if hours or hours_always else ""
    return f"{prefix}{minutes:02d}:{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"


def full_text(transcript: common.Transcript, language: str) -> str:
    """The text of all segments in one line."""
    return ("" if language in UNSPACED_LANGUAGES else " ").join(segment.text for segment in transcript.segments)


def render(transcript: common.Transcript, extension: str, language: str) -> str:
    """The content of an output file, in the format of openai/whisper's writers."""
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


def deliver(transcript: common.Transcript, outputs: list[str], args: argparse.Namespace, many: bool) -> None:
    """Write a transcript to its output files, or to stdout where it has none; what fails becomes its error."""
    if not outputs and many and args.output_format == "txt":
        path = common.one_line(transcript.path)
        common.write_stdout(f"{path}\t{full_text(transcript, args.language)}\n")
    elif not outputs:
        common.write_stdout(render(transcript, args.output_format, args.language))
    for output in outputs:
        try:
            common.write_whole(output, render(transcript, output.rpartition(".")[2], args.language))
        except OSError as error:
            transcript.error = f"cannot write {output}: {error.strerror}"


def program() -> str:
    """What messages begin with: the name of the script and, where there are several processes, which it is."""
    rank = os.environ.get("RANK")
    return "inference.py" if rank is None else f"inference.py, rank {rank}"


def notice(message: str) -> None:
    """One line on stderr, above the progress bar; in one piece, for other processes may write there too."""
    tqdm.write(common.one_line(f"{program()}: {message}") + "\n", file=sys.stderr, end="")


def summarize(transcript: common.Transcript, skipped: bool) -> dict[str, object]:
    """A line of --report."""
    status = "failed" if transcript.error is not None else "skipped" if skipped else "done"
    return {
        "path": transcript.path, "status": status, "audio_s": round(transcript.duration, 3),
        "taken_s": round(transcript.taken_s, 3), "segments": len(transcript.segments), "silent": transcript.silent,
        "cut": sum(segment.token_limit for segment in transcript.segments),
        "looping": sum(segment.looping for segment in transcript.segments), "error": transcript.error,
    }  # fmt: skip


def closing_line(totals: Counter, load_s: float = 0.0, taken_s: float = 0.0, model=None) -> str:
    """What was done, how fast and on what, and what to be careful with."""
    n_files, audio_s = totals["done"] + totals["failed"] + totals["skipped"], totals["audio_s"]
    line = f"{n_files} file{'s' * (n_files != 1)}, {totals['failed']} failed"
    line += f", {totals['skipped']} skipped" if totals["skipped"] else ""
    if model is None:
        return line
    rtf = f", RTF {taken_s:.1f} / {audio_s:.1f} = {taken_s / audio_s:.3f}" if audio_s else ""
    return (
        f"{line}; {audio_s:.1f} s of audio in {taken_s:.1f} s{rtf} (and {load_s:.1f} s to load) on {model.device} in "
        f"{str(model.dtype)[6:]}; chunks: {totals['segments']} decoded, {totals['silent']} silent, {totals['cut']} cut "
        f"at the token limit, {totals['looping']} looping"
    )


def progress_bar(paths: list[str], window_s: float) -> tqdm:
    """A bar in seconds of audio on a terminal of its own, where there is more than one chunk to wait for."""
    if not sys.stderr.isatty() or os.environ.get("WORLD_SIZE", "1") != "1":
        return tqdm(disable=True)
    total = None  # of several files, or of one that only ffmpeg can read
    with contextlib.suppress(soundfile.SoundFileError, TypeError, OSError), open(paths[0], "rb") as file:
        total = soundfile.info(file).duration if len(paths) == 1 else None
    short = total is not None and total <= window_s
    done = "{n:.0f} s of audio" if total is None else "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of audio"
    return tqdm(total=total, disable=short, unit=" s", bar_format=done + " [{elapsed}, {rate_noinv_fmt}]")


def open_report(path: str | None) -> contextlib.AbstractContextManager:
    """The file of --report, unbuffered, or None. Raises SetupError."""
    if path is None:
        return contextlib.nullcontext()
    try:
        return open(path, "wb", buffering=0)
    except OSError as error:
        raise common.SetupError(f"--report {path}: {error.strerror}") from error


def record(transcript: common.Transcript, totals: Counter, report: io.RawIOBase | None, skipped: bool = False) -> None:
    """Count a file, say it where it failed, and write its line of the report."""
    line = summarize(transcript, skipped)
    totals.update({key: value for key, value in line.items() if isinstance(value, int | float)})
    totals[line["status"]] += 1
    if transcript.error is not None:
        notice(f"error: {transcript.path}: {transcript.error}")
    if report is not None:
        data = f"{common.to_json(line)}\n".encode()
        try:
            if report.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            totals["unreported"] += 1
            notice(f"error: {transcript.path} is missing in the report: {error.strerror}")


def transcribe(paths: list[str], outputs: dict[str, list[str]], many: bool, totals: Counter, report, args) -> bool:
    """Load the model, transcribe files and deliver their transcripts; whether all were reached. Raises SetupError."""
    started = time.perf_counter()
    device, warning = common.select_device(args.device)
    if warning:
        notice(f"warning: {warning}")
    recognizer = common.load_model(args.model, device, common.select_dtype(args.dtype, device), args.language)
    loaded, stopped, n_left = time.perf_counter(), None, len(paths)
    with progress_bar(paths, recognizer.extractor.chunk_length) as bar:
        results = common.transcribe(
            recognizer, paths, args.language, args.task, args.max_new_tokens, args.chunk_length, args.batch_size,
            on_progress=bar.update, on_notice=lambda message: notice(f"warning: {message}"),
        )  # fmt: skip
        try:
            for transcript in results:
                if transcript.error is None:
                    deliver(transcript, outputs[transcript.path], args, many)
                record(transcript, totals, report)
                n_left -= 1
        except common.DeviceError as error:
            stopped = error
    notice(closing_line(totals, loaded - started, time.perf_counter() - loaded, recognizer.model))
    if stopped:
        notice(f"error: {stopped}; files not reached: {n_left} (--skip-existing goes on with them)")
    return stopped is None


def run(args: argparse.Namespace) -> int:
    """Transcribe what the arguments name; the exit status. Raises SetupError."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for option, given in (("--skip-existing", args.skip_existing), ("more than one process", world_size > 1)):
        if given and args.output_dir is None:
            raise common.SetupError(f"{option} needs --output-dir")
    inputs, failed = find_audio(args.audio)
    many = len(inputs) + len(failed) > 1
    outputs = plan_outputs(inputs, many, args)
    mine, report_path = list(inputs), args.report
    if world_size > 1:
        mine, failed = share(inputs, rank, world_size), failed if rank == 0 else []
        report_path = report_path and f"{report_path}.{rank}"
    if report_path and os.path.abspath(report_path) in map(os.path.abspath, [*inputs, *chain(*outputs.values())]):
        raise common.SetupError(f"--report {report_path} would overwrite a recording or a transcript")
    if args.task == "translate" and "bilingual" not in args.model:
        notice("kotoba-whisper-v2.0 was trained for Japanese transcription only; to translate, use --model "
               "kotoba-tech/kotoba-whisper-bilingual-v1.0")  # fmt: skip
    totals, paths = Counter(), []
    with open_report(report_path) as report:
        for transcript in failed:
            record(transcript, totals, report)
        for path in mine:
            if args.skip_existing and all(map(os.path.isfile, outputs[path])):
                record(common.Transcript(path), totals, report, skipped=True)
            else:
                paths.append(path)
        if paths and not transcribe(paths, outputs, many, totals, report, args):
            return 2
    if not paths and (totals["skipped"] or world_size > 1):
        notice(closing_line(totals))
    return int(totals["failed"] + totals["unreported"] > 0)


def open_tally() -> str | None:
    """The path of a file that the processes of torchrun on this machine share; None without torchrun.

    They agree on it at the start, when all machines are there: the store of torchrun ends with the first of them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as in common.select_device
    import torch.distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
    key = f"inference.py/{os.environ['GROUP_RANK']}/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if os.environ["LOCAL_RANK"] == "0":
        store.set(key, tempfile.mkstemp(prefix="inference.py-")[1])
    return store.get(key).decode()


def shared_status(status: int, tally: str) -> int:
    """The exit status under torchrun, which ends all processes of a machine as soon as one of them fails.

    So they end with 0, but for the last one to end, which ends with 1 where any of them failed.
    """
    with open(tally, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("1" if status else "0")
        file.flush()
        file.seek(0)
        statuses = file.read()
    if len(statuses) < int(os.environ["LOCAL_WORLD_SIZE"]):
        return 0
    os.remove(tally)
    return int("1" in statuses)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_arguments(argv)
    tally = open_tally()
    status = common.exit_status(program(), run, args)
    return status if tally is None else shared_status(status, tally)


if __name__ == "__main__":
    sys.exit(main())
