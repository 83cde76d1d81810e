"""Does the device compute what the CPU computes, and is the text right?

    python3 eval_accuracy.py                                          # a 3 s sweep; the NPU in float16
    python3 eval_accuracy.py --audio meeting.wav --json report.json   # every chunk of real recordings
    python3 eval_accuracy.py --manifest test.jsonl                    # and the character error rate

The reference is the CPU in float32. It decodes each clip greedily; then the reference and the candidate each run one
forward over the same features and the same tokens (teacher forcing), and their raw logits are compared in float64.
The candidate does so in float32 first, where a fault cannot hide behind rounding, and then in its own dtype, in which
it also runs in a batch, among other inputs, and decodes freely, alone and in that batch. The first clip is decoded once
more, to the decoder's last position.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import common
import numpy as np

FLOAT32_LIMIT = 5e-5  # relative error in float32: see the README for what lies below and above it
ENCODER_FACTOR = 5  # by so much the encoder's may exceed the threshold: sound bfloat16 gives 0.014 at full size
FORMULAS = {
    "cosine": "sum(r c) / sqrt(sum(r^2) sum(c^2)), of raw logits: r the reference's, c the candidate's, in float64",
    "max_abs": "max |c - r|",
    "mean_abs": "mean |c - r|",
    "relative": "max |c - r| / (max r - min r)",
    "encoder": "relative, of the encoder's output",
    "float32_relative, float32_encoder": "relative and encoder, of the candidate in float32",
    "repeat": "relative, between runs of the candidate, one of them in a batch with another input",
    "cache": "max |s - c| / (max c - min c), s the scores in free decoding, alone and in a batch, of the tokens chosen",
    "top1_agrees": "the largest logit of both is that of the same token",
    "top1_margin": "largest less second largest logit of the reference",
    "cer": "edits / reference characters over all utterances, after BasicTextNormalizer, without spaces, 。. as 。",
}


OVERALL = ("cosine", "max_abs", "mean_abs", "relative", "encoder", "float32_relative", "float32_encoder", "repeat",
           "cache")  # fmt: skip


@dataclass
class Clip:
    """What was compared in one chunk of audio; the figures are those of FORMULAS."""

    name: str
    utterance: int | None  # which recording it is a part of; None for the clip that is decoded to the last position
    text: str = ""
    candidate_text: str = ""
    tokens: list[int] = field(default_factory=list)
    overall: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OVERALL, math.nan))
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


def normalize_text(text: str) -> str:
    """As the authors of kotoba-whisper do before they count errors (run_short_form_eval.py)."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

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


def character_error_rates(clips: list[Clip], references: list[str]) -> dict[str, float]:
    """The rate of the reference and of the candidate, the texts of an utterance's clips joined."""
    rates = {}
    for side, attribute in (("reference", "text"), ("candidate", "candidate_text")):
        texts = [""] * len(references)
        for clip in clips:
            if clip.utterance is not None:
                texts[clip.utterance] += getattr(clip, attribute)
        rates[side] = character_error_rate(references, texts)
    return rates


# --- What a healthy device may compute otherwise ---


@contextlib.contextmanager
def tanh_gelu(model) -> Iterator[None]:
    """GELU in its tanh form, in the convolutions' activations too: torch_npu's F.gelu (aclnnGelu)."""
    import torch

    gelu, layers = torch.nn.functional.gelu, [*model.model.encoder.layers, *model.model.decoder.layers]
    activations = [layer.activation_fn for layer in layers]
    torch.nn.functional.gelu = lambda x, approximate="tanh": gelu(x, approximate="tanh")
    for layer in layers:
        layer.activation_fn = torch.nn.GELU(approximate="tanh")
    yield
    torch.nn.functional.gelu = gelu
    for layer, activation in zip(layers, activations, strict=True):
        layer.activation_fn = activation


@contextlib.contextmanager
def hf32_convolutions(model) -> Iterator[None]:
    """Convolutions with inputs and weights rounded to 11 bits of mantissa: an NPU's, where HF32 stays on."""
    import torch

    def hf32(x: torch.Tensor) -> torch.Tensor:
        """float32 rounded to 11 bits of mantissa."""
        return ((x.contiguous().view(torch.int32) + (1 << 11)) & ~((1 << 12) - 1)).view(torch.float32)

    convolutions = [model.model.encoder.conv1, model.model.encoder.conv2]
    weights = [convolution.weight.data for convolution in convolutions]
    hooks = [c.register_forward_pre_hook(lambda _, inputs: (hf32(inputs[0]),)) for c in convolutions]
    for convolution in convolutions:
        convolution.weight.data = hf32(convolution.weight.data)
    yield
    for convolution, weight, hook in zip(convolutions, weights, hooks, strict=True):
        convolution.weight.data = weight
        hook.remove()


