"""What a prompt changes: is the text that of other programs, and is the prompt repeated where nobody speaks?

    PYTHONPATH=ow python3 tests/benchmarks/prompt.py FILE... --prompt TEXT... --model tests/real_whisper/model

It prints a row of a Markdown table for no prompt and for each: in how many chunks transformers' generate gives the
same token ids, and openai/whisper (as in alignment.py; else neither is asked) the same text; how many chunks
inference.py keeps, their characters, and in how many N_REPEATED characters of the prompt stand in a row. In float32.
"""
import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers.modeling_outputs import BaseModelOutput

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import common  # noqa: E402
from alignment import openai_model  # noqa: E402
from speech import normalize  # noqa: E402

import inference  # noqa: E402

N_REPEATED, BATCH_SIZE, N_TOKENS = 5, 20, 220  # tokens that fit after the longest prompt


def count_equal(recognizer, theirs, encoded: torch.Tensor, rows: list[list[int]], prompt: str) -> tuple[int, int]:
    """The number of rows for which transformers gives the same token ids, and openai/whisper the same text."""
    import whisper
    prompt_ids = torch.tensor(recognizer.tokenizer.get_prompt_ids(prompt)) if prompt else None
    output = recognizer.model.generate(
        encoder_outputs=BaseModelOutput(encoded), prompt_ids=prompt_ids, language="ja", task="transcribe",
        max_new_tokens=N_TOKENS, force_unique_generate_call=True)[:, len(recognizer.initial_tokens) :]  # fmt: skip
    options = whisper.DecodingOptions(language="ja", without_timestamps=True, prompt=prompt or None,
                                      sample_len=N_TOKENS, fp16=False)  # fmt: skip
    results, texts = whisper.decode(theirs, encoded, options), recognizer.tokenizer.batch_decode(rows, True)
    return (sum(row == ids[: len(row)].tolist() for row, ids in zip(rows, output, strict=True)),
            sum(text.strip() == result.text for text, result in zip(texts, results, strict=True)))  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--prompt", nargs="+", default=[])
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    plain = common.load_model(args.model, common.select_device("cpu"), torch.float32)
    theirs = openai_model(plain.model) if importlib.util.find_spec("whisper") else None
    waveforms = [chunk.waveform for path in args.files for chunk in common.read_chunks(path, 15, print)]
    encoded = [common.encode(plain.model, common.extract_features(plain.extractor, each)) for each in waveforms]
    print("| prompt | as transformers | as openai/whisper | kept | characters | with the prompt |\n|" + "---|" * 6)
    for prompt in ["", *args.prompt]:
        ids, said = common.prompt_tokens(plain.tokenizer, prompt), normalize(prompt)
        recognizer = replace(plain, initial_tokens=torch.tensor([*ids, *plain.initial_tokens]))
        pieces, found, equal = {said[i : i + N_REPEATED] for i in range(len(said) - N_REPEATED + 1)}, [], []
        for batch in torch.cat(encoded).split(BATCH_SIZE):
            rows, probs = common.decode(recognizer, batch, N_TOKENS)
            found += zip(probs, map(normalize, plain.tokenizer.batch_decode(rows, True)), strict=True)
            equal += [count_equal(recognizer, theirs, batch, rows, prompt)] if theirs else []
        kept = [text for (prob, text), waveform in zip(found, waveforms, strict=True)
                if prob <= inference.NO_SPEECH_THRESHOLD and not common.is_steady(waveform, 16_000)]  # fmt: skip
        counts = [f"{sum(column)} of {len(found)}" for column in zip(*equal, strict=True)] or ["", ""]
        n_repeated = sum(any(piece in text for piece in pieces) for text in kept)
        counts += [f"{len(kept)} of {len(found)}", str(sum(map(len, kept))), str(n_repeated)]
        print(f"| {prompt} | {' | '.join(counts)} |", flush=True)


if __name__ == "__main__":
    main()
