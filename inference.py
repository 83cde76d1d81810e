"""Transcribe Japanese recordings with kotoba-whisper-v2.0 on an Ascend NPU or a CPU.

    python3 inference.py --audio meeting.mp3
    python3 inference.py --audio recordings/ --output-dir transcripts/ --output-format srt
    torchrun --nproc-per-node 8 inference.py --audio corpus/ --output-dir out/ --skip-existing

The transcript goes to stdout or to files in --output-dir, and everything else to stderr.
"""
import argparse
import contextlib
import html
import itertools
import math
import os
import re
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
    ".3gp", ".aac", ".ac3", ".aif", ".aiff", ".amr", ".au", ".avi", ".caf", ".flac", ".flv", ".m4a", ".m4b", ".m4v",
    ".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpg", ".mts", ".oga", ".ogg", ".opus", ".rf64", ".ts", ".w64",
    ".wav", ".weba", ".webm", ".wma", ".wmv",
)  # fmt: skip
FORMATS = ("txt", "srt", "vtt", "tsv", "json")
UNSPACED_LANGUAGES = ("ja", "zh", "yue", "th", "lo", "my")  # as in openai/whisper
COMPRESSION_RATIO_LIMIT = 2.4  # openai/whisper's; none of 14,746 true outputs of this model exceeds 2.12
FRAME_S = 0.02  # of the encoder's output
QUIETER_DB = 30  # a pause is that much below the loudest part
N_HEADS = 10  # of 40, the best in arXiv 2509.09987
FASTEST = 20  # tokens in a second of speech: twice as many as anyone speaks
LONGEST_TOKEN_S = 2.0  # of loud sound: beyond, the alignment has left something out
LONG_PAUSE_S = 0.7
SHORTEST_CUE_S, LONGEST_CUE_S = 1.0, 7.0
SENTENCE_END = r"[。！？!?]+[。！？!?」』）】〉》”\"')\]]*|(?<=\w\w)(?<![A-Z]\w)[.]+[\"')\]”]*(?=\s|$)"  # not U.S.
# Kinsoku (JIS X 4051), as far as it matters to subtitles
NOT_FIRST = "、。，．・：；？！」』）】〉》ー々ゝゞぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ…‥〜～,.:;?!)]}%”’ﾞﾟｰ､｡｣･"
NOT_LAST = "「『（【〈《([{“‘｢\u200d"  # a zero-width joiner too
JOINED = ("Mn", "Mc", "Me", "Cf", "Sk")  # Unicode categories of what changes the character before
SPACED = r"[!-\u0dff\u10a0-\u1cff\u1e00-\u2fff\uac00-\ud7a3]"  # of scripts that put spaces between words
STORE_TIMEOUT_S = 60  # in which torchrun's store answers
SHORTEST_WAIT_S = 600  # for the other processes of torchrun, which all have about the same to do


@dataclass
class Chunk:
    """What was said in one chunk; start and end in seconds from the beginning of the file."""

    start: float
    end: float
    text: str = ""
    compression_ratio: float = 0.0
    token_limit: bool = False  # decoding ended at the token limit: text may be missing
    loud: np.ndarray | None = None  # as of loud_frames
    breaks: set[int] = field(default_factory=set)  # the characters that a token begins with
    spans: np.ndarray | None = None  # start and end of each character, seconds from the beginning of the file, (n, 2)
    aligned: bool = False  # the spans are from the decoder's attention

    @property
    def looping(self) -> bool:
        """The text repeats itself like that of a decoder caught in a loop."""
        return self.compression_ratio > COMPRESSION_RATIO_LIMIT


@dataclass(eq=False)
class Transcript:
    """One file: its chunks in order, its length in seconds, its silent chunks, and why it failed if it did."""

    path: str
    chunks: list[Chunk] = field(default_factory=list)
    duration: float = 0.0
    silent: int = 0
    error: str | None = None


