"""Train tests/tiny_whisper: a Whisper of 0.8 M parameters that transcribes the tone speech of tone_speech.py.

    PYTHONPATH=tests python3 tests/tiny_whisper/train.py tests/tiny_whisper    # an hour on two cores

The window is 30 s and there are 128 mel bins, as in kotoba-whisper-v2.0, so the model goes through the very same
code. It learns in short windows first, which is possible because the encoder's positions are fixed sinusoids: a
5 s window is the same model with the table cut. Save it with transformers 4.57.6: later versions write files
that 4.57.6 cannot read.
"""
import argparse
import json
import os
import tempfile
import time

import numpy as np
import torch
from random_model import byte_symbols
from tone_speech import KANA, SLOT_S, tone
from transformers import (
    AddedToken,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

SAMPLING_RATE = 16_000
EOT, SOT, PREVIOUS, NO_SPEECH = "<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|nospeech|>"
TASKS, NO_TIMESTAMPS = ("<|translate|>", "<|transcribe|>"), "<|notimestamps|>"
START = (SOT, "<|ja|>", "<|transcribe|>", NO_TIMESTAMPS)
# Steps, learning rate at their start and end, whether the texts grow longer on the way, and the mix of (window s,
# batch size, fewest kana, most kana) that the steps take turns in.
PHASES = [
    (2200, 1.5e-3, 1.5e-3, True, [(4, 32, 1, 9)]),
    (1400, 1.5e-3, 1.5e-3, True, [(10, 16, 4, 24)]),
    (2900, 1.5e-3, 5e-5, True, [(5, 24, 1, 11), (15, 12, 1, 36), (15, 12, 12, 36), (15, 12, 1, 36), (30, 6, 1, 40)]),
    (2600, 1e-3, 1e-5, False, [(15, 12, 1, 28), (15, 12, 10, 28), (15, 12, 1, 34), (30, 6, 1, 30)]),
]


def make_tokenizer() -> WhisperTokenizerFast:
    """A Whisper tokenizer of 256 bytes, one token per kana, and the special tokens in the order of large-v3."""
    symbols = byte_symbols()
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    merges = []
    for kana in KANA:  # three UTF-8 bytes each: two merges make one token
        first, second, third = (symbols[byte] for byte in kana.encode())
        if first + second not in vocab:
            vocab[first + second] = len(vocab)
            merges.append(f"{first} {second}")
        vocab[first + second + third] = len(vocab)
        merges.append(f"{first + second} {third}")
    merges.sort(key=len)
    vocab[EOT] = len(vocab)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/vocab.json", "w", encoding="utf-8") as file:
            json.dump(vocab, file)
        with open(f"{folder}/merges.txt", "w", encoding="utf-8") as file:
            file.write("#version: 0.2\n" + "\n".join(merges) + "\n")
        tokenizer = WhisperTokenizerFast(
            f"{folder}/vocab.json", f"{folder}/merges.txt",
            pad_token=EOT, bos_token=EOT, eos_token=EOT, unk_token=EOT,
        )
    languages = [f"<|{code}|>" for code in LANGUAGES]
    specials = [SOT, *languages, *TASKS, "<|startoflm|>", PREVIOUS, NO_SPEECH, NO_TIMESTAMPS]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    timestamps = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]  # not special: decoding tells them apart by that
    tokenizer.add_tokens([AddedToken(t, lstrip=False, rstrip=False, normalized=False) for t in timestamps])
    tokenizer.set_prefix_tokens(language="ja", task="transcribe", predict_timestamps=False)
    return tokenizer


