"""Does the device compute what the CPU computes, and is the text right?

    python3 eval_accuracy.py                         # 3 s of synthetic sound
    python3 eval_accuracy.py --audio a.wav b.wav     # all chunks of recordings
    python3 eval_accuracy.py --manifest test.jsonl   # and character error rates
    python3 eval_accuracy.py --json > report.json    # the same as JSON
    python3 eval_accuracy.py --device cpu --dtype bfloat16    # without an NPU

The reference is the CPU in float32, the candidate is the device. The device
decodes each clip three times: in float32, then in its dtype in a full batch
beside another input, then in its dtype alone. It decodes the first clip once
more, to the decoder's last position. The reference computes the same tokens, and
all figures compare the two.

How far the candidate may be off is measured: the reference computes each clip
once more with everything rounded to the dtype, and the limit of each error is
three times the error that this causes. In float32, where rounding causes almost
none, the limit is 0.05 %. Encoder error and logits error are the root mean square
of the error, divided by that of the reference's values; relative error is the
largest error of a logit, divided by the range of all logits.

Exit status: 0 PASS; 1 FAIL; 2 nothing could be evaluated; 130 interrupted.
"""
import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # Python leaves that out with -P and -I
import common  # before torch: it sets how that is imported
import torch

FACTOR = 3  # sound kernels make 0.8 to 1.2 times what rounding alone makes, on the tiny model up to 2.4
FLOAT32_LIMIT = 5e-4  # sound kernels that err by 1e-5 make 3e-5, the smallest fault that was seeded 3e-3
LIMITS = {"relative error": 0.01, "encoder error": FLOAT32_LIMIT, "logits error": FLOAT32_LIMIT}  # at least
TO_END = f"to position {common.N_POSITIONS}"
# Ranges of both errors in float32 that a known setting of an NPU causes
CAUSES = {"HF32 makes as much": (0, 0.002), "GELU in its tanh form makes as much": (0.002, 0.005)}


class Computed(NamedTuple):
    """What was computed of a clip: the encoder's output and the raw logits of each token."""

    encoded: torch.Tensor  # (n_positions, d_model)
    logits: torch.Tensor  # (n_tokens, n_vocab)


@dataclass(frozen=True)
class Figure:
    """A number of the report."""

    name: str
    where: str  # the clip, and how it was decoded
    value: float
    limit: float | None
    rounding: float | None  # the same of the reference, with rounding to the dtype

    @property
    def is_fault(self) -> bool:
        """Whether it is not below its limit, as NaN never is."""
        return self.limit is not None and not self.value < self.limit

    @property
    def badness(self) -> float:
        """A number that grows as the figure gets worse: in relation to its limit, where it has one."""
        value = -self.value if self.name == "cosine similarity" else self.value / (self.limit or 1)
        return math.inf if math.isnan(value) else value


@dataclass
class Clip:
    """A chunk of a recording, and what the comparison has shown."""

    name: str
    recording: int  # its index
    n_tokens: int = 0  # of the reference's text
    text: str = ""
    candidate_text: str = ""
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


# --- Command ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input").add_mutually_exclusive_group().add_argument
    add("--audio", nargs="+", action="extend", default=[], metavar="PATH",
        help="Audio files. (default: a sweep, which is a tone that rises from 200 to 800 Hz in 3 s)")  # fmt: skip
    add("--manifest", metavar="FILE", help='A file with a line {"audio": "a.wav", "text": "..."} for each recording, '
        "whose paths are relative to its folder: then the report has the character error rate too.")  # fmt: skip
    common.add_model_options(parser, "the evaluation ends with status 2")
    parser.set_defaults(device="npu")
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="Print the report as JSON, in place of the table.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return common.run_script(run, parse_arguments(argv))


def run(args: argparse.Namespace) -> int:
    """Evaluate what the arguments say; the exit status. Raises SetupError."""
    recordings = read_manifest(args.manifest) if args.manifest else [(path, "") for path in args.audio or [None]]
    paths = [path for path, _ in recordings]
    device = common.select_device(args.device)
    forbid_hf32(device)
    dtype = common.select_dtype(args.dtype, device)
    places = (torch.device("cpu"), torch.float32), (device, torch.float32), (device, dtype)
    clips, left_out = measure(*(common.load_model(args.model, *place) for place in places), paths, args)
    if not clips:
        raise common.SetupError(f"there is nothing to compare: none of {len(paths)} recordings can be read")
    environment = common.environment(device)
    said = {"npu": ", HF32 off", "cuda": ", TF32 off", "cpu": ": no NPU was tested"}[device.type]
    candidate = f"{device} ({environment['device_name']}) in {common.dtype_name(dtype)}{said}"
    n_failed = sum(bool(clip.faults) for clip in clips)
    verdict = f"FAIL: {n_failed} of {len(clips)} clips" if n_failed else "PASS"
    verdict += f", on {len(paths) - len(left_out)} of {len(paths)} recordings" if left_out else ""
    texts = ["" if i in left_out else text for i, (_, text) in enumerate(recordings)]
    report = {
        "model": args.model, "reference": "cpu in float32", "candidate": candidate,
        "clips, tokens": f"{len(clips)}, {sum(clip.n_tokens for clip in clips)}",
        "text match": f"{sum(clip.text == clip.candidate_text for clip in clips)} of {len(clips)}",
        "figures": [asdict(figure) for figure in worst([figure for clip in clips for figure in clip.figures])],
        "cer": character_error_rates(clips, texts) if args.manifest else {},
        "verdict": verdict, "left_out": [paths[i] for i in left_out], "clips": [asdict(clip) for clip in clips],
        "environment": environment,
    }  # fmt: skip
    common.write_stdout(common.report_json(report) if args.json else format_table(report))
    return int(n_failed > 0)


