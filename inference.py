"""Transcribe Japanese recordings with kotoba-whisper-v2.0 on an Ascend NPU or a CPU.

    python3 inference.py --audio meeting.mp3
    python3 inference.py --audio recordings/ -o transcripts/ -f srt
    torchrun --nproc-per-node 8 inference.py --audio corpus/ -o out/ --skip-existing

The transcript goes to stdout or to files in --output-dir, and everything else to
stderr.

Exit status: 0 every recording was transcribed; 1 some were not; 2 wrong options,
or a device or model that cannot be used or that fails on the way; 130
interrupted; 141 the reader of stdout has gone.
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
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import common  # before torch: it sets how that is imported
import numpy as np
import soundfile
import torch
from tqdm import tqdm

AUDIO_EXTENSIONS = (
    ".3g2", ".3ga", ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".asf", ".au", ".avi", ".awb",
    ".caf", ".dss", ".dts", ".eac3", ".f4v", ".flac", ".flv", ".m2t", ".m2ts", ".m4a", ".m4b", ".m4v", ".mka", ".mkv",
    ".mov", ".mp2", ".mp3", ".mp4", ".mpc", ".mpeg", ".mpg", ".mpga", ".mts", ".mxf", ".oga", ".ogg", ".ogv", ".opus",
    ".qt", ".ra", ".rf64", ".rm", ".snd", ".spx", ".ts", ".tta", ".vob", ".voc", ".w64", ".wav", ".wave", ".weba",
    ".webm", ".wma", ".wmv", ".wv",
)  # fmt: skip
FORMATS = ("txt", "srt", "vtt", "tsv", "json")
UNSPACED_LANGUAGES = ("ja", "zh", "yue", "th", "lo", "my")  # as in openai/whisper
COMPRESSION_RATIO_LIMIT = 2.4  # openai/whisper's; none of 14,746 true outputs of this model exceeds 2.12
NO_SPEECH_THRESHOLD = 0.7  # openai/whisper's 0.6 lost 6 whole sentences in 1162 inputs, this one 1 (tests/README.md)
QUIETER_DB = 30  # what is more than this below the loudest part of a chunk is a pause,
NOISE_DB, VOICE_DB = 8, 12  # and what is less than NOISE_DB above the noise, and more than VOICE_DB below the loudest
FRAME_S = 0.02  # of the encoder's output
CLICK_FRAMES = 5  # of which most are loud where someone speaks: keys and gusts are shorter
N_HEADS = 10  # attention heads that are used, at most: the best number in arXiv 2509.09987
FASTEST = 20  # tokens in a second of speech: twice as many as anyone speaks
LONGEST_TOKEN_S = 2.0  # of loud sound; a longer token shows that the alignment has missed text
SHORT_PAUSE_S = 0.2  # ends a token; at 0.3 a sentence that follows after 0.1 s of silence is shown 0.2 s early
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
LOG_EVERY_S = 60  # seconds between lines on progress where stderr is no terminal
START_TIMEOUT = timedelta(minutes=1)  # in which the processes of torchrun, which starts them together, find each other
END_TIMEOUT = timedelta(days=30)  # in which all of them have ended


@dataclass(eq=False)
class Recording:
    """One input file and what became of it: its chunks in order, what may be lost, and why it failed if it did."""

    path: str
    chunks: list["Chunk"] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def duration(self) -> float:
        """Its length in seconds."""
        return self.chunks[-1].end if self.chunks else 0.0

    def warn(self, message: str) -> None:
        """Keep a warning, and write it to stderr."""
        self.warnings.append(message)
        common.notice(f"warning: {self.path}: {message}")


@dataclass(eq=False)
class Chunk:
    """A stretch of a recording that is decoded at once; start and end in seconds from the recording's beginning."""

    recording: Recording
    start: float
    end: float
    is_last: bool = False  # of its recording
    features: torch.Tensor | None = None  # input_features, until it is decoded
    loud_frames: np.ndarray | None = None  # as find_loud_frames gives them
    # What set_text finds out:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # of the text, and the end of the text
    no_speech_prob: float | None = None  # None where it was not decoded
    compression_ratio: float = 0.0
    left_out: bool = True  # not in the text: it is steady and was not decoded, or the model finds no speech in it
    token_limit: bool = False  # decoding ended at the token limit: text may be missing
    looping: bool = False  # the decoder repeated itself; the text keeps the first turn
    # What set_times finds out:
    token_starts: set[int] = field(default_factory=set)  # the characters of the text that a token begins with
    times: np.ndarray | None = None  # start and end of each character, from the recording's beginning, (n, 2) in s
    aligned: bool = False  # the times are from the decoder's attention


