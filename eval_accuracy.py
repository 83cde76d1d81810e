"""Does the device compute what the CPU computes, and is the text right?

    .venv/bin/python eval_accuracy.py                         # 3 s of synthetic sound
    .venv/bin/python eval_accuracy.py --audio a.wav b.wav     # recordings
    .venv/bin/python eval_accuracy.py --manifest test.jsonl   # character error rates
    .venv/bin/python eval_accuracy.py --device cpu --dtype bfloat16   # without an NPU

The reference is the CPU in float32, the candidate is the device. The device
decodes each clip three times: in float32, then in its dtype in a full batch
beside another input, then in its dtype alone. It decodes the first clip once
more, to the decoder's last position, and if it is an NPU or a GPU also in batches
of every size from 2 to the full one, because a kernel may be wrong for one size
only; it stops at the first size with a fault. The reference computes the same
tokens, and all figures compare the two.

How far the candidate may be off is measured: the reference computes each clip
once more with everything rounded to the dtype, and the limit of each error is
three times the error that this causes. In float32, where rounding causes almost
none, the limit is 0.05 %. Encoder error and logits error are the root mean square
of the error, divided by that of the reference's values; relative error is the
largest error of a logit, divided by the range of all logits.

Exit status: 0 PASS; 1 FAIL; 2 nothing could be evaluated; 128 + n ended by
signal n (130: Ctrl-C).
"""
import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # Python leaves that out with -P and -I
import common  # before torch: it sets how that is imported
import torch

FACTOR = 3  # sound kernels make 0.8 to 1.2 times what rounding alone makes, on the tiny model up to 2.4
FLOAT32_LIMIT = 5e-4  # sound kernels that err by 1e-5 make 3e-5, the smallest fault that was seeded 3e-3
LIMITS = {"relative error": 0.01, "encoder error": FLOAT32_LIMIT, "logits error": FLOAT32_LIMIT}  # at least
IN_FLOAT32, TO_END = "in float32", f"to position {common.N_POSITIONS}"


class Computed(NamedTuple):
    """What was written of a clip, and what was computed on the way."""

    token_ids: list[int]
    encoded: torch.Tensor  # the encoder's output, (n_positions, d_model)
    logits: torch.Tensor  # raw, (n_tokens, n_vocab)


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
    n_tokens: int = 0  # of the reference's text
    text: str = ""
    candidate_text: str | None = None  # None until the device has decoded it
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass
class Recording:
    """A sound file, and what was compared of it."""

    path: str | None  # None is the sweep
    text: str = ""  # the true one, where a manifest has it
    clips: list[Clip] = field(default_factory=list)
    is_complete: bool = False  # whether it was read and compared to its end

    def warn(self, message: str) -> None:
        """Write a warning to stderr."""
        common.notice(f"warning: {self.path}: {message}")


# --- Command ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input").add_mutually_exclusive_group().add_argument
    add("--audio", nargs="+", action="extend", default=[], type=os.path.expanduser, metavar="PATH",
        help="Audio files. (default: a sweep, which is a tone that rises from 200 to 800 Hz in 3 s)")  # fmt: skip
    add("--manifest", type=os.path.expanduser, metavar="FILE",
        help='A file with a line {"audio": "a.wav", "text": "..."} for each recording, whose paths are relative to its '
        "folder: then the report has the character error rate too.")  # fmt: skip
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
    recordings = read_manifest(args.manifest) if args.manifest else [Recording(path) for path in args.audio or [None]]
    device = common.select_device(args.device)
    forbid_hf32(device)
    dtype = common.select_dtype(args.dtype, device)
    cpu = common.load_model(args.model, torch.device("cpu"), torch.float32)
    in_float32 = common.load_model(args.model, device, torch.float32)
    candidate = common.load_model(args.model, device, dtype)
    measure(recordings, cpu, in_float32, candidate, args)
    if not any(recording.clips for recording in recordings):
        raise common.SetupError(f"there is nothing to compare: none of {len(recordings)} recordings can be read")
    report = make_report(recordings, candidate, args)
    common.write_stdout(common.report_json(report) if args.json else format_table(report))
    return int(any(clip["faults"] for clip in report["clips"]))


