"""Greedy decoding gives the token ids of plain transformers, without its warnings."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from conftest import MODEL, run, write
from tone_speech import random_text, synthesize

GENERATION, LAYERS = "generation_config.json", "weights are missing, too many or of another shape"
TOKENIZER = "its tokenizer.json or tokenizer_config.json is missing or broken"
TEXTS = ["こんにちは", "さようなら", "なにぬねの", "あ"]


def changed(name: str, **changes) -> Callable[[Path], None]:
    """A function that changes a JSON file of a model folder; None takes a key out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def variant(folder: Path, change: Callable[[Path], None]) -> str:
    """A copy of the tiny model, changed."""
    shutil.copytree(MODEL, folder)
    change(folder)
    return str(folder)


def load(name: str, dtype: torch.dtype = torch.float32, **options) -> common.Recognizer:
    return common.load_model(name, common.select_device("cpu"), dtype, **options)


def stock_rows(model, extractor, waveforms: list, max_new_tokens: int, prompt_ids=None) -> list[list[int]]:
    """The token ids of plain transformers, a window at a time: its own features, caches, processors and stopping."""
    rows, n_prompt = [], 0 if prompt_ids is None else len(prompt_ids)
    for waveform in waveforms:
        inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
        [row] = model.generate(
            **inputs.to(model.dtype), language="ja", task="transcribe", return_timestamps=False, num_beams=1,
            do_sample=False, max_new_tokens=max_new_tokens, force_unique_generate_call=True, prompt_ids=prompt_ids,
        ).tolist()  # fmt: skip
        rows.append(row[n_prompt + common.START_LENGTH :])
    return rows


def our_rows(recognizer, waveforms: list, max_new_tokens: int) -> list[list[int]]:
    features = [common.extract_features(recognizer.extractor, waveform) for waveform in waveforms]
    return common.generate(recognizer, features, max_new_tokens)[0]


@pytest.mark.parametrize("version", ["4.49.0", "4.57.6"])
def test_the_token_mask_gives_the_token_ids_of_transformers(tmp_path, version, recognizer):
    from transformers import WhisperForConditionalGeneration

    id_of = recognizer.tokenizer.convert_tokens_to_ids
    spoken_ids = recognizer.tokenizer("こにさらなぬあ", add_special_tokens=False).input_ids
    # 88 ids, as many as OpenAI's models suppress, and among them kana that these texts have.
    suppressed = sorted({*spoken_ids[1:6:2], *range(85), id_of("<|startoftranscript|>")} - {308})
    lists = {"suppress_tokens": suppressed, "begin_suppress_tokens": [spoken_ids[0], 308]}
    name = variant(tmp_path / "model", changed(GENERATION, transformers_version=version, **lists))
    stock, waveforms = WhisperForConditionalGeneration.from_pretrained(name).eval(), [*map(synthesize, TEXTS)]
    rows = our_rows(load(name), waveforms, 20)
    assert rows == stock_rows(stock, recognizer.extractor, waveforms, 20)
    assert rows != our_rows(recognizer, waveforms, 20)  # the lists do matter here
    assert not set(suppressed) & {token_id for row in rows for token_id in row}
    none = variant(tmp_path / "none", changed(GENERATION, suppress_tokens=None, begin_suppress_tokens=None))
    assert our_rows(load(none), waveforms, 20) == our_rows(recognizer, waveforms, 20)


@pytest.mark.parametrize("max_new_tokens", [1, 8, 9, 40, common.MAX_NEW_TOKENS])
def test_decoding_gives_the_token_ids_of_transformers(recognizer, max_new_tokens):
    from transformers import WhisperForConditionalGeneration

    stock, rng = WhisperForConditionalGeneration.from_pretrained(MODEL).eval(), np.random.default_rng(11)
    waveforms = [synthesize(random_text(rng, n, 6)) for n in (0, 1, 3, 7, 8, 16, 30)]  # rows that end at many steps
    waveforms.append(rng.normal(0, 0.1, 480_000).astype(np.float32))  # and one in which it may find anything
    rows = our_rows(recognizer, waveforms, max_new_tokens)
    assert rows == stock_rows(stock, recognizer.extractor, waveforms, max_new_tokens)
    assert max_new_tokens < 40 or len(set(map(len, rows))) > 5


