"""Seed faults into the candidate of eval_accuracy.py, one at a time, on the simulated NPU.

    PYTHONPATH=tests/fake_npu python3 tests/stress/seed_faults.py --audio a.wav b.wav
    PYTHONPATH=tests/fake_npu python3 tests/stress/seed_faults.py --model FOLDER --only nothing head

Prints a JSON line for each: the fault, the exit status, the worst figures, and what was named, then a Markdown table.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import json
import re
import sys
import tempfile
import types
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS.parent))

import common  # noqa: E402

import eval_accuracy  # noqa: E402


def wrong_weight(model):
    model.model.encoder.layers[1].fc1.weight.data[7].mul_(-1)  # one row of one matrix


def head_zeroed(model):
    attention = model.model.encoder.layers[0].self_attn
    attention.out_proj.weight.data[:, : attention.head_dim] = 0


def bias_dropped(model):
    model.model.encoder.layers[0].fc2.bias.data.zero_()


def layer_norm_epsilon(model, epsilon=1e-3):
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = epsilon


def layer_norm_epsilon_small(model):
    layer_norm_epsilon(model, 1e-6)


def float16_noise(model):
    import torch

    def add_noise(module, inputs, output):
        if output.dtype is not torch.float16:
            return output
        torch.manual_seed(0)
        return output * (1 + 1e-2 * torch.randn(output.shape)).to(output.device, output.dtype)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(add_noise)


def nan_in_one_logit(model):
    import torch

    def spoil(module, inputs, output):
        mask = torch.zeros(output.shape)
        mask.view(-1, mask.shape[-1])[-1, 5] = float("nan")
        return output + mask.to(output.device, output.dtype)

    model.proj_out.register_forward_hook(spoil)


def encoder_off_by_one_frame(model):
    def shift(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.roll(1, 1)
        return output

    model.model.encoder.register_forward_hook(shift)


def cache_off_by_one(model):
    embedding = model.model.decoder.embed_positions
    original = embedding.forward

    def forward(input_ids, past_key_values_length=0, position_ids=None):
        if input_ids.shape[1] == 1 and position_ids is not None:  # a step with a cache
            position_ids = position_ids + 1
        return original(input_ids, past_key_values_length, position_ids)

    embedding.forward = forward


def head_wrong_in_the_last_layer(model):
    attention = model.model.encoder.layers[-1].self_attn
    attention.v_proj.weight.data[-attention.head_dim :].mul_(-1)


def rows_swapped(model):
    def swap(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.flip(0)
        return output

    model.model.encoder.register_forward_hook(swap)


def even_rows_wrong(model):
    def spoil(module, inputs, output):
        if len(output.last_hidden_state) > 1:
            output.last_hidden_state[::2] = output.last_hidden_state[::2].flip(1)
        return output

    model.model.encoder.register_forward_hook(spoil)


def nan_in_batches(model):
    def spoil(module, inputs, output):
        return output * float("nan") if len(output) == 2 else output

    model.proj_out.register_forward_hook(spoil)


def wrong_in_batches_of_16(model):
    def spoil(module, inputs, output):
        return output * 1.5 if len(output) == 16 else output

    model.model.encoder.layers[0].fc2.register_forward_hook(spoil)


def second_window_wrong(model):
    windows = []

    def spoil(module, inputs, output):
        windows.append(None)
        return output * 1.02 if len(windows) % 2 == 0 else output

    model.model.encoder.layers[0].fc2.register_forward_hook(spoil)


def cache_wrong_beyond_256(model):
    import torch_npu

    torch_npu.FAULT = "cat"


def stale_after_an_error(model):
    """An operation fails in the middle of the candidate's runs, and the task queue says it once."""
    import torch_npu

    torch_npu.FAULT, torch_npu.AFTER = "async", torch_npu.STATS["products"] + 500


def stale_without_an_error(model):
    """The same, where something has swallowed the error."""
    import torch_npu

    torch_npu.QUEUE["dead"] = True


def stale_results(model):
    before = []

    def previous(module, inputs, output):
        now = output.last_hidden_state
        if before and before[-1].dtype is now.dtype:
            output.last_hidden_state = before[-1]
        before.append(now)
        return output

    model.model.encoder.register_forward_hook(previous)


def reordered_reductions(model):
    import torch

    def backwards(module, inputs, output):  # the sums run from the last product to the first
        return torch.nn.functional.linear(inputs[0].flip(-1), module.weight.flip(-1), module.bias)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(backwards)


def nothing(model):
    pass


def tanh_gelu_of_the_device(model):
    """torch_npu's own F.gelu, where its exact one cannot be put in place."""
    import torch
    import torch_npu

    torch_npu.npu_gelu = lambda x, *, approximate: torch.ops.aten.gelu.default(x)


def hf32_that_stays_on(model):
    import torch_npu

    torch_npu.FAULT = "hf32-stuck"


def both_of_them(model):
    tanh_gelu_of_the_device(model)
    hf32_that_stays_on(model)


def kernels_with_an_error_of_1e_5(model):
    """LayerNorm and attention, as far from exact as the device's documentation allows."""
    import torch_npu

    torch_npu.KERNEL_ERROR = 1e-5