OF_SEGMENT = "offset|duration|start|end|begin|segment"  # what keys begin with that are of a part of a file


def read_manifest(path: str) -> list[Recording]:
    """The recording of each line of a JSON lines file, relative to which the paths are. Raises SetupError."""
    recordings, number = [], 1
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if segment := [key for key in row if re.match(OF_SEGMENT, key.lower())]:
                        raise common.SetupError(f"--manifest {path}, line {number}: {segment[0]} is of a segment, but "
                                                "a text is that of a whole file: cut the segments first")  # fmt: skip
                    recordings.append(Recording(os.path.join(os.path.dirname(path), row["audio"]), row["text"] + ""))
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


def measure(recordings: list[Recording], cpu, in_float32, candidate, args: argparse.Namespace) -> None:
    """Compare the recordings clip by clip, until the device fails: nothing that it returns after that can be believed.

    cpu, in_float32 and candidate are Recognizers: on the CPU in float32, on the device in float32 and in its dtype.
    Raises SetupError where the CPU fails or the device has too little memory.
    """
    reference_of = functools.partial(Reference, cpu, dtype=candidate.model.dtype, max_new_tokens=args.max_new_tokens)
    other = None
    for i, recording in enumerate(recordings, start=1):
        try:
            chunks = [common.Chunk(0, 3, common.sweep())]
            if recording.path is not None:
                chunks = common.read_chunks(recording.path, args.chunk_length, recording.warn)
            for chunk in chunks:
                clip = Clip(f"{recording.path or 'sweep'}, {chunk.start:.1f} to {chunk.end:.1f} s")
                recording.clips.append(clip)
                common.notice(f"recording {i} of {len(recordings)}: {clip.name}")
                features, is_first = common.extract_features(cpu.extractor, chunk.waveform), other is None
                reference = reference_of(features)
                # Reversed in time the first clip is another input, which shares all batches.
                other = other or reference_of(features.flip(-1))
                try:
                    compare_clip(clip, reference, other, in_float32, candidate, is_first)
                except common.OutOfMemoryError:
                    raise
                except common.DeviceError as error:
                    clip.faults.append(str(error))
                    return
            recording.is_complete = True
        except common.AudioError as error:
            common.notice(f"error: {recording.path}: {error}: left out")


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
        decoded = common.generate(recognizer, [features], max_new_tokens)
        self.token_ids, self.encoded = decoded.token_ids[0], decoded.encoded
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
        return Computed(token_ids, encoded[0], model.proj_out(hidden[0, len(self.recognizer.initial_tokens) - 1 :]))


def compare_clip(clip: Clip, reference: Reference, other: Reference, in_float32, candidate, is_first: bool) -> None:
    """Hold the device, in float32 and in its dtype, against the reference. Raises DeviceError.

    other is another input, which shares the batches. The device decodes the first clip to the decoder's last position
    too, beyond the end of its text, and an accelerator in all sizes of batches; on a CPU these would take minutes.
    """
    device = candidate.model.device
    clip.n_tokens, clip.text = len(reference.token_ids), reference.text(reference.token_ids)
    compare_rows(clip, [reference], in_float32, IN_FLOAT32)
    full = common.default_batch_size(device)
    sizes = range(2, full + 1) if is_first and device.type != "cpu" else [full]
    for size in sizes:
        # The two take turns; the last row is the clip and the first is not, so that rows in reverse order are noticed.
        turns = [other, reference] * size
        if not compare_rows(clip, [*turns[: size - 1], reference], candidate, f"in a batch of {size}"):
            break
    compare_rows(clip, [reference], candidate, "alone")
    if is_first:
        compare_rows(clip, [reference], common.endless(candidate), TO_END)
    with common.device_errors(device):
        if not torch.equal(reference.recognizer.token_mask, candidate.token_mask.cpu()):
            clip.faults.append("the device suppresses other tokens than the reference")


