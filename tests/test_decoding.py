"""Greedy decoding gives the token ids of plain transformers, without its warnings."""
import dataclasses
import json
import shutil
import types
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


def stock_rows(model, extractor, waveforms: list, max_new_tokens: int, language: str = "ja") -> list[list[int]]:
    """The token ids of plain transformers, a window at a time: its own features, caches, processors and stopping."""
    rows = []
    for waveform in waveforms:
        inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
        [row] = model.generate(
            **inputs.to(model.dtype), language=language, task="transcribe", return_timestamps=False, num_beams=1,
            do_sample=False, max_new_tokens=max_new_tokens, force_unique_generate_call=True,
        ).tolist()  # fmt: skip
        rows.append(row[common.PROMPT_LENGTH :])
    return rows


def our_rows(recognizer, waveforms: list, max_new_tokens: int) -> list[list[int]]:
    features = [common.extract_features(recognizer.extractor, waveform) for waveform in waveforms]
    return common.generate(recognizer, features, "ja", "transcribe", max_new_tokens)


@pytest.mark.parametrize("version", ["4.49.0", "4.57.6"])
def test_suppress_bias_gives_the_token_ids_of_transformers(tmp_path, version, recognizer):
    from transformers import WhisperForConditionalGeneration

    id_of = recognizer.tokenizer.convert_tokens_to_ids
    spoken_ids = recognizer.tokenizer("こにさらなぬあ", add_special_tokens=False).input_ids
    # 88 ids, as many as OpenAI's models suppress, and among them kana that these texts have.
    suppressed = sorted({*spoken_ids[1:6:2], *range(85), id_of("<|startoftranscript|>")} - {308})
    name = variant(tmp_path / "model", suppress_tokens=suppressed, begin_suppress_tokens=[spoken_ids[0], 308],
                   transformers_version=version)  # fmt: skip
    stock, waveforms = WhisperForConditionalGeneration.from_pretrained(name).eval(), [*map(synthesize, TEXTS)]
    rows = our_rows(load(name), waveforms, 20)
    assert rows == stock_rows(stock, recognizer.extractor, waveforms, 20)
    assert rows != our_rows(recognizer, waveforms, 20)  # the lists do matter here
    assert not set(suppressed) & {token_id for row in rows for token_id in row}


@pytest.mark.parametrize("max_new_tokens", [1, 3, 8, 9, 40, common.MAX_NEW_TOKENS])
def test_decoding_gives_the_token_ids_of_transformers(recognizer, max_new_tokens):
    from transformers import WhisperForConditionalGeneration

    stock, rng = WhisperForConditionalGeneration.from_pretrained(MODEL).eval(), np.random.default_rng(11)
    waveforms = [synthesize(random_text(rng, n, 6)) for n in (0, 1, 3, 7, 8, 16, 30)]  # rows that end at many steps
    waveforms.append(rng.normal(0, 0.1, 480_000).astype(np.float32))  # and one in which it may find anything
    rows = our_rows(recognizer, waveforms, max_new_tokens)
    assert rows == stock_rows(stock, recognizer.extractor, waveforms, max_new_tokens)
    assert max_new_tokens < 40 or len(set(map(len, rows))) > 5


def test_a_row_without_an_end_decodes_to_the_last_position(recognizer):
    endless = dataclasses.replace(recognizer, bias=recognizer.bias.clone())
    endless.bias[:, recognizer.tokenizer.eos_token_id] = -float("inf")
    [row] = our_rows(endless, [synthesize("あ")], common.MAX_NEW_TOKENS)
    assert len(row) == common.MAX_NEW_TOKENS


def test_features_are_those_of_the_extractor(recognizer):
    rng, extractor = np.random.default_rng(5), recognizer.extractor
    for waveform in [
        synthesize("こんにちは"), rng.normal(0, 0.1, 480_000).astype(np.float32), np.zeros(16_000, np.float32),
        np.full(1, 0.5, np.float32), rng.normal(0, 1e-7, 33_333).astype(np.float32),
    ]:  # fmt: skip
        expected = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features
        assert torch.allclose(common.extract_features(extractor, waveform), expected, rtol=0, atol=2e-5)


class TestCpuKernels:
    """bfloat16 on a CPU, with attention and weights of our own."""

    pytestmark = pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not compute bfloat16"
    )

    @pytest.mark.parametrize("n_query, n_key, causal", [(1, 1500, False), (1, 7, True), (4, 4, True), (5, 1500, False)])
    def test_the_attention_is_as_exact_as_that_of_torch(self, n_query, n_key, causal):
        torch.manual_seed(0)
        shapes = [(2, 3, n_query, 64), (2, 3, n_key, 64), (2, 3, n_key, 64)]
        states = [torch.randn(shape).mul(2).bfloat16() for shape in shapes]
        states[0] *= 0.2  # scores of a trained model: peaks in the softmax
        attend = torch.nn.functional.scaled_dot_product_attention
        exact = attend(*(x.double() for x in states), scale=1, is_causal=causal and n_query > 1)
        torchs = attend(*states, scale=1, is_causal=causal and n_query > 1)
        module = types.SimpleNamespace(is_causal=causal)
        ours, _ = common.cpu_attention(module, *states, attention_mask=None, scaling=1.0, dropout=0.0)
        errors = [(x.double() - exact).norm() / exact.norm() for x in (ours.transpose(1, 2), torchs)]
        assert errors[0] <= 1.5 * errors[1] and errors[0] < 0.005

    def test_the_encoder_is_as_exact_as_that_of_transformers(self):
        rng, cpu, plain = np.random.default_rng(0), torch.device("cpu"), load(MODEL)
        waveforms = [synthesize(random_text(rng, n, 6)) for n in (3, 12, 25)] + [rng.normal(0, 0.1, 480_000)]
        features = [common.extract_features(plain.extractor, waveform.astype(np.float32)) for waveform in waveforms]
        with torch.inference_mode():
            exact = [plain.model.model.encoder(row).last_hidden_state for row in features]
            fast = common.move(plain, cpu, torch.bfloat16).model
            ours = [common.encode(fast, row.bfloat16()) for row in features]
            common.use_plain_kernels(fast)
            stock = [fast.model.encoder(row.bfloat16()).last_hidden_state for row in features]
        for reference, candidate, other in zip(exact, ours, stock, strict=True):
            errors = [((x - reference).norm() / reference.norm()).item() for x in (candidate, other)]
            assert errors[0] <= 1.1 * errors[1] and 0.001 < errors[0] < 0.02

    def test_a_model_moved_on_is_plain_again(self):
        waveforms = [*map(synthesize, TEXTS)]
        plain = load(MODEL)
        expected = our_rows(plain, waveforms, 20)
        fast = common.move(plain, torch.device("cpu"), torch.bfloat16)
        assert our_rows(fast, waveforms, 20) == expected and fast.model.config._attn_implementation == "cpu_attention"
        again = common.move(fast, torch.device("cpu"), torch.float32)
        assert our_rows(again, waveforms, 20) == expected and again.model.config._attn_implementation == "sdpa"
        assert again.model.proj_out.weight is again.model.model.decoder.embed_tokens.weight


def test_a_config_that_suppresses_nothing(tmp_path, recognizer):
    ours = load(variant(tmp_path / "model", suppress_tokens=None, begin_suppress_tokens=None))
    waveforms = [*map(synthesize, TEXTS)]
    assert our_rows(ours, waveforms, 20) == our_rows(recognizer, waveforms, 20)


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