def make_model(tokenizer: WhisperTokenizerFast) -> WhisperForConditionalGeneration:
    """An untrained model with the fields that generate reads from a real Whisper's generation config."""
    id_of = tokenizer.convert_tokens_to_ids
    ends = {"pad_token_id": id_of(EOT), "bos_token_id": id_of(EOT), "eos_token_id": id_of(EOT)}
    heads = 4
    model = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=128, d_model=96, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=192, decoder_ffn_dim=192,
        max_source_positions=1500, max_target_positions=448, decoder_start_token_id=id_of(SOT),
        suppress_tokens=None, begin_suppress_tokens=None, dropout=0.0, **ends,
    ))  # fmt: skip
    model.generation_config = GenerationConfig(
        decoder_start_token_id=id_of(SOT), max_length=448, is_multilingual=True, language="ja", task="transcribe",
        return_timestamps=False, lang_to_id={f"<|{code}|>": id_of(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task.strip("<|>"): id_of(task) for task in TASKS},
        no_timestamps_token_id=id_of(NO_TIMESTAMPS), prev_sot_token_id=id_of(PREVIOUS),
        max_initial_timestamp_index=50, begin_suppress_tokens=[id_of("Ġ"), id_of(EOT)],
        suppress_tokens=[id_of(t) for t in (SOT, *TASKS, "<|startoflm|>", PREVIOUS, NO_SPEECH)],
        # Beyond the last decoder layer, as in kotoba-whisper-v2.0: word timestamps must not be relied on.
        alignment_heads=[[7, 0], [10, 3]], **ends,
    )  # fmt: skip
    return model


def set_window(model: WhisperForConditionalGeneration, positions: torch.Tensor, window_s: int) -> None:
    """Cut the encoder to windows of window_s seconds; positions is the whole table, (1500, d_model)."""
    encoder, n_positions = model.model.encoder, 50 * window_s
    encoder.embed_positions.weight = torch.nn.Parameter(positions[:n_positions].clone(), requires_grad=False)
    encoder.embed_positions.num_embeddings = encoder.max_source_positions = n_positions
    model.config.max_source_positions = n_positions


def utterance(rng: np.random.Generator, n_kana: int, window_s: float) -> tuple[np.ndarray, str]:
    """Random tone speech in a window: pauses, level, noise and what follows the last kana all vary."""
    waveform, t, text = np.zeros(round(window_s * SAMPLING_RATE)), rng.uniform(0, 0.5), ""
    for _ in range(n_kana):
        if text and rng.random() < 0.12:
            t += rng.uniform(0.3, 1.5)
        if t + SLOT_S > window_s:
            break
        kana = KANA[rng.integers(len(KANA))]
        chord, first = tone(kana, SAMPLING_RATE), round(t * SAMPLING_RATE)
        waveform[first : first + len(chord)] += chord * rng.uniform(0.6, 1.1)
        text, t = text + kana, t + SLOT_S
    waveform *= 10 ** rng.uniform(-1, 0.2)
    if rng.random() < 0.8:
        noise = rng.normal(0, 10 ** rng.uniform(-5, -2.5), len(waveform))
        if rng.random() < 0.5:  # a short recording: digital silence pads it to the window
            noise[round((t + rng.uniform(0, 0.5)) * SAMPLING_RATE) :] = 0
        waveform += noise
    return waveform.astype(np.float32), text


def batch(rng, tokenizer, extractor, window_s: int, size: int, fewest: int, most: int) -> tuple[torch.Tensor, ...]:
    """input_features (size, 128, frames), token_ids (size, n_tokens), and which of these are to be predicted."""
    start = [tokenizer.convert_tokens_to_ids(t) for t in START]
    features, rows = [], []
    for _ in range(size):
        waveform, text = utterance(rng, int(rng.integers(fewest, most + 1)), window_s)
        features.append(extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features[0])
        rows.append(start + tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id])
    token_ids = torch.full((size, max(map(len, rows))), tokenizer.eos_token_id)
    predicted = torch.zeros(token_ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = torch.tensor(row)
        predicted[i, len(start) : len(row)] = True
    return torch.stack(features), token_ids, predicted


def train(model, tokenizer, phases: list[tuple], seed: int) -> None:
    """Teacher-forced cross-entropy through the phases; prints the loss as it goes."""
    rng = np.random.default_rng(seed)
    positions = model.model.encoder.embed_positions.weight.detach().clone()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.98))
    model.train()
    step, start, losses = 0, time.monotonic(), {}
    for n_phase, first_rate, last_rate, lengthen, mix in phases:
        for i in range(n_phase):
            window_s, size, fewest, most = mix[i % len(mix)]
            if lengthen:
                most = fewest + round((most - fewest) * min(1.0, max(0.0, (i / n_phase - 0.15) / 0.5)))
            set_window(model, positions, window_s)
            extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=window_s)
            for group in optimizer.param_groups:
                group["lr"] = min(1, (step + 1) / 200) * (first_rate + (last_rate - first_rate) * i / n_phase)
            features, token_ids, predicted = batch(rng, tokenizer, extractor, window_s, size, fewest, most)
            logits = model(input_features=features, decoder_input_ids=token_ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits[predicted[:, 1:]], token_ids[:, 1:][predicted[:, 1:]])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses[window_s] = 0.95 * losses.get(window_s, loss.item()) + 0.05 * loss.item()
            if step % 50 == 0:
                means = " ".join(f"{w}s {x:.3f}" for w, x in sorted(losses.items()))
                print(f"step {step}  up to {most} kana  loss {means}  {time.monotonic() - start:.0f} s", flush=True)
            step += 1
    set_window(model, positions, 30)
    model.eval()


def exact_transcripts(model, processor, n_kana: int, trials: int = 20, seed: int = 99) -> int:
    """How many of `trials` random texts of n_kana kana come back without an error."""
    rng, exact = np.random.default_rng(seed), 0
    for _ in range(trials):
        waveform, text = utterance(rng, n_kana, 30)
        inputs = processor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt", return_attention_mask=True)
        token_ids = model.generate(**inputs, language="ja", task="transcribe", return_timestamps=False)
        exact += processor.tokenizer.decode(token_ids[0].tolist(), skip_special_tokens=True) == text
    return exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to save the model and the processor in")
    parser.add_argument("--start", metavar="FOLDER", help="a model after all phases but the last, to go on with")
    parser.add_argument("--steps", type=int, help="steps of each phase (default: as many as the committed model had)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    phases = PHASES
    if args.start:
        trained = WhisperForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
        phases = PHASES[-1:]
    if args.steps is not None:
        phases = [(args.steps, *rest) for _, *rest in phases]
    train(model, tokenizer, phases, args.seed)
    processor = WhisperProcessor(feature_extractor=WhisperFeatureExtractor(feature_size=128), tokenizer=tokenizer)
    for n_kana in (1, 3, 6, 12, 18, 22, 26, 30, 36):
        print(f"{n_kana} kana: {exact_transcripts(model, processor, n_kana)} of 20 exact", flush=True)
    model.half().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    # save_pretrained writes its own version here; one from 4.50 on makes every generate call print warnings about
    # settings that generate itself has changed.
    path = os.path.join(args.output, "generation_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config["transformers_version"] = "4.49.0"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