def test_a_row_that_loops_ends_at_the_next_look_and_the_others_do_not_change(recognizer):
    features = [common.extract_features(recognizer.extractor, synthesize(text)) for text in (TEXTS[0], "なにぬね" * 4)]
    expected = common.generate(recognizer, features, 40).token_ids
    asked = []
    rows = common.generate(recognizer, features, 40, lambda row, ids: asked.append((row, ids)) or row == 1).token_ids
    assert len(expected[1]) > 8 and rows == [expected[0], expected[1][:8]]
    assert asked == [(1, rows[1])]  # the first row has ended by itself


def prompt_of_length(recognizer, n_tokens: int) -> str:
    """A prompt that has that many tokens, of which the first is the space before it."""
    text = "こ" * (n_tokens - 1)
    assert len(recognizer.tokenizer(" " + text, add_special_tokens=False).input_ids) == n_tokens
    return text


def endless(folder: Path) -> None:
    """A model that never ends its text."""
    changed(GENERATION, suppress_tokens=[json.loads((folder / GENERATION).read_text())["eos_token_id"]])(folder)


@pytest.mark.parametrize("n_tokens, max_new_tokens, change", [
    (2, 9, None), (60, 40, None), (60, 40, endless), (223, common.MAX_NEW_TOKENS, endless),
])  # fmt: skip
def test_a_prompt_gives_the_token_ids_of_transformers(tmp_path, recognizer, n_tokens, max_new_tokens, change):
    """Up to the last of the 448 positions, of which the prompt and its <|startofprev|> take some."""
    from transformers import WhisperForConditionalGeneration, WhisperTokenizer

    name = variant(tmp_path / "model", change) if change else MODEL
    stock, prompt = WhisperForConditionalGeneration.from_pretrained(name).eval(), prompt_of_length(recognizer, n_tokens)
    prompt_ids = torch.tensor(WhisperTokenizer.from_pretrained(name).get_prompt_ids(prompt))
    waveforms, limit = [*map(synthesize, TEXTS[:2])], min(max_new_tokens, 448 - 1 - n_tokens - 4)
    rows = our_rows(load(name, prompt=prompt), waveforms, max_new_tokens)
    assert rows == stock_rows(stock, recognizer.extractor, waveforms, limit, prompt_ids)
    assert rows != our_rows(load(name), waveforms, limit)  # the prompt does matter here
    assert not change or {len(row) for row in rows} == {limit}


def test_what_a_prompt_leaves_of_the_positions_is_a_token_limit(tmp_path, recognizer, infer):
    name, path = variant(tmp_path / "model", endless), write(tmp_path / "a.wav", synthesize("こんにちは"))
    options = ["--model", name, "--prompt", prompt_of_length(recognizer, 223), "--max-new-tokens", "444"]
    status, out, err = infer("--audio", path, *options, "--no-speech-threshold", "1", "-f", "json")
    assert status == 0 and "chunks looping: 1" in err
    assert {segment["looping"] for segment in json.loads(out)["segments"]} == {True}


def test_chunks_in_which_the_model_writes_nothing_are_counted(tmp_path, recognizer, infer):
    """As a model may do after a prompt that it does not understand."""
    others = [i for i in range(recognizer.model.config.vocab_size) if i != recognizer.tokenizer.eos_token_id]
    name = variant(tmp_path / "model", changed(GENERATION, suppress_tokens=others, begin_suppress_tokens=None))
    status, out, err = infer("--audio", write(tmp_path / "a.wav", synthesize("こんにちは")), "--model", name)
    assert (status, out) == (0, "") and err.endswith("; chunks without text: 1\n")


def test_a_blank_prompt_is_none(recognizer):
    assert load(MODEL, prompt=" \n").initial_tokens.equal(recognizer.initial_tokens)


PLAIN = "--prompt must be plain text: .*"


