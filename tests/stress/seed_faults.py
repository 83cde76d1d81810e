"""Seed faults into the candidate of eval_accuracy.py, one at a time, on the simulated NPU.

    PYTHONPATH=tests/fake_npu python3 tests/stress/seed_faults.py --audio a.wav b.wav

Prints a JSON line for each: the fault, the exit status, the worst figures, and the faults that were named.
"""
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS.parent))

import common  # noqa: E402
import eval_accuracy  # noqa: E402


def layers(model):
    return [*model.model.encoder.layers, *model.model.decoder.layers]


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


def gelu_tanh(model):
    import torch

    for layer in layers(model):
        layer.activation_fn = torch.nn.GELU(approximate="tanh")


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


FAULTS = [wrong_weight, head_zeroed, bias_dropped, layer_norm_epsilon, layer_norm_epsilon_small, gelu_tanh,
          float16_noise, nan_in_one_logit, encoder_off_by_one_frame, cache_off_by_one, "wrong_suppress_list",
          stale_results]  # fmt: skip
CLEAN = [(nothing, "float16"), (nothing, "bfloat16"), (nothing, "float32"), (reordered_reductions, "float16"),
         (reordered_reductions, "float32")]  # fmt: skip


def evaluate(fault, dtype: str, arguments: list[str]) -> dict:
    """Run eval_accuracy.py with a fault in the candidate."""
    move, seeded = common.move, []

    def faulty_move(recognizer, device, dtype):
        recognizer = move(recognizer, device, dtype)
        if device.type == "npu" and fault == "wrong_suppress_list":
            recognizer = dataclasses.replace(recognizer, bias=recognizer.bias.roll(1, 1))
        elif device.type == "npu" and not seeded:
            fault(recognizer.model)
            seeded.append(fault)
        return recognizer

    common.move = faulty_move
    out, err = io.StringIO(), io.StringIO()
    with tempfile.NamedTemporaryFile() as file, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = eval_accuracy.main(["--device", "npu", "--dtype", dtype, "--json", file.name, *arguments])
        report = {"clips": [], "error": err.getvalue()}
        if status < 2:
            report = json.loads(Path(file.name).read_text(encoding="utf-8"))
    common.move = move
    names = ("relative", "encoder", "repeat", "float32_relative", "float32_encoder")
    worst = {n: [c["overall"][n] for c in report["clips"]] for n in names}  # null: NaN or infinity
    figures = {n: None if None in values else max(values, default=None) for n, values in worst.items()}
    name = fault if isinstance(fault, str) else fault.__name__
    reasons = [reason for clip in report["clips"] for reason in clip["faults"]] + [report.get("error", "")]
    return {"fault": name, "dtype": dtype, "status": status, **figures, "reasons": reasons}


def main() -> None:
    for fault, dtype in [*((fault, "float16") for fault in FAULTS), *CLEAN]:
        print(json.dumps(evaluate(fault, dtype, sys.argv[1:]), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
