"""Against faster-whisper, whisper.cpp, OpenVINO and plain transformers on a CPU, with the real architecture.

    python3 -m venv peers
    peers/bin/pip install -r tests/benchmarks/peers.txt
    peers/bin/python tests/benchmarks/peers.py models        # makes 10 GB of models once

All get the same chunks of the same audio and decode each to the same number of tokens, the end of text suppressed.
A program whose package is not installed is left out.
Each runs in a process of its own, which waits while another has its turn, so that what else the machine does falls on
all. Loading is not timed, and neither is a first run.
"""
import argparse
import glob
import importlib.util
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import common  # noqa: E402
import random_model  # noqa: E402

import eval_performance  # noqa: E402
import inference  # noqa: E402

END = 50257  # <|endoftext|>
CLIP_TOKENS, FEW_TOKENS = 128, 8
TOKENS_PER_S = 70 / 15  # of dense Japanese speech
BATCH_SIZE = 8

# --- Converting ---


def save_ctranslate2(source: Path, folder: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(source), copy_files=files).convert(str(folder), quantization="int8")


def save_ggml(source: Path, path: Path) -> None:
    """The format of whisper.cpp's models/convert-h5-to-ggml.py, in float16."""
    from safetensors.numpy import load_file
    from transformers import WhisperConfig, WhisperFeatureExtractor

    c, filters = WhisperConfig.from_pretrained(source), WhisperFeatureExtractor.from_pretrained(source).mel_filters.T
    vocab = sorted(json.loads((source / "vocab.json").read_text()).items(), key=lambda item: item[1])
    parts = {
        "self_attn_layer_norm": "attn_ln", "encoder_attn_layer_norm": "cross_attn_ln", "final_layer_norm": "mlp_ln",
        "self_attn": "attn", "encoder_attn": "cross_attn", "q_proj": "query", "k_proj": "key", "v_proj": "value",
        "out_proj": "out", "fc1": "mlp.0", "fc2": "mlp.2", "layers": "blocks",
        "embed_tokens": "token_embedding",
    }  # fmt: skip
    with open(path, "wb") as file:
        file.write(struct.pack("12i", 0x67676D6C, c.vocab_size, c.max_source_positions, c.d_model,
                               c.encoder_attention_heads, c.encoder_layers, c.max_target_positions, c.d_model,
                               c.decoder_attention_heads, c.decoder_layers, c.num_mel_bins, 1))  # fmt: skip
        file.write(struct.pack("2i", *filters.shape) + filters.astype(np.float32).tobytes())
        file.write(struct.pack("i", END))
        for token, i in vocab[:END]:
            content = bytes([i]) if i < 256 else token.encode()
            file.write(struct.pack("i", len(content)) + content)
        for name, tensor in load_file(source / "model.safetensors").items():
            if name == "proj_out.weight":
                continue
            name = name.removeprefix("model.").replace("embed_positions.weight", "positional_embedding")
            name = name.replace("encoder.layer_norm", "encoder.ln_post").replace("decoder.layer_norm", "decoder.ln")
            name = ".".join(parts.get(part, part) for part in name.split("."))
            if name.startswith("encoder.conv") and name.endswith("bias"):
                tensor = tensor[:, None]
            half = tensor.ndim > 1 and not name.endswith(("bias", "positional_embedding"))
            file.write(struct.pack("3i", tensor.ndim, len(name), half))
            file.write(struct.pack(f"{tensor.ndim}i", *reversed(tensor.shape)) + name.encode())
            file.write(tensor.astype(np.float16 if half else np.float32).tobytes())


def save_openvino(source: Path, folder: Path) -> None:
    from optimum.intel import OVModelForSpeechSeq2Seq

    model = OVModelForSpeechSeq2Seq.from_pretrained(str(source), export=True, compile=False, load_in_8bit=False)
    model.save_pretrained(folder)


# --- Contenders: each loads its model and gives a function of (path, chunks, n_tokens) that returns the tokens made ---


def ours(models: Path, dtype: str, chunk_length_s: float):
    import torch

    device = common.select_device("cpu")
    recognizer = common.endless(common.load_model(str(models / "transformers"), device, getattr(torch, dtype)))

    def run(path, chunks, n_tokens):
        n_tokens = round(n_tokens * chunk_length_s / 30) if len(chunks) > 1 else n_tokens
        threshold = inference.NO_SPEECH_THRESHOLD
        options = inference.Options(BATCH_SIZE, chunk_length_s, n_tokens, threshold, "", fixed_work=True)
        [recording] = inference.transcribe(recognizer, [path], options)
        return recording.n_tokens

    return run