@pytest.mark.parametrize("prompt, words", [
    ("こ" * 223, "--prompt: its 224 tokens are more than the 223 that may come before a text: leave out"),
    ("東京<|ja|>", PLAIN + r"<\|ja\|>"), ("<|0.00|>", PLAIN + r"<\|0.00\|>"), ("<|endoftext|>", PLAIN + "endoftext"),
    ("\udcff", PLAIN),  # bytes of a command line that are not UTF-8
])  # fmt: skip
def test_a_prompt_that_cannot_be_used_is_one_line(prompt, words):
    with pytest.raises(common.SetupError, match=words) as caught:
        load(MODEL, prompt=prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("own", [True, False])
def test_with_either_attention_the_text_in_bfloat16_is_that_of_float32(monkeypatch, own):
    monkeypatch.setattr(common, "needs_cpu_attention", lambda device, dtype: own and dtype == torch.bfloat16)
    waveforms, fast = [*map(synthesize, TEXTS)], load(MODEL, torch.bfloat16)
    assert (fast.model.config._attn_implementation == "cpu_attention") == own
    assert our_rows(fast, waveforms, 20) == our_rows(load(MODEL), waveforms, 20)


def test_the_encoder_in_bfloat16_is_as_exact_as_that_of_transformers(monkeypatch):
    from transformers import WhisperForConditionalGeneration

    monkeypatch.setattr(common, "needs_cpu_attention", lambda device, dtype: True)
    rng, fast = np.random.default_rng(0), load(MODEL, torch.bfloat16)
    exact, stock = (WhisperForConditionalGeneration.from_pretrained(MODEL, dtype=dtype).eval().model.encoder
                    for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    for waveform in [*(synthesize(random_text(rng, n, 6)) for n in (3, 25)), rng.normal(0, 0.1, 480_000)]:
        features = common.extract_features(fast.extractor, waveform.astype(np.float32))
        with torch.inference_mode():
            reference = exact(features).last_hidden_state
            states = [common.encode(fast.model, features.bfloat16()), stock(features.bfloat16()).last_hidden_state]
        errors = [((x - reference).norm() / reference.norm()).item() for x in states]
        assert errors[0] <= 1.1 * errors[1] and 0.001 < errors[0] < 0.02


def test_the_libraries_have_nothing_to_warn_of(tmp_path):
    model = variant(tmp_path / "model", changed(GENERATION, transformers_version="4.49.0"))
    path = write(tmp_path / "a.wav", synthesize(random_text(np.random.default_rng(3), 60, 6), 44_100), 44_100)
    result = run("inference.py", "--audio", path, "--model", model, "--device", "cpu",
                 environment={"PYTHONWARNINGS": "default", "TRANSFORMERS_VERBOSITY": "info"})  # fmt: skip
    assert result.returncode == 0
    assert [line for line in result.stderr.splitlines() if "arning" in line or "deprecated" in line] == []


@pytest.mark.parametrize("prompt", ["", "さようなら。"])
def test_the_no_speech_probability_is_that_of_a_forward_to_the_start_of_the_transcript(recognizer, prompt):
    tokenizer, features = recognizer.tokenizer, [common.extract_features(recognizer.extractor, synthesize(text))
                                                 for text in ("こんにちは", "あ")]  # fmt: skip
    _, probs, encoded = common.generate(load(MODEL, prompt=prompt), features, 20)
    before = f"<|startofprev|> {prompt}" if prompt else ""
    ids = tokenizer(f"{before}<|startoftranscript|>", add_special_tokens=False).input_ids
    with torch.inference_mode():
        logits = recognizer.model(encoder_outputs=(encoded,), decoder_input_ids=torch.tensor([ids, ids])).logits
    no_speech = tokenizer.convert_tokens_to_ids("<|nospeech|>")
    np.testing.assert_allclose(probs, logits[:, -1].softmax(-1)[:, no_speech], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "auto"])
def test_half_precision_gives_the_same_text(tmp_path, infer, dtype):
    path = write(tmp_path / "a.wav", synthesize("こんにちは、さようなら"))
    status, out, err = infer("--audio", path, "--dtype", dtype)
    assert (status, out) == (0, "こんにちはさようなら\n")
    assert dtype == "auto" or f"in {dtype}, loaded" in err


def cut(name: str, n_bytes: int) -> Callable[[Path], None]:
    """A function that cuts off a file of a model folder."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])


def pickled(folder: Path) -> None:
    """Weights as a pickle, which may do anything when it is loaded."""
    torch.save(load(MODEL).model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    """A model folder as training leaves it: the weights and their settings."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").unlink()


