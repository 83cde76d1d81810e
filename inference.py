"""Transcribe Japanese recordings with kotoba-whisper-v2.0 on an Ascend NPU or a CPU.

    .venv/bin/python inference.py meeting.mp3
    .venv/bin/python inference.py recordings/ -o transcripts/ -f srt
    .venv/bin/torchrun --nproc-per-node 8 inference.py in/ -o out/ --skip-existing

The transcript goes to stdout or to files in --output-dir, and everything else to
stderr.

Exit status: 0 every recording was transcribed; 1 some were not; 2 wrong options,
outputs that are already there, or a device or model that cannot be used or that
fails on the way; 128 + n ended by signal n (130: Ctrl-C); 141 the reader of
stdout has gone.
"""
import argparse
import contextlib
import html
import itertools
import json
import math
import os
import re
import secrets
import sys
import time
import types
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # Python leaves that out with -P and -I
import common  # before torch: it sets how that is imported
import numpy as np
import soundfile
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Options:
    """How recordings are transcribed; parse_arguments describes it."""

    batch_size: int = 8
    chunk_length_s: float = 15.0
    max_new_tokens: int = 256
    no_speech_threshold: float = 0.7
    prompt: str = ""
    fixed_work: bool = False  # for measurements: no loop is stopped, and no chunk is decoded again


@dataclass(eq=False)
class Recording:
    """One input file and what became of it: its chunks in order, what may be lost, and why it failed if it did."""

    path: str
    chunks: list["Chunk"] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    n_windows: int = 0  # windows that were decoded, those of parts too
    n_tokens: int = 0  # tokens that were decoded, with ends of texts and repetitions
    n_again: int = 0  # chunks that were decoded again, in two parts

    @property
    def duration(self) -> float:
        """Its length in seconds."""
        return self.chunks[-1].end if self.chunks else 0.0

    def warn(self, message: str) -> None:
        """Keep a warning, and write it to stderr."""
        self.warnings.append(message)
        common.notice(f"warning: {self.path}: {message}")


@dataclass(eq=False)
class Chunk(common.Chunk):
    """A chunk on its way from the sound to the text and its times."""

    recording: Recording
    is_last: bool = False  # of its recording
    # What prepare sets, unless the chunk is steady and so is not decoded:
    features: torch.Tensor | None = None  # input_features, until it is decoded
    loud_frames: np.ndarray | tuple = ()  # as find_loud_frames gives them
    # What set_text sets:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # of the text, and the end of the text
    no_speech_prob: float | None = None  # None where it was not decoded
    compression_ratio: float = 0.0
    token_limit: bool = False  # decoding ended at the token limit: text may be missing
    looping: bool = False  # the decoder repeated itself without an end; the text keeps the first turn
    # What recognize_batch sets:
    avg_logprob: float | None = None  # mean log-probability of its tokens; None where it was not decoded
    left_out: bool = True  # not in the text: it was not decoded, or is_left_out says so
    # What set_times sets:
    token_starts: set[int] = field(default_factory=set)  # the characters of the text that a token begins with
    times: np.ndarray | None = None  # start and end of each character, from the recording's beginning, (n, 2) in s
    aligned: bool = False  # the times are from the decoder's attention
    unheard_frames: np.ndarray | tuple = ()  # loud frames that belong to no character


# --- Command ---

START_TIMEOUT = timedelta(minutes=1)  # in which the processes of torchrun, which starts them together, find each other
END_TIMEOUT = timedelta(days=30)  # in which all of them have ended
REDRAW_S, LOG_EVERY_S = 0.1, 60  # from one state of the progress bar to the next on a terminal, and in a log
FORMATS = ("txt", "srt", "vtt", "tsv", "json")
NO_SPEECH_THRESHOLD = 0.7  # above it are 8 of 397 inputs with speech, and 12 above openai/whisper's 0.6


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input").add_argument
    add("audio", nargs="*", action="extend", type=os.path.expanduser, default=[], metavar="PATH",
        help="Audio or video files, or folders to search for them.")  # fmt: skip
    add("--audio", nargs="+", action="extend", type=os.path.expanduser, metavar="PATH", help="The same.")
    add("--language", default="ja", metavar="NAME", help="A language that the model knows, such as ja or Japanese. "
        "(default: %(default)s)")  # fmt: skip
    add("--task", choices=["transcribe", "translate"], default="transcribe", help="translate gives English or, with "
        "kotoba's bilingual model, the language in --language. (default: %(default)s)")  # fmt: skip
    add("--prompt", default="", metavar="TEXT", help="Names and terms of the recordings, as they are to be written, in "
        f"at most {common.MAX_PROMPT_TOKENS} tokens. End it with 。: after one that does not, the model leaves 。 out. "
        "Not tested with kotoba-whisper, which was trained with previous text in a fifth of its examples. "
        "(default: none)")  # fmt: skip
    common.add_model_options(parser)
    add = parser.add_argument_group("batches and silence").add_argument
    add("--batch-size", type=common.number(int, 1), metavar="N",
        help="How many chunks are decoded together, across recordings too. (default: 16, on a CPU 8)")  # fmt: skip
    add("--no-speech-threshold", type=common.number(float, 0, 1), default=NO_SPEECH_THRESHOLD, metavar="P",
        help="Leave a chunk out where the model's probability that nobody speaks is above P and its text is unlikely "
        "(below -1 in log-probability); 1 keeps all, steady sound too. (default: %(default)s)")  # fmt: skip
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output-dir", "--output", "-o", type=os.path.expanduser, metavar="DIR", help="Write files into this folder. "
        "(default: write to stdout)")  # fmt: skip
    add("--output-format", "-f", choices=[*FORMATS, "all"], default="txt", help="all, and srt, vtt and tsv of several "
        "recordings, need --output-dir. (default: %(default)s)")  # fmt: skip
    add = group.add_mutually_exclusive_group().add_argument
    add("--skip-existing", action="store_true", help="Where outputs are already in --output-dir, leave those that are "
        "not older than their recordings. (default: refuse to start)")  # fmt: skip
    add("--overwrite", action="store_true", help="Where outputs are already in --output-dir, replace them.")
    # Other programs have _ in the names of their options.
    argv = [re.sub(r"^--[a-z_]+(?=$|=)", lambda match: match[0].replace("_", "-"), argument)
            for argument in (sys.argv[1:] if argv is None else argv)]  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    if not args.audio:
        parser.error("which recordings? Name files or folders")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_arguments(argv)
    return common.run_script(run_with_others if torch.distributed.is_torchelastic_launched() else run, args)


def run(args: argparse.Namespace) -> int:
    """Transcribe what the arguments name; the exit status. Raises SetupError."""
    totals = Counter()
    return transcribe_files(plan(args, totals), totals, args)