def features_of(path, chunks, extractor) -> list:
    """input_features (1, 128, 3000) of each chunk, float32."""
    waveform, _ = soundfile.read(path, dtype="float32")
    rows = [waveform[round(16_000 * start) : round(16_000 * end)] for start, end in chunks]
    return [extractor(row, sampling_rate=16_000, return_tensors="pt").input_features for row in rows]


def generating(model, extractor):
    """What the contenders share that have the generate of transformers."""
    import torch

    config = model.generation_config
    config.suppress_tokens = [*(config.suppress_tokens or []), config.eos_token_id]

    def run(path, chunks, n_tokens):
        features, made = features_of(path, chunks, extractor), 0
        for first in range(0, len(features), BATCH_SIZE):
            batch = torch.cat(features[first : first + BATCH_SIZE])
            rows = model.generate(
                batch, attention_mask=torch.ones(len(batch), batch.shape[2]), language="ja", task="transcribe",
                num_beams=1, do_sample=False, return_timestamps=False, max_new_tokens=n_tokens,
                force_unique_generate_call=True,
            )  # fmt: skip
            made += rows[:, common.START_LENGTH :].numel()
        return made

    return run


def plain_transformers(models: Path):
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(models / "transformers").eval()
    return generating(model, WhisperFeatureExtractor.from_pretrained(models / "transformers"))


def openvino(models: Path):
    from optimum.intel import OVModelForSpeechSeq2Seq
    from transformers import WhisperFeatureExtractor

    config = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    model = OVModelForSpeechSeq2Seq.from_pretrained(str(models / "openvino"), ov_config=config)
    return generating(model, WhisperFeatureExtractor.from_pretrained(models / "transformers"))


def faster_whisper(models: Path):
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(str(models / "ctranslate2"), device="cpu", compute_type="int8", cpu_threads=os.cpu_count())
    pipeline, prompt_length = BatchedInferencePipeline(model), 4 if model.model.is_multilingual else 2

    def run(path, chunks, n_tokens):
        clips = [{"start": start, "end": end} for start, end in chunks]
        segments, _ = pipeline.transcribe(
            path, language="ja", task="transcribe", beam_size=1, temperature=0, without_timestamps=True,
            vad_filter=False, clip_timestamps=clips, batch_size=BATCH_SIZE, suppress_tokens=[-1, *range(END, 51866)],
            max_new_tokens=2 * n_tokens - prompt_length,  # CTranslate2 stops at half of the length
        )  # fmt: skip
        return sum(len(segment.tokens) for segment in segments)

    return run


def whisper_cpp(models: Path):
    import _pywhispercpp
    from pywhispercpp.model import Model

    model = Model(str(models / "ggml.bin"), n_threads=os.cpu_count(), redirect_whispercpp_logs_to=None)

    def run(path, chunks, n_tokens):
        (waveform, _), made = soundfile.read(path, dtype="float32"), 0
        for start, end in chunks:
            model.transcribe(
                waveform[round(16_000 * start) : round(16_000 * end)], language="ja", no_timestamps=True,
                single_segment=True, no_context=True, temperature_inc=0.0, greedy={"best_of": 1},
                max_tokens=n_tokens - 1,  # it makes one more
            )  # fmt: skip
            n_segments = _pywhispercpp.whisper_full_n_segments(model._ctx)
            made += sum(_pywhispercpp.whisper_full_n_tokens(model._ctx, i) for i in range(n_segments))
        return made

    return run


CONTENDERS = {  # the package that each needs, the model that it reads, and the function that loads it
    "ours, bfloat16": ("torch", "transformers", lambda models: ours(models, "bfloat16", 30)),
    "ours, bfloat16, chunks of 15 s": ("torch", "transformers", lambda models: ours(models, "bfloat16", 15)),
    "faster-whisper 1.2.1, int8": ("faster_whisper", "ctranslate2", faster_whisper),
    "OpenVINO (optimum-intel 2.2.0), bfloat16": ("openvino", "openvino", openvino),
    "whisper.cpp (pywhispercpp 1.5.1), float16": ("pywhispercpp", "ggml.bin", whisper_cpp),
    "transformers 4.57.6, float32": ("transformers", "transformers", plain_transformers),
}
CONVERSIONS = {"ctranslate2": save_ctranslate2, "ggml.bin": save_ggml, "openvino": save_openvino}