# --- Command ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input").add_argument
    add("--audio", nargs="+", action="extend", required=True, metavar="PATH",
        help="Audio or video files, or folders to search for them.")  # fmt: skip
    add("--language", default="ja", metavar="CODE", help="A language that the model knows. (default: %(default)s)")
    add("--task", choices=["transcribe", "translate"], default="transcribe", help="translate gives English or, with "
        "kotoba's bilingual model, the language in --language. (default: %(default)s)")  # fmt: skip
    common.add_model_options(parser)
    add = parser.add_argument_group("batches and silence").add_argument
    add("--batch-size", type=common.number(int, 1), metavar="N",
        help="How many chunks are decoded together, across recordings too. (default: 16, on a CPU 8)")  # fmt: skip
    add("--no-speech-threshold", type=common.number(float, 0, 1), default=NO_SPEECH_THRESHOLD, metavar="P",
        help="Leave a chunk out where the model's probability that nobody speaks is above P; 1 keeps all, "
        "steady sound too. (default: %(default)s)")  # fmt: skip
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", "-o", metavar="DIR", help="Write files into this folder. (default: write to stdout)")
    add("--output-format", "-f", choices=[*FORMATS, "all"], default="txt", help="all, and srt, vtt and tsv of several "
        "recordings, need --output-dir. (default: %(default)s)")  # fmt: skip
    add("--skip-existing", action="store_true", help="Skip the recordings whose outputs are all in --output-dir.")
    parser.set_defaults(local_rank=0)  # among the processes of torchrun on this machine
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    several = torch.distributed.is_torchelastic_launched()
    return common.run_script(run_with_others if several else run, parse_arguments(argv))


def run_with_others(args: argparse.Namespace) -> int:
    """Run the command as one of torchrun's processes; the worst exit status of all.

    All wait for the last, because torchrun stops the others when one fails. Raises SetupError.
    """
    try:
        args.local_rank = int(os.environ["LOCAL_RANK"])
        torch.distributed.init_process_group("gloo", timeout=START_TIMEOUT)
        everyone = torch.distributed.new_group(timeout=END_TIMEOUT)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        remedy = "start with torchrun, or unset TORCHELASTIC_RUN_ID, which an earlier torchrun has left"
        raise common.SetupError(f"torchrun's processes do not find each other ({common.first_line(error)}): {remedy}"
                                ) from error  # fmt: skip
    status = torch.tensor(common.run_script(run, args))
    try:
        torch.distributed.all_reduce(status, torch.distributed.ReduceOp.MAX, everyone)
    except RuntimeError as error:
        common.notice(f"error: another process did not come to its end ({common.first_line(error)})")
        return int(status) or 1
    torch.distributed.destroy_process_group()
    return int(status)


def run(args: argparse.Namespace) -> int:
    """Transcribe what the arguments name; the exit status. Raises SetupError."""
    rank, world_size = 0, 1
    if torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for option, given in (("--skip-existing", args.skip_existing), ("more than one process", world_size > 1)):
        if given and args.output_dir is None:
            raise common.SetupError(f"{option} needs --output-dir")
    inputs, failed = find_audio(args.audio)
    args.many = len(inputs) + len(failed) > 1
    outputs, unwritable = plan_outputs(inputs, args)
    args.is_bilingual = "bilingual" in args.model
    args.text_language = args.language if args.task == "transcribe" or args.is_bilingual else "en"
    totals = Counter()
    for recording in [*failed, *unwritable] if rank == 0 else []:
        count(recording, totals)
    # The longest first, so that all processes have about the same to do.
    mine = sorted(outputs, key=os.path.getsize, reverse=True)[rank::world_size] if world_size > 1 else list(outputs)
    paths = [path for path in mine if not (args.skip_existing and all(map(os.path.isfile, outputs[path])))]
    totals["skipped"] = len(mine) - len(paths)
    if paths:
        transcribe_files(paths, outputs, totals, args)
    elif totals["skipped"] or world_size > 1:
        common.notice(closing_line(totals))
    return int(totals["failed"] > 0)