def read_manifest(path: str) -> list[tuple[str, str]]:
    """Audio path and text of each line of a JSON lines file; the paths are relative to it. Raises SetupError."""
    recordings, number = [], 1
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):  # noqa: B007
                if line.strip():
                    row = json.loads(line)
                    recordings.append((os.path.join(os.path.dirname(path), row["audio"]), row["text"] + ""))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            expected = '{"audio": "a.wav", "text": "..."}'
            raise common.SetupError(f"--manifest {path}, line {number}: not {expected} ({error})") from error
    if not recordings:
        raise common.SetupError(f"--manifest {path}: there is no line in it")
    return recordings


def forbid_hf32(device: torch.device) -> None:
    """Make float32 mean float32: an NPU convolves in HF32, and a GPU in TF32, unless told not to. Raises SetupError."""
    if device.type == "npu":
        try:
            torch.npu.matmul.allow_hf32 = torch.npu.conv.allow_hf32 = False
        except RuntimeError as error:
            raise common.npu_error(f"{device} cannot switch HF32 off", error) from error
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"


# --- Measuring ---


def measure(
    reference, exact, candidate, paths: list[str | None], args: argparse.Namespace
) -> tuple[list[Clip], list[int]]:
    """Compare every clip. Returns the clips and the indices of the recordings that are left out: those that cannot be
    read, and all from the one on at which the device failed, because then nothing that it returns can be believed.

    reference, exact and candidate are the model on the CPU, on the device in float32, and there in its dtype; the path
    None means the sweep. Raises SetupError where the reference fails or the device has too little memory.
    """
    clips, left_out, other = [], [], None
    for i, path in enumerate(paths):
        try:
            chunks = [common.Chunk(0, 3, common.sweep())]
            if path is not None:
                chunks = common.read_chunks(path, args.chunk_length, lambda text, path=path:
                                            common.notice(f"warning: {path}: {text}"))  # fmt: skip
            for chunk in chunks:
                clips.append(Clip(f"{path or 'sweep'}, {chunk.start:.1f} to {chunk.end:.1f} s", i))
                common.notice(f"recording {i + 1} of {len(paths)}: {clips[-1].name}")
                features = common.extract_features(reference.extractor, chunk.waveform)
                expected = Reference(reference, features, candidate.model.dtype, args.max_new_tokens)
                # The first clip reversed in time is another input, which shares all batches.
                other = other or Reference(reference, features.flip(-1), candidate.model.dtype, args.max_new_tokens)
                try:
                    compare_clip(clips[-1], expected, other, exact, candidate, len(clips) == 1)
                except common.OutOfMemoryError:
                    raise
                except common.DeviceError as error:
                    clips[-1].faults.append(str(error))
                    return clips, [*left_out, *range(i, len(paths))]
        except common.AudioError as error:
            left_out.append(i)
            common.notice(f"error: {path}: {error}: left out")
    return clips, left_out


class Rounded(torch.overrides.TorchFunctionMode):
    """A context in which each function of torch takes and gives float32 that is rounded to a dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def round(self, value):
        """The value, with all float32 tensors in it rounded."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.round, value))
        is_float = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(self.dtype).float() if is_float else value

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """What torch calls in the place of each of its functions."""
        kwargs = {name: self.round(value) for name, value in (kwargs or {}).items()}
        return self.round(function(*self.round(args), **kwargs))


