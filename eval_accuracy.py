"""Does the device compute what the CPU computes, and is the text right?

    python3 eval_accuracy.py                                          # a 3 s sweep; the NPU in float16
    python3 eval_accuracy.py --audio meeting.wav --json report.json   # every chunk of real recordings
    python3 eval_accuracy.py --manifest test.jsonl                    # and the character error rate
    python3 eval_accuracy.py --random-weights                         # without a download

The reference is the CPU in float32. It decodes each clip greedily; then the reference and the candidate each run one
forward over the same features and the same tokens (teacher forcing), and their raw logits are compared in float64.
The candidate does so in float32 first, where a fault cannot hide behind rounding, and then in its own dtype, in which
it also runs twice and decodes freely.
"""
import argparse
import functools
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

import common

FLOAT32_LIMIT = 1e-4  # relative error in float32: reordered sums stay below 1e-5
FORMULAS = {
    "cosine": "sum(r c) / sqrt(sum(r^2) sum(c^2)), of raw logits: r the reference's, c the candidate's, in float64",
    "max_abs": "max |c - r|",
    "mean_abs": "mean |c - r|",
    "relative": "max |c - r| / (max r - min r)",
    "encoder": "relative, of the encoder's output",
    "repeat": "relative, between two runs of the candidate with another input in between",
    "top1_agreement": "share of the tokens where the largest logit of both is that of the same token",
    "top1_margin": "largest less second largest logit of the reference; the smallest over the tokens",
    "cer": "edits / reference characters over all utterances, after BasicTextNormalizer, without spaces, 。. as 。",
}