def transcribe_files(paths: list[str], outputs: dict[str, list[str]], totals: Counter, args) -> None:
    """Load the model, transcribe recordings and write their outputs. Raises SetupError, also where some are left."""
    started_s = time.perf_counter()
    recognizer = load(args)
    loaded_s, failure, n_left = time.perf_counter(), None, len(paths)
    with progress_bar(paths) as bar:
        try:
            for recording in transcribe(recognizer, paths, args, progress(bar, totals, len(paths))):
                if recording.error is None:
                    deliver(recording, outputs[recording.path], args)
                count(recording, totals)
                n_left -= 1
        except common.DeviceError as error:
            failure = error
    common.notice(closing_line(totals, loaded_s - started_s, time.perf_counter() - loaded_s, recognizer.model))
    if failure:
        remedy = "a run with --output-dir and --skip-existing goes on with them and with those that failed"
        raise common.SetupError(f"{failure}; recordings not reached: {n_left} ({remedy})")


def load(args: argparse.Namespace) -> common.Recognizer:
    """The model on the device that the arguments name. Raises SetupError."""
    if args.task == "translate" and not args.is_bilingual:
        common.notice("kotoba-whisper-v2.0 was trained for Japanese transcription only; to translate, use --model "
                      "kotoba-tech/kotoba-whisper-bilingual-v1.0 with --language en (or ja, from English)")  # fmt: skip
    device = common.select_device(args.device, args.local_rank)
    if args.output_format != "txt":
        common.import_librosa()  # here, where it counts as loading and a failure ends the run
    return common.load_model(args.model, device, common.select_dtype(args.dtype, device), args.language, args.task)


def progress_bar(paths: list[str]) -> tqdm:
    """A bar in seconds of audio on a terminal, with a total where one recording is all and libsndfile knows it."""
    total = None
    if len(paths) == 1 and sys.stderr is not None and sys.stderr.isatty():
        with contextlib.suppress(soundfile.SoundFileError, OSError), open(paths[0], "rb") as file:
            total = soundfile.info(file).duration
    done = "{n:.0f} s of audio" if total is None else "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of audio"
    off = torch.distributed.is_initialized() or None  # None: where stderr is no terminal
    return tqdm(total=total, disable=off, unit=" s", bar_format=done + " [{elapsed}, {rate_noinv_fmt}]")


def progress(bar: tqdm, totals: Counter, n_recordings: int) -> Callable[[float], None]:
    """A function that takes the seconds of audio done since its last call and shows them, on the bar or, without a
    terminal, in a line every LOG_EVERY_S."""
    started_s = said_s = time.perf_counter()
    done_s, n_before = 0.0, totals["recordings"]  # those that failed before anything was read

    def update(seconds: float) -> None:
        """Show that so many seconds more are done."""
        nonlocal said_s, done_s
        done_s += seconds
        bar.update(seconds)
        if bar.disable and (now_s := time.perf_counter()) - said_s >= LOG_EVERY_S:
            said_s = now_s
            n_done = totals["recordings"] - n_before
            common.notice(f"{done_s:.0f} s of audio done, {n_done} of {n_recordings} recordings, "
                          f"{done_s / (now_s - started_s):.3g} times real time")  # fmt: skip

    return update


def count(recording: Recording, totals: Counter) -> None:
    """Add a recording to the totals, and say it where it failed or has no speech."""
    totals["recordings"] += 1
    totals["warnings"] += len(recording.warnings)
    if recording.error is not None:
        totals["failed"] += 1
        common.notice(f"error: {recording.path}: {recording.error}")
        return
    totals["audio_s"] += recording.duration
    for chunk in recording.chunks:
        totals["left_out"] += chunk.left_out
        totals["token_limit"] += chunk.token_limit and not chunk.left_out
        totals["looping"] += chunk.looping and not chunk.left_out
    if all(chunk.left_out for chunk in recording.chunks):
        probs = [chunk.no_speech_prob for chunk in recording.chunks if chunk.no_speech_prob is not None]
        why = f"the model gives that a probability of {min(probs):.2f} or more" if probs else "nothing in it moves"
        common.notice(f"{recording.path}: no speech: {why}")