def run_with_others(args: argparse.Namespace) -> int:
    """Run the command as one of torchrun's processes; the worst exit status of all.

    The first process says what is to be done, and each does its share. Each ends its own run with its own line, and all
    wait for the last, because torchrun stops the others when one fails. Raises SetupError.
    """
    totals, work, status, started_s = Counter(), [None], 0, time.perf_counter()

    def plan_all(args: argparse.Namespace) -> int:
        """Decide what all are to do: the longest first, so that all have about the same to do."""
        work[0] = sorted(plan(args, totals).items(), key=lambda item: os.path.getsize(item[0]), reverse=True)
        return 0

    try:
        torch.distributed.init_process_group("gloo", timeout=START_TIMEOUT)
        everyone = torch.distributed.new_group(timeout=END_TIMEOUT)
        rank, results = torch.distributed.get_rank(), [None] * torch.distributed.get_world_size()
        if rank == 0:
            status = common.run_script(plan_all, args)
        torch.distributed.broadcast_object_list(work, group=everyone)
    except (RuntimeError, ValueError, TypeError) as error:
        remedy = "start with torchrun, or unset TORCHELASTIC_RUN_ID, which an earlier torchrun has left"
        raise common.SetupError(f"torchrun's processes do not find each other ({common.first_line(error)}): {remedy}"
                                ) from error  # fmt: skip
    if work[0] is not None:
        share = dict(work[0][rank :: len(results)])
        status = common.run_script(lambda args: transcribe_files(share, totals, args), args)
    try:
        torch.distributed.all_gather_object(results, (status, totals), everyone)
    except RuntimeError as error:
        common.notice(f"error: another process did not come to its end ({common.first_line(error)})")
        return status or 1
    if rank == 0 and work[0] is not None:
        line = closing_line(sum((of_one for _, of_one in results), Counter()), args, time.perf_counter() - started_s)
        common.notice(f"all processes: {line}")
    torch.distributed.destroy_process_group()
    return max(status for status, _ in results)


def plan(args: argparse.Namespace, totals: Counter) -> dict[str, list[str]]:
    """The recordings to transcribe, each with the files to write, none where its text goes to stdout.

    Says and counts what is passed over, cannot be read or is skipped. Raises SetupError.
    """
    with_others = torch.distributed.is_initialized()
    for option, given in (("--skip-existing", args.skip_existing), ("more than one process", with_others)):
        if given and args.output_dir is None:
            raise common.SetupError(f"{option} needs --output-dir")
    inputs, failed, notes = find_audio(args.audio)
    outputs = plan_outputs(inputs, args, several=len(inputs) + len(failed) > 1)
    for note in notes:
        common.notice(note)
    for recording in failed:
        count(recording, totals)
    totals["skipped"] = len(inputs) - len(outputs)
    return outputs


def transcribe_files(outputs: dict[str, list[str]], totals: Counter, args: argparse.Namespace) -> int:
    """Load the model, transcribe recordings and write their outputs; the exit status. Raises SetupError and, where some
    recordings are left, DeviceError or KeyboardInterrupt."""
    started_s, failure, n_left = time.perf_counter(), None, len(outputs)
    if not outputs:
        if totals["skipped"]:
            common.notice(closing_line(totals, args))
        return int(totals["failed"] > 0)
    recognizer, language = load(args)
    loaded_s, model = time.perf_counter(), recognizer.model
    options = Options(args.batch_size or common.default_batch_size(model.device), args.chunk_length,
                      args.max_new_tokens, args.no_speech_threshold, args.prompt)  # fmt: skip
    # On stdout each of several recordings is one line.
    several = len(outputs) + totals["recordings"] > 1
    stdout_format = "line" if several and args.output_format == "txt" else args.output_format
    as_heard = args.output_dir is None and stdout_format == "txt"  # then there is one recording
    bar = progress_bar(list(outputs))

    def on_chunk(chunk: Chunk) -> None:
        """Show the progress, and the text where it need not wait for the end of its recording."""
        bar.set_description_str(f"file {len(outputs) - n_left + 1} of {len(outputs)}", refresh=False)
        bar.update(chunk.end - chunk.start if len(outputs) == 1 else chunk.is_last)
        if as_heard:
            common.write_stdout(plain_text(chunk))

    with bar:
        try:
            for recording in transcribe(recognizer, outputs, options, on_chunk):
                if recording.error is None and not as_heard:
                    deliver(recording, outputs[recording.path], stdout_format, language)
                count(recording, totals)
                n_left -= 1
        except (common.DeviceError, KeyboardInterrupt) as error:
            failure = error
    how = f" on {model.device} in {common.dtype_name(model.dtype)}, loaded in {loaded_s - started_s:.1f} s"
    common.notice(closing_line(totals, args, time.perf_counter() - loaded_s, how))
    if failure:
        remedy = "the same command with -o DIR --skip-existing (not --overwrite) goes on, also with those that failed"
        common.notice(f"recordings not begun or not finished: {n_left}; {remedy}")
        raise failure
    return int(totals["failed"] > 0)


