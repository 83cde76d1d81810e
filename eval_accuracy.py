"""Does the device compute what the CPU computes, and is the text right?

    python3 eval_accuracy.py                                          # a 3 s sweep; the NPU in float16
    python3 eval_accuracy.py --audio meeting.wav --json report.json   # every chunk of real recordings
    python3 eval_accuracy.py --manifest test.jsonl                    # and the character error rate

The README says what is compared, and the verdict's rule. All three models are held at once, and the arrays of one clip
at a time.
"""
import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import common  # before torch: it sets how that is imported
import numpy as np
import torch

FLOAT32_LIMIT = 5e-5  # relative error in float32: see the README for what lies below and above it
ENCODER_FACTOR = 5  # by so much the encoder's may exceed the threshold: sound bfloat16 gives 0.014 at full size
FIGURES = {  # of a clip: the key in the JSON, the row of the table, the formula
    "cosine": ("cosine similarity", "sum(r c) / sqrt(sum(r^2) sum(c^2)), of raw logits, in float64"),
    "max_abs": ("largest absolute error", "max |c - r|, r the reference's logits, c the candidate's"),
    "mean_abs": ("mean absolute error", "mean |c - r|"),
    "relative": ("relative error", "max |c - r| / (max r - min r)"),
    "encoder": ("  of the encoder", "relative, of the encoder's output"),
    "float32_relative": ("  in float32", "relative, of the candidate in float32"),
    "float32_encoder": ("  in float32, of the encoder", "encoder, of the candidate in float32"),
    "repeat": ("  between runs", "relative, between runs of the candidate, one of them in a batch with another input"),
    "cache": ("  in decoding", "max |s - c| / (max c - min c), s the scores in free decoding, alone and in a batch"),
}
FORMULAS = {key: formula for key, (_, formula) in FIGURES.items()} | {
    "top1_agrees": "the largest logit of both is that of the same token",
    "top1_margin": "largest less second largest logit of the reference",
    "cer": "edits / reference characters over all utterances, after BasicTextNormalizer, without spaces, 。. as 。",
}


@dataclass
class Clip:
    """What was compared in one chunk of audio; overall has FIGURES, per_token other FORMULAS too."""

    name: str
    utterance: int | None  # which recording it is a part of; None for the clip that is decoded to the last position
    text: str = ""
    candidate_text: str = ""
    tokens: list[int] = field(default_factory=list)
    overall: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FIGURES, math.nan))
    per_token: dict[str, list[float]] = field(default_factory=dict)
    explained: bool = False  # its error in float32 is that of a formula which the device is known to use
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


# --- Figures ---