def program() -> str:
    """What messages begin with: the name of the script and, where there are several processes, which it is."""
    under_torchrun = {"TORCHELASTIC_RUN_ID", "RANK"} <= {*os.environ}
    return f"inference.py, rank {os.environ['RANK']}" if under_torchrun else "inference.py"


def notice(message: str) -> None:
    """One line on stderr."""
    common.notice(f"{program()}: {message}")


def torchrun_place() -> tuple[int, int, int, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of torchrun; 0, 1, 0, 1 in a process that it did not start.

    Raises SetupError where they contradict each other, whoever set them.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    started = "TORCHELASTIC_RUN_ID" in given  # by torchrun; clusters set some of the others on their own
    try:
        place = (int(given.get(name, sys.maxsize if "SIZE" in name else 0)) for name in names[:4])
        rank, size, local_rank, local_size = place
        agree = 0 <= rank < size and 0 <= local_rank < local_size
        agree &= not started or (len(given) == 5 and local_rank <= rank and local_size <= size)
    except ValueError:
        agree = False
    if not agree:
        said = common.one_line(" ".join(f"{name}={text}" for name, text in given.items()))
        raise common.SetupError(f"{said}: not what torchrun sets: unset {' '.join(given)}, or start with torchrun")
    return (rank, size, local_rank, local_size) if started else (0, 1, 0, 1)


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
    add("--max-line-width", type=common.number(int, 1), default=16, metavar="N",
        help="full-width characters in a line of a subtitle; others count half (default: %(default)s)")  # fmt: skip
    add("--max-line-count", type=common.number(int, 1), default=2, metavar="N",
        help="lines of a subtitle (default: %(default)s)")  # fmt: skip
    add("--word-timestamps", action="store_true", help="times of words too; needs json or all")
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


# --- Times and cues: token ids -> cues that people can read ---


@dataclass
class Cue:
    """A sentence, or as much of one as can be read at a time; seconds from the beginning of the file."""

    start: float
    end: float
    text: str  # a part of its chunk's text, with the space that it may begin with
    lines: list[str]
    words: list[tuple[str, float, float]]
    chunk: Chunk


def loud_frames(waveform: np.ndarray) -> np.ndarray:
    """The frames of FRAME_S that are at most QUIETER_DB below the loudest part of a chunk: (n >= 1,) int64."""
    n = round(FRAME_S * common.SAMPLING_RATE)
    power = np.var(np.pad(waveform, (0, -len(waveform) % n)).reshape(-1, n), axis=1)
    loudest = min(power.max(), common.mean_squares(waveform, common.SAMPLING_RATE).max())
    return np.flatnonzero(power >= loudest / 10 ** (QUIETER_DB / 10))


def token_runs(tokenizer, ids: list[int], text: str) -> list[tuple[range, range]]:
    """The fewest tokens that decode to whole characters of the text: (their indices, those of the characters)."""
    runs, token, character = [], 0, 0
    for i in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:i], skip_special_tokens=True)
        if len(prefix) > character and text.startswith(prefix):  # the bytes of half a character decode to another one
            runs.append((range(token, i), range(character, len(prefix))))
            token, character = i, len(prefix)
    return runs


def cross_attention(recognizer: common.Recognizer, encoded, token_ids: list[list[int]]) -> Iterator:
    """Where all heads look as they predict each token of a row: (n_heads, n_tokens, n_positions) float32, row by row.

    One forward over the batch; from queries and keys, because fused kernels do not give the weights away.
    """
    decoder, prompt = recognizer.model.model.decoder, recognizer.prompt.tolist()
    rows = [torch.tensor([*prompt, *ids[:-1]]) for ids in token_ids]
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=prompt[0]).to(encoded.device)
    layers, outputs = [layer.encoder_attn for layer in decoder.layers], []
    with contextlib.ExitStack() as hooks:
        for linear in itertools.chain(*((layer.q_proj, layer.k_proj) for layer in layers)):
            hooks.enter_context(linear.register_forward_hook(lambda module, args, output: outputs.append(output)))
        decoder(input_ids=inputs, encoder_hidden_states=encoded, use_cache=False)
    for i, ids in enumerate(token_ids):
        weights = []
        for layer, queries, keys in zip(layers, outputs[::2], outputs[1::2], strict=True):
            query = queries[i, len(prompt) - 1 : len(prompt) - 1 + len(ids)].float() * layer.scaling
            query, key = (states.unflatten(-1, (layer.num_heads, -1)) for states in (query, keys[i].float()))
            weights.append((query.transpose(0, 1) @ key.permute(1, 2, 0)).softmax(-1))
        yield torch.cat(weights)