def closing_line(totals: Counter, load_s: float = 0.0, taken_s: float = 0.0, model=None) -> str:
    """How much was done, how fast and on what, and the counts that are not zero."""
    n_recordings, audio_s = totals["recordings"] + totals["skipped"], totals["audio_s"]
    line = f"{n_recordings} recording{'s' * (n_recordings != 1)}"
    line += "".join(f", {totals[name]} {name}" for name in ("failed", "skipped") if totals[name])
    if model is not None:
        line += f", {audio_s:.1f} s of audio in {taken_s:.1f} s ({audio_s / taken_s:.3g} times real time) on "
        line += f"{model.device} in {common.dtype_name(model.dtype)}, loaded in {load_s:.1f} s"
    for name, noun, rest in (("warnings", "warning", ""), ("left_out", "chunk", " without speech"),
                             ("token_limit", "chunk", " cut off at the token limit"), ("looping", "chunk", " looping")):
        line += f"; {totals[name]} {noun}{'s' * (totals[name] != 1)}{rest}" if totals[name] else ""
    return line


# --- Inputs and outputs ---


def find_audio(arguments: list[str]) -> tuple[dict[str, str], list[Recording]]:
    """The files to transcribe, each with its path below the folder given, and those that cannot be.

    A folder is searched recursively, links to folders too. A file that is named twice, or a link to it, counts once.
    """
    found, failed = {}, []  # found: real path to path and relative path
    for argument in arguments:
        here, searched, unreadable = {argument: os.path.basename(argument)}, set(), []
        if os.path.isdir(argument):
            here = {}
            for folder, folders, names in os.walk(argument, onerror=unreadable.append, followlinks=True):
                folders.sort()
                if (real := os.path.realpath(folder)) in searched:  # a link to where the search has been
                    folders.clear()
                    continue
                searched.add(real)
                paths = (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))
                here |= {p: os.path.relpath(p, argument) for p in paths if p.lower().endswith(AUDIO_EXTENSIONS)}
            failed += [Recording(error.filename, error=error.strerror) for error in unreadable]
            if not here and not unreadable:
                failed.append(Recording(argument, error=f"no audio in this folder ({' '.join(AUDIO_EXTENSIONS)})"))
        for path, relative in here.items():
            try:
                common.check_file(path)
                found.setdefault(os.path.realpath(path), (path, relative))
            except common.AudioError as error:
                failed.append(Recording(path, error=str(error)))
    return dict(found.values()), failed


def output_names(inputs: dict[str, str]) -> dict[str, str]:
    """A name for the outputs of each file: a for a.wav; a.wav where there is an a.mp3 as well; else the whole path."""
    names = {
        path: [os.path.splitext(relative)[0], relative, os.path.abspath(path).lstrip(os.sep)]
        for path, relative in inputs.items()
    }
    while len(counts := Counter(choices[0] for choices in names.values())) < len(names):
        for choices in names.values():
            if counts[choices[0]] > 1 and len(choices) > 1:
                choices.pop(0)
    return {path: choices[0] for path, choices in names.items()}


def plan_outputs(inputs: dict[str, str], args: argparse.Namespace) -> tuple[dict[str, list[str]], list[Recording]]:
    """The paths of each input's output files, none where the text goes to stdout; and the inputs that cannot have any.

    Makes the folder that they are for. Raises SetupError where it cannot, or where an output is one of the inputs.
    """
    if args.output_dir is None:
        if args.output_format == "all" or (args.many and args.output_format not in ("txt", "json")):
            raise common.SetupError(f"--output-format {args.output_format} needs --output-dir")
        return {path: [] for path in inputs}, []
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise common.SetupError(f"--output-dir {args.output_dir}: {error.strerror}") from error
    if not os.access(args.output_dir, os.W_OK | os.X_OK):
        raise common.SetupError(f"--output-dir {args.output_dir}: no permission to write in this folder")
    owners, outputs, failed = {os.path.realpath(path): path for path in inputs}, {}, []
    for path, name in output_names(inputs).items():
        extensions = FORMATS if args.output_format == "all" else [args.output_format]
        files = [os.path.join(args.output_dir, f"{name}.{extension}") for extension in extensions]
        try:
            for output in files:
                if owner := owners.get(os.path.realpath(output)):
                    raise common.SetupError(f"--output-dir: {output} would overwrite {owner}: name another place")
                with contextlib.suppress(FileNotFoundError):
                    os.lstat(output)
            outputs[path] = files
        except OSError as error:  # the name is too long with its extension, or a folder of it is a file
            failed.append(Recording(path, error=f"cannot write {output}: {error.strerror}"))
    return outputs, failed


# --- Recognition: recordings -> chunks -> batches -> texts ---