def compare(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """cosine, max_abs, mean_abs and relative of each row, as in FORMULAS: (n_rows,) float64 each."""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity in, NaN out: the verdict names both
        error = np.abs(c - r)
        return {
            "cosine": (r * c).sum(1) / np.sqrt((r * r).sum(1) * (c * c).sum(1)),
            "max_abs": error.max(1),
            "mean_abs": error.mean(1),
            "relative": error.max(1) / (r.max(1) - r.min(1)),
        }


def compare_whole(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """The same over whole arrays."""
    rows = compare(reference.reshape(1, -1), candidate.reshape(1, -1))
    return {name: float(row[0]) for name, row in rows.items()}


def relative_errors(reference: dict[str, np.ndarray], candidate: dict[str, np.ndarray]) -> tuple[float, float]:
    """relative of FORMULAS, of the logits and of the encoder's output, of what forward gives."""
    return tuple(compare_whole(reference[key], candidate[key])["relative"] for key in ("logits", "encoder"))


def normalize_text(text: str) -> str:
    """As the authors of kotoba-whisper do before they count errors (run_short_form_eval.py)."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer  # after the device is chosen

    return BasicTextNormalizer()(text).replace(" ", "").replace("。.", "。")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def character_error_rate(references: list[str], hypotheses: list[str]) -> float:
    """Edits over reference characters, pooled over the utterances that have a reference; NaN where none has."""
    pairs = [(normalize_text(r), normalize_text(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [(r, h) for r, h in pairs if r]
    return sum(edit_distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs) if pairs else math.nan


# --- What a healthy device may compute otherwise ---


def hf32(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to 11 bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + (1 << 11)) & ~((1 << 12) - 1)).view(torch.float32)


KNOWN_FORMULAS = {  # an NPU's: F.gelu of torch_npu 2.9.0 (aclnnGelu), and convolutions where HF32 stays on
    "GELU in its tanh form": {"gelu"},
    "convolutions in HF32": {"conv1d"},
    "GELU in its tanh form and convolutions in HF32": {"gelu", "conv1d"},
}


class ComputedAsOnAnNpu(torch.overrides.TorchFunctionMode):
    """A context in which the functions of these names, of torch, are computed with the formulas above."""

    def __init__(self, names: set[str]):
        super().__init__()
        self.names = names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """As TorchFunctionMode calls it in place of each function of torch."""
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name == "gelu" and name in self.names:
            kwargs = {"approximate": "tanh"}
        elif name == "conv1d" and name in self.names:
            args = hf32(args[0]), hf32(args[1]), *args[2:]
        return function(*args, **kwargs)


def forbid_hf32(device: torch.device) -> None:
    """Make float32 mean float32: an NPU convolves in HF32, and a GPU in TF32, unless told not to. Raises SetupError."""
    if device.type == "npu":
        try:
            torch.npu.matmul.allow_hf32 = torch.npu.conv.allow_hf32 = False
        except RuntimeError as error:
            raise common.SetupError(f"{device} cannot switch HF32 off {common.npu_problem(error)}") from error
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"


# --- Measuring ---


def read_clips(path: str | None, utterance: int, extractor, twice: bool) -> Iterator[tuple[Clip, torch.Tensor]]:
    """The clips to compare and their features: every chunk that is not silent, or the sweep. Raises AudioError.

    Where twice is True, the first comes again, to be decoded to the last position.
    """
    chunks = [("sweep", common.sweep())]
    if path is not None:
        read = common.read_chunks(path, common.CHUNK_LENGTH_S)
        chunks = ((f"{path}, {start:.1f} to {end:.1f} s", waveform) for start, end, waveform in read)
    for name, waveform in chunks:
        if waveform is not None:
            features = common.extract_features(extractor, waveform)
            yield Clip(name, utterance), features
            if twice:
                yield Clip(f"{name}, to the last position", None), features
            twice = False


def decode_freely(recognizer, clip: Clip, rows: list, max_new_tokens: int) -> list[tuple[list[int], list[float]]]:
    """Free greedy decoding of a batch of features: token ids and scores, for the clip without utterance to the end."""
    if clip.utterance is None:
        recognizer, max_new_tokens = common.endless(recognizer), common.MAX_NEW_TOKENS
    token_ids, scores, _ = common.generate(recognizer, rows, max_new_tokens)
    if len(token_ids) != len(rows):
        raise common.DeviceError(f"{recognizer.model.device} gives {len(token_ids)} rows for a batch of {len(rows)}")
    return list(zip(token_ids, scores, strict=True))


def forward(recognizer: common.Recognizer, rows: list, tokens: list[int], i: int = 0) -> dict[str, np.ndarray]:
    """A teacher-forced forward of a batch: encoder (n_frames, d_model) and logits (n_tokens, n_vocab) of its row i.

    The logits are those before any suppression.
    """
    model = recognizer.model
    with torch.inference_mode(), common.device_errors(model.device):
        token_ids = torch.tensor([[*recognizer.prompt.tolist(), *tokens[:-1]]] * len(rows), device=model.device)
        features = torch.cat(rows).to(model.device, model.dtype)
        output = model(input_features=features, decoder_input_ids=token_ids)
        encoder, logits = output.encoder_last_hidden_state[i], output.logits[i, common.PROMPT_LENGTH - 1 :]
        return {"encoder": encoder.float().cpu().numpy(), "logits": logits.float().cpu().numpy()}


def cache_errors(recognizer, clip: Clip, features, batches: list, logits, args) -> dict[tuple[int, ...], float]:
    """Decode batches freely: the different token ids of the rows that are features, and cache of FORMULAS for each.

    logits are those of a forward over the clip's tokens. A forward has no cache.
    """
    known, errors = {tuple(clip.tokens): logits}, {}
    for batch in batches:
        decoded = decode_freely(recognizer, clip, batch, args.max_new_tokens)
        for row, (tokens, scores) in zip(batch, decoded, strict=True):
            if row is features:
                if (key := tuple(tokens)) not in known:
                    known[key] = forward(recognizer, [features], tokens)["logits"]
                error = np.abs(known[key][np.arange(len(tokens)), tokens] - scores).max() / np.ptp(known[key])
                errors[key] = float(np.maximum(error, errors.get(key, 0)))  # max would pass over NaN
    return errors


def compare_decoding(recognizer, clip: Clip, tokens: list[int], logits: np.ndarray, threshold: float) -> None:
    """Note where free decoding leaves the reference's tokens, and add it to the faults unless it is at a tie.

    At a tie, rounding can turn the choice: the reference prefers its token by no more than twice the largest error
    there, and that error is within the threshold. What follows is then another text.
    """
    i = next(i for i, (a, b) in enumerate(itertools.zip_longest(clip.tokens, tokens)) if a != b)
    ends = i == min(len(clip.tokens), len(tokens))  # only where one of them has come to its limit
    expected, got = (recognizer.tokenizer.decode(list(row[i : i + 1])) for row in (clip.tokens, tokens))
    margin = math.inf if ends else float(logits[i, clip.tokens[i]] - logits[i, tokens[i]])
    tie = not ends and margin <= 2 * clip.per_token["max_abs"][i] and clip.per_token["relative"][i] < threshold
    difference = (
        f"text differs from token {i} on: {got!r} for {expected!r}, which the reference prefers by {margin:.4g}, "
        f"a {'tie' if tie else 'fault'}"
    )
    said = clip.notes if tie else clip.faults
    if difference not in said:  # alone and in a batch it may leave them at the same token
        said.append(difference)


def measure_reference(recognizer, clip: Clip, features: torch.Tensor, max_new_tokens: int) -> dict[str, np.ndarray]:
    """What the candidate is held against."""
    [(clip.tokens, _)] = decode_freely(recognizer, clip, [features], max_new_tokens)
    clip.text = recognizer.tokenizer.decode(clip.tokens, skip_special_tokens=True).strip()
    arrays = forward(recognizer, [features], clip.tokens)
    top = np.sort(np.partition(arrays["logits"], -2)[:, -2:])
    clip.per_token["top1_margin"] = (top[:, 1] - top[:, 0]).tolist()
    return arrays


def measure_float32(recognizer, reference, clip: Clip, features, expected: dict[str, np.ndarray], args) -> None:
    """Compare the candidate in float32; where it differs, look whether a formula of KNOWN_FORMULAS explains it.

    expected is what the reference computed. The clip that is decoded to the last position shows the cache.
    """
    arrays = forward(recognizer, [features], clip.tokens)
    errors = relative_errors(expected, arrays)
    clip.overall["float32_relative"], clip.overall["float32_encoder"] = errors
    for name, functions in KNOWN_FORMULAS.items() if max(errors) >= FLOAT32_LIMIT else ():
        with ComputedAsOnAnNpu(functions):
            left = np.max(relative_errors(forward(reference, [features], clip.tokens), arrays))
        if left < FLOAT32_LIMIT:
            clip.explained = True
            clip.notes.append(f"the device computes {name}: that makes {max(errors):.3g} in float32, and without it "
                              f"{left:.3g} are left")  # fmt: skip
            break
    if clip.utterance is None:
        [error] = cache_errors(recognizer, clip, features, [[features]], arrays["logits"], args).values()
        if not error < FLOAT32_LIMIT:
            clip.faults.append(f"cache in float32 {error:.3g} is not below {FLOAT32_LIMIT:g}")


def measure_candidate(recognizer, clip: Clip, features, expected: dict[str, np.ndarray], args) -> None:
    """Compare the candidate in its dtype, alone and in a batch, and let it decode freely."""
    other = features.flip(-1)  # time reversed: what is left of another input is not the right one
    first = forward(recognizer, [features], clip.tokens)
    runs = [forward(recognizer, [features, other], clip.tokens), forward(recognizer, [other, features], clip.tokens, 1)]
    rows = compare(expected["logits"], first["logits"])
    clip.per_token |= {name: row.tolist() for name, row in rows.items()}
    clip.per_token["top1_agrees"] = (first["logits"].argmax(1) == expected["logits"].argmax(1)).tolist()
    clip.overall |= compare_whole(expected["logits"], first["logits"])
    _, clip.overall["encoder"] = relative_errors(expected, first)
    clip.overall["repeat"] = float(np.max([relative_errors(first, run) for run in runs]))  # max would pass over NaN
    batches = [[features]]
    if clip.utterance is not None:  # on an accelerator the batch is as large as inference.py's
        batches.append([features, other, other, features] * (1 if recognizer.model.device.type == "cpu" else 4))
    errors = cache_errors(recognizer, clip, features, batches, first["logits"], args)
    clip.overall["cache"] = float(np.max(list(errors.values())))
    clip.candidate_text = recognizer.tokenizer.decode(next(iter(errors)), skip_special_tokens=True).strip()
    for tokens in errors:
        if list(tokens) != clip.tokens:
            compare_decoding(recognizer, clip, tokens, expected["logits"], args.threshold)


def judge(clip: Clip, threshold: float) -> None:
    """Add to the faults of a clip the figures that are beyond their limits."""
    if not np.isfinite(list(clip.overall.values())).all():
        clip.faults.append("NaN or infinite values")
    limits = dict.fromkeys(("relative", "repeat", "cache"), threshold) | {"encoder": ENCODER_FACTOR * threshold}
    if clip.utterance is None:  # past the end of the text nothing is certain, and rounding weighs more
        limits["relative"] = ENCODER_FACTOR * threshold
    if not clip.explained:
        limits |= dict.fromkeys(("float32_relative", "float32_encoder"), FLOAT32_LIMIT)
    for name, limit in limits.items():
        if clip.overall[name] >= limit:
            clip.faults.append(f"{name} {clip.overall[name]:.3g} is not below {limit:g}")


def compare_clip(reference, exact, candidate, clip: Clip, features, expected: dict[str, np.ndarray], args) -> None:
    """Hold the device, in float32 and in its dtype, against what the reference computed. Raises DeviceError."""
    measure_float32(exact, reference, clip, features, expected, args)
    measure_candidate(candidate, clip, features, expected, args)
    judge(clip, args.threshold)
    with common.device_errors(candidate.bias.device):
        if not torch.equal(reference.bias, candidate.bias.cpu()):
            clip.faults.append("the candidate suppresses other tokens than the reference")


def measure(reference, exact, candidate, paths: list[str | None], args) -> tuple[list[Clip], list[int]]:
    """Compare every clip: the clips, and which paths are left out because they cannot be read or, after a failure of
    the device, are not reached: nothing that it returns can be believed.

    reference, exact and candidate are the model on the CPU, on the device in float32, and there in its dtype.
    """
    clips, left_out = [], []
    for i, path in enumerate(paths):
        n_before = len(clips)
        try:
            for clip, features in read_clips(path, i, reference.extractor, not clips):
                clips.append(clip)
                expected = measure_reference(reference, clip, features, args.max_new_tokens)
                try:
                    compare_clip(reference, exact, candidate, clip, features, expected, args)
                except common.OutOfMemoryError:
                    raise
                except common.DeviceError as error:
                    clip.faults.append(str(error))
                    return clips, [*left_out, *range(i, len(paths))]
        except common.AudioError as error:
            del clips[n_before:]
            left_out.append(i)
            common.notice(f"eval_accuracy.py: error: {path}: {error}: left out")
    return clips, left_out


# --- Report ---


def character_error_rates(clips: list[Clip], references: list[str]) -> dict[str, float]:
    """The rate of the reference and of the candidate, the texts of an utterance's clips joined."""
    texts = {"reference": [""] * len(references), "candidate": [""] * len(references)}
    for clip in clips:
        if clip.utterance is not None:
            texts["reference"][clip.utterance] += clip.text
            texts["candidate"][clip.utterance] += clip.candidate_text
    return {side: character_error_rate(references, of_side) for side, of_side in texts.items()}


def format_table(clips: list[Clip], header: dict[str, str], cer: dict[str, float], n_read: str) -> str:
    """The report for a person: the worst of each figure over the clips, and why a clip failed."""
    own = [clip for clip in clips if clip.utterance is not None]
    n_tokens = sum(len(clip.tokens) for clip in own)
    failed = [clip for clip in clips if clip.faults]
    rows = header | {
        "clips, tokens": f"{len(own)}, {n_tokens}",
        "text match": f"{sum(clip.text == clip.candidate_text for clip in own)} of {len(own)}",
    }
    for name, (label, _) in FIGURES.items():
        worst = np.min if name == "cosine" else np.max  # NaN where one is
        rows[label] = f"{worst([clip.overall[name] for clip in clips]):.6g}"
    rows["top-1 agreement"] = f"{sum(sum(clip.per_token.get('top1_agrees', [])) for clip in own)} of {n_tokens}"
    rows["smallest top-1 margin"] = f"{min(min(clip.per_token['top1_margin']) for clip in own):.6g}"
    rows |= {f"CER of the {side}": f"{100 * r:.4f} %" if r >= 0 else "no text to count" for side, r in cer.items()}
    rows["verdict"] = (f"FAIL: {len(failed)} of {len(clips)} clips" if failed else "PASS") + n_read
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    lines += [f"note {clip.name}: {note}" for clip in clips for note in clip.notes]
    return "\n".join(lines + [f"FAIL {clip.name}: {'; '.join(clip.faults)}" for clip in failed])


# --- Command ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="exit status: 0 PASS; 1 FAIL; 2 nothing could be evaluated; 130 interrupted",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--audio", nargs="+", action="extend", default=[], metavar="PATH",
                        help="audio files (default: a sweep of 3 s, 200 to 800 Hz)")  # fmt: skip
    source.add_argument("--manifest", metavar="FILE", help='JSON lines {"audio": ..., "text": ...}: also gives the CER')
    common.add_model_options(add)
    parser.set_defaults(dtype="float16")
    add("--max-new-tokens", type=common.number(int, 1, common.MAX_NEW_TOKENS), default=256, metavar="N",
        help=f"token limit of a clip, as in inference.py, 1 to {common.MAX_NEW_TOKENS} (default: %(default)s)")
    add("--threshold", type=common.number(float, 0, 1), default=0.01, metavar="X",
        help="the relative error that every clip must stay below (default: %(default)s)")  # fmt: skip
    add("--json", metavar="FILE", help="write everything measured there, per clip and per token")
    return parser.parse_args(argv)


def read_manifest(path: str) -> list[tuple[str, str]]:
    """Audio path and text of each line of a JSON lines file; the paths are relative to it. Raises SetupError."""
    rows = []
    try:
        with open(path, "rb") as file:
            lines = file.readlines()  # of bytes: json.loads knows the mark that Windows begins a file with
    except OSError as error:
        raise common.SetupError(f"--manifest {path}: {error.strerror}") from error
    for i, line in enumerate(lines, start=1):
        try:
            match json.loads(line) if line.strip() else None:
                case {"audio": str(audio), "text": str(text)} if b"\0" not in os.fsencode(audio):
                    rows.append((os.path.join(os.path.dirname(path), audio), text))
                case _ if line.strip():
                    raise ValueError("audio and text are not both strings")
        except (ValueError, RecursionError) as error:
            expected = '{"audio": "a.wav", "text": "..."}'
            raise common.SetupError(f"--manifest {path}, line {i}: not {expected} ({error})") from error
    if not rows:
        raise common.SetupError(f"--manifest {path}: there is no line in it")
    return rows


def run(args: argparse.Namespace) -> int:
    """Evaluate what the arguments say; the exit status. Raises SetupError."""
    utterances = read_manifest(args.manifest) if args.manifest else [(path, "") for path in args.audio or [None]]
    paths = [path for path, _ in utterances]
    if args.json:
        common.check_report(args.json, [path for path in (*paths, args.manifest) if path])
    device, warning = common.select_device(args.device)
    if warning:
        common.notice(f"eval_accuracy.py: warning: {warning}")
    forbid_hf32(device)
    dtype = common.select_dtype(args.dtype, device)
    places = (torch.device("cpu"), torch.float32), (device, torch.float32), (device, dtype)
    clips, left_out = measure(*(common.load_model(args.model, *place) for place in places), paths, args)
    if not clips:
        raise common.SetupError(f"there is nothing to compare: of {len(paths)} recordings {len(left_out)} cannot be "
                                "read, and the others are silent")  # fmt: skip
    environment = common.environment(device)
    failed = any(clip.faults for clip in clips)
    header = {
        "model": args.model,
        "reference": "cpu in float32",
        "candidate": f"{device} ({environment['device_name']}) in {str(dtype)[6:]}",
        "HF32": {"npu": "off", "cuda": "TF32 off"}.get(device.type, "none on this device"),
    }
    n_read = f", on {len(paths) - len(left_out)} of {len(paths)} recordings" if left_out else ""
    references = ["" if i in left_out else text for i, (_, text) in enumerate(utterances)]
    cer = character_error_rates(clips, references) if args.manifest else {}
    common.write_stdout(format_table(clips, header, cer, n_read) + "\n")
    if args.json:
        report = {"verdict": "FAIL" if failed else "PASS", **header, "threshold": args.threshold,
                  "left_out": [paths[i] for i in left_out],
                  "float32_limit": FLOAT32_LIMIT, "cer": cer, "formulas": FORMULAS, "environment": environment,
                  "clips": [asdict(clip) for clip in clips]}  # fmt: skip
        common.write_report(args.json, report)
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return common.run_script("eval_accuracy.py", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
