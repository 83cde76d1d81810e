"""Seed faults into the device of eval_accuracy.py, one at a time, on the simulated NPU, and see what the verdict names.

    PYTHONPATH=tests/fake_npu python3 tests/stress/seed_faults.py --audio a.wav b.wav
    PYTHONPATH=tests/fake_npu python3 tests/stress/seed_faults.py --model FOLDER --only nothing head --short

Prints a JSON line for each: the fault, the exit status, the worst figures with their limits, and what was named, then a
Markdown table.
"""
import argparse
import contextlib
import dataclasses
import functools
import io
import json
import re
import sys
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


def first_row_wrong(model):
    def spoil(module, inputs, output):
        if len(output.last_hidden_state) > 1:
            output.last_hidden_state[:1] = output.last_hidden_state[:1].flip(1)
        return output

    model.model.encoder.register_forward_hook(spoil)


def nan_in_batches(model):
    def spoil(module, inputs, output):
        return output * float("nan") if len(output) > 1 else output

    model.proj_out.register_forward_hook(spoil)


def wrong_in_batches_of_7(model, size=7):
    def spoil(module, inputs, output):
        return output * 1.5 if len(output) == size else output

    model.model.encoder.layers[0].fc2.register_forward_hook(spoil)


def wrong_in_full_batches(model):
    wrong_in_batches_of_7(model, eval_accuracy.common.default_batch_size(model.device))


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
        if before and before[-1].dtype is now.dtype and len(now) == 1:  # torch itself sees other wrong sizes
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
    import torch

    torch.npu.matmul.allow_hf32 = torch.npu.conv.allow_hf32 = True  # after eval_accuracy.py has set it


def kernels_with_an_error_of_1e_5(model):
    """LayerNorm and attention, as far from exact as the device's documentation allows."""
    import torch_npu

    torch_npu.KERNEL_ERROR = 1e-5


def another_make(model):
    """Attention rounds its scores and its weights to the dtype, and the sums of the others run backwards."""
    model.set_attn_implementation("eager")
    reordered_reductions(model)


FAULTS = [wrong_weight, head_zeroed, head_wrong_in_the_last_layer, bias_dropped, layer_norm_epsilon,
          layer_norm_epsilon_small, float16_noise, nan_in_one_logit, nan_in_batches, encoder_off_by_one_frame,
          cache_off_by_one, cache_wrong_beyond_256, "wrong_suppress_list", rows_swapped, even_rows_wrong,
          first_row_wrong, wrong_in_batches_of_7, wrong_in_full_batches, second_window_wrong, stale_results,
          stale_after_an_error, stale_without_an_error]  # fmt: skip
OTHER_FORMULAS = [tanh_gelu_of_the_device, hf32_that_stays_on]
HEALTHY = [nothing, reordered_reductions, kernels_with_an_error_of_1e_5, another_make]
FIGURES = ("relative error", "encoder error", "logits error", "encoder error in float32", "logits error in float32")
REFERENCES = {}


@functools.cache
def load_reference(name: str) -> common.Recognizer:
    import torch

    return common.load_model(name, torch.device("cpu"), torch.float32)


def shared_reference(recognizer, features, dtype, max_new_tokens, make=eval_accuracy.Reference):
    """What the reference, which has no faults, computes of a clip: once for all of them."""
    key = features.numpy().tobytes(), dtype, max_new_tokens
    if key not in REFERENCES:
        REFERENCES[key] = make(recognizer, features, dtype, max_new_tokens)
    for token_ids in list(REFERENCES[key].known)[3:]:  # other texts, which faults have made, take much memory
        del REFERENCES[key].known[token_ids]
    return REFERENCES[key]