class Reference:
    """What the CPU computes of a clip in float32, and what rounding to a dtype alone makes of that."""

    def __init__(self, recognizer: common.Recognizer, features, dtype: torch.dtype, max_new_tokens: int):
        """Decode the clip, and encode it once more with rounding. Raises DeviceError."""
        self.recognizer, self.features, self.max_new_tokens = recognizer, features, max_new_tokens
        self.rounded, self.known = Rounded(dtype), {}
        [self.token_ids], _, self.encoded = common.generate(recognizer, [features], max_new_tokens)
        with torch.inference_mode(), self.rounded:
            self.encoded_rounded = recognizer.model.model.encoder(features).last_hidden_state

    def text(self, token_ids: list[int]) -> str:
        """The text of token ids."""
        return self.recognizer.tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    def computed(self, token_ids: list[int]) -> tuple[Computed, dict[str, float]]:
        """What it computes where these tokens are written, and what compare gives for the same with rounding."""
        key = tuple(token_ids)
        if key not in self.known:
            exact = self.forward(self.encoded, token_ids)
            with self.rounded:
                rounded = self.forward(self.encoded_rounded, token_ids)
            self.known[key] = exact, compare(exact, rounded)
        return self.known[key]

    @torch.inference_mode()
    def forward(self, encoded: torch.Tensor, token_ids: list[int]) -> Computed:
        """Teacher forcing: the decoder's logits for all tokens at once, without a cache."""
        model, inputs = self.recognizer.model, common.decoder_inputs(self.recognizer, [token_ids])
        hidden = model.model.decoder(input_ids=inputs, encoder_hidden_states=encoded, use_cache=False).last_hidden_state
        return Computed(encoded[0], model.proj_out(hidden[0, common.START_LENGTH - 1 :]))


def compare_clip(clip: Clip, reference: Reference, other: Reference, exact, candidate, to_end: bool) -> None:
    """Hold the device, in float32 and in its dtype, against the reference. Raises DeviceError.

    other is another input, which shares the batch. Where to_end is True, the device decodes the clip to the decoder's
    last position too, beyond the end of its text.
    """
    device, limit = candidate.model.device, reference.max_new_tokens
    clip.n_tokens, clip.text = len(reference.token_ids), reference.text(reference.token_ids)
    # The other input stands first, so that rows in reverse order are noticed.
    batch = [other, reference, reference, reference] * (common.default_batch_size(device) // 4)
    runs = [("in float32", exact, [reference], limit), ("in a batch", candidate, batch, limit),
            ("alone", candidate, [reference], limit)]  # fmt: skip
    if to_end:
        runs.append((TO_END, common.endless(candidate), [reference], common.MAX_NEW_TOKENS))
    for how, recognizer, rows, max_new_tokens in runs:
        figures = []
        for row, (token_ids, computed) in zip(rows, decode(recognizer, rows, max_new_tokens), strict=True):
            expected, rounding = row.computed(token_ids)
            of_row = limited(compare(expected, computed), rounding, f"{clip.name}, {how}", recognizer is exact)
            figures += of_row
            if how != TO_END:
                if row is reference:
                    clip.candidate_text = reference.text(token_ids)
                is_sound = not any(figure.is_fault for figure in of_row)
                note_difference(clip, row, token_ids, expected.logits, computed.logits, is_sound, how)
        clip.figures += worst(figures)
        clip.faults += describe_faults(worst(figures), how)
    with common.device_errors(device):
        if not torch.equal(reference.recognizer.token_mask, candidate.token_mask.cpu()):
            clip.faults.append("the device suppresses other tokens than the reference")


def decode(
    recognizer: common.Recognizer, rows: list[Reference], max_new_tokens: int
) -> Iterator[tuple[list[int], Computed]]:
    """Decode a batch of the rows' features as inference.py does: token ids and what was computed, of each row.

    Raises DeviceError.
    """
    model, steps = recognizer.model, []
    with model.proj_out.register_forward_hook(lambda module, inputs, output: steps.append(output[:, -1])):
        token_ids, _, encoded = common.generate(recognizer, [row.features for row in rows], max_new_tokens)
    exist = range(model.config.vocab_size)
    if len(token_ids) != len(rows) or not all(i in exist for ids in token_ids for i in ids):
        raise common.DeviceError(f"{model.device} gives {len(token_ids)} rows for a batch of {len(rows)}, or token ids "
                                 "that do not exist")  # fmt: skip
    for i in range(len(rows)):
        with torch.inference_mode(), common.device_errors(model.device):
            logits = torch.stack([step[i] for step in steps[: len(token_ids[i])]])
            computed = Computed(encoded[i].cpu(), logits.cpu())
        yield token_ids[i], computed


def note_difference(clip: Clip, reference: Reference, token_ids, expected, got, is_sound: bool, how: str) -> None:
    """Note where a text leaves the reference's, if it does: as a fault, unless it is at a tie that rounding can turn.

    At a tie all figures are sound, and the reference prefers its token by no more than twice the largest error there;
    what follows is then another text. expected and got are the logits of token_ids.
    """
    ours = reference.token_ids
    if token_ids == ours:
        return
    i = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours, token_ids)) if a != b)
    margin, error = math.inf, 0.0
    if i < min(len(ours), len(token_ids)):
        margin = (expected[i, ours[i]] - expected[i, token_ids[i]]).item()
        error = (got[i] - expected[i]).abs().max().item()
    got_token, our_token = (reference.recognizer.tokenizer.decode(ids[i : i + 1]) for ids in (token_ids, ours))
    said = clip.notes if is_sound and margin <= 2 * error else clip.faults
    difference = f"text differs from token {i} on: {got_token!r} for {our_token!r}"
    difference += f", which the reference prefers by {margin:.3g} ({how})"
    if difference not in said:  # another row of the batch may show the same
        said.append(difference)