def load(args: argparse.Namespace) -> tuple[common.Recognizer, str]:
    """The model, on its device, and the code of the language of its texts. Raises SetupError."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if torch.distributed.is_initialized() else 0
    device = common.select_device(args.device, local_rank)
    dtype, name = common.select_dtype(args.dtype, device), os.path.basename(args.model.rstrip("/"))
    common.notice(f"loading {args.model} on {device} in {common.dtype_name(dtype)}")
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # takes seconds, and needs the device

    language = TO_LANGUAGE_CODE.get(args.language.lower(), args.language.lower())
    # Nothing in the model says so but its name.
    if "kotoba" in name and "bilingual" not in name and (language, args.task) != ("ja", "transcribe"):
        common.notice(f"warning: {name} was trained for Japanese transcription only; for English and for translation "
                      "there is --model kotoba-tech/kotoba-whisper-bilingual-v1.0")  # fmt: skip
    recognizer = common.load_model(args.model, device, dtype, language, args.task, args.prompt)
    return recognizer, "en" if args.task == "translate" and "bilingual" not in name else language


def progress_bar(paths: list[str]) -> tqdm:
    """A bar on stderr, of one recording in seconds of audio, of several in files; in a log a line every LOG_EVERY_S."""
    total, layout = len(paths), "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    if total == 1:
        total, layout = None, "{n:.0f} s of audio [{elapsed}<{remaining}, {rate_noinv:.3g} times real time]"
        with contextlib.suppress(soundfile.SoundFileError, OSError), open(paths[0], "rb") as file:
            total = soundfile.info(file).duration or None
        layout = "{percentage:3.0f}%|{bar}| " * (total is not None) + layout
    with_others = torch.distributed.is_initialized()
    on_terminal = sys.stderr is not None and sys.stderr.isatty() and not with_others
    every_s = REDRAW_S if on_terminal else LOG_EVERY_S
    log = types.SimpleNamespace(write=lambda state: state.strip() and common.notice(state.strip()))
    return tqdm(
        desc=f"file 1 of {total}", total=total, bar_format=layout, smoothing=0, miniters=0, mininterval=every_s,
        delay=every_s, file=None if on_terminal else log, disable=with_others and torch.distributed.get_rank() > 0,
    )  # fmt: skip


def count(recording: Recording, totals: Counter) -> None:
    """Add a recording to the totals, and say it where it failed or has no speech."""
    totals.update({"recordings": 1, "warnings": len(recording.warnings)})
    if recording.error is not None:
        totals["failed"] += 1
        common.notice(f"error: {recording.path}: {recording.error}")
        return
    kept = [chunk for chunk in recording.chunks if not chunk.left_out]
    totals.update({
        "audio_s": recording.duration, "chunks decoded again": recording.n_again,
        "chunks left out": len(recording.chunks) - len(kept), "chunks without text": sum(not c.text for c in kept),
        "chunks cut off at the token limit": sum(c.token_limit for c in kept),
        "chunks looping": sum(c.looping for c in kept),
        "chunks with loud sound that has no text": sum(bool(c.text and unheard_stretches(c)) for c in kept),
    })  # fmt: skip
    if not kept:
        why = "the model finds none" if recording.n_windows else "it is silence or steady sound"
        common.notice(f"{recording.path}: no speech: {why} (--no-speech-threshold 1 keeps all)")


def closing_line(totals: Counter, args: argparse.Namespace, taken_s: float = 0.0, how: str = "") -> str:
    """How much was done, how fast and where it is, and the counts that are not zero."""
    n_recordings, audio_s = totals["recordings"] + totals["skipped"], totals["audio_s"]
    line = f"{n_recordings} recording{'s' * (n_recordings != 1)}"
    line += "".join(f", {totals[name]} {name}" for name in ("failed", "skipped") if totals[name])
    if taken_s:
        line += f", {audio_s:.1f} s of audio in {taken_s:.1f} s ({audio_s / taken_s:.3g} times real time){how}"
    if args.output_dir is not None and n_recordings > totals["failed"]:
        line += f"; the files are in {args.output_dir}"
    return line + "".join(f"; {name}: {n}" for name, n in totals.items() if n and name.startswith(("warn", "chunk")))


# --- Inputs and outputs ---

AUDIO_EXTENSIONS = (  # what phones, recorders, meetings, television and corpora have; other files are to be named
    ".3g2", ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".asf", ".au", ".avi", ".awb", ".caf", ".dss",
    ".evo", ".flac", ".flv", ".m2ts", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mod", ".mov", ".mp2", ".mp3", ".mp4",
    ".mpeg", ".mpg", ".mts", ".oga", ".ogg", ".opus", ".qta", ".sph", ".tod", ".tp", ".ts", ".vob", ".vro", ".w64",
    ".wav", ".webm", ".wma", ".wmv",
)  # fmt: skip
HIDDEN = r"[.$@~].*|#recycle|#snapshot|lost[+]found"  # folders of programs, disks, and what was thrown away


def find_audio(arguments: list[str]) -> tuple[dict[str, str], list[Recording], list[str]]:
    """The files to transcribe, each with its path below the folder given; those that cannot be; and lines that say what
    is passed over. A file that is named twice, or a link to it, counts once."""
    found, failed, notes = {}, [], []  # found: real path to path and relative path
    for argument in arguments:
        here = {argument: os.path.basename(argument)}
        if os.path.isdir(argument):
            paths, unreadable, passed_over = search_folder(argument)
            here = {path: os.path.relpath(path, argument) for path in paths}
            failed, notes = failed + unreadable, notes + passed_over
        for path, relative in here.items():
            try:
                common.check_file(path)
                first, _ = found.setdefault(os.path.realpath(path), (path, relative))
                if os.path.abspath(path) != os.path.abspath(first):
                    notes.append(f"{path} is the same file as {first}, which alone is transcribed")
            except common.AudioError as error:
                failed.append(Recording(path, error=str(error)))
    return dict(found.values()), failed, notes


def search_folder(top: str) -> tuple[list[str], list[Recording], list[str]]:
    """The audio files in a folder and in all below it, also through links; an error where there are none or a folder
    cannot be read; and lines that say what is passed over, such as HIDDEN folders."""
    paths, failed, notes, not_looked_at, not_searched, searched = [], [], [], Counter(), Counter(), {}

    def fail(error: OSError) -> None:
        """Keep what os.walk cannot read."""
        failed.append(Recording(error.filename, error=error.strerror))

    for folder, folders, files in os.walk(top, onerror=fail, followlinks=True):
        if (first := searched.setdefault(os.path.realpath(folder), folder)) != folder:
            notes.append(f"{folder} is the same folder as {first}, which alone is searched")
            folders.clear()  # so that os.walk goes no further
            continue
        hidden = {name for name in folders if re.fullmatch(HIDDEN, name, re.IGNORECASE)}
        folders[:] = sorted(set(folders) - hidden)
        audio = {name for name in files if name[0] != "." and name.lower().endswith(AUDIO_EXTENSIONS)}
        paths += [os.path.join(folder, name) for name in audio]
        not_searched.update(sorted(hidden))
        for name in sorted(set(files) - audio):
            not_looked_at[".*" if name[0] == "." else os.path.splitext(name)[1].lower() or name] += 1
    for what, counts in (("files not looked at", not_looked_at), ("folders not searched", not_searched)):
        if counts:
            notes.append(f"{top}: {what}: {counts.total()} ({' '.join(name for name, _ in counts.most_common(9))})")
    if not paths and not failed:
        remedy = "name the files themselves, which are then read whatever their names"
        failed.append(Recording(top, error=f"no audio in this folder, going by the names: {remedy}"))
    return sorted(paths), failed, notes


def output_names(inputs: dict[str, str]) -> dict[str, str]:
    """A name for the outputs of each file: a for a.wav; a.wav where there is an a.mp3 as well; else the whole path."""
    names = {
        path: [os.path.splitext(relative)[0], relative, os.path.abspath(path).lstrip(os.sep)]
        for path, relative in inputs.items()
    }
    while True:
        counts = Counter(one_case(choices[0]) for choices in names.values())
        doubtful = [choices for choices in names.values() if counts[one_case(choices[0])] > 1 and len(choices) > 1]
        if not doubtful:
            return {path: choices[0] for path, choices in names.items()}
        for choices in doubtful:
            choices.pop(0)


def one_case(name: str) -> str:
    """A name as disks compare it that ignore case and ways to write が, as on macOS and Windows."""
    return unicodedata.normalize("NFC", name).casefold()


def is_current(output: str, path: str) -> bool:
    """Whether an output is newer than its recording, as make decides it: an older one may have been made while that was
    still being written."""
    changed_s = os.path.getmtime(path)  # in the future if the recorder's card is from another time zone
    return os.path.getmtime(output) >= changed_s or changed_s > time.time()


def plan_outputs(inputs: dict[str, str], args: argparse.Namespace, several: bool) -> dict[str, list[str]]:
    """The inputs to transcribe, each with the files to write, none where the text goes to stdout.

    Raises SetupError where a file would replace another one unasked, or where the folder does not take any.
    """
    if args.output_dir is None:
        if args.output_format == "all" or (several and args.output_format not in ("txt", "json")):
            raise common.SetupError(f"--output-format {args.output_format} needs --output-dir")
        return {path: [] for path in inputs}
    option = f"--output-dir {args.output_dir}: "
    if not args.output_dir:
        raise common.SetupError(f"{option}the name is empty, as of a variable that is not set: name a folder")
    extension = os.path.splitext(args.output_dir)[1][1:].lower()
    if extension in FORMATS and not os.path.isdir(args.output_dir):
        remedy = f"write -o {os.path.dirname(args.output_dir) or '.'} -f {extension}; the recording gives the name"
        raise common.SetupError(f"{option}this is to be a folder, not a file: {remedy}")
    outputs, there, taken = {}, [], {one_case(os.path.realpath(path)): path for path in inputs}
    for path, name in output_names(inputs).items():
        for extension in FORMATS if args.output_format == "all" else [args.output_format]:
            output = os.path.join(args.output_dir, f"{name}.{extension}")
            place = one_case(os.path.realpath(output))
            if place in taken:
                is_input = taken[place] in inputs
                remedy = "name another place" if is_input else "many disks do not tell these names apart: rename one"
                raise common.SetupError(f"{option}{output} would overwrite {taken[place]}: {remedy}")
            if os.path.isdir(output):
                raise common.SetupError(f"{option}{output} is a folder: name another place")
            taken[place] = output
            if os.path.exists(output):
                there.append(output)
                if args.skip_existing and is_current(output, path):
                    continue
            outputs.setdefault(path, []).append(output)
    if there and not (args.skip_existing or args.overwrite):
        remedy = "name another folder if they are of other recordings, else --skip-existing or --overwrite"
        raise common.SetupError(f"{option}outputs are already there: {len(there)}, such as {there[0]}: {remedy}")
    try:
        if outputs:  # some mounts can write but not rename
            probe = os.path.join(args.output_dir, f".{secrets.token_hex(16)}.part")
            write_whole(probe, "")
            os.remove(probe)
    except OSError as error:
        raise common.SetupError(f"{option}no file can be written there: {error.strerror}") from error
    return outputs


# --- Recognition: recordings -> chunks -> batches -> texts ---

FASTEST_TOKENS = 12  # in a second of a chunk: more than anybody speaks
ECHO_NO_SPEECH_PROB = 0.3  # nearly all speech is below it; noise in which a prompt was echoed has 0.5 and more
LOGPROB_LIMIT = -1.0  # openai/whisper's: below it a text is not to be believed
LONGEST_WAIT = 8  # batches, while the parts of chunks wait for others: the text and the progress must not stand still
UNHEARD_S = 1.0  # of loud sound without a character: shorter ones are coughs and chairs
FRAME_S = 0.02  # of the encoder's output
QUIETER_DB = 30  # what is more than this below the loudest part of its chunk is a pause
NOISE_DB, VOICE_DB = 8, 12  # and what is within NOISE_DB of the noise and more than VOICE_DB below the loudest part
CLICK_FRAMES = 5  # of which most are loud where someone speaks: keys and gusts are shorter


def transcribe(
    recognizer: common.Recognizer, paths: Iterable[str], options: Options,
    on_chunk: Callable[[Chunk], None] = lambda chunk: None,
) -> Iterator[Recording]:  # fmt: skip
    """The recordings, in order, each when its last chunk has its text; on_chunk is called with each chunk, in order.

    A batch may have chunks of several recordings. While an accelerator decodes one batch the next is read, unless the
    stages are timed. Where the device fails, nothing that it returns can be believed: all recordings that have begun
    come with an error, and then DeviceError is raised.
    """
    chunks = read_recordings(paths, recognizer, options)
    # On a CPU both would compete for the cores.
    if recognizer.model.device.type != "cpu" and recognizer.lap is common.untimed:
        chunks = ahead(chunks, options.batch_size)
    begun = {}  # its keys are the recordings, in order, that have begun and not ended
    try:
        for chunk in hear_again(recognizer, decoded_batches(recognizer, chunks, options, begun), options):
            chunk.recording.chunks.append(chunk)
            on_chunk(chunk)
            if chunk.is_last:
                del begun[chunk.recording]
                yield chunk.recording
    except common.DeviceError as error:
        for recording in begun:
            recording.error = recording.error or str(error)
            yield recording
        raise


def read_recordings(paths: Iterable[str], recognizer: common.Recognizer, options: Options) -> Iterator[Chunk]:
    """The chunks of each recording, at least one. Whatever goes wrong while it is read is the recording's error."""
    for path in paths:
        recording, chunk = Recording(path), None
        try:
            for found in common.read_chunks(path, options.chunk_length_s, recording.warn):
                recognizer.lap("read and resample")
                if chunk is not None:
                    yield chunk
                chunk = Chunk(**vars(found), recording=recording)
                prepare(recognizer, chunk, options)
                recognizer.lap("features")
        except common.AudioError as error:
            recording.error = str(error)
        except Exception as error:
            recording.error = f"cannot be read ({type(error).__name__}: {common.first_line(error)})"
        if chunk is None:
            chunk = Chunk(0.0, 0.0, None, recording)
        chunk.is_last = True
        yield chunk