def compare_rows(clip: Clip, rows: list[Reference], recognizer: common.Recognizer, how: str) -> bool:
    """Hold a batch, whose last row is the clip, against the reference; whether no fault shows. Raises DeviceError."""
    try:
        batch = decode_rows(recognizer, rows, common.MAX_NEW_TOKENS if how == TO_END else rows[-1].max_new_tokens)
    except common.DeviceError as error:
        raise type(error)(f"{error} ({how})") from error
    figures, n_faults = [], len(clip.faults)
    for reference, found in zip(rows, batch, strict=True):
        expected, rounding = reference.computed(found.token_ids)
        of_row = limited(compare(expected, found), rounding, f"{clip.name}, {how}", how == IN_FLOAT32)
        figures += of_row
        if how != TO_END:  # there no text ends
            note_difference(clip, reference, found, not any(figure.is_fault for figure in of_row), how)
            if how != IN_FLOAT32:
                clip.candidate_text = reference.text(found.token_ids)
    clip.figures += (shown := worst(figures))
    clip.faults += [f"{f.name} {f.value:.3g} is not below {f.limit:.3g} ({how})" for f in shown if f.is_fault]
    return len(clip.faults) == n_faults


def decode_rows(recognizer: common.Recognizer, rows: list[Reference], max_new_tokens: int) -> list[Computed]:
    """Decode a batch of the rows' features as inference.py does: what comes out of each row. Raises DeviceError."""
    model, steps = recognizer.model, []
    with model.proj_out.register_forward_hook(lambda module, inputs, output: steps.append(output)):
        decoded = common.generate(recognizer, [row.features for row in rows], max_new_tokens)
    n_rows, exist = len(decoded.token_ids), range(model.config.vocab_size)
    if n_rows != len(rows) or not all(token_id in exist for ids in decoded.token_ids for token_id in ids):
        raise common.DeviceError(f"{model.device} gives {n_rows} rows for a batch of {len(rows)}, or token ids that do "
                                 "not exist")  # fmt: skip
    with torch.inference_mode(), common.device_errors(model.device):
        logits = torch.stack(steps[1:], 1)  # the first were for the probability of no speech
        return [Computed(ids, decoded.encoded[i].cpu(), logits[i, : len(ids)].cpu())
                for i, ids in enumerate(decoded.token_ids)]  # fmt: skip


def note_difference(clip: Clip, reference: Reference, found: Computed, is_sound: bool, how: str) -> None:
    """Note where a text leaves the reference's, if it does: as a fault, unless it is at a tie that rounding can turn.

    At a tie all figures are sound, and the reference prefers its token by no more than twice the largest error there;
    what follows is then another text.
    """
    ours, theirs = reference.token_ids, found.token_ids
    if theirs == ours:
        return
    i = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
    margin, error = math.inf, 0.0
    if i < min(len(ours), len(theirs)):
        expected = reference.computed(theirs)[0].logits[i]
        margin = (expected[ours[i]] - expected[theirs[i]]).item()
        error = (found.logits[i] - expected).abs().max().item()
    our_token, their_token = (reference.recognizer.tokenizer.decode(ids[i : i + 1]) for ids in (ours, theirs))
    difference = f"text differs from token {i} on: {their_token!r} for {our_token!r}"
    difference += f", which the reference prefers by {margin:.3g} ({how})"
    is_tie = is_sound and margin <= 2 * error
    remarks = clip.notes if is_tie else clip.faults
    if difference not in remarks:  # another row of the batch may show the same
        remarks.append(difference)


# --- Figures ---