def transcribe(
    recognizer: common.Recognizer, paths: Iterable[str], args: argparse.Namespace,
    on_progress: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Recording]:  # fmt: skip
    """The recordings, in order, each when its last chunk has its text; on_progress is told the seconds of audio done
    since its last call.

    A batch may have chunks of several recordings, and while an accelerator decodes one batch the next is read. Where
    the device fails, nothing that it returns can be believed: all recordings in the batch come with an error, and then
    DeviceError is raised.
    """
    device = recognizer.model.device
    batch_size = fitting = args.batch_size or common.default_batch_size(device)
    chunks = read_recordings(paths, recognizer.extractor, args)
    if device.type != "cpu":  # where the reader and the model would compete for the cores: half the speed
        chunks = ahead(chunks, batch_size)
    for batch in batches(chunks, batch_size):
        try:
            fitting = recognize(recognizer, [chunk for chunk in batch if chunk.features is not None], fitting, args)
        except common.DeviceError as error:
            for recording in dict.fromkeys(chunk.recording for chunk in batch):
                recording.error = recording.error or str(error)
                yield recording
            raise
        for chunk in batch:
            chunk.recording.chunks.append(chunk)
            on_progress(chunk.end - chunk.start)
            if chunk.is_last:
                yield chunk.recording


def read_recordings(paths: Iterable[str], extractor, args: argparse.Namespace) -> Iterator[Chunk]:
    """The chunks of each recording, at least one. Whatever goes wrong while it is read is the recording's error."""
    for path in paths:
        recording, chunk = Recording(path), None
        try:
            for start, end, waveform in common.read_chunks(path, args.chunk_length, recording.warn):
                if chunk is not None:
                    yield chunk
                chunk = Chunk(recording, start, end)
                if args.no_speech_threshold == 1 or not common.is_steady(waveform, common.SAMPLING_RATE):
                    chunk.features = common.extract_features(extractor, waveform)
                    if args.output_format != "txt":  # which has no times
                        chunk.loud_frames = find_loud_frames(waveform)
        except common.SetupError:  # librosa cannot be loaded: the same for all recordings
            raise
        except common.AudioError as error:
            recording.error = str(error)
        except Exception as error:
            recording.error = f"cannot be read ({type(error).__name__}: {common.first_line(error)})"
        if chunk is None:
            chunk = Chunk(recording, 0.0, 0.0)
        chunk.is_last = True
        yield chunk


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


def batches(chunks: Iterable[Chunk], batch_size: int) -> Iterator[list[Chunk]]:
    """Lists of chunks: each has batch_size chunks with features, and the chunks without features between them."""
    batch, n_features = [], 0
    for chunk in chunks:
        if chunk.features is not None and n_features == batch_size:
            yield batch
            batch, n_features = [], 0
        batch.append(chunk)
        n_features += chunk.features is not None
    yield batch


def recognize(recognizer: common.Recognizer, chunks: list[Chunk], batch_size: int, args: argparse.Namespace) -> int:
    """Set the texts and, where the output format has them, the times of chunks; returns the batch size that fitted.

    Where the device is out of memory the batch is halved. Raises DeviceError.
    """
    device, n_done, before = recognizer.model.device, 0, batch_size
    while n_done < len(chunks):
        batch = chunks[n_done : n_done + batch_size]
        try:
            token_ids, no_speech_probs, encoded = common.generate(
                recognizer, [chunk.features for chunk in batch], args.max_new_tokens
            )
            for chunk, ids, no_speech_prob in zip(batch, token_ids, no_speech_probs, strict=True):
                set_text(chunk, recognizer.tokenizer, ids, no_speech_prob, args.no_speech_threshold)
            if args.output_format != "txt":
                with torch.inference_mode(), common.device_errors(device):
                    weights = cross_attention(recognizer, encoded, [chunk.token_ids for chunk in batch])
                    for chunk, of_chunk in zip(batch, weights, strict=True):
                        set_times(chunk, recognizer.tokenizer, of_chunk)
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
    for chunk in chunks:
        chunk.features = None
    return batch_size