def prepare(recognizer: common.Recognizer, chunk: Chunk, options: Options) -> None:
    """Set the features and the loud frames of a chunk that is to be decoded; one that is not keeps no sound."""
    if options.no_speech_threshold < 1 and common.is_steady(chunk.waveform, common.SAMPLING_RATE):
        chunk.waveform = None
    else:
        chunk.features = common.extract_features(recognizer.extractor, chunk.waveform)
        chunk.loud_frames = find_loud_frames(chunk.waveform)


def find_loud_frames(waveform: np.ndarray) -> np.ndarray:
    """The frames of FRAME_S that are louder than the pauses of a waveform at SAMPLING_RATE: (n >= 1,) int64."""
    powers = common.mean_squares(waveform, common.SAMPLING_RATE, FRAME_S)[:: round(FRAME_S / common.LEVEL_HOP_S)]
    levels = common.mean_squares(waveform, common.SAMPLING_RATE, common.PAUSE_S)
    loudest, noise = min(powers.max(), levels.max()), np.percentile(levels, 10)
    in_noise = min(noise * 10 ** (NOISE_DB / 10), loudest / 10 ** (VOICE_DB / 10))
    loud = powers >= max(loudest / 10 ** (QUIETER_DB / 10), in_noise)
    mostly = np.convolve(np.pad(loud, CLICK_FRAMES // 2), np.ones(CLICK_FRAMES), "valid") > CLICK_FRAMES / 2
    return np.flatnonzero(mostly if mostly.any() else loud)


def ahead(items: Iterable, n: int) -> Iterator:
    """The same items; a thread in the background prepares up to n of them before they are asked for."""
    iterator, end = iter(items), object()
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        futures = deque(thread.submit(next, iterator, end) for _ in range(n))
        while (item := futures.popleft().result()) is not end:
            futures.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def decoded_batches(
    recognizer: common.Recognizer, chunks: Iterator[Chunk], options: Options, begun: dict[Recording, None]
) -> Iterator[tuple[list[Chunk], int]]:  # fmt: skip
    """The chunks in batches, decoded, each with the batch size that fits the device; adds recordings to begun.

    A batch has batch_size chunks with features, and those without features between them. Raises DeviceError.
    """
    batch_size = options.batch_size
    while batch := next_batch(chunks, batch_size):
        begun.update(dict.fromkeys(chunk.recording for chunk in batch))
        batch_size = recognize(recognizer, batch, batch_size, options)
        yield batch, batch_size


def next_batch(chunks: Iterator[Chunk], batch_size: int) -> list[Chunk]:
    """The next chunks: batch_size with features, and those without features between them."""
    batch, n_features = [], 0
    while n_features < batch_size and (chunk := next(chunks, None)):
        batch.append(chunk)
        n_features += chunk.features is not None
    return batch


def recognize(recognizer: common.Recognizer, chunks: list[Chunk], batch_size: int, options: Options) -> int:
    """Decode the chunks with features in batches, which are halved where the device is out of memory; the batch size
    that fitted. Raises DeviceError."""
    chunks = [chunk for chunk in chunks if chunk.features is not None]
    device, n_done, before = recognizer.model.device, 0, batch_size
    while n_done < len(chunks):
        batch = chunks[n_done : n_done + batch_size]
        try:
            recognize_batch(recognizer, batch, options)
            n_done += len(batch)
            continue
        except common.OutOfMemoryError:
            if len(batch) == 1:
                raise
        batch_size = len(batch) // 2
        if device.type != "cpu":
            with common.device_errors(device):
                torch.get_device_module(device).empty_cache()  # here, where no error holds the tensors
    if batch_size < before:
        said = f"{device} is out of memory in batches of {before}: --batch-size {batch_size} from here on"
        common.notice(f"warning: {said}")
    return batch_size


def recognize_batch(recognizer: common.Recognizer, batch: list[Chunk], options: Options) -> None:
    """Set the texts and the times of chunks. Raises DeviceError."""

    def is_loop(row: int, ids: list[int]) -> bool:
        """Whether a text repeats itself and is longer than what anybody can say in the time of its chunk."""
        is_long = len(ids) > FASTEST_TOKENS * (batch[row].end - batch[row].start)
        return is_long and not options.fixed_work and len(without_loop(ids)) < len(ids)

    decoded = common.generate(recognizer, [chunk.features for chunk in batch], options.max_new_tokens, is_loop)
    for chunk, ids, no_speech_prob in zip(batch, decoded.token_ids, decoded.no_speech_probs, strict=True):
        set_text(chunk, recognizer.tokenizer, ids, no_speech_prob)
    recognizer.lap("text")
    with torch.inference_mode(), common.device_errors(recognizer.model.device):
        forced = force_texts(recognizer, decoded.encoded, [chunk.token_ids for chunk in batch])
        for chunk, (weights, logprobs) in zip(batch, forced, strict=True):
            # The end of a text that was cut off is not the model's own, and does not count.
            chunk.avg_logprob = logprobs[: len(logprobs) - (chunk.looping or chunk.token_limit)].mean().item()
            chunk.left_out = is_left_out(chunk, options)
            set_times(chunk, recognizer.tokenizer, weights)
    recognizer.lap("times")
    for chunk, ids in zip(batch, decoded.token_ids, strict=True):
        chunk.features = None
        chunk.recording.n_windows += 1
        chunk.recording.n_tokens += len(ids)


def set_text(chunk: Chunk, tokenizer, ids: list[int], no_speech_prob: float) -> None:
    """Set the text of a chunk and its marks, from what was decoded."""
    eos = tokenizer.eos_token_id
    data = tokenizer.decode(ids, skip_special_tokens=True).strip().encode()
    chunk.compression_ratio = len(data) / len(zlib.compress(data))
    kept = ids if ids[-1] == eos else without_loop(ids)  # people repeat themselves, and come to an end
    chunk.looping = len(kept) < len(ids)
    chunk.token_limit = ids[-1] != eos and not chunk.looping
    chunk.no_speech_prob = no_speech_prob
    chunk.token_ids = [*(i for i in kept if i != eos), eos]
    chunk.text = re.sub(common.CONTROL, " ", tokenizer.decode(chunk.token_ids, skip_special_tokens=True)).strip()


def is_left_out(chunk: Chunk, options: Options) -> bool:
    """Whether a decoded chunk is left out: the model finds no speech in it, or its text is nothing but a piece of the
    prompt, and perhaps nobody has spoken."""
    if options.no_speech_threshold == 1:  # which keeps all
        return False
    text, prompt = (re.sub(r"\W", "", text) for text in (chunk.text, options.prompt))
    is_echo = text != "" and text in prompt and chunk.no_speech_prob > ECHO_NO_SPEECH_PROB
    # As in openai/whisper: what is likely is speech. Sentences with long pauses between them have 0.87.
    is_silent = chunk.no_speech_prob > options.no_speech_threshold and chunk.avg_logprob < LOGPROB_LIMIT
    return is_silent or is_echo


def without_loop(ids: list[int]) -> list[int]:
    """Token ids without the repetitions at their end: a unit that comes three times or more is kept once."""
    n_repeated = 0
    for n in range(1, len(ids) // 3 + 1):
        n_same = next((i for i in range(len(ids) - n) if ids[-1 - i] != ids[-1 - i - n]), len(ids) - n)
        n_repeated = max(n_repeated, n_same if n_same >= 2 * n else 0)
    return ids[: len(ids) - n_repeated]


def hear_again(
    recognizer: common.Recognizer, batches: Iterable[tuple[list[Chunk], int]], options: Options
) -> Iterator[Chunk]:  # fmt: skip
    """The chunks of decoded batches, in order, with two parts in the place of each that the model has not heard whole.

    An accelerator decodes the parts of several batches together: when they fill one, when a recording ends or after
    LONGEST_WAIT batches. Until then the chunks wait here, without their sound. Parts are not cut again: a third try
    made text of noise. Raises DeviceError.
    """
    waiting, n_parts = {}, 0  # chunks, in order, with their parts
    for batch, batch_size in batches:
        at_once = recognizer.model.device.type == "cpu" or any(chunk.is_last for chunk in batch)
        for chunk in batch:
            place_s = None if options.fixed_work else place_to_cut(chunk)
            waiting[chunk] = halve(recognizer, chunk, place_s, options) if place_s else []
            chunk.waveform = None
            n_parts += len(waiting[chunk])
            is_full = n_parts + 2 > batch_size or len(waiting) >= LONGEST_WAIT * batch_size
            if is_full or (chunk is batch[-1] and (at_once or n_parts == 0)):
                recognize(recognizer, list(itertools.chain(*waiting.values())), batch_size, options)
                for whole, parts in waiting.items():
                    whole.recording.n_again += bool(parts)
                    yield from parts if is_heard_better(parts) else [whole]
                waiting, n_parts = {}, 0


def is_heard_better(parts: list[Chunk]) -> bool:
    """Whether the parts of a chunk, if it has any, take its place: not if one of them is left out or unlikely, as the
    whole may then have more of what was said."""
    return bool(parts) and all(not part.left_out and part.avg_logprob >= LOGPROB_LIMIT for part in parts)


def place_to_cut(chunk: Chunk) -> float | None:
    """Where to cut a chunk that the model has not heard whole, in seconds from its start; None where it has.

    After a pause the model may end its text. Then a stretch of sound follows of which no character has a frame, and the
    pause before it is the place. A text that repeats itself, reaches the token limit or is unlikely may lack words too:
    the longest pause is the place or, where there is none, the quietest moment in the middle.
    """
    duration_s = chunk.end - chunk.start
    if chunk.left_out or duration_s < 2 * common.PAUSE_S:
        return None
    stretches = loud_stretches(chunk)
    pauses = [(before[-1] + 1, after[0]) for before, after in itertools.pairwise(stretches)]
    unheard = [stretch[0] for stretch in unheard_stretches(chunk)]
    silent = [i for i, stretch in enumerate(stretches) if stretch[0] in unheard]
    is_doubtful = chunk.looping or chunk.token_limit or chunk.avg_logprob < LOGPROB_LIMIT
    if is_doubtful and not pauses:
        middle = chunk.waveform[: 3 * len(chunk.waveform) // 4]
        place_s = common.quietest_cut(middle, common.SAMPLING_RATE) / common.SAMPLING_RATE
    elif is_doubtful:
        place_s = FRAME_S * sum(max(pauses, key=lambda pause: pause[1] - pause[0])) / 2
    elif silent and pauses:
        place_s = FRAME_S * sum(pauses[max(silent[0] - 1, 0)]) / 2
    else:
        return None
    return place_s if common.PAUSE_S <= place_s <= duration_s - common.PAUSE_S else None  # else a part is a scrap


def loud_stretches(chunk: Chunk) -> list[np.ndarray]:
    """The loud frames of a decoded chunk, in stretches between which there is at least PAUSE_S."""
    return np.split(chunk.loud_frames, np.flatnonzero(np.diff(chunk.loud_frames) * FRAME_S >= common.PAUSE_S) + 1)


def unheard_stretches(chunk: Chunk) -> list[np.ndarray]:
    """Those of them that last for UNHEARD_S and belong to no character of the chunk's text."""
    long = (stretch for stretch in loud_stretches(chunk) if len(stretch) * FRAME_S >= UNHEARD_S)
    return [stretch for stretch in long if np.isin(stretch, chunk.unheard_frames).mean() > 0.9]


def halve(recognizer: common.Recognizer, chunk: Chunk, place_s: float, options: Options) -> list[Chunk]:
    """The two parts of a chunk, ready to be decoded."""
    place, middle_s = round(place_s * common.SAMPLING_RATE), chunk.start + place_s
    first = Chunk(chunk.start, middle_s, chunk.waveform[:place], chunk.recording)
    second = Chunk(middle_s, chunk.end, chunk.waveform[place:], chunk.recording, is_last=chunk.is_last)
    for part in (first, second):
        prepare(recognizer, part, options)
        part.waveform = None
    recognizer.lap("features")
    return [first, second]


# --- Times: cross-attention -> when each character is spoken ---

N_HEADS = 10  # attention heads that are used, at most: the best number in arXiv 2509.09987
FASTEST = 20  # units in a second of speech: twice as many as anyone speaks
LONGEST_UNIT_S = 2.0  # of loud sound; a unit that takes longer shows that the alignment has missed text
SHORT_PAUSE_S = 0.2  # separates units; at 0.3 a sentence that follows after 0.1 s of silence is shown 0.2 s early


@dataclass
class Unit:
    """The smallest piece of a text that is timed: a token, or all tokens of a character, with the signs beside it."""

    tokens: slice  # of the chunk's token_ids; where the decoder looks as it predicts them, they are spoken
    first: int  # the first of its characters in the text
    stop: int  # the character after its last one


def force_texts(
    recognizer: common.Recognizer, encoded: torch.Tensor, token_ids: list[list[int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One forward over the finished texts (teacher forcing), and what it shows of each row of the batch.

    Where the decoder looks in the audio as it predicts each token: attention weights of all heads of all layers,
    (n_heads, n_tokens, n_positions) float32, computed from its queries and keys, because the kernels that compute
    attention do not hand the weights out. And the log-probability of each token, (n_tokens,) float32 on the CPU.
    """
    model, first, outputs = recognizer.model, len(recognizer.initial_tokens) - 1, {}
    layers = [layer.encoder_attn for layer in model.model.decoder.layers]
    with contextlib.ExitStack() as hooks:
        for linear in itertools.chain(*((layer.q_proj, layer.k_proj) for layer in layers)):
            hook = linear.register_forward_hook(lambda linear, _, output: outputs.update({linear: output}))
            hooks.enter_context(hook)
        inputs = common.decoder_inputs(recognizer, token_ids)
        hidden = model.model.decoder(input_ids=inputs, encoder_hidden_states=encoded, use_cache=False).last_hidden_state
    for i, ids in enumerate(token_ids):
        row, weights = slice(first, first + len(ids)), []
        for layer in layers:
            queries, keys = outputs[layer.q_proj][i, row].float() * layer.scaling, outputs[layer.k_proj][i].float()
            queries, keys = (states.unflatten(-1, (layer.num_heads, -1)).transpose(0, 1) for states in (queries, keys))
            weights.append((queries @ keys.mT).softmax(-1))
        logits = model.proj_out(hidden[i, row]).float()
        logits += recognizer.token_mask[[0] + [1] * (len(ids) - 1)]
        chosen = torch.tensor(ids, device=model.device)[:, None]
        logprobs = logits.log_softmax(-1).gather(1, chosen)[:, 0].cpu()
        if logprobs.isnan().any():
            raise common.nan_error(model)
        yield torch.cat(weights), logprobs


def set_times(chunk: Chunk, tokenizer, weights: torch.Tensor) -> None:
    """Set the times of the characters of a chunk whose text is set; weights are as force_texts yields them.

    The units are aligned with the loud frames, so that none falls into a pause. Where align finds nothing to believe,
    the characters are spread evenly over the loud frames.
    """
    units, chunk.token_starts = find_units(tokenizer, chunk.token_ids[:-1], chunk.text)
    frames = chunk.loud_frames
    if len(units) > FASTEST * FRAME_S * len(frames):  # a bang, next to which the speech looks quiet: use all frames
        frames = np.arange(min(weights.shape[-1], math.ceil((chunk.end - chunk.start) / FRAME_S)))
    looks = [weights[:, unit.tokens].mean(1) for unit in units]
    edges = align(torch.stack([*looks, weights[:, -1]], 1), frames) if units else None
    chunk.aligned, times = edges is not None, spread(frames, len(chunk.text))
    if chunk.aligned:
        before, *of_units, after = np.split(frames, edges)
        for unit, own in zip(units, of_units, strict=True):
            times[unit.first : unit.stop] = spread(own, unit.stop - unit.first)
        chunk.unheard_frames = np.append(before, after)
    elif not units:
        chunk.unheard_frames = frames
    chunk.times = chunk.start + times


def find_units(tokenizer, ids: list[int], text: str) -> tuple[list[Unit], set[int]]:
    """The units of a chunk's text in order, which together are all of it, and the characters that a token begins with.

    Punctuation and spaces are not spoken. They belong to the unit before them; but from an opening bracket or a space
    on, to the unit after them. A text of which nothing is spoken has no unit.
    """
    from transformers.models.whisper.tokenization_whisper import bytes_to_unicode

    # In UTF-8 these bytes continue a character, and no others do; a token may begin with one.
    inner = {symbol for byte, symbol in bytes_to_unicode().items() if 0x80 <= byte < 0xC0}
    tokens = map(str, tokenizer.convert_ids_to_tokens(ids))  # None where an id has no token
    borders = [i for i, token in enumerate(tokens) if i == 0 or token[:1] not in inner]
    units, token_starts, stop = [], set(), 0
    for i, j in itertools.pairwise([*borders, len(ids)]):
        first = stop
        token_starts.add(first)
        decoded = tokenizer.decode(ids[i:j], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for character in re.sub(common.CONTROL, " ", decoded):
            stop += character == text[stop : stop + 1]  # others are spaces that the text has lost
        if re.search(r"\w", text[first:stop]):
            units.append(Unit(slice(i, j), first, stop))
    for unit, following in itertools.pairwise(units):
        signs = range(unit.stop, following.first)
        unit.stop = following.first = next((i for i in signs if text[i] in NOT_LAST + " "), following.first)
    if units:
        units[0].first, units[-1].stop = 0, len(text)
    return units, token_starts


def align(looks: torch.Tensor, frames: np.ndarray) -> np.ndarray | None:
    """The edges of the units by dynamic time warping, (n_units + 1,) int64: unit i has frames[edges[i] : edges[i + 1]].

    looks are (n_heads, n_units + 1, n_positions), and only the heads that look most sharply count: those with the
    largest L2 norms of rows and columns (arXiv 2509.09987). Every unit gets at least one frame. The last row is the end
    of the text: it gets what sounds before and after the speech. None where the result is not to be believed, because a
    unit takes longer than LONGEST_UNIT_S or most units take a single frame.
    """
    import librosa

    n_heads, n_rows, _ = looks.shape
    if n_rows > len(frames):
        return None
    looks = looks[:, :, frames]
    sharpness = looks.norm(dim=1).sum(-1) + looks.norm(dim=2).sum(-1)
    looks = looks[sharpness.topk(max(1, min(N_HEADS, n_heads // 4))).indices]
    matrix = torch.nn.functional.normalize(looks, dim=1).mean(0).cpu().numpy()
    _, steps = librosa.sequence.dtw(C=-matrix, step_sizes_sigma=np.array([[1, 1], [0, 1]]))
    edges, looks = np.searchsorted(steps[::-1, 0], np.arange(n_rows)), looks.mean(0).cpu().numpy()
    for pause in np.flatnonzero(np.diff(frames) * FRAME_S >= SHORT_PAUSE_S) + 1:  # the first frame after each
        if edges[0] < pause < edges[-1] and pause not in edges:  # a unit stays on the side of it where it looks most
            unit = np.searchsorted(edges, pause) - 1
            peak = edges[unit] + looks[unit, edges[unit] : edges[unit + 1]].argmax()
            edges[unit + 1 if peak < pause else unit] = pause
    counts = np.diff(edges)
    return None if counts.max() * FRAME_S > LONGEST_UNIT_S or np.mean(counts == 1) > 0.5 else edges


def spread(frames: np.ndarray, n: int) -> np.ndarray:
    """Start and end, in seconds from the start of the chunk, of n characters spread evenly over frames: (n, 2)."""
    edges = np.linspace(0, len(frames), n + 1)
    first, last = np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int) - 1
    return FRAME_S * np.stack([frames[first] + edges[:-1] - first, frames[last] + edges[1:] - last], 1)


# --- Cues: texts and times -> what people can read ---

LONG_PAUSE_S = 0.7  # ends a cue
LINE_CELLS, CUE_LINES = 16, 2  # full-width characters in a line of a subtitle, and lines of it (Netflix: 13 to 16, 2)
SHORTEST_CUE_S, LONGEST_CUE_S = 1.0, 7.0
DEVOICED_END_S = 0.15  # added to the end of a cue: a devoiced last vowel is too faint to be found in noise
SENTENCE_END = r"[。！？!?]+[。！？!?」』）】〉》”\"')\]]*|(?<=\w\w)(?<![A-Z]\w)[.]+[\"')\]”]*(?=\s|$)"  # not U.S.
# Kinsoku (JIS X 4051), as far as it matters to subtitles
NOT_FIRST = "、。，．・：；？！」』）】〉》ー々ゝゞぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ…‥〜～,.:;?!)]}%”’ﾞﾟｰ､｡｣･"
NOT_LAST = "「『（【〈《([{“‘｢\u200d"  # a zero-width joiner too
JOINED = ("Mn", "Mc", "Me", "Cf", "Sk")  # Unicode categories of what changes the character before
SPACED = r"[!-\u0dff\u10a0-\u1cff\u1e00-\u2fff\uac00-\ud7a3]"  # of scripts that put spaces between words
PHRASE_END = "(?![おごりしきけち])[ぁ-ん][^ぁ-ん]|を."  # hiragana before another script, but not in お|客 or 売り|上げ
COMPOUND = r"[\u3400-\u9fff々]{2}|[ァ-ヴー]{2}"  # two kanji or two katakana


@dataclass
class Cue:
    """A sentence, or as much of one as can be read at a time; seconds from the beginning of the recording."""

    start: float
    end: float
    text: str  # a part of its chunk's text, with the space that it may begin with
    lines: list[str]
    words: list[tuple[str, float, float]]  # text, start, end
    chunk: Chunk


def cues_of(recording: Recording) -> list[Cue]:
    """The cues of a recording, together all of its text."""
    pieces = []  # of texts: chunk, first character, the one behind the last, break qualities
    for chunk in (chunk for chunk in recording.chunks if not chunk.left_out):
        qualities = break_qualities(chunk.text, chunk.token_starts)
        for sentence in sentences(chunk.text):
            pieces += [(chunk, *piece, qualities) for piece in split_sentence(chunk, *sentence, qualities)]
    next_starts = [*(chunk.times[first, 0] for chunk, first, *_ in pieces[1:]), recording.duration]
    return [make_cue(*piece, next_start) for piece, next_start in zip(pieces, next_starts, strict=False)]


def make_cue(chunk: Chunk, first: int, stop: int, qualities: list[int], next_start: float) -> Cue:
    """The cue of a chunk's text from first to before stop, which ends before the next one starts."""
    starts, ends = chunk.times.T
    end = max(ends[stop - 1] + DEVOICED_END_S, starts[first] + SHORTEST_CUE_S)
    end = min(end, starts[first] + LONGEST_CUE_S, next_start)
    edges = [first, *(i for i in range(first + 1, stop) if qualities[i] > 1), stop]
    words = [(chunk.text[i:j], min(starts[i], end), min(ends[j - 1], end)) for i, j in itertools.pairwise(edges)]
    text = chunk.text[first:stop]
    return Cue(starts[first], end, text, break_lines(text, qualities[first:stop]), words, chunk)


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text begin and end; punctuation alone is no sentence."""
    edges = [0]
    for match in re.finditer(SENTENCE_END, text):
        done, rest = text[edges[-1] : match.end()], text[match.end() :]
        if re.search(r"\w", done) and re.search(r"\w", rest) and rest.lstrip()[0] not in NOT_FIRST:
            edges.append(match.end())
    return list(itertools.pairwise([*edges, len(text)])) if text else []


def break_qualities(text: str, token_starts: set[int]) -> list[int]:
    """How good a place to break a text is before each of its characters: 0 never, 1 within a word, 2 between two kanji
    or katakana, 3 after another token, 4 after a phrase, 5 at a comma or space."""
    qualities = [0] * len(text)
    for i, (before, after) in enumerate(itertools.pairwise(text), start=1):
        first = text[i:].lstrip()[:1]
        if before.isspace() or before in NOT_LAST or first in NOT_FIRST or unicodedata.category(after) in JOINED:
            continue
        if after.isspace() or (before in "、，,;；：" and not after.isdigit()):
            qualities[i] = 5
        elif i not in token_starts or (re.fullmatch(SPACED, before) and re.fullmatch(SPACED, after)):
            qualities[i] = 1
        else:
            pair = before + after
            qualities[i] = 4 if re.fullmatch(PHRASE_END, pair) else 2 if re.fullmatch(COMPOUND, pair) else 3
    return qualities


def split_sentence(chunk: Chunk, first: int, stop: int, qualities: list[int]) -> list[tuple[int, int]]:
    """Cut a chunk's text from first to before stop into pieces that fit a cue: CUE_LINES of LINE_CELLS, LONGEST_CUE_S.

    Cuts are made at long pauses first, then near the middle: best at a pause, after a comma, a phrase or a token.
    """
    starts, ends = chunk.times.T
    places = [i for i in range(first + 1, stop) if chunk.text[first:i].strip() and chunk.text[i:stop].strip()]
    pauses = {i: starts[i] - ends[i - 1] for i in places}
    long = [i for i in places if pauses[i] >= LONG_PAUSE_S and qualities[i] > 1]
    n_lines = len(break_lines(chunk.text[first:stop], qualities[first:stop]))
    fits = n_lines <= CUE_LINES and ends[stop - 1] - starts[first] <= LONGEST_CUE_S
    if not places or (fits and not long):
        return [(first, stop)]

    def goodness(i: int) -> float:
        """How good it is to cut before a character: its quality, up to 3 for a pause of 1 s or more, and down to -6 at
        the ends of the text. The two weights have no source."""
        return qualities[i] + 3 * min(pauses[i], 1) - 6 * ((2 * i - first - stop) / (stop - first)) ** 2

    cut = max(long or [i for i in places if qualities[i]] or places, key=goodness)
    return [*split_sentence(chunk, first, cut, qualities), *split_sentence(chunk, cut, stop, qualities)]


def break_lines(text: str, qualities: list[int]) -> list[str]:
    """The lines of a text, as few as there can be, broken at the best places; qualities are those of its characters."""
    lines, first = [], 0
    while (rest := cells(text[first:])) > LINE_CELLS:
        fitting = [i for i in range(first + 1, len(text)) if cells(text[first:i]) <= LINE_CELLS]
        few = [i for i in fitting if cells(text[i:]) <= LINE_CELLS * (math.ceil(rest / LINE_CELLS) - 1)]
        places = [i for i in few if qualities[i]] or [i for i in fitting if qualities[i]] or fitting[-1:]
        cut = max(places, key=lambda i: (qualities[i], -abs(2 * i - first - len(text))))
        lines.append(text[first:cut].strip())
        first = cut
    return [*lines, text[first:].strip()]


def cells(text: str) -> float:
    """The width of a text without the spaces around it, in full-width characters."""
    return sum(1 if unicodedata.east_asian_width(character) in "WF" else 0.5 for character in text.strip())


# --- Output ---

UNSPACED_LANGUAGES = ("ja", "zh", "yue", "th", "lo", "my")  # as in openai/whisper


def deliver(recording: Recording, outputs: list[str], stdout_format: str, language: str) -> None:
    """Write a recording's output files, or to stdout where it has none; what fails becomes its error."""
    if not outputs:
        common.write_stdout(render(recording, stdout_format, language))
    errors = []
    for output in outputs:
        try:
            write_whole(output, render(recording, output.rpartition(".")[2], language))
        except OSError as error:
            errors.append(f"cannot write {output}: {error.strerror}")
    recording.error = "; ".join(errors) or None


def write_whole(path: str, content: str) -> None:
    """Write a UTF-8 file so that it is there whole or not at all, however the program ends. Raises OSError."""
    path = os.path.realpath(path)  # a link stays one
    # os.replace would replace it all the same, and root may write whatever its owner may not.
    if os.path.exists(path) and not (os.access(path, os.W_OK) and os.stat(path).st_mode & 0o200):
        raise OSError(None, "it is write-protected, and stays as it is")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(16)}.part")  # no other process has this one
    try:
        with open(temporary, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else it may be there and empty after a power cut
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def render(recording: Recording, extension: str, language: str) -> str:
    """The content of an output file, in the format of openai/whisper's writers; language is that of the text.

    "line" is the path, a tab and the whole text.
    """
    if extension == "line":
        return f"{common.one_line(recording.path)}\t{full_text(recording, language)}\n"
    if extension == "txt":
        return "".join(map(plain_text, recording.chunks))
    cues = cues_of(recording)
    if extension == "tsv":
        rows = (f"{round(1000 * cue.start)}\t{round(1000 * cue.end)}\t{cue.text.strip()}\n" for cue in cues)
        return "start\tend\ttext\n" + "".join(rows)
    if extension == "json":
        return json.dumps(json_content(recording, cues, language), ensure_ascii=False) + "\n"
    srt = extension == "srt"
    mark, content = "," if srt else ".", "" if srt else "WEBVTT\n\n"
    for i, cue in enumerate(cues, start=1):
        times = f"{timestamp(cue.start, mark, srt)} --> {timestamp(cue.end, mark, srt)}"
        shown = "\n".join(cue.lines)
        shown = shown.replace("-->", "->") if srt else html.escape(shown, quote=False)
        content += (f"{i}\n" if srt else "") + f"{times}\n{shown}\n\n"
    return content


def plain_text(chunk: Chunk) -> str:
    """A line for each sentence of a chunk, none where it is left out."""
    pieces = [] if chunk.left_out else sentences(chunk.text)
    return "".join(f"{chunk.text[first:stop].strip()}\n" for first, stop in pieces)


def timestamp(seconds: float, decimal_mark: str, hours_always: bool) -> str:
    """HH:MM:SS and milliseconds; unless hours_always, the hours only where there are some."""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    prefix = f"{hours:02d}:" if hours or hours_always else ""
    return f"{prefix}{minutes:02d}:{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"


def full_text(recording: Recording, language: str) -> str:
    """The text of all chunks in one line."""
    texts = (chunk.text for chunk in recording.chunks if not chunk.left_out and chunk.text)
    return ("" if language in UNSPACED_LANGUAGES else " ").join(texts)


def json_content(recording: Recording, cues: list[Cue], language: str) -> dict:
    """What openai/whisper's JSON has, and what is known of the chunk that a segment comes from; to three decimals."""
    segments = [
        {
            "id": i, "start": cue.start, "end": cue.end, "text": cue.text,
            "words": [{"word": word, "start": start, "end": end} for word, start, end in cue.words],
            "times": "aligned" if cue.chunk.aligned else "proportional",
            "avg_logprob": cue.chunk.avg_logprob, "no_speech_prob": cue.chunk.no_speech_prob,
            "compression_ratio": cue.chunk.compression_ratio, "token_limit": cue.chunk.token_limit,
            "looping": cue.chunk.looping,
        }
        for i, cue in enumerate(cues)
    ]  # fmt: skip
    left_out = [
        {name: getattr(chunk, name) for name in ("start", "end", "text", "avg_logprob", "no_speech_prob")}
        for chunk in recording.chunks if chunk.left_out
    ]  # fmt: skip
    unheard = [
        {"start": chunk.start + FRAME_S * stretch[0], "end": min(chunk.end, chunk.start + FRAME_S * (stretch[-1] + 1))}
        for chunk in recording.chunks if not chunk.left_out
        for stretch in unheard_stretches(chunk)
    ]  # fmt: skip
    content = {
        "text": full_text(recording, language), "segments": segments, "language": language,
        "duration": recording.duration, "path": recording.path, "warnings": recording.warnings, "left_out": left_out,
        "unheard": unheard,
    }  # fmt: skip
    return json.loads(json.dumps(content), parse_float=lambda number: round(float(number), 3))


if __name__ == "__main__":
    sys.exit(main())
