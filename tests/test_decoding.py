"""Greedy decoding gives the token ids of plain transformers, without its warnings."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, run, write
from tone_speech import random_text, synthesize

import common

TEXTS = ["こんにちは", "さようなら", "なにぬねの", "あ"]


def variant(folder: Path, **changes) -> str:
    """A copy of the tiny model with another generation config."""
    shutil.copytree(MODEL, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


def load(name: str) -> common.Recognizer:
    device, _ = common.select_device("cpu")
    return common.load_model(name, device, torch.float32)


@pytest.mark.parametrize("version", ["4.49.0", "4.57.6"])
def test_suppress_bias_gives_the_token_ids_of_transformers(tmp_path, version, recognizer):
    from transformers import WhisperForConditionalGeneration

    id_of = recognizer.tokenizer.convert_tokens_to_ids
    spoken_ids = recognizer.tokenizer("こにさらなぬあ", add_special_tokens=False).input_ids
    # 88 ids, as many as OpenAI's models suppress, and among them kana that these texts have.
    suppressed = sorted({*spoken_ids[1:6:2], *range(85), id_of("<|startoftranscript|>")} - {308})
    name = variant(tmp_path / "model", suppress_tokens=suppressed, begin_suppress_tokens=[spoken_ids[0], 308],
                   transformers_version=version)  # fmt: skip
    ours, stock = load(name), WhisperForConditionalGeneration.from_pretrained(name).eval()
    features = [common.extract_features(ours.extractor, synthesize(text)) for text in TEXTS]
    rows = common.generate(ours, features, "ja", "transcribe", 20)
    for feature, row in zip(features, rows, strict=True):
        expected = stock.generate(
            **feature, language="ja", task="transcribe", return_timestamps=False, max_new_tokens=20,
            force_unique_generate_call=True,
        )  # fmt: skip
        assert row == expected[0, common.PROMPT_LENGTH :].tolist()
    assert rows != common.generate(recognizer, features, "ja", "transcribe", 20)  # the lists do matter here
    assert not set(suppressed) & {token_id for row in rows for token_id in row}


def test_a_config_that_suppresses_nothing(tmp_path, recognizer):
    ours = load(variant(tmp_path / "model", suppress_tokens=None, begin_suppress_tokens=None))
    features = [common.extract_features(ours.extractor, synthesize(text)) for text in TEXTS]
    rows = common.generate(ours, features, "ja", "transcribe", 20)
    assert rows == common.generate(recognizer, features, "ja", "transcribe", 20)


@pytest.mark.parametrize("version", ["4.49.0", "4.57.6"])
def test_the_libraries_have_nothing_to_warn_of(tmp_path, version):
    model = variant(tmp_path / "model", transformers_version=version)
    path = write(tmp_path / "a.wav", synthesize(random_text(np.random.default_rng(3), 60, 6), 44_100), 44_100)
    result = run("inference.py", "--audio", path, "--model", model, "--device", "cpu",
                 environment={"PYTHONWARNINGS": "default", "TRANSFORMERS_VERBOSITY": "info"})  # fmt: skip
    assert result.returncode == 0
    assert [line for line in result.stderr.splitlines() if "arning" in line or "deprecated" in line] == []


def test_more_audio_than_the_window_is_refused_not_cut_off(recognizer):
    with pytest.raises(ValueError, match="480001 samples do not fit a window of 480000"):
        common.extract_features(recognizer.extractor, np.zeros(480_001, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "auto"])
def test_half_precision_gives_the_same_text(tmp_path, infer, dtype):
    path = write(tmp_path / "a.wav", synthesize("こんにちは、さようなら"))
    status, out, err = infer("--audio", path, "--dtype", dtype)
    assert (status, out) == (0, "こんにちはさようなら\n")
    assert dtype == "auto" or f"in {dtype};" in err


def test_weights_come_from_safetensors_only(tmp_path):
    folder = Path(variant(tmp_path / "model"))
    model = load(MODEL).model
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(common.SetupError, match="safetensors"):
        load(str(folder))


@pytest.mark.parametrize("damage", ["weights cut", "weights missing", "config cut", "tokenizer absent", "other model"])
def test_a_broken_model_folder_is_one_line(tmp_path, damage):
    folder = Path(variant(tmp_path / "model"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "weights missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["model.decoder.layers.1.fc1.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "config cut":
        config.write_text(config.read_text()[:50])
    elif damage == "tokenizer absent":
        for path in folder.iterdir():
            if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
                path.unlink()
    else:
        config.write_text('{"model_type": "bert"}')
    with pytest.raises(common.SetupError, match="cannot load the model") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_unknown_language_is_refused_with_those_known():
    device, _ = common.select_device("cpu")
    with pytest.raises(common.SetupError, match=r"--language xx: not a language of .* which knows af am "):
        common.load_model(MODEL, device, torch.float32, "xx")