def set_text(chunk: Chunk, tokenizer, ids: list[int], no_speech_prob: float, no_speech_threshold: float) -> None:
    """Set the text of a chunk and its marks, from what was decoded."""
    end = tokenizer.eos_token_id
    data = tokenizer.decode(ids, skip_special_tokens=True).strip().encode()
    chunk.compression_ratio = len(data) / len(zlib.compress(data))
    chunk.looping = chunk.compression_ratio > COMPRESSION_RATIO_LIMIT
    chunk.token_limit = ids[-1] != end
    chunk.no_speech_prob = no_speech_prob
    chunk.left_out = no_speech_prob > no_speech_threshold
    ids = [i for i in ids if i != end]
    chunk.token_ids = [*(without_loop(ids) if chunk.looping else ids), end]
    chunk.text = re.sub(common.CONTROL, " ", tokenizer.decode(chunk.token_ids, skip_special_tokens=True)).strip()


def without_loop(ids: list[int]) -> list[int]:
    """Token ids without the repetitions at their end: a unit that comes three times or more is kept once."""
    n_repeated = 0
    for n in range(1, len(ids) // 3 + 1):
        run = next((i for i in range(len(ids) - n) if ids[-1 - i] != ids[-1 - i - n]), len(ids) - n)
        n_repeated = max(n_repeated, run if run >= 2 * n else 0)
    return ids[: len(ids) - n_repeated]


# --- Times: cross-attention -> when each character is spoken ---


def cross_attention(recognizer: common.Recognizer, encoded, token_ids: list[list[int]]) -> Iterator[torch.Tensor]:
    """Where the decoder looks in the audio as it predicts each token: attention weights of all heads of all layers,
    (n_heads, n_tokens, n_positions) float32, for one row of the batch after the other.

    They are computed from the queries and keys of one forward over the finished texts, because the kernels that
    compute attention do not hand its weights out.
    """
    decoder, first = recognizer.model.model.decoder, common.PROMPT_LENGTH - 1
    layers, outputs = [layer.encoder_attn for layer in decoder.layers], []
    with contextlib.ExitStack() as hooks:
        for linear in itertools.chain(*((layer.q_proj, layer.k_proj) for layer in layers)):
            hooks.enter_context(linear.register_forward_hook(lambda module, args, output: outputs.append(output)))
        inputs = common.decoder_inputs(recognizer, token_ids)
        decoder(input_ids=inputs, encoder_hidden_states=encoded, use_cache=False)
    for i, ids in enumerate(token_ids):
        weights = []
        for layer, queries, keys in zip(layers, outputs[::2], outputs[1::2], strict=True):
            query = queries[i, first : first + len(ids)].float() * layer.scaling
            query, key = (states.unflatten(-1, (layer.num_heads, -1)) for states in (query, keys[i].float()))
            weights.append((query.transpose(0, 1) @ key.permute(1, 2, 0)).softmax(-1))
        yield torch.cat(weights)


def set_times(chunk: Chunk, tokenizer, weights: torch.Tensor) -> None:
    """Set the times of the characters of a chunk whose text is set; weights are as cross_attention yields them.

    Tokens that are spoken are aligned with the loud frames, so that no character falls into a pause. Where align finds
    nothing to believe, the characters are spread evenly over the loud frames.
    """
    text = tokenizer.decode(chunk.token_ids, skip_special_tokens=True)
    n_stripped = len(text) - len(re.sub(common.CONTROL, " ", text).lstrip())
    runs = token_runs(tokenizer, chunk.token_ids, text)
    chunk.token_starts = {characters[0] - n_stripped for _, characters in runs}
    words = spoken_words(runs, text)
    tokens = [i for of_word, _ in words for i in of_word]
    frames = chunk.loud_frames[chunk.loud_frames < weights.shape[-1]]
    if len(tokens) > FASTEST * FRAME_S * len(frames):  # a bang, next to which the speech looks quiet: use all frames
        frames = np.arange(min(weights.shape[-1], math.ceil((chunk.end - chunk.start) / FRAME_S)))
    token_of_frame = align(weights[:, [*tokens, len(chunk.token_ids) - 1]], frames) if tokens else None
    chunk.aligned, times, n_done = token_of_frame is not None, spread(frames, len(text)), 0
    for of_word, end in words if chunk.aligned else []:
        of_frames = frames[np.isin(token_of_frame, np.searchsorted(tokens, of_word))]
        times[n_done:end] = spread(of_frames, end - n_done)
        n_done = end
    chunk.times = chunk.start + times[n_stripped : n_stripped + len(chunk.text)]


def token_runs(tokenizer, ids: list[int], text: str) -> list[tuple[range, range]]:
    """Which tokens make which characters of the text they decode to: (indices of tokens, indices of characters).

    A character may take several tokens, and a token may be several characters; each run is as short as it can be.
    """
    runs, token, character = [], 0, 0
    for i in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:i], skip_special_tokens=True)
        if len(prefix) > character and text.startswith(prefix):  # the bytes of half a character decode to another one
            runs.append((range(token, i), range(character, len(prefix))))
            token, character = i, len(prefix)
    return runs


