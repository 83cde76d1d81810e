"""What a prompt changes: is the text that of other programs, and is the prompt repeated where nobody speaks?

    PYTHONPATH=ow python3 tests/benchmarks/prompt.py FILE... --prompt TEXT... --model tests/real_whisper/model

It prints a row of a Markdown table for each prompt, and for none: in how many chunks the token ids are those of
transformers' generate with prompt_ids, and the text that of openai/whisper with this prompt (benchmarks/alignment.py
says how to get it); the characters that inference.py writes; and in how many chunks it writes N_ECHO characters or more
of the prompt in a row. --no-witness leaves the other programs out. All is in float32.
"""
import argparse
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

N_ECHO = 5
HEAD = "| prompt | as transformers | as openai/whisper | characters | chunks with the prompt |\n|---|---|---|---|---|"
N_TOKENS = common.N_POSITIONS - common.START_LENGTH - common.MAX_PROMPT_TOKENS - 1  # that fit after every prompt
OPTIONS = {"num_beams": 1, "do_sample": False, "return_timestamps": False, "force_unique_generate_call": True}


def are_equal(recognizer, theirs, encoded: torch.Tensor, prompt: str) -> tuple[bool, bool]:
    """Whether transformers gives the same token ids, and openai/whisper the same text."""
    import whisper

    ids = common.decode(recognizer, encoded, N_TOKENS)[0][0]
    prompt_ids = torch.tensor(recognizer.tokenizer.get_prompt_ids(prompt)) if prompt else None
    output = recognizer.model.generate(
        encoder_outputs=BaseModelOutput(encoded), language="ja", task="transcribe", prompt_ids=prompt_ids,
        max_new_tokens=N_TOKENS, **OPTIONS,
    )  # fmt: skip
    options = whisper.DecodingOptions(
        language="ja", without_timestamps=True, fp16=False, prompt=prompt or None, sample_len=N_TOKENS
    )
    text = recognizer.tokenizer.decode(ids, skip_special_tokens=True).strip()
    is_text = text == whisper.decode(theirs, encoded[0], options).text
    return ids == output[0, len(recognizer.initial_tokens) :].tolist(), is_text


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--prompt", nargs="+", default=[], action="extend")
    parser.add_argument("--model", required=True)
    parser.add_argument("--no-witness", action="store_true")
    args = parser.parse_args()
    plain = common.load_model(args.model, common.select_device("cpu"), torch.float32)
    theirs = None if args.no_witness else openai_model(plain.model)
    chunks = [] if args.no_witness else [chunk for path in args.files for chunk in common.read_chunks(path, 15, print)]
    features = [common.extract_features(plain.extractor, chunk.waveform) for chunk in chunks]
    encoded = [common.encode(plain.model, each) for each in features]
    print(HEAD)
    for prompt in ["", *args.prompt]:
        initial = torch.tensor([*common.prompt_tokens(plain.tokenizer, prompt), *plain.initial_tokens])
        recognizer = replace(plain, initial_tokens=initial)
        equal = [are_equal(recognizer, theirs, each, prompt) for each in encoded]
        options = inference.parse_arguments(["--audio", *args.files])
        recordings = inference.transcribe(recognizer, args.files, options)
        texts = [normalize(chunk.text) for r in recordings for chunk in r.chunks if not chunk.left_out]
        pieces = {normalize(prompt)[i : i + N_ECHO] for i in range(len(normalize(prompt)) - N_ECHO + 1)}
        n_echoes = sum(any(piece in text for piece in pieces) for text in texts)
        counts = [f"{sum(column)} of {len(equal)}" for column in zip(*equal, strict=True)] or ["", ""]
        row = [prompt, *counts, str(sum(map(len, texts))), f"{n_echoes} of {len(texts)}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
