"""Times of tokens against transformers' return_token_timestamps and openai/whisper's find_alignment, and their cost.

    python3 tests/benchmarks/alignment.py                      # the tiny model, whose truth is known
    python3 tests/benchmarks/alignment.py --cost random/       # the share of the run that they take; 6 GB

openai/whisper is compared where `import whisper` finds it: `pip install --no-deps --target ow openai-whisper tiktoken`
and PYTHONPATH=ow. All get the same weights and texts, and all heads: the others cannot choose any.
"""
import argparse
import statistics
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import common  # noqa: E402
import test_subtitles  # noqa: E402
from tone_speech import random_text, synthesize  # noqa: E402

import inference  # noqa: E402

NAMES = {
    "encoder_attn_layer_norm": "cross_attn_ln", "self_attn_layer_norm": "attn_ln", "final_layer_norm": "mlp_ln",
    "encoder_attn": "cross_attn", "self_attn": "attn", "q_proj": "query", "k_proj": "key", "v_proj": "value",
    "out_proj": "out", "fc1": "mlp.0", "fc2": "mlp.2", "layers.": "blocks.", "embed_tokens": "token_embedding",
    "encoder.layer_norm": "encoder.ln_post", "decoder.layer_norm": "decoder.ln",
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
}  # fmt: skip


def openai_model(model):
    """The same weights as openai/whisper holds them."""
    import whisper.model

    c, weights = model.config, {}
    sizes = (c.num_mel_bins, 1500, c.d_model, c.encoder_attention_heads, c.encoder_layers, c.vocab_size, 448, c.d_model,
             c.decoder_attention_heads, c.decoder_layers)  # fmt: skip
    for name, tensor in model.model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        n_missing = 4 * c.d_model - c.decoder_ffn_dim  # openai/whisper has 4 d_model always: zeros change nothing
        if name.endswith("mlp.0.weight"):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, n_missing))
        elif name.endswith(("mlp.0.bias", "mlp.2.weight")):
            tensor = torch.nn.functional.pad(tensor, (0, n_missing))
        weights[name] = tensor
    theirs = whisper.model.Whisper(whisper.model.ModelDimensions(*sizes))
    theirs.load_state_dict(weights)
    theirs.register_buffer("alignment_heads", torch.ones(c.decoder_layers, c.decoder_attention_heads).to_sparse())
    return theirs.eval()


def starts_of_openai(theirs, recognizer, features: torch.Tensor, ids: list[int], n_frames: int) -> list[float]:
    from whisper.timing import find_alignment

    *sequence, no_timestamps = recognizer.initial_tokens.tolist()
    tokenizer = types.SimpleNamespace(
        sot_sequence=sequence, no_timestamps=no_timestamps, eot=recognizer.tokenizer.eos_token_id,
        split_to_word_tokens=lambda tokens: ([str(token) for token in tokens], [[token] for token in tokens]),
    )  # fmt: skip
    return [word.start for word in find_alignment(theirs, tokenizer, ids, features[0], n_frames)]


def starts_of_transformers(recognizer, features: torch.Tensor, n_frames: int) -> list[float]:
    """token_timestamps, also of the initial tokens and of the end of text; fails without heads that exist."""
    output = recognizer.model.generate(
        features, language="ja", task="transcribe", return_token_timestamps=True, return_dict_in_generate=True,
        attention_mask=torch.arange(3000)[None] < n_frames,
    )  # fmt: skip
    return output["token_timestamps"][0].tolist()


def compare(n: int) -> None:
    device = common.select_device("cpu")
    recognizer = common.load_model(str(TESTS / "tiny_whisper"), device, torch.float32)
    config, model_config = recognizer.model.generation_config, recognizer.model.config
    config.alignment_heads = [
        [i, j] for i in range(model_config.decoder_layers) for j in range(model_config.decoder_attention_heads)
    ]
    rng, errors, problems = np.random.default_rng(13), {}, {}
    try:
        theirs = openai_model(recognizer.model)
    except ImportError as error:
        theirs, problems["openai/whisper"] = None, error
    for _ in range(n):
        waveform, text, truth = test_subtitles.timed_speech(rng)
        features = common.extract_features(recognizer.extractor, waveform)
        ids, n_frames = recognizer.tokenizer(text, add_special_tokens=False).input_ids, len(waveform) // 160
        starts = {"inference.py": test_subtitles.align(recognizer, waveform, text).times[:, 0]}
        if theirs is not None:
            starts["openai/whisper"] = starts_of_openai(theirs, recognizer, features, ids, n_frames)
        try:
            timestamps = starts_of_transformers(recognizer, features, n_frames)
            starts["transformers"] = timestamps[-len(ids) - 1 : -1]
            starts["transformers, each in its neighbour's place"] = timestamps[-len(ids) - 2 : -2]
        except Exception as error:
            problems["transformers"] = error
        for name, of_name in starts.items():
            if len(of_name) == len(truth):
                errors.setdefault(name, []).extend(np.array(of_name) - truth)
                if name != "inference.py":
                    errors.setdefault(f"inference.py less {name}", []).extend(starts["inference.py"] - of_name)
    for name, of_name in errors.items():
        size = np.abs(of_name)
        print(f"{name}: {len(size)} tokens, bias {np.median(of_name):.3f} s, median {np.median(size):.3f}, "
              f"90 % within {np.quantile(size, 0.9):.3f}, worst {size.max():.2f}")  # fmt: skip
    for name, error in problems.items():
        print(f"{name}: {type(error).__name__}: {common.first_line(error)}")


def cost(folder: str, n_tokens: int, runs: int) -> None:
    """The time of one chunk of 15 s with and without times, taking turns."""
    device = common.select_device("cpu")
    recognizer = common.endless(common.load_model(folder, device, common.select_dtype("auto", device)))
    waveform = synthesize(random_text(np.random.default_rng(0), 40))[: 15 * 16_000]
    taken = {"txt": [], "json": []}
    for i in range(runs + 1):
        for output_format, of_format in taken.items():
            chunk = test_subtitles.chunk_to_decode(recognizer, waveform)
            started = time.perf_counter()
            args = test_subtitles.options_of(output_format=output_format, max_new_tokens=n_tokens)
            inference.recognize(recognizer, [chunk], 1, args)
            if i:
                of_format.append(time.perf_counter() - started)
    without, with_times = (statistics.median(of_kind) for of_kind in taken.values())
    print(f"{recognizer.model.dtype}, {torch.get_num_threads()} threads, {n_tokens} tokens, medians of {runs}: "
          f"{without:.3f} s without times, {with_times:.3f} s with: {with_times / without - 1:+.1%}")  # fmt: skip
    started = time.perf_counter()
    for _ in range(100):
        inference.find_loud_frames(waveform)
    print(f"loud frames, which txt computes too: {10 * (time.perf_counter() - started):.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", metavar="MODEL")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-n", type=int, default=50, help="texts, or tokens of the chunk with --cost")
    args = parser.parse_args()
    cost(args.cost, args.n, args.runs) if args.cost else compare(args.n)