def compare(expected: Computed, found: Computed) -> dict[str, float]:
    """The figures of what was found, c, and what was expected, r, in float64, in the order of the table.

    The first four are of the raw logits. The last, which is of the logits less each token's mean over the vocabulary,
    leaves out what softmax does not see.
    """
    norm = torch.linalg.vector_norm
    r, c = expected.logits.double(), found.logits.double()
    error, encoded = c - r, expected.encoded.double()
    values = {
        "cosine similarity": (r * c).sum() / (norm(r) * norm(c)),
        "largest absolute error": error.abs().max(),
        "mean absolute error": error.abs().mean(),
        "relative error": error.abs().max() / (r.max() - r.min()),
        "encoder error": norm(found.encoded.double() - encoded) / norm(encoded),
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


# --- Report ---


def make_report(recordings: list[Recording], candidate: common.Recognizer, args: argparse.Namespace) -> dict:
    """The content of the report: what was compared and found, the worst figures, the verdict, and each clip."""
    device, dtype = candidate.model.device, common.dtype_name(candidate.model.dtype)
    environment, clips = common.environment(device), [clip for recording in recordings for clip in recording.clips]
    complete = [recording for recording in recordings if recording.is_complete]
    truth = [recording.text for recording in complete]
    heard = {"reference": ["".join(clip.text for clip in recording.clips) for recording in complete],
             "candidate": ["".join(clip.candidate_text for clip in recording.clips) for recording in complete]}
    remark = {"npu": ", HF32 off", "cuda": ", TF32 off", "cpu": ": no NPU was tested"}[device.type]
    others = "on a CPU no other size is checked" if device.type == "cpu" else "all smaller ones for the first clip"
    return {
        "model": args.model, "reference": "cpu in float32",
        "candidate": f"{device} ({environment['device_name']}) in {dtype}{remark}",
        "batch sizes": f"{common.default_batch_size(device)}; {others}",
        "clips, tokens": f"{len(clips)}, {sum(clip.n_tokens for clip in clips)}",
        "text match": f"{sum(clip.text == clip.candidate_text for clip in clips)} of {len(clips)}",
        "figures": [asdict(figure) for figure in worst([figure for clip in clips for figure in clip.figures])],
        "cer": {side: character_error_rate(truth, texts) for side, texts in heard.items() if args.manifest},
        "verdict": verdict(clips, len(recordings) - len(complete), f"{device} in {dtype}"),
        "left_out": [recording.path for recording in recordings if not recording.is_complete],
        "clips": [asdict(clip) for clip in clips], "environment": environment,
    }  # fmt: skip


def verdict(clips: list[Clip], n_left_out: int, candidate: str) -> str:
    """PASS or FAIL, and what that means in a sentence; n_left_out recordings were not compared to their end."""
    n_failed, n = sum(bool(clip.faults) for clip in clips), f"{len(clips)} clip{'s' * (len(clips) != 1)}"
    if n_failed:
        sentence = f"FAIL: {candidate} does not compute what the CPU computes in float32: {n_failed} of {n}"
    else:
        figure = max((f for clip in clips for f in clip.figures if f.limit), key=lambda f: f.badness)
        sentence = f"PASS: {candidate} computes what the CPU computes in float32; {n}, worst "
        sentence += f"{figure.name}, {figure.badness:.2f} of its limit, in {figure.where}"
    return sentence + (f"; recordings left out: {n_left_out}" if n_left_out else "")


def format_table(report: dict) -> str:
    """The report for a person: each figure where it is worst, why a clip failed, and at the end the verdict."""
    header = "model", "reference", "candidate", "batch sizes", "clips, tokens", "text match"
    rows = {name: report[name] for name in header}
    rows[""] = f"{'value':<12}{'limit':<12}{'rounding':<12}largest in"
    for figure in report["figures"]:
        numbers = ("" if figure[key] is None else f"{figure[key]:.6g}" for key in ("value", "limit", "rounding"))
        rows[figure["name"]] = "".join(f"{number:<12}" for number in numbers) + figure["where"]
    for side, rate in report["cer"].items():
        rows[f"CER of the {side}"] = f"{100 * rate:.4f} %" if rate >= 0 else "no text to count"
    lines = [f"{name:<26}  {value}\n" for name, value in rows.items()]
    for clip in report["clips"]:
        lines += [f"note {clip['name']}: {note}\n" for note in clip["notes"]]
    lines += [f"FAIL {clip['name']}: {'; '.join(clip['faults'])}\n" for clip in report["clips"] if clip["faults"]]
    return "".join(lines) + report["verdict"] + "\n"


if __name__ == "__main__":
    sys.exit(main())