FAULTS = [wrong_weight, head_zeroed, head_wrong_in_the_last_layer, bias_dropped, layer_norm_epsilon,
          layer_norm_epsilon_small, float16_noise, nan_in_one_logit, nan_in_batches, encoder_off_by_one_frame,
          cache_off_by_one, cache_wrong_beyond_256, "wrong_suppress_list", rows_swapped, even_rows_wrong,
          wrong_in_batches_of_16, second_window_wrong, stale_results, stale_after_an_error,
          stale_without_an_error]  # fmt: skip
HEALTHY = [nothing, reordered_reductions, tanh_gelu_of_the_device, hf32_that_stays_on, both_of_them,
           kernels_with_an_error_of_1e_5]  # fmt: skip
FIGURES = ("relative", "encoder", "repeat", "cache", "float32_relative", "float32_encoder")


MEASURED = {}  # what measure_reference gave, and what it noted in the clip


@functools.cache
def load_reference(name: str) -> common.Recognizer:
    import torch

    return common.load_model(name, torch.device("cpu"), torch.float32)


def measure_reference(recognizer, clip, features, max_new_tokens, measure=eval_accuracy.measure_reference):
    """What the reference, which has no faults, computes: once for all of them."""
    key = clip.name, max_new_tokens, eval_accuracy.common.MAX_NEW_TOKENS
    if key not in MEASURED:
        MEASURED[key] = measure(recognizer, clip, features, max_new_tokens), copy.deepcopy(vars(clip))
    arrays, of_clip = MEASURED[key]
    vars(clip).update(copy.deepcopy(of_clip))
    return arrays


def evaluate(fault, dtype: str, max_new_tokens: int, arguments: list[str]) -> dict:
    """Run eval_accuracy.py with a fault in the candidate; its clip to the last position has max_new_tokens."""
    import torch_npu

    load_model, device = common.load_model, (torch_npu.FAULT, torch_npu.KERNEL_ERROR, torch_npu.npu_gelu)
    eval_accuracy.measure_reference = measure_reference

    def load_faulty(name, device, dtype):
        if device.type == "cpu":
            return load_reference(name)
        recognizer = load_model(name, device, dtype)
        if fault == "wrong_suppress_list":
            return dataclasses.replace(recognizer, bias=recognizer.bias.roll(1, 1))
        fault(recognizer.model)
        return recognizer

    out, err = io.StringIO(), io.StringIO()
    with tempfile.NamedTemporaryFile() as file, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        changed = {"load_model": load_faulty, "MAX_NEW_TOKENS": max_new_tokens}
        eval_accuracy.common = types.SimpleNamespace(**vars(common) | changed)
        status = eval_accuracy.main(["--device", "npu", "--dtype", dtype, "--json", file.name, *arguments])
        report = {"clips": [], "error": err.getvalue()}
        if status < 2:
            report = json.loads(Path(file.name).read_text(encoding="utf-8"))
    eval_accuracy.common = common
    torch_npu.FAULT, torch_npu.KERNEL_ERROR, torch_npu.npu_gelu = device
    torch_npu.QUEUE.update(error=None, dead=False)
    worst = {n: [c["overall"][n] for c in report["clips"]] for n in FIGURES}  # null: NaN or infinity
    figures = {n: None if None in values else max(values, default=None) for n, values in worst.items()}
    name = fault if isinstance(fault, str) else fault.__name__
    reasons = [reason for clip in report["clips"] for reason in clip["faults"]] + [report.get("error", "")]
    notes = [note for clip in report["clips"] for note in clip["notes"]]
    return {"fault": name, "dtype": dtype, "status": status, **figures, "reasons": reasons, "notes": notes}


def row(result: dict) -> str:
    """A row of the table: what was seeded, the figures, the verdict and what showed it."""
    figures = ["NaN" if result[n] is None else f"{result[n]:.2g}" for n in FIGURES]
    named = dict.fromkeys(re.sub(r" \S+ is not below.*| from token.*|:0? .*", "", r) for r in result["reasons"] if r)
    said = ", ".join(named) or "; ".join(dict.fromkeys(re.sub(":.*", "", note) for note in result["notes"]))
    verdict = ["PASS", "FAIL", "not evaluated"][result["status"]]
    return f"| {result['fault'].replace('_', ' ')}, {result['dtype']} | {' | '.join(figures)} | {verdict} | {said} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="those with this in their names")
    parser.add_argument("--short", nargs="*", default=[], metavar="NAME",
                        help="those that decode to position 64, not to the last: a quarter of the time")  # fmt: skip
    args, arguments = parser.parse_known_args()
    runs = [(fault, "float16") for fault in FAULTS] + [(h, d) for h in HEALTHY for d in ("float16", "bfloat16")]
    rows = []
    for fault, dtype in [*runs, (nothing, "float32")]:
        if any(text in str(fault) for text in args.only):
            short = (fault if isinstance(fault, str) else fault.__name__) in args.short
            limit = 64 - common.PROMPT_LENGTH if short else common.MAX_NEW_TOKENS
            result = evaluate(fault, dtype, limit, [*arguments, *(["--max-new-tokens", str(limit)] if short else [])])
            rows.append(row(result))
            print(json.dumps(result, ensure_ascii=False), flush=True)
    print("| seeded | relative | encoder | between runs | decoding | float32 | encoder in float32 | verdict | named |")
    print("|---|---|---|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
