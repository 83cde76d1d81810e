"""Times of tokens against transformers' return_token_timestamps and openai/whisper's find_alignment.

    python3 tests/benchmarks/alignment.py                      # the tiny model, whose truth is known

openai/whisper is compared where `import whisper` finds it: `pip install --no-deps --target ow openai-whisper tiktoken`
and PYTHONPATH=ow. All get the same weights and texts, and all heads: the others cannot choose any.
"""
import argparse
import sys
import types
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import common  # noqa: E402
import test_subtitles  # noqa: E402

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=50, help="texts")
    compare(parser.parse_args().n)
