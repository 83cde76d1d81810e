"""Write a model folder with the exact architecture of kotoba-whisper-v2.0, seeded random weights and a tokenizer.

    python3 tests/random_model.py FOLDER       # 3 GB in float32, for speed and numerics without a download

Architecture and special ids are those of its config.json and of whisper-large-v3's generation_config.json. Its text
means nothing: token i below 50257 is the byte i or the word w<i>.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS_MULTI
from transformers.models.whisper.tokenization_whisper import LANGUAGES

END = 50257  # <|endoftext|>


def byte_symbols() -> list[str]:
    """The 256 characters by which GPT-2's byte-level vocabulary writes bytes (bytes_to_unicode in its encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def random_model(**changes) -> transformers.WhisperForConditionalGeneration:
    """The model in float32; changes are to its config."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 50256, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": 50258}
    config = {
        "vocab_size": 51866, "num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32, "decoder_layers": 2,
        "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120,
    }  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**(config | ends | changes)))
    model.generation_config = transformers.GenerationConfig(
        is_multilingual=True, lang_to_id={f"<|{language}|>": 50259 + i for i, language in enumerate(LANGUAGES)},
        task_to_id={"translate": 50359, "transcribe": 50360}, no_timestamps_token_id=50364, prev_sot_token_id=50362,
        return_timestamps=False, max_length=448, begin_suppress_tokens=[220, END],
        suppress_tokens=[t for t in NON_SPEECH_TOKENS_MULTI if t < END] + [50258, *range(50359, 50364)], **ends,
    )  # fmt: skip
    return model.eval()


def save(folder: Path, **changes) -> None:
    """Write the model folder."""
    random_model(**changes).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
    vocab = {symbol: i for i, symbol in enumerate(byte_symbols())}
    vocab |= {f"w{i}": i for i in range(len(vocab), END)} | {"<|endoftext|>": END}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = dict.fromkeys(["pad_token", "unk_token", "bos_token", "eos_token"], "<|endoftext|>")
    tokenizer = transformers.WhisperTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), **ends)
    names = ["startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm", "startofprev", "nospeech",
             "notimestamps"]  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    stamps = [transformers.AddedToken(f"<|{t:.2f}|>", normalized=False) for t in 0.02 * np.arange(1501)]
    tokenizer.add_tokens(stamps)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