@dataclass
class Clip:
    """What was compared in one chunk of audio; the figures are those of FORMULAS."""

    name: str
    utterance: int  # which input it is a part of
    text: str = ""
    candidate_text: str = ""
    tokens: list[int] = field(default_factory=list)
    overall: dict[str, float] = field(default_factory=dict)
    per_token: dict[str, list[float]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


# --- Measuring ---


def forward(recognizer: common.Recognizer, features, prompt: list[int], tokens: list[int]) -> tuple[np.ndarray, ...]:
    """One teacher-forced forward: encoder output (n_frames, d_model) and raw logits (n_tokens, n_vocab), float32."""
    import torch

    model = recognizer.model
    with torch.inference_mode(), common.device_errors(model.device):
        output = model(
            input_features=features.input_features.to(model.device, model.dtype),
            decoder_input_ids=torch.tensor([prompt + tokens[:-1]], device=model.device),
        )
        encoder, logits = output.encoder_last_hidden_state[0], output.logits[0, len(prompt) - 1 :]
        return encoder.float().cpu().numpy(), logits.float().cpu().numpy()


def compare(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """Cosine, largest, mean and relative error of each row, as in FORMULAS: (n_rows,) float64 each."""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    error = np.abs(c - r)
    return {
        "cosine": (r * c).sum(1) / np.sqrt((r * r).sum(1) * (c * c).sum(1)),
        "max_abs": error.max(1),
        "mean_abs": error.mean(1),
        "relative": error.max(1) / (r.max(1) - r.min(1)),
    }


def relative_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """The relative error over whole arrays."""
    return float(compare(reference.reshape(1, -1), candidate.reshape(1, -1))["relative"][0])


def first_difference(clip: Clip, tokens: list[int], logits: np.ndarray, decode) -> str | None:
    """Where free decoding leaves the reference's tokens, the two alternatives, and what the reference thought of them.

    A margin of at most twice the largest error of that token is a tie: rounding alone can turn it.
    """
    pairs = itertools.zip_longest(clip.tokens, tokens)
    i = next((i for i, (expected, got) in enumerate(pairs) if expected != got), None)
    if i is None:
        return None
    expected, got = (decode(row[i : i + 1]) if i < len(row) else "nothing" for row in (clip.tokens, tokens))
    where = f"text differs from token {i} on: {got!r} for {expected!r}"
    if i >= min(len(clip.tokens), len(tokens)):
        return where
    margin = float(logits[i, clip.tokens[i]] - logits[i, tokens[i]])
    kind = "a tie" if margin <= 2 * clip.per_token["max_abs"][i] else "a fault"
    return f"{where}, which the reference prefers by {margin:.4g}: {kind}"


def measure_reference(recognizer: common.Recognizer, clip: Clip, features, prompt: list[int], limit: int) -> dict:
    """Decode a clip with the reference; its arrays to compare with."""
    [clip.tokens] = common.generate(recognizer, [features], "ja", "transcribe", limit)
    clip.text = recognizer.tokenizer.decode(clip.tokens, skip_special_tokens=True).strip()
    encoder, logits = forward(recognizer, features, prompt, clip.tokens)
    top = np.sort(np.partition(logits, -2)[:, -2:])
    clip.per_token["top1_margin"] = (top[:, 1] - top[:, 0]).tolist()
    return {"encoder": encoder, "logits": logits}


def measure_float32(recognizer: common.Recognizer, clip: Clip, features, prompt: list[int], reference: dict) -> None:
    """Compare the candidate in float32."""
    encoder, logits = forward(recognizer, features, prompt, clip.tokens)
    clip.overall["float32_encoder"] = relative_error(reference["encoder"], encoder)
    clip.overall["float32_relative"] = relative_error(reference["logits"], logits)


def measure_candidate(
    recognizer: common.Recognizer, clip: Clip, features, prompt: list[int], reference: dict, limit: int
) -> None:
    """Compare the candidate in its dtype, run it again, and let it decode freely."""
    encoder, logits = forward(recognizer, features, prompt, clip.tokens)
    other = type(features)({**features, "input_features": features.input_features.flip(-1)})
    forward(recognizer, other, prompt, clip.tokens)  # so that what an earlier run left behind is not its result
    _, again = forward(recognizer, features, prompt, clip.tokens)
    rows = compare(reference["logits"], logits)
    agrees = logits.argmax(1) == reference["logits"].argmax(1)
    clip.per_token |= {name: row.tolist() for name, row in rows.items()} | {"top1_agrees": agrees.tolist()}
    total = compare(reference["logits"].reshape(1, -1), logits.reshape(1, -1))
    clip.overall |= {name: float(row[0]) for name, row in total.items()}
    clip.overall |= {
        "encoder": relative_error(reference["encoder"], encoder), "repeat": relative_error(logits, again),
        "top1_agreement": float(agrees.mean()), "top1_margin": min(clip.per_token["top1_margin"]),
    }  # fmt: skip
    [tokens] = common.generate(recognizer, [features], "ja", "transcribe", limit)
    decode = lambda ids: recognizer.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    clip.candidate_text = recognizer.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    if difference := first_difference(clip, tokens, reference["logits"], decode):
        clip.faults.append(difference)


def judge(clip: Clip, threshold: float) -> None:
    """Add what the figures show to the faults of a clip."""
    if not np.isfinite(list(clip.overall.values())).all():
        clip.faults.append("NaN or infinite values")
    limits = {"relative": threshold, "encoder": threshold, "repeat": threshold,
              "float32_relative": FLOAT32_LIMIT, "float32_encoder": FLOAT32_LIMIT}  # fmt: skip
    for name, limit in limits.items():
        if clip.overall[name] >= limit:
            clip.faults.append(f"{name} {clip.overall[name]:.3g} is not below {limit:g}")


# --- Character error rate ---


def normalize_text(text: str) -> str:
    """As the authors of kotoba-whisper do before they count errors."""
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
    """Edits over reference characters, pooled over all utterances with a reference; NaN where there is none."""
    pairs = [(normalize_text(r), normalize_text(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [(r, h) for r, h in pairs if r]
    characters = sum(len(r) for r, _ in pairs)
    return sum(edit_distance(r, h) for r, h in pairs) / characters if characters else float("nan")


# --- Input and output ---


def read_manifest(path: str) -> list[tuple[str, str]]:
    """Audio path and text of each line of a JSON lines file; the paths are relative to it. Raises SetupError."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [(i, json.loads(line)) for i, line in enumerate(file, start=1) if line.strip()]
        return [(os.path.join(os.path.dirname(path), row["audio"]), str(row["text"])) for i, row in rows]
    except OSError as error:
        raise common.SetupError(f"--manifest {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise common.SetupError(
            f'--manifest {path}: not JSON lines of {{"audio": ..., "text": ...}} ({common.first_line(error)})'
        ) from error


def read_clips(paths: list[str] | None, extractor) -> Iterator[tuple[Clip, object]]:
    """The clips to compare and their features: every chunk that is not silent, or without paths the sweep."""
    if paths is None:
        yield Clip("sweep, 3 s", 0), common.extract_features(extractor, common.sweep(extractor.sampling_rate))
    for utterance, path in enumerate(paths or ()):
        try:
            for start, end, waveform in common.read_chunks(path, extractor, common.CHUNK_LENGTH_S):
                if waveform is not None:
                    name = f"{path}, {start:.1f} to {end:.1f} s"
                    yield Clip(name, utterance), common.extract_features(extractor, waveform)
        except common.AudioError as error:
            raise common.SetupError(f"{path}: {error}") from error


def measure(recognizer: common.Recognizer, paths: list[str] | None, device, dtype, args) -> list[Clip]:
    """Compare every clip. One copy of the model: it is moved from the reference's device to the candidate's."""
    import torch
    from transformers import BatchFeature

    config, clips = recognizer.model.generation_config, []
    prompt = [config.decoder_start_token_id, config.lang_to_id["<|ja|>"], config.task_to_id["transcribe"],
              config.no_timestamps_token_id]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # the logits of an hour are some 10 GB

        def saved() -> Iterator[tuple[Clip, BatchFeature, dict]]:
            for i, clip in enumerate(clips):
                with np.load(f"{folder}/{i}.npz") as arrays:
                    features = {k: torch.from_numpy(arrays[k]) for k in ("input_features", "attention_mask")}
                    yield clip, BatchFeature(features), dict(arrays)

        for clip, features in read_clips(paths, recognizer.extractor):
            arrays = measure_reference(recognizer, clip, features, prompt, args.max_new_tokens)
            np.savez(f"{folder}/{len(clips)}.npz", **{k: v.numpy() for k, v in features.items()}, **arrays)
            clips.append(clip)
        bias = recognizer.bias
        recognizer = common.move(recognizer, device, torch.float32)
        for clip, features, reference in saved():
            measure_float32(recognizer, clip, features, prompt, reference)
        recognizer = common.move(recognizer, device, dtype)
        for clip, features, reference in saved():
            measure_candidate(recognizer, clip, features, prompt, reference, args.max_new_tokens)
            if not torch.equal(bias, recognizer.bias.cpu()):
                clip.faults.append("the candidate suppresses other tokens")
            judge(clip, args.threshold)
    return clips


def format_table(clips: list[Clip], cer: dict[str, float], header: dict[str, str]) -> str:
    """The report for a person: the worst of each figure over the clips, and why a clip failed."""

    def worst(name: str, pick=max) -> str:
        return f"{pick(clip.overall[name] for clip in clips):.6g}"

    n_tokens = sum(len(clip.tokens) for clip in clips)
    agree = sum(sum(clip.per_token["top1_agrees"]) for clip in clips)
    same = sum(clip.text == clip.candidate_text for clip in clips)
    failed = sum(bool(clip.faults) for clip in clips)
    rows = header | {
        "clips, tokens": f"{len(clips)}, {n_tokens}",
        "text match": f"{same} of {len(clips)}",
        "cosine similarity": worst("cosine", min),
        "largest absolute error": worst("max_abs"),
        "mean absolute error": worst("mean_abs"),
        "relative error": worst("relative"),
        "  of the encoder": worst("encoder"),
        "  in float32, of the encoder": f"{worst('float32_relative')}, {worst('float32_encoder')}",
        "  between two runs": worst("repeat"),
        "top-1 agreement": f"{agree} of {n_tokens}",
        "smallest top-1 margin": worst("top1_margin", min),
    }
    rows |= {f"CER of the {side}": f"{100 * rate:.4f} %" for side, rate in cer.items()}
    rows["verdict"] = f"FAIL: {failed} of {len(clips)} clips" if failed else "PASS"
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join(lines + [f"FAIL {clip.name}: {'; '.join(clip.faults)}" for clip in clips if clip.faults])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="exit status: 0 PASS; 1 FAIL; 2 nothing could be evaluated; 130 interrupted",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--audio", nargs="+", metavar="PATH", help="recordings (default: a 3 s sweep, 200 to 800 Hz)")
    source.add_argument("--manifest", metavar="FILE", help='JSON lines {"audio": ..., "text": ...}: also gives the CER')
    add = parser.add_argument
    common.add_model_options(add)
    parser.set_defaults(dtype="float16")
    add("--random-weights", action="store_true", help="the same architecture with seeded random weights, no download")
    add("--max-new-tokens", type=common.number(int, 1, common.MAX_NEW_TOKENS), default=128, metavar="N",
        help=f"tokens to compare in a clip, 1 to {common.MAX_NEW_TOKENS} (default: %(default)s)")  # fmt: skip
    add("--threshold", type=common.number(float, 0, 1), default=0.01, metavar="X",
        help="the relative error that a clip must stay below (default: %(default)s)")  # fmt: skip
    add("--json", metavar="FILE", help="write everything measured there, per clip and per token")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Evaluate what the arguments say; the exit status. Raises SetupError."""
    utterances = read_manifest(args.manifest) if args.manifest else [(path, "") for path in args.audio or ()]
    try:
        for path, _ in utterances:
            common.check_file(path)
    except common.AudioError as error:
        raise common.SetupError(f"{path}: {error}") from error
    device, warning = common.select_device(args.device)
    if warning:
        print(f"eval_accuracy.py: warning: {warning}", file=sys.stderr)
    import torch

    forbid_hf32(device)
    dtype, cpu = common.select_dtype(args.dtype, device), torch.device("cpu")
    load = common.random_recognizer if args.random_weights else functools.partial(common.load_model, args.model)
    clips = measure(load(cpu, torch.float32), [path for path, _ in utterances] or None, device, dtype, args)
    if not clips:
        raise common.SetupError("there is nothing to compare: all of the audio is silent")
    environment = common.environment(device)
    header = {
        "model": f"{common.MODEL}, random weights" if args.random_weights else args.model,
        "reference": "cpu in float32",
        "candidate": f"{device} ({environment['device_name']}) in {str(dtype)[6:]}",
        "HF32": "off" if device.type == "npu" else "this device has none",
    }
    cer = {}
    if args.manifest:
        for side, attribute in (("reference", "text"), ("candidate", "candidate_text")):
            texts = ["" for _ in utterances]
            for clip in clips:
                texts[clip.utterance] += getattr(clip, attribute)
            cer[side] = character_error_rate([text for _, text in utterances], texts)
    print(format_table(clips, cer, header))
    failed = any(clip.faults for clip in clips)
    if args.json:
        report = {"verdict": "FAIL" if failed else "PASS", "threshold": args.threshold, "float32_limit": FLOAT32_LIMIT,
                  **header, "cer": cer, "formulas": FORMULAS, "environment": environment,
                  "clips": [asdict(clip) for clip in clips]}  # fmt: skip
        try:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(finite(report), file, ensure_ascii=False, indent=1)
        except OSError as error:
            raise common.SetupError(f"--json {args.json}: {error.strerror}") from error
    return int(failed)


def forbid_hf32(device) -> None:
    """Make float32 mean float32: an NPU convolves in HF32, and a GPU in TF32, unless it is told not to."""
    import torch

    if device.type == "npu":
        torch.npu.matmul.allow_hf32 = torch.npu.conv.allow_hf32 = False
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def finite(value):
    """The same JSON value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_arguments(argv)
    try:
        return run(args)
    except common.SetupError as error:
        print(f"eval_accuracy.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval_accuracy.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