def evaluate(fault, dtype: str, short: bool, arguments: list[str]) -> dict:
    """Run eval_accuracy.py with a fault in the device; short: in batches of at most 4 and to position 64, unless the
    fault's name has a larger number."""
    import torch_npu

    load_model, to_end = common.load_model, eval_accuracy.TO_END
    device = torch_npu.FAULT, torch_npu.KERNEL_ERROR, torch_npu.npu_gelu

    def load_faulty(name, device, dtype):
        if device.type == "cpu":
            return load_reference(name)
        recognizer = load_model(name, device, dtype)
        if fault == "wrong_suppress_list":
            return dataclasses.replace(recognizer, token_mask=recognizer.token_mask.roll(1, 1))
        fault(recognizer.model)
        return recognizer

    changed = {"load_model": load_faulty}
    name = fault if isinstance(fault, str) else fault.__name__
    if short and not name.endswith("_7"):
        changed["default_batch_size"] = lambda device: 4
    if short and not name.endswith("_256"):
        changed["MAX_NEW_TOKENS"], eval_accuracy.TO_END = 60, "to position 64"
    eval_accuracy.Reference, eval_accuracy.common = shared_reference, types.SimpleNamespace(**vars(common) | changed)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = eval_accuracy.main(["--device", "npu", "--dtype", dtype, "--json", *arguments])
    eval_accuracy.common, eval_accuracy.TO_END = common, to_end
    torch_npu.FAULT, torch_npu.KERNEL_ERROR, torch_npu.npu_gelu = device
    torch_npu.QUEUE.update(error=None, dead=False)
    report = json.loads(out.getvalue()) if status < 2 else {"clips": [], "figures": []}
    figures = {figure["name"]: (figure["value"], figure["limit"]) for figure in report["figures"]}
    reasons = [reason for clip in report["clips"] for reason in clip["faults"]] or err.getvalue().splitlines()[-1:]
    notes = [note for clip in report["clips"] for note in clip["notes"]]
    return {"fault": name, "dtype": dtype, "status": status, "figures": figures,
            "reasons": reasons if status else [], "notes": notes}  # fmt: skip


def named(reasons: list[str]) -> str:
    """What the faults name, in a few words: how the clip was decoded, and which figures showed it."""
    by_run = {}
    for reason in reasons:
        figure = re.match(r"(text|relative|encoder|logits) ", reason)
        how = re.search(r"\((in float32|in a batch of \d+|alone|to position \d+)\)$", reason)
        name = figure[1] if figure else re.split(r" \(|[.] ", reason)[0]
        by_run.setdefault(how[1] if how else "", []).append(name)
    return "; ".join(f"{how}: {', '.join(dict.fromkeys(names))}".removeprefix(": ") for how, names in by_run.items())


def row(result: dict) -> str:
    """A row of the table: what was seeded, the figures and their limits, the verdict and what showed it."""
    cells = []
    for value, limit in (result["figures"].get(name, (None, None)) for name in FIGURES):
        cells.append("" if limit is None else f"{'NaN' if value is None else format(value, '.2g')} / {limit:.2g}")
    verdict = ["PASS", "FAIL", "not evaluated"][result["status"]]
    seeded = f"{result['fault'].replace('_', ' ')}, {result['dtype']}"
    return f"| {seeded} | {' | '.join(cells)} | {verdict} | {named(result['reasons'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="those with this in their names")
    parser.add_argument("--short", action="store_true", help="batches of at most 4 and position 64 for the last, "
                        "except where the fault is of 7 rows or beyond position 256")  # fmt: skip
    args, arguments = parser.parse_known_args()
    runs = [(fault, "float16") for fault in (*FAULTS, *OTHER_FORMULAS)]
    runs += [(device, dtype) for device in HEALTHY for dtype in ("float16", "bfloat16")]
    rows = []
    for fault, dtype in [*runs, (nothing, "float32")]:
        if any(text in str(fault) for text in args.only):
            result = evaluate(fault, dtype, args.short, arguments)
            rows.append(row(result))
            print(json.dumps(result, ensure_ascii=False), flush=True)
    print(f"| seeded | {' | '.join(FIGURES)} | verdict | named |", "|---" * (len(FIGURES) + 3) + "|", *rows, sep="\n")


if __name__ == "__main__":
    main()