KNOWN_FORMULAS = {
    "GELU in its tanh form": [tanh_gelu], "convolutions in HF32": [hf32_convolutions],
    "GELU in its tanh form and convolutions in HF32": [tanh_gelu, hf32_convolutions],
}  # fmt: skip

# --- Measuring ---


def read_clips(path: str, utterance: int, extractor) -> Iterator[tuple[Clip, object]]:
    """The clips to compare and their features: every chunk that is not silent. Raises AudioError."""
    for start, end, waveform in common.read_chunks(path, common.CHUNK_LENGTH_S):
        if waveform is not None:
            yield Clip(f"{path}, {start:.1f} to {end:.1f} s", utterance), common.extract_features(extractor, waveform)


def decode(
    recognizer: common.Recognizer, clip: Clip, rows: list, max_new_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Free greedy decoding of a batch of features: token ids and scores, for the clip without utterance to the end."""
    if clip.utterance is None:
        bias, max_new_tokens = recognizer.bias.clone(), common.MAX_NEW_TOKENS
        bias[:, recognizer.tokenizer.eos_token_id] = -float("inf")
        recognizer = replace(recognizer, bias=bias)
    return list(zip(*common.generate(recognizer, rows, max_new_tokens), strict=True))


def forward(recognizer: common.Recognizer, rows: list, tokens: list[int], i: int = 0) -> dict[str, np.ndarray]:
    """A teacher-forced forward of a batch: encoder (n_frames, d_model) and logits (n_tokens, n_vocab) of its row i.

    The logits are those before any suppression.
    """
    import torch

    model = recognizer.model
    with torch.inference_mode(), common.device_errors(model.device):
        token_ids = torch.tensor([[*recognizer.prompt.tolist(), *tokens[:-1]]] * len(rows), device=model.device)
        features = torch.cat(rows).to(model.device, model.dtype)
        output = model(input_features=features, decoder_input_ids=token_ids)
        encoder, logits = output.encoder_last_hidden_state[i], output.logits[i, common.PROMPT_LENGTH - 1 :]
        return {"encoder": encoder.float().cpu().numpy(), "logits": logits.float().cpu().numpy()}


def cache_error(logits: np.ndarray, tokens: list[int], scores: list[float]) -> float:
    """cache of FORMULAS: how far the scores of free decoding are from the logits of a forward, which has no cache."""
    return float(np.abs(logits[np.arange(len(tokens)), tokens] - scores).max() / (logits.max() - logits.min()))


def compare_float32(recognizer, clip: Clip, features, reference: dict, args) -> dict[str, np.ndarray]:
    """Compare the candidate in float32, and at the last position its cache; what it computed."""
    arrays = forward(recognizer, [features], clip.tokens)
    if clip.utterance is None:
        try:
            [(tokens, scores)] = decode(recognizer, clip, [features], args.max_new_tokens)
            own = arrays if tokens == clip.tokens else forward(recognizer, [features], tokens)
            if not (error := cache_error(own["logits"], tokens, scores)) < FLOAT32_LIMIT:
                clip.faults.append(f"cache in float32 {error:.3g} is not below {FLOAT32_LIMIT:g}")
        except common.DeviceError as error:
            clip.faults.append(str(error))
    clip.overall["float32_relative"] = compare_whole(reference["logits"], arrays["logits"])["relative"]
    clip.overall["float32_encoder"] = compare_whole(reference["encoder"], arrays["encoder"])["relative"]
    return arrays


def explain(recognizer: common.Recognizer, clip: Clip, features, candidate: dict[str, np.ndarray]) -> None:
    """Look whether the reference, computed with a formula that a device is known to use, is what it computed."""
    for name, changes in KNOWN_FORMULAS.items():
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(change(recognizer.model))
            reference = forward(recognizer, [features], clip.tokens)
        error = np.max([compare_whole(reference[key], candidate[key])["relative"] for key in reference])
        if error < FLOAT32_LIMIT:
            worst = max(clip.overall["float32_relative"], clip.overall["float32_encoder"])
            clip.explained = True
            clip.notes.append(f"the device computes {name}: that makes {worst:.3g} in float32, and without it "
                              f"{error:.3g} are left")  # fmt: skip
            return


def measure_candidate(recognizer: common.Recognizer, clip: Clip, features, reference: dict, args) -> None:
    """Compare the candidate in its dtype, alone and in a batch, let it decode freely, and judge what came out."""
    other = features.flip(-1)  # time reversed: what is left of another input is not the right one
    first = forward(recognizer, [features], clip.tokens)
    runs = [forward(recognizer, [features, other], clip.tokens), forward(recognizer, [other, features], clip.tokens, 1)]
    rows = compare(reference["logits"], first["logits"])
    clip.per_token |= {name: row.tolist() for name, row in rows.items()}
    clip.per_token["top1_agrees"] = (first["logits"].argmax(1) == reference["logits"].argmax(1)).tolist()
    clip.overall |= compare_whole(reference["logits"], first["logits"])
    clip.overall["encoder"] = compare_whole(reference["encoder"], first["encoder"])["relative"]
    repeats = [compare_whole(first[key], run[key])["relative"] for run in runs for key in run]
    clip.overall["repeat"] = float(np.max(repeats))  # max would pass over NaN
    try:
        decoded = decode(recognizer, clip, [features], args.max_new_tokens)
        clip.candidate_text = recognizer.tokenizer.decode(decoded[0][0], skip_special_tokens=True).strip()
        if clip.utterance is not None:
            device = recognizer.model.device  # on an accelerator the batch is as large as inference.py's
            batch = [features, other, other, features] * (1 if device.type == "cpu" else 4)
            in_batch = decode(recognizer, clip, batch, args.max_new_tokens)
            decoded += [row for row, was in zip(in_batch, batch, strict=True) if was is features]
        errors, own = [], {tuple(clip.tokens): first["logits"]}
        for tokens, scores in decoded:
            if tuple(tokens) not in own:
                compare_decoding(recognizer, clip, tokens, reference["logits"], args.threshold)
                own[tuple(tokens)] = forward(recognizer, [features], tokens)["logits"]
            errors.append(cache_error(own[tuple(tokens)], tokens, scores))
        clip.overall["cache"] = float(np.max(errors))
    except common.DeviceError as error:
        clip.faults.append(str(error))
    if not np.isfinite(list(clip.overall.values())).all():
        clip.faults.append("NaN or infinite values")
    limits = dict.fromkeys(("relative", "repeat", "cache"), args.threshold)
    limits["encoder"] = ENCODER_FACTOR * args.threshold
    if not clip.explained:
        limits |= {"float32_relative": FLOAT32_LIMIT, "float32_encoder": FLOAT32_LIMIT}
    clip.faults += [
        f"{name} {clip.overall[name]:.3g} is not below {limit:g}"
        for name, limit in limits.items() if clip.overall[name] >= limit
    ]  # fmt: skip


def compare_decoding(recognizer, clip: Clip, tokens: list[int], logits: np.ndarray, threshold: float) -> None:
    """Note where free decoding leaves the reference's tokens, and add it to the faults unless it is at a tie.

    At a tie, rounding can turn the choice: the reference prefers its token by no more than twice the largest error
    there, and that error is within the threshold. What follows is then another text.
    """
    i = next(i for i, (a, b) in enumerate(itertools.zip_longest(clip.tokens, tokens)) if a != b)
    ends = i == min(len(clip.tokens), len(tokens))  # only where one of them has come to its limit
    expected, got = (recognizer.tokenizer.decode(row[i : i + 1], skip_special_tokens=False)
                     for row in (clip.tokens, tokens))  # fmt: skip
    margin = math.inf if ends else float(logits[i, clip.tokens[i]] - logits[i, tokens[i]])
    tie = not ends and margin <= 2 * clip.per_token["max_abs"][i] and clip.per_token["relative"][i] < threshold
    difference = (
        f"text differs from token {i} on: {got!r} for {expected!r}, which the reference prefers by {margin:.4g}, "
        f"a {'tie' if tie else 'fault'}"
    )
    said = clip.notes if tie else clip.faults
    said += [difference] if difference not in said else []


def measure(
    recognizer: common.Recognizer, paths: list[str], device, dtype, args: argparse.Namespace
) -> tuple[list[Clip], list[str]]:
    """Compare every clip, without paths the sweep: the clips, and the files that cannot be read, which are left out.

    There is one copy of the model, moved from the reference's device to the candidate's.
    """
    import torch

    clips, left_out, bias = [], [], recognizer.bias
    with tempfile.TemporaryDirectory() as folder:  # the logits of an hour of audio are some 10 GB

        def saved(kind: str) -> Iterator[tuple[Clip, torch.Tensor, dict[str, np.ndarray]]]:
            """Each clip, its features, and what was saved of it."""
            for i, clip in enumerate(clips):
                if os.path.exists(f"{folder}/{i}-{kind}.npz"):
                    with np.load(f"{folder}/{i}-{kind}.npz") as arrays:
                        yield clip, torch.from_numpy(arrays["features"]), dict(arrays)

        def save(clip: Clip, features: torch.Tensor, kind: str, arrays: dict[str, np.ndarray]) -> None:
            """Keep the arrays of one kind for a clip."""
            np.savez(f"{folder}/{clips.index(clip)}-{kind}.npz", features=features.numpy(), **arrays)

        def refer(clip: Clip, features: torch.Tensor) -> None:
            """Compute and save what the candidate is held against."""
            [(clip.tokens, _)] = decode(recognizer, clip, [features], args.max_new_tokens)
            clip.text = recognizer.tokenizer.decode(clip.tokens, skip_special_tokens=True).strip()
            reference = forward(recognizer, [features], clip.tokens)
            top = np.sort(np.partition(reference["logits"], -2)[:, -2:])
            clip.per_token["top1_margin"] = (top[:, 1] - top[:, 0]).tolist()
            clips.append(clip)
            save(clip, features, "reference", reference)

        if not paths:
            refer(Clip("sweep", 0), common.extract_features(recognizer.extractor, common.sweep()))
        for i, path in enumerate(paths):
            n_before = len(clips)
            try:
                for clip, features in read_clips(path, i, recognizer.extractor):
                    refer(clip, features)
            except common.AudioError as error:
                del clips[n_before:]
                left_out.append(path)
                common.notice(f"eval_accuracy.py: error: {path}: {error}: left out")
        for clip, features, _ in itertools.islice(saved("reference"), 1):
            refer(Clip(f"{clip.name}, to the last position", None), features)
        try:
            recognizer = common.move(recognizer, device, torch.float32)
            for clip, features, reference in saved("reference"):
                arrays = compare_float32(recognizer, clip, features, reference, args)
                if not np.max([clip.overall["float32_relative"], clip.overall["float32_encoder"]]) < FLOAT32_LIMIT:
                    save(clip, features, "float32", arrays)
            recognizer = common.move(recognizer, torch.device("cpu"), torch.float32)
            for clip, features, candidate in saved("float32"):
                explain(recognizer, clip, features, candidate)
            recognizer = common.move(recognizer, device, dtype)
            for clip, features, reference in saved("reference"):
                measure_candidate(recognizer, clip, features, reference, args)
                if not torch.equal(bias, recognizer.bias.cpu()):
                    clip.faults.append("the candidate suppresses other tokens than the reference")
        except common.OutOfMemoryError:
            raise
        except common.DeviceError as error:  # which leaves nothing that the device returned to be believed
            for clip in clips:
                clip.faults.append(str(error))
    return clips, left_out


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
    add("--max-new-tokens", type=common.number(int, 1, common.MAX_NEW_TOKENS), default=128, metavar="N",
        help=f"tokens to compare in a clip, 1 to {common.MAX_NEW_TOKENS} (default: %(default)s)")  # fmt: skip
    add("--threshold", type=common.number(float, 0, 1), default=0.01, metavar="X",
        help="the relative error that every clip must stay below (default: %(default)s)")  # fmt: skip
    add("--json", metavar="FILE", help="write everything measured there, per clip and per token")
    return parser.parse_args(argv)


def read_manifest(path: str) -> list[tuple[str, str]]:
    """Audio path and text of each line of a JSON lines file; the paths are relative to it. Raises SetupError."""
    rows, i = [], 0
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows begins a file with a mark
            for line in file:
                i += 1
                if line.strip():
                    row = json.loads(line)
                    if not (isinstance(row["audio"], str) and isinstance(row["text"], str)):
                        raise ValueError("audio and text are not both strings")
                    rows.append((os.path.join(os.path.dirname(path), row["audio"]), row["text"]))
    except OSError as error:
        raise common.SetupError(f"--manifest {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else common.first_line(error)
        raise common.SetupError(
            f'--manifest {path}, line {i}: not {{"audio": "a.wav", "text": "..."}} ({reason})'
        ) from error
    if not rows:
        raise common.SetupError(f"--manifest {path}: there is no line in it")
    return rows


def format_table(clips: list[Clip], header: dict[str, str], cer: dict[str, float], n_read: str) -> str:
    """The report for a person: the worst of each figure over the clips, and why a clip failed."""

    def worst(name: str, pick=np.max) -> str:
        """The largest of a figure over the clips, NaN where one is, or what pick makes of them."""
        return f"{pick([clip.overall[name] for clip in clips]):.6g}"

    own = [clip for clip in clips if clip.utterance is not None]
    n_tokens = sum(len(clip.tokens) for clip in own)
    failed = [clip for clip in clips if clip.faults]
    rows = header | {
        "clips, tokens": f"{len(own)}, {n_tokens}",
        "text match": f"{sum(clip.text == clip.candidate_text for clip in own)} of {len(own)}",
        "cosine similarity": worst("cosine", np.min),
        "largest absolute error": worst("max_abs"),
        "mean absolute error": worst("mean_abs"),
        "relative error": worst("relative"),
        "  of the encoder": worst("encoder"),
        "  in float32": worst("float32_relative"),
        "  in float32, of the encoder": worst("float32_encoder"),
        "  between runs": worst("repeat"),
        "  in decoding": worst("cache"),
        "top-1 agreement": f"{sum(sum(clip.per_token.get('top1_agrees', [])) for clip in own)} of {n_tokens}",
        "smallest top-1 margin": f"{min(min(clip.per_token['top1_margin']) for clip in own):.6g}",
    }
    rows |= {f"CER of the {side}": f"{100 * rate:.4f} %" for side, rate in cer.items()}
    rows["verdict"] = (f"FAIL: {len(failed)} of {len(clips)} clips" if failed else "PASS") + n_read
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    lines += [f"note {clip.name}: {note}" for clip in clips for note in clip.notes]
    return "\n".join(lines + [f"FAIL {clip.name}: {'; '.join(clip.faults)}" for clip in failed])


def forbid_hf32(device) -> None:
    """Make float32 mean float32: an NPU convolves in HF32, and a GPU in TF32, unless told not to. Raises SetupError."""
    import torch

    if device.type == "npu":
        try:
            torch.npu.matmul.allow_hf32 = torch.npu.conv.allow_hf32 = False
        except RuntimeError as error:
            raise common.SetupError(f"{device} cannot switch HF32 off {common.npu_problem(error)}") from error
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"


def run(args: argparse.Namespace) -> int:
    """Evaluate what the arguments say; the exit status. Raises SetupError."""
    utterances = read_manifest(args.manifest) if args.manifest else [(path, "") for path in args.audio]
    paths = [path for path, _ in utterances]
    if args.json:
        common.check_report(args.json, [*paths, *([args.manifest] if args.manifest else [])])
    device, warning = common.select_device(args.device)
    if warning:
        common.notice(f"eval_accuracy.py: warning: {warning}")
    import torch

    forbid_hf32(device)
    dtype, cpu = common.select_dtype(args.dtype, device), torch.device("cpu")
    clips, left_out = measure(common.load_model(args.model, cpu, torch.float32), paths, device, dtype, args)
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
    references = ["" if path in left_out else text for path, text in utterances]
    cer = character_error_rates(clips, references) if args.manifest else {}
    common.write_stdout(format_table(clips, header, cer, n_read) + "\n")
    if args.json:
        report = {"verdict": "FAIL" if failed else "PASS", **header, "left_out": left_out, "threshold": args.threshold,
                  "float32_limit": FLOAT32_LIMIT, "cer": cer, "formulas": FORMULAS, "environment": environment,
                  "clips": [asdict(clip) for clip in clips]}  # fmt: skip
        common.write_report(args.json, report)
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return common.run_script("eval_accuracy.py", run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