# --- Figures ---


def compare(reference: Computed, candidate: Computed) -> dict[str, float]:
    """The figures of a candidate c and its reference r, computed in float64, in the order of the table.

    Of the raw logits: cosine similarity is sum(r c) / sqrt(sum(r^2) sum(c^2)), relative error max |c - r| / (max r -
    min r). Encoder error is RMS(c - r) / RMS(r) of the encoder's output over all positions, and logits error the same
    of the logits less each token's mean over the vocabulary, which softmax does not see.
    """
    norm = torch.linalg.vector_norm
    r, c = reference.logits.double(), candidate.logits.double()
    error, encoded = c - r, reference.encoded.double()
    values = {
        "cosine similarity": (r * c).sum() / (norm(r) * norm(c)),
        "largest absolute error": error.abs().max(),
        "mean absolute error": error.abs().mean(),
        "relative error": error.abs().max() / (r.max() - r.min()),
        "encoder error": norm(candidate.encoded.double() - encoded) / norm(encoded),
        "logits error": norm(error - error.mean(1, keepdim=True)) / norm(r - r.mean(1, keepdim=True)),
    }
    return {name: value.item() for name, value in values.items()}


def limited(values: dict[str, float], rounding: dict[str, float], where: str, is_float32: bool) -> list[Figure]:
    """The figures of a row with their limits; in float32 only the two errors over all that was computed."""
    if is_float32:
        names = "encoder error", "logits error"
        return [Figure(f"{name} in float32", where, values[name], FLOAT32_LIMIT, None) for name in names]
    limits = {name: max(limit, FACTOR * rounding[name]) for name, limit in LIMITS.items()}
    return [Figure(name, where, value, limits.get(name), rounding[name]) for name, value in values.items()]


def worst(figures: list[Figure]) -> list[Figure]:
    """Of the figures of each name the worst, with those in float32 at the end."""
    names = sorted(dict.fromkeys(figure.name for figure in figures), key=lambda name: name.endswith("in float32"))
    return [max((f for f in figures if f.name == name), key=lambda figure: figure.badness) for name in names]


def describe_faults(figures: list[Figure], how: str) -> list[str]:
    """Which figures are not below their limits, and how the clip was decoded or what on an NPU makes as much."""
    if how == "in float32":
        fitting = (cause for cause, (low, high) in CAUSES.items() if all(low <= f.value <= high for f in figures))
        how = next(fitting, how)
    faults = (figure for figure in figures if figure.is_fault)
    return [f"{figure.name} {figure.value:.3g} is not below {figure.limit:.3g} ({how})" for figure in faults]


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


def character_error_rates(clips: list[Clip], texts: list[str]) -> dict[str, float]:
    """The rate of the reference and of the candidate against the true texts; the clips of a recording are joined."""
    heard = {"reference": [""] * len(texts), "candidate": [""] * len(texts)}
    for clip in clips:
        heard["reference"][clip.recording] += clip.text
        heard["candidate"][clip.recording] += clip.candidate_text
    return {side: character_error_rate(texts, of_side) for side, of_side in heard.items()}


# --- Report ---


def format_table(report: dict) -> str:
    """The report for a person: each figure where it is worst, the verdict, and why a clip failed."""
    rows = {name: report[name] for name in ("model", "reference", "candidate", "clips, tokens", "text match")}
    rows[""] = f"{'value':<12}{'limit':<12}{'rounding':<12}largest in"
    for figure in report["figures"]:
        numbers = ("" if figure[key] is None else f"{figure[key]:.6g}" for key in ("value", "limit", "rounding"))
        rows[figure["name"]] = "".join(f"{number:<12}" for number in numbers) + figure["where"]
    for side, rate in report["cer"].items():
        rows[f"CER of the {side}"] = f"{100 * rate:.4f} %" if rate >= 0 else "no text to count"
    lines = [f"{name:<26}  {value}\n" for name, value in (rows | {"verdict": report["verdict"]}).items()]
    for clip in report["clips"]:
        lines += [f"note {clip['name']}: {note}\n" for note in clip["notes"]]
    lines += [f"FAIL {clip['name']}: {'; '.join(clip['faults'])}\n" for clip in report["clips"] if clip["faults"]]
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