def align(weights, frames: np.ndarray) -> np.ndarray | None:
    """Which token each of the frames belongs to, (n_frames,) int64, from weights (n_heads, n_tokens, n_positions).

    Dynamic time warping in which a token has one frame or more, and a frame one token; the last token is the end of the
    text, which takes what sounds after the speech. The heads are those with the largest L2 norms of rows and columns
    (arXiv 2509.09987). None where a token takes LONGEST_TOKEN_S, or most tokens a single frame: then the text is not
    what was said, or the heads look elsewhere.
    """
    n_heads, n_tokens, _ = weights.shape
    if n_tokens > len(frames):
        return None
    weights = weights[:, :, frames]
    scores = weights.norm(dim=1).sum(-1) + weights.norm(dim=2).sum(-1)
    weights = weights[scores.topk(max(1, min(N_HEADS, n_heads // 4))).indices]
    matrix = torch.nn.functional.normalize(weights, dim=1).mean(0).cpu().numpy()
    _, steps = common.import_librosa().sequence.dtw(C=-matrix, step_sizes_sigma=np.array([[1, 1], [0, 1]]))
    path = steps[::-1, 0].copy()
    for i in np.flatnonzero(np.diff(frames) * FRAME_S >= common.LEVEL_WINDOW_S):  # no token goes on after a pause
        before, after = path[: i + 1] == path[i], path[i + 1 :] == path[i]
        if after.any() and after.sum() <= before.sum() and path[i] < n_tokens - 1:
            path[i + 1 :][after] += 1
        elif after.any() and path[i] > 0:
            path[: i + 1][before] -= 1
    counts = np.bincount(path, minlength=n_tokens)[:-1]
    return None if counts.max() * FRAME_S > LONGEST_TOKEN_S or np.mean(counts == 1) > 0.5 else path


def spread(frames: np.ndarray, n: int) -> np.ndarray:
    """Start and end, in seconds, of n characters that share frames evenly: (n, 2)."""
    edges = np.linspace(0, len(frames), n + 1)
    first, last = np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int) - 1
    return FRAME_S * np.stack([frames[first] + edges[:-1] - first, frames[last] + edges[1:] - last], 1)


def spoken_parts(runs: list[tuple[range, range]], text: str) -> list[tuple[list[int], int]]:
    """Tokens that are spoken and the index of the character that ends them: those of token_runs, where signs and
    spaces, which have no sound, go with the tokens that they follow, and opening brackets with the next."""
    parts = []
    for tokens, characters in runs:
        spoken = re.search(r"\w", text[characters[0] : characters.stop])
        if parts and not spoken and text[characters[0]] not in NOT_LAST + " ":
            parts[-1] = parts[-1][0], characters.stop
        elif parts and not parts[-1][0]:
            parts[-1] = list(tokens) if spoken else [], characters.stop
        else:
            parts.append((list(tokens) if spoken else [], characters.stop))
    if len(parts) > 1 and not parts[-1][0]:
        parts[-2:] = [(parts[-2][0], parts[-1][1])]
    return parts


def set_times(chunk: Chunk, tokenizer, ids: list[int], weights) -> None:
    """Give a chunk, whose text is set, the times of its characters; weights as cross_attention yields them.

    Only the tokens that are spoken and the loud frames take part, so that nothing is drawn into a pause. Where the
    alignment is doubtful, the characters share the loud frames evenly.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    n_left_out = len(text) - len(re.sub(common.CONTROL, " ", text).lstrip())
    runs = token_runs(tokenizer, ids, text)
    chunk.breaks = {characters[0] - n_left_out for _, characters in runs}
    parts = spoken_parts(runs, text)
    tokens = [i for of_part, _ in parts for i in of_part]
    frames = chunk.loud[chunk.loud < weights.shape[-1]]
    if len(tokens) > FASTEST * FRAME_S * len(frames):  # a bang has made the speech look quiet
        frames = np.arange(min(weights.shape[-1], math.ceil((chunk.end - chunk.start) / FRAME_S)))
    path = align(weights[:, [*tokens, len(ids) - 1]], frames) if tokens else None
    chunk.aligned, spans, n_done = path is not None, spread(frames, len(text)), 0
    for of_part, end in parts if chunk.aligned else []:
        spans[n_done:end] = spread(frames[np.isin(path, np.searchsorted(tokens, of_part))], end - n_done)
        n_done = end
    chunk.spans = chunk.start + spans[n_left_out : n_left_out + len(chunk.text)]


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text begin and end; signs alone are none."""
    edges = [0]
    for match in re.finditer(SENTENCE_END, text):
        done, rest = text[edges[-1] : match.end()], text[match.end() :]
        if re.search(r"\w", done) and re.search(r"\w", rest) and rest.lstrip()[0] not in NOT_FIRST:
            edges.append(match.end())
    return list(itertools.pairwise([*edges, len(text)])) if text else []


def break_qualities(text: str, breaks: set[int]) -> list[int]:
    """How good it is to break a text before each character: 0 never, 1 in a word, 2 after a token, 3 after a phrase,
    4 at a comma or space. breaks: the characters that a token begins with."""
    qualities = [0] * len(text)
    for i, (before, after) in enumerate(itertools.pairwise(text), start=1):
        first = text[i:].lstrip()[:1]
        if before.isspace() or before in NOT_LAST or first in NOT_FIRST or unicodedata.category(after) in JOINED:
            continue
        if after.isspace() or (before in "、，,;；：" and not after.isdigit()):
            qualities[i] = 4
        elif i not in breaks or (re.fullmatch(SPACED, before) and re.fullmatch(SPACED, after)):
            qualities[i] = 1
        else:
            qualities[i] = 3 if re.fullmatch("[ぁ-ん][^ぁ-ん]", before + after) else 2
    return qualities


def cells(text: str) -> float:
    """The width of a text without the spaces around it, in full-width characters."""
    return sum(1 if unicodedata.east_asian_width(character) in "WF" else 0.5 for character in text.strip())


def break_lines(text: str, qualities: list[int], width: float) -> list[str]:
    """The lines of a text, as few as there can be, broken at the best places; qualities: of those in the text."""
    lines, first = [], 0
    while (rest := cells(text[first:])) > width:
        fitting = [i for i in range(first + 1, len(text)) if cells(text[first:i]) <= width]
        few = [i for i in fitting if cells(text[i:]) <= width * (math.ceil(rest / width) - 1)]
        places = [i for i in few if qualities[i]] or [i for i in fitting if qualities[i]] or fitting[-1:]
        cut = max(places, key=lambda i: (qualities[i], -abs(2 * i - first - len(text))))
        lines.append(text[first:cut].strip())
        first = cut
    return [*lines, text[first:].strip()]


def readable_parts(chunk: Chunk, first: int, end: int, qualities: list[int], limits: tuple) -> list[tuple[int, int]]:
    """Parts of a chunk's text from first to end that keep to limits (cells in a line, lines) and to LONGEST_CUE_S.

    They are cut at long pauses, and then near the middle: best at a pause, after a comma, a phrase, a token.
    """
    starts, ends = chunk.spans.T
    places = [i for i in range(first + 1, end) if chunk.text[first:i].strip() and chunk.text[i:end].strip()]
    pauses = {i: starts[i] - ends[i - 1] for i in places}
    long = [i for i in places if pauses[i] >= LONG_PAUSE_S and qualities[i] > 1]
    fits = ends[end - 1] - starts[first] <= LONGEST_CUE_S and cells(chunk.text[first:end]) <= limits[0] * limits[1]
    fits = fits and len(break_lines(chunk.text[first:end], qualities[first:end], limits[0])) <= limits[1]
    if not places or (fits and not long):
        return [(first, end)]

    def goodness(i: int) -> float:
        """How good it is to cut before a character: the place, the pause there, and how far it is from the middle."""
        return (qualities[i] or -100) + 3 * min(pauses[i], 1) - 6 * ((2 * i - first - end) / (end - first)) ** 2

    cut = max(long or places, key=goodness)
    return [*readable_parts(chunk, first, cut, qualities, limits), *readable_parts(chunk, cut, end, qualities, limits)]


def cues_of(transcript: Transcript, limits: tuple[float, int]) -> list[Cue]:
    """The cues of a file, together all of its text; limits as of readable_parts."""
    cues = []
    for chunk in transcript.chunks:
        qualities = break_qualities(chunk.text, chunk.breaks)
        for sentence in sentences(chunk.text):
            for first, end in readable_parts(chunk, *sentence, qualities, limits):
                text, (starts, ends) = chunk.text[first:end], chunk.spans.T
                edges = [first, *(i for i in range(first + 1, end) if qualities[i] > 1), end]
                words = [(chunk.text[i:j], starts[i], ends[j - 1]) for i, j in itertools.pairwise(edges)]
                lines = break_lines(text, qualities[first:end], limits[0])
                cues.append(Cue(starts[first], ends[end - 1], text, lines, words, chunk))
    for cue, limit in zip(cues, [*(cue.start for cue in cues[1:]), transcript.duration], strict=False):
        cue.end = min(max(cue.end, cue.start + SHORTEST_CUE_S), cue.start + LONGEST_CUE_S, limit)
        cue.words = [(word, min(start, cue.end), min(end, cue.end)) for word, start, end in cue.words]
    return cues


# --- Writing ---


def timestamp(seconds: float, decimal_mark: str = ".", hours_always: bool = False) -> str:
    """HH:MM:SS and milliseconds; unless hours_always, the hours only where there are some."""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    prefix = f"{hours:02d}:" if hours or hours_always else ""
    return f"{prefix}{minutes:02d}:{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"


def full_text(transcript: Transcript, language: str) -> str:
    """The text of all chunks in one line."""
    return ("" if language in UNSPACED_LANGUAGES else " ").join(chunk.text for chunk in transcript.chunks if chunk.text)


def json_segment(i: int, cue: Cue, word_timestamps: bool) -> dict:
    """A segment of openai/whisper's JSON, with what is known of the chunk that it comes from."""
    chunk = cue.chunk
    content = {"id": i, "start": round(cue.start, 3), "end": round(cue.end, 3), "text": cue.text}
    content |= {"compression_ratio": round(chunk.compression_ratio, 3), "token_limit": chunk.token_limit}
    content |= {"looping": chunk.looping, "times": "aligned" if chunk.aligned else "proportional"}
    if word_timestamps:
        content["words"] = [{"word": w, "start": round(s, 3), "end": round(e, 3)} for w, s, e in cue.words]
    return content


def render(
    transcript: Transcript, extension: str, language: str, limits: tuple[float, int] = (16, 2), words: bool = False
) -> str:
    """The content of an output file, in the format of openai/whisper's writers; language is that of the text.

    limits as of cues_of, for the cues of subtitles; txt needs no times, and has a line for each sentence.
    """
    if extension == "txt":
        texts = (chunk.text[first:end] for chunk in transcript.chunks for first, end in sentences(chunk.text))
        return "".join(f"{text.strip()}\n" for text in texts)
    cues = cues_of(transcript, limits)
    if extension == "tsv":
        rows = ((f"{round(1000 * c.start)}\t{round(1000 * c.end)}", c.text.strip().replace("\t", " ")) for c in cues)
        return "start\tend\ttext\n" + "".join(f"{times}\t{text}\n" for times, text in rows)
    if extension == "json":
        rows = [json_segment(i, cue, words) for i, cue in enumerate(cues)]
        content = {"text": full_text(transcript, language), "segments": rows, "language": language}
        content |= {"duration": round(transcript.duration, 3), "path": transcript.path}
        return common.to_json(content) + "\n"
    srt = extension == "srt"
    mark, content = "," if srt else ".", "" if srt else "WEBVTT\n\n"
    for i, cue in enumerate(cues, start=1):
        times = f"{timestamp(cue.start, mark, srt)} --> {timestamp(cue.end, mark, srt)}"
        shown = "\n".join(cue.lines)
        shown = shown.replace("-->", "->") if srt else html.escape(shown, quote=False)
        content += (f"{i}\n" if srt else "") + f"{times}\n{shown}\n\n"
    return content


def deliver(transcript: Transcript, outputs: list[str], args: argparse.Namespace, many: bool) -> None:
    """Write a transcript to its output files, or to stdout where it has none; what fails becomes its error."""
    how = args.text_language, (args.max_line_width, args.max_line_count), args.word_timestamps
    if not outputs and many and args.output_format == "txt":
        path = common.one_line(transcript.path)
        common.write_stdout(f"{path}\t{full_text(transcript, args.text_language)}\n")
    elif not outputs:
        common.write_stdout(render(transcript, args.output_format, *how))
    for output in outputs:
        try:
            common.write_whole(output, render(transcript, output.rpartition(".")[2], *how))
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
        f"{str(model.dtype)[6:]}; chunks: {totals['decoded']} decoded, {totals['silent']} silent, {totals['cut']} cut "
        f"at the token limit, {totals['looping']} looping"
    )


def record(transcript: Transcript, totals: Counter) -> None:
    """Count a file, and say it where it failed."""
    totals["failed" if transcript.error is not None else "done"] += 1
    totals["audio_s"] += transcript.duration
    totals["decoded"] += len(transcript.chunks)
    totals["silent"] += transcript.silent
    totals["cut"] += sum(chunk.token_limit for chunk in transcript.chunks)
    totals["looping"] += sum(chunk.looping for chunk in transcript.chunks)
    if transcript.error is not None:
        notice(f"error: {transcript.path}: {transcript.error}")


def progress_bar(paths: list[str], window_s: float) -> tqdm:
    """A bar in seconds of audio on a terminal of its own, where there is more than one chunk to wait for."""
    if not sys.stderr.isatty() or torchrun_place()[1] > 1:
        return tqdm(disable=True)
    total = None  # of several files, or of one that only ffmpeg can read
    if len(paths) == 1 and os.path.isfile(paths[0]):
        with contextlib.suppress(soundfile.SoundFileError, TypeError, OSError), open(paths[0], "rb") as file:
            total = soundfile.info(file).duration
    short = total is not None and total <= window_s
    done = "{n:.0f} s of audio" if total is None else "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of audio"
    return tqdm(total=total, disable=short, unit=" s", bar_format=done + " [{elapsed}, {rate_noinv_fmt}]")


# --- The pipeline: files -> chunks -> batches -> texts ---


def read_files(paths: Iterable[str], extractor, chunk_length_s: float) -> Iterator[tuple]:
    """The chunks of each file, (transcript, chunk, features), and at its end (transcript, None, None).

    features is None where the chunk is silent. Whatever goes wrong while a file is read is that file's error.
    """
    for path in paths:
        transcript = Transcript(path)
        try:
            for start, end, waveform in common.read_chunks(path, chunk_length_s):
                features, chunk = None, Chunk(start, end)
                if waveform is not None:
                    features, chunk.loud = common.extract_features(extractor, waveform), loud_frames(waveform)
                yield transcript, chunk, features
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


def batches(items: Iterable[tuple], batch_size: int) -> Iterator[list[tuple]]:
    """What read_files yields, in lists with batch_size chunks to decode among them; a file ends with its last."""
    batch, n_features = [], 0
    for transcript, chunk, features in items:
        if features is not None and n_features == batch_size:
            yield batch
            batch, n_features = [], 0
        batch.append((transcript, chunk, features))
        n_features += features is not None
    yield batch


def recognize_at_once(recognizer: common.Recognizer, part: list[tuple], max_new_tokens: int, timed: bool) -> None:
    """Give as many chunks as the device takes at once their texts and, where timed, times. Raises DeviceError."""
    model, tokenizer = recognizer.model, recognizer.tokenizer
    token_ids, _, encoded = common.generate(recognizer, [features for *_, features in part], max_new_tokens)
    for (_, chunk, _), ids in zip(part, token_ids, strict=True):
        chunk.text = re.sub(common.CONTROL, " ", tokenizer.decode(ids, skip_special_tokens=True)).strip()
        data = chunk.text.encode()
        chunk.compression_ratio = len(data) / len(zlib.compress(data))
        chunk.token_limit = ids[-1] != tokenizer.eos_token_id
    with torch.inference_mode(), common.device_errors(model.device):
        for i, weights in enumerate(cross_attention(recognizer, encoded, token_ids) if timed else []):
            set_times(part[i][1], tokenizer, token_ids[i], weights)


def recognize(
    recognizer: common.Recognizer, batch: list[tuple], max_new_tokens: int, batch_size: int, timed: bool = False
) -> int:
    """recognize_at_once for a batch, in parts if need be: the batch size that fits the device. Raises DeviceError."""
    n_done = 0
    while n_done < len(batch):
        part = batch[n_done : n_done + batch_size]
        try:
            recognize_at_once(recognizer, part, max_new_tokens, timed)
            n_done += len(part)
            continue
        except common.OutOfMemoryError:
            if len(part) == 1:
                raise
        batch_size = len(part) // 2
        if recognizer.model.device.type != "cpu":
            with common.device_errors(recognizer.model.device):
                torch.get_device_module(recognizer.model.device).empty_cache()  # here, where no error holds the tensors
    for transcript, chunk, _ in batch:
        transcript.chunks.append(chunk)
    return batch_size


def transcribe(
    recognizer: common.Recognizer, paths: Iterable[str], max_new_tokens: int, chunk_length_s: float, batch_size: int,
    on_progress: Callable[[float], None] = lambda seconds: None, timed: bool = False,
) -> Iterator[Transcript]:  # fmt: skip
    """The transcript of each file, in order; on_progress is told the seconds of audio done since it was last called.

    Where timed, the characters have times. Chunks of several files share a batch, and an accelerator decodes one while
    the next is read. Where the device fails, the files of the batch have failed, for nothing that comes back from it
    can be believed, and then DeviceError is raised.
    """
    device, fitting = recognizer.model.device, batch_size
    items = read_files(paths, recognizer.extractor, chunk_length_s)
    if device.type != "cpu":  # whose OpenMP threads would wait for each other: half the speed
        items = ahead(items, batch_size)
    for batch in batches(items, batch_size):
        before = fitting
        try:
            decoded = [item for item in batch if item[2] is not None]
            fitting = recognize(recognizer, decoded, max_new_tokens, before, timed)
        except common.DeviceError as error:
            for transcript in dict.fromkeys(transcript for transcript, *_ in batch):
                transcript.error = transcript.error or str(error)
                yield transcript
            raise
        if fitting < before:
            notice(f"warning: {device} is out of memory in batches of {before}: --batch-size {fitting} from here on")
        for transcript, chunk, features in batch:
            if chunk is None:
                yield transcript
                continue
            transcript.duration = chunk.end
            transcript.silent += features is None
            on_progress(chunk.end - chunk.start)


# --- Command ---


def share(paths: Iterable[str], rank: int, world_size: int) -> list[str]:
    """The files of one of world_size processes, the longest first, all of them together about as long as the others'.

    Their length is taken to be that in bytes: to open them all would take too long.
    """
    sizes = {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in paths}
    loads, mine = [0] * world_size, []
    for path in sorted(sizes, key=lambda path: (sizes[path], path), reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[path] + 1
        if lightest == rank:
            mine.append(path)
    return mine


def transcribe_files(paths: list[str], outputs: dict[str, list[str]], many: bool, totals: Counter, args) -> None:
    """Load the model, transcribe files and deliver their transcripts. Raises SetupError, also where some are left."""
    started = time.perf_counter()
    device, warning = common.select_device(args.device, *torchrun_place()[2:])
    if warning:
        notice(f"warning: {warning}")
    dtype = common.select_dtype(args.dtype, device)
    recognizer = common.load_model(args.model, device, dtype, args.language, args.task)
    timed = args.output_format != "txt"
    if timed:
        common.import_librosa().sequence  # noqa: B018  (imported when it is used: seconds that belong to loading)
    loaded, stopped, n_left = time.perf_counter(), None, len(paths)
    with progress_bar(paths, recognizer.extractor.chunk_length) as bar:
        results = transcribe(
            recognizer, paths, args.max_new_tokens, args.chunk_length,
            args.batch_size or common.default_batch_size(device), on_progress=bar.update, timed=timed,
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
        remedy = "--output-dir and --skip-existing go on with them"
        raise common.SetupError(f"{stopped}; files not reached: {n_left} ({remedy})")


def run(args: argparse.Namespace) -> int:
    """Transcribe what the arguments name; the exit status. Raises SetupError."""
    rank, world_size, *_ = torchrun_place()
    for option, given in (("--skip-existing", args.skip_existing), ("more than one process", world_size > 1)):
        if given and args.output_dir is None:
            raise common.SetupError(f"{option} needs --output-dir")
    if args.word_timestamps and args.output_format not in ("json", "all"):
        raise common.SetupError("--word-timestamps needs --output-format json or all: the others have no words")
    inputs, failed = find_audio(args.audio)
    many = len(inputs) + len(failed) > 1
    outputs = plan_outputs(inputs, many, args)
    mine = list(inputs)
    if world_size > 1:
        mine, failed = share(inputs, rank, world_size), (failed if rank == 0 else [])
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
    if paths:
        transcribe_files(paths, outputs, many, totals, args)
    elif totals["skipped"] or world_size > 1:
        notice(closing_line(totals))
    return int(totals["failed"] > 0)


def run_with_others(args: argparse.Namespace) -> int:
    """Run the command; the exit status of all processes of torchrun, on all machines: the worst of theirs.

    torchrun ends the others as soon as one fails, and its store with the first machine: so all wait here for the last,
    but no longer than SHORTEST_WAIT_S or, if that is more, than they have run themselves. Raises SetupError.
    """
    started, (rank, world_size, *_) = time.monotonic(), torchrun_place()
    if world_size == 1:
        return run(args)
    try:
        store, *_ = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=STORE_TIMEOUT_S)))
        n_starts = store.add(f"starts of {rank}", 1)
    except (RuntimeError, ValueError, TypeError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        raise common.SetupError(
            f"torchrun's store at {place} does not answer ({common.first_line(error)}): unset what an earlier "
            "torchrun left in the environment, or start with torchrun"
        ) from error
    if n_starts > 1:
        raise common.SetupError(f"{n_starts} processes have RANK={rank}: start each with a torchrun of its own")
    status = common.run_script(program(), run, args)
    if status == 130:
        return status
    try:
        store.set(f"status {rank}", str(status))
        store.set_timeout(timedelta(seconds=max(SHORTEST_WAIT_S, time.monotonic() - started)))
        return max(map(int, store.multi_get([f"status {i}" for i in range(world_size)])))
    except RuntimeError as error:
        notice(f"error: the other processes do not end ({common.first_line(error)})")
        return status or 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return common.run_script(program(), run_with_others, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