def serve(name: str, models: Path) -> None:
    """Load a contender, and do what the lines on stdin ask for: a line of JSON with seconds and tokens for each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not for the other side
    run = CONTENDERS[name][-1](models)
    for line in sys.stdin:
        path, chunks, n_tokens = json.loads(line)
        started = time.perf_counter()
        made = run(path, chunks, n_tokens)
        print(json.dumps([time.perf_counter() - started, made]), file=out, flush=True)


# --- Driving ---


def choose(models: Path, only: list[str]) -> list[str]:
    """The contenders with one of these texts in their names whose packages are installed; their models are made."""
    source, names = models / "transformers", []
    if not source.exists():
        random_model.save(source)
    for name in (name for name in CONTENDERS if any(text in name for text in only)):
        package, model, _ = CONTENDERS[name]
        if not importlib.util.find_spec(package):
            print(f"{name}: left out, because {package} is not installed", file=sys.stderr)
            continue
        names.append(name)
        if not (models / model).exists():
            print(f"converting to {models / model}", file=sys.stderr)
            CONVERSIONS[model](source, models / model)
    return names


class Contender:
    def __init__(self, name: str, models: Path):
        libraries = os.path.dirname(next(iter(glob.glob(f"{sys.prefix}/lib/python3*/site-packages/libwhisper.so")), ""))
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, str(models), "--serve", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name, self.process = name, subprocess.Popen(command, env=environment, **pipes)

    def time(self, path: str, chunks: list, n_tokens: int) -> tuple[float, int]:
        print(json.dumps([path, chunks, n_tokens]), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            sys.exit(f"{self.name}: its process ended, with status {self.process.wait()}")
        return json.loads(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="folder for the converted models, made if it is not there")
    parser.add_argument("--minutes", type=float, default=10, help="length of the long audio (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="contenders with this in their names")
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.models)
    args.models.mkdir(parents=True, exist_ok=True)
    names = choose(args.models, args.only)
    clip = eval_performance.synthesize(str(args.models / "clip.wav"), 3)
    recording = eval_performance.synthesize(str(args.models / "long.wav"), 60 * args.minutes)
    chunks = [(chunk.start, chunk.end) for chunk in common.read_chunks(recording, 30, print)]
    n_tokens = round(30 * TOKENS_PER_S)
    contenders = [Contender(name, args.models) for name in names]
    work = {"clip": (clip, [(0, 3)], CLIP_TOKENS), "few": (clip, [(0, 3)], FEW_TOKENS)}
    work["recording"] = (recording, chunks, n_tokens)
    seconds, n_made = {(c.name, kind): [] for c in contenders for kind in work}, {}
    for i in range(args.runs + 1):
        for kind, (_, _, n) in work.items():
            for contender in contenders:
                if kind == "recording" and (i == 0 or "float32" in contender.name):
                    continue
                taken_s, made = contender.time(*work[kind])
                print(f"{contender.name}, {kind}: {taken_s:.2f} s", file=sys.stderr)
                if kind != "recording" and made != n:
                    sys.exit(f"{contender.name}: {made} tokens instead of {n}: the times cannot be compared")
                n_made[contender.name, kind] = made
                if i:
                    seconds[contender.name, kind].append(taken_s)
    rows = [["", f"3 s, {CLIP_TOKENS} tokens (s)", "a token (ms)", f"{args.minutes:g} min (s)", "RTFx", "tokens"]]
    for name in names:
        many, few = (statistics.median(seconds[name, kind]) for kind in ("clip", "few"))
        row = [name, f"{many:.2f}", f"{1000 * (many - few) / (CLIP_TOKENS - FEW_TOKENS):.1f}", "", "", ""]
        if taken := seconds[name, "recording"]:
            taken_s = statistics.median(taken)
            row[3:] = [f"{taken_s:.1f} ({min(taken):.1f} to {max(taken):.1f})", f"{60 * args.minutes / taken_s:.2f}",
                       str(n_made[name, "recording"])]  # fmt: skip
        rows.append(row)
    print(f"medians of {args.runs} runs in turns after one warm-up by the clip; {args.minutes:g} min: {len(chunks)} "
          f"chunks of up to 30 s with {n_tokens} tokens each, or of up to 15 s with half of that\n")  # fmt: skip
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