@pytest.mark.parametrize("damage, words", [
    (cut("model.safetensors", 1000), "cannot load"), (cut("config.json", 50), "cannot load"), (pickled, "safetensors"),
    (changed("config.json", encoder_layers=3), LAYERS), (changed("config.json", encoder_layers=1), LAYERS),
    (changed(GENERATION, task_to_id=None), "task_to_id"), (changed(GENERATION, suppress_tokens=[5, 99_999]), "99999"),
    (changed(GENERATION, lang_to_id={"<|ja|>": 7}), "its generation_config.json and its tokenizer"),
    (changed("preprocessor_config.json", feature_size=80), "mel bins"), (without_tokenizer, TOKENIZER),
    (cut("tokenizer.json", 1000), TOKENIZER), (changed("tokenizer_config.json", bos_token=[]), TOKENIZER),
])  # fmt: skip
def test_a_broken_model_folder_is_one_line(tmp_path, damage, words):
    folder = variant(tmp_path / "model", damage)
    with pytest.raises(common.SetupError, match=f"cannot load the model {folder}: ") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and words in str(caught.value)


def as_transformers_5_saves_it(folder: Path) -> None:
    """The tokenizer in tokenizer.json alone, its special tokens as a list, and no preprocessor_config.json."""
    extractor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": extractor}))
    special = json.loads((folder / "special_tokens_map.json").read_text())
    config = {"backend": "tokenizers", "tokenizer_class": "WhisperTokenizer", "clean_up_tokenization_spaces": False}
    config |= {"extra_special_tokens": special.pop("additional_special_tokens"), "errors": "replace", "is_local": True}
    config |= {name: token if isinstance(token, str) else token["content"] for name, token in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("preprocessor_config", "special_tokens_map", "added_tokens", "vocab"):
        (folder / f"{name}.json").unlink()
    (folder / "merges.txt").unlink()


def test_a_folder_that_transformers_5_has_saved_gives_the_same_texts(tmp_path, recognizer):
    new, waveforms = load(variant(tmp_path / "model", as_transformers_5_saves_it)), [*map(synthesize, TEXTS)]
    assert new.initial_tokens.equal(recognizer.initial_tokens) and new.token_mask.equal(recognizer.token_mask)
    assert new.tokenizer.eos_token_id == recognizer.tokenizer.eos_token_id
    rows = our_rows(new, waveforms, 20)
    assert rows == our_rows(recognizer, waveforms, 20)
    assert new.tokenizer.batch_decode(rows, skip_special_tokens=True) == TEXTS
    rows = np.random.default_rng(0).integers(len(recognizer.tokenizer), size=(200, 30)).tolist()
    for skip in (False, True):
        texts = [each.tokenizer.batch_decode(rows, skip_special_tokens=skip) for each in (new, recognizer)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_would_not_be_applied_is_refused(tmp_path, name):
    folder = variant(tmp_path / "model", lambda folder: (folder / name).touch())
    with pytest.raises(common.SetupError, match=f"its LoRA adapter \\({name}\\) would not be applied: merge it"):
        load(folder)


def test_a_model_whose_settings_list_no_languages(tmp_path):
    with pytest.raises(common.SetupError, match=r"which knows none \(it is English only, or needs"):
        load(variant(tmp_path / "model", changed(GENERATION, lang_to_id=None, task_to_id=None)))


def multiplied(name: str, factor: float) -> Callable[[Path], None]:
    """A function that multiplies one tensor of a model folder."""
    from safetensors.torch import load_file, save_file

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name] * factor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize("name, factor, dtype", [
    ("model.decoder.layers.1.fc2.weight", float("nan"), "float32"),
    ("model.encoder.layers.0.fc1.weight", float("inf"), "bfloat16"),
    ("model.encoder.layers.1.fc1.weight", 1e4, "float16"),  # transformers clamps what overflows here
])  # fmt: skip
def test_a_model_that_computes_nan_is_an_error_not_an_empty_text(tmp_path, infer, name, factor, dtype):
    folder = variant(tmp_path / "model", multiplied(name, factor))
    paths = [write(tmp_path / f"{text}.wav", synthesize(text)) for text in ("さ", "よ")]
    status, out, err = infer("--audio", *paths, "--model", folder, "--dtype", dtype)
    assert (status, out) == (2, "") and f"cpu computes NaN or infinity in {dtype}" in err
    assert ("--dtype bfloat16 or float32" in err) == (dtype == "float16") and "Traceback" not in err
