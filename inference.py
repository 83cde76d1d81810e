"""Transcribe Japanese recordings with kotoba-whisper-v2.0 on an Ascend NPU or a CPU.

    python3 inference.py --audio meeting.mp3
    python3 inference.py --audio recordings/ --output-dir transcripts/ --output-format srt

The transcript goes to stdout or to files in --output-dir, and everything else to stderr.
"""
import argparse
import contextlib
import json
import os
import sys
import time

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
    return parser.parse_args(argv)


def find_audio(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The files to transcribe as (path, output name without extension), and what is wrong with the arguments.

    A folder is searched recursively, and its tree is kept in the output names.
    """
    inputs, problems = [], []
    for argument in arguments:
        if os.path.isdir(argument):
            paths = sorted(
                os.path.join(folder, name)
                for folder, _, names in os.walk(argument)
                for name in names
                if name.lower().endswith(AUDIO_EXTENSIONS) and not name.startswith(".")
            )
            inputs += [(path, os.path.splitext(os.path.relpath(path, argument))[0]) for path in paths]
            if not paths:
                problems.append(f"{argument}: no audio in this folder ({' '.join(AUDIO_EXTENSIONS)})")
        else:
            try:
                common.check_file(argument)
                inputs.append((argument, os.path.splitext(os.path.basename(argument))[0]))
            except common.AudioError as error:
                problems.append(f"{argument}: {error}")
    return inputs, problems


def plan_outputs(inputs: list[tuple[str, str]], many: bool, args: argparse.Namespace) -> list[list[str]]:
    """The files to write for each input, none for stdout. Raises SetupError where they cannot all be written."""
    if args.output_dir is None:
        if args.output_format == "all" or (many and args.output_format not in ("txt", "json")):
            raise common.SetupError(f"--output-format {args.output_format} needs --output-dir")
        return [[] for _ in inputs]
    extensions = FORMATS if args.output_format == "all" else [args.output_format]
    owners = {os.path.abspath(path): path for path, _ in inputs}
    planned = []
    for path, name in inputs:
        planned.append([os.path.join(args.output_dir, f"{name}.{extension}") for extension in extensions])
        for output in planned[-1]:
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
        return json.dumps(content, ensure_ascii=False) + "\n"
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
        common.write_stdout(f"{transcript.path}\t{full_text(transcript, args.language)}\n")
    elif not outputs:
        common.write_stdout(render(transcript, args.output_format, args.language))
    for output in outputs:
        try:
            common.write_whole(output, render(transcript, output.rpartition(".")[2], args.language))
        except OSError as error:
            transcript.error = f"cannot write {output}: {error.strerror}"


def notice(message: str) -> None:
    """One line on stderr, above the progress bar."""
    tqdm.write(f"inference.py: {message}", file=sys.stderr)


def closing_line(
    n_files: int, n_failed: int, transcripts: list[common.Transcript], load_s: float, taken_s: float, model
) -> str:
    """What was done, how fast and on what, and what to be careful with."""
    segments = [segment for transcript in transcripts for segment in transcript.segments]
    audio_s = sum(transcript.duration for transcript in transcripts)
    rtf = f", RTF {taken_s:.1f} / {audio_s:.1f} = {taken_s / audio_s:.3f}" if audio_s else ""
    return (
        f"{n_files} file{'s' * (n_files != 1)}, {n_failed} failed; {audio_s:.1f} s of audio in "
        f"{taken_s:.1f} s{rtf} (and {load_s:.1f} s to load) on {model.device} in {str(model.dtype)[6:]}; chunks: "
        f"{len(segments)} decoded, {sum(transcript.silent for transcript in transcripts)} silent, "
        f"{sum(segment.token_limit for segment in segments)} cut at the token limit, "
        f"{sum(segment.looping for segment in segments)} looping"
    )


def progress_bar(inputs: list[tuple[str, str]], window_s: float) -> tqdm:
    """A bar in seconds of audio on a terminal, where there is more than one chunk to wait for."""
    if not sys.stderr.isatty():
        return tqdm(disable=True)
    total = None  # of several files, or of one that only ffmpeg can read
    with contextlib.suppress(soundfile.SoundFileError, TypeError, OSError):
        total = soundfile.info(inputs[0][0]).duration if len(inputs) == 1 else None
    short = total is not None and total <= window_s
    done = "{n:.0f} s of audio" if total is None else "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of audio"
    return tqdm(total=total, disable=short, unit=" s", bar_format=done + " [{elapsed}, {rate_noinv_fmt}]")


def run(args: argparse.Namespace) -> int:
    """Transcribe what the arguments name; the exit status. Raises SetupError."""
    inputs, problems = find_audio(args.audio)
    n_files = len(inputs) + len(problems)
    planned = plan_outputs(inputs, n_files > 1, args)
    for problem in problems:
        notice(f"error: {problem}")
    if not inputs:
        return 1
    if args.task == "translate" and "bilingual" not in args.model:
        notice("kotoba-whisper-v2.0 was trained for Japanese transcription only; to translate, use --model "
               "kotoba-tech/kotoba-whisper-bilingual-v1.0")  # fmt: skip
    started = time.perf_counter()
    device, warning = common.select_device(args.device)
    if warning:
        notice(f"warning: {warning}")
    recognizer = common.load_model(args.model, device, common.select_dtype(args.dtype, device), args.language)
    loaded = time.perf_counter()
    transcripts = []
    with progress_bar(inputs, recognizer.extractor.chunk_length) as bar:
        results = common.transcribe(
            recognizer, [path for path, _ in inputs], args.language, args.task, args.max_new_tokens,
            args.chunk_length, args.batch_size, on_progress=bar.update,
        )  # fmt: skip
        for transcript, outputs in zip(results, planned, strict=True):
            if transcript.error is None:
                deliver(transcript, outputs, args, n_files > 1)
            if transcript.error is not None:
                problems.append(transcript.path)
                notice(f"error: {transcript.path}: {transcript.error}")
            transcripts.append(transcript)
    taken_s = time.perf_counter() - loaded
    notice(closing_line(n_files, len(problems), transcripts, loaded - started, taken_s, recognizer.model))
    return int(bool(problems))


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return common.exit_status("inference.py", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