def spoken_words(runs: list[tuple[range, range]], text: str) -> list[tuple[list[int], int]]:
    """The runs of token_runs that are spoken: (indices of tokens, index of the character after them).

    Punctuation and spaces are not spoken: they go with the tokens before them, opening brackets with those after.
    """
    words = []
    for tokens, characters in runs:
        spoken = re.search(r"\w", text[characters[0] : characters.stop])
        if words and not spoken and text[characters[0]] not in NOT_LAST + " ":
            words[-1] = words[-1][0], characters.stop
        elif words and not words[-1][0]:
            words[-1] = list(tokens) if spoken else [], characters.stop
        else:
            words.append((list(tokens) if spoken else [], characters.stop))
    if len(words) > 1 and not words[-1][0]:
        words[-2:] = [(words[-2][0], words[-1][1])]
    return words


def align(weights: torch.Tensor, frames: np.ndarray) -> np.ndarray | None:
    """Which token each of the frames belongs to, (n_frames,) int64, by dynamic time warping.

    weights are (n_heads, n_tokens, n_positions), and only the heads that look most sharply count: those with the
    largest L2 norms of rows and columns (arXiv 2509.09987). Every token gets at least one frame. The last token is the
    end of the text: it gets what sounds before and after the speech. None where the result is not to be believed,
    because a token takes longer than LONGEST_TOKEN_S or most tokens take a single frame.
    """
    n_heads, n_tokens, _ = weights.shape
    if n_tokens > len(frames):
        return None
    weights = weights[:, :, frames]
    sharpness = weights.norm(dim=1).sum(-1) + weights.norm(dim=2).sum(-1)
    weights = weights[sharpness.topk(max(1, min(N_HEADS, n_heads // 4))).indices]
    matrix = torch.nn.functional.normalize(weights, dim=1).mean(0).cpu().numpy()
    _, steps = common.import_librosa().sequence.dtw(C=-matrix, step_sizes_sigma=np.array([[1, 1], [0, 1]]))
    tokens = steps[::-1, 0].copy()
    looks = weights.mean(0).cpu().numpy()
    for i in np.flatnonzero(np.diff(frames) * FRAME_S >= SHORT_PAUSE_S):
        own = np.flatnonzero(tokens == (token := tokens[i]))
        if own[-1] > i and token < n_tokens - 1:  # no token goes on after a pause: it is on the side that it looks at
            if own[looks[token, own].argmax()] <= i:
                tokens[own[own > i]] += 1
            else:
                tokens[own[own <= i]] = (token - 1) % n_tokens  # what sounds before the first goes with the end
    counts = np.bincount(tokens, minlength=n_tokens)[:-1]
    return None if counts.max() * FRAME_S > LONGEST_TOKEN_S or np.mean(counts == 1) > 0.5 else tokens


def spread(frames: np.ndarray, n: int) -> np.ndarray:
    """Start and end, in seconds from the start of the chunk, of n characters spread evenly over frames: (n, 2)."""
    edges = np.linspace(0, len(frames), n + 1)
    first, last = np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int) - 1
    return FRAME_S * np.stack([frames[first] + edges[:-1] - first, frames[last] + edges[1:] - last], 1)


# --- Cues: texts and times -> what people can read ---


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
    cues = []
    for chunk in recording.chunks:
        if chunk.left_out:
            continue
        qualities = break_qualities(chunk.text, chunk.token_starts)
        for sentence in sentences(chunk.text):
            for first, end in split_sentence(chunk, *sentence, qualities):
                text, (starts, ends) = chunk.text[first:end], chunk.times.T
                lines = break_lines(text, qualities[first:end])
                edges = [first, *(i for i in range(first + 1, end) if qualities[i] > 1), end]
                words = [(chunk.text[i:j], starts[i], ends[j - 1]) for i, j in itertools.pairwise(edges)]
                cues.append(Cue(starts[first], ends[end - 1], text, lines, words, chunk))
    for cue, limit in zip(cues, [*(cue.start for cue in cues[1:]), recording.duration], strict=False):
        cue.end = max(cue.end + DEVOICED_END_S, cue.start + SHORTEST_CUE_S)
        cue.end = min(cue.end, cue.start + LONGEST_CUE_S, limit)
        cue.words = [(word, min(start, cue.end), min(end, cue.end)) for word, start, end in cue.words]
    return cues


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


def split_sentence(chunk: Chunk, first: int, end: int, qualities: list[int]) -> list[tuple[int, int]]:
    """Cut a chunk's text from first to end into parts that fit a cue: CUE_LINES of LINE_CELLS, and LONGEST_CUE_S.

    Cuts are made at long pauses first, then near the middle: best at a pause, after a comma, a phrase or a token.
    """
    starts, ends = chunk.times.T
    places = [i for i in range(first + 1, end) if chunk.text[first:i].strip() and chunk.text[i:end].strip()]
    pauses = {i: starts[i] - ends[i - 1] for i in places}
    long = [i for i in places if pauses[i] >= LONG_PAUSE_S and qualities[i] > 1]
    fits = ends[end - 1] - starts[first] <= LONGEST_CUE_S
    fits = fits and len(break_lines(chunk.text[first:end], qualities[first:end])) <= CUE_LINES
    if not places or (fits and not long):
        return [(first, end)]

    def goodness(i: int) -> float:
        """How good it is to cut before a character: the place, the pause there, and how far it is from the middle."""
        return (qualities[i] or -100) + 3 * min(pauses[i], 1) - 6 * ((2 * i - first - end) / (end - first)) ** 2

    cut = max(long or places, key=goodness)
    return [*split_sentence(chunk, first, cut, qualities), *split_sentence(chunk, cut, end, qualities)]


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


def deliver(recording: Recording, outputs: list[str], args: argparse.Namespace) -> None:
    """Write a recording's output files, or to stdout where it has none; what fails becomes its error."""
    if not outputs and args.many and args.output_format == "txt":
        path = common.one_line(recording.path)
        common.write_stdout(f"{path}\t{full_text(recording, args.text_language)}\n")
    elif not outputs:
        common.write_stdout(render(recording, args.output_format, args.text_language))
    for output in outputs:
        try:
            write_whole(output, render(recording, output.rpartition(".")[2], args.text_language))
        except OSError as error:
            recording.error = f"cannot write {output}: {error.strerror}"


def write_whole(path: str, content: str) -> None:
    """Write a UTF-8 file so that it is there whole or not at all, however the program ends. Raises OSError."""
    path = os.path.realpath(path)  # a link stays one
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

    txt has a line for each sentence, and needs no times.
    """
    if extension == "txt":
        chunks = (chunk for chunk in recording.chunks if not chunk.left_out)
        texts = (chunk.text[first:end] for chunk in chunks for first, end in sentences(chunk.text))
        return "".join(f"{text.strip()}\n" for text in texts)
    cues = cues_of(recording)
    if extension == "tsv":
        rows = ((f"{round(1000 * c.start)}\t{round(1000 * c.end)}", c.text.strip().replace("\t", " ")) for c in cues)
        return "start\tend\ttext\n" + "".join(f"{times}\t{text}\n" for times, text in rows)
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
    """What openai/whisper's JSON has, and what is known of the chunk that a segment comes from."""
    segments = [
        {
            "id": i, "start": round(cue.start, 3), "end": round(cue.end, 3), "text": cue.text,
            "words": [{"word": word, "start": round(s, 3), "end": round(e, 3)} for word, s, e in cue.words],
            "times": "aligned" if cue.chunk.aligned else "proportional",
            "no_speech_prob": round(cue.chunk.no_speech_prob, 3),
            "compression_ratio": round(cue.chunk.compression_ratio, 3),
            "token_limit": cue.chunk.token_limit, "looping": cue.chunk.looping,
        }
        for i, cue in enumerate(cues)
    ]  # fmt: skip
    left_out = [
        {"start": round(c.start, 3), "end": round(c.end, 3), "text": c.text,
         "no_speech_prob": None if c.no_speech_prob is None else round(c.no_speech_prob, 3)}
        for c in recording.chunks if c.left_out
    ]  # fmt: skip
    return {
        "text": full_text(recording, language), "segments": segments, "language": language,
        "duration": round(recording.duration, 3), "path": recording.path, "warnings": recording.warnings,
        "left_out": left_out,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
