"""The encoder against a plain product of two matrices, which is what a device can do at best.

    python3 tests/benchmarks/encoder.py --model MODEL --device cpu
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import common
import torch
from torch.utils.flop_counter import FlopCounterMode

RUNS = 5


def fastest(device: torch.device, work) -> float:
    """The least seconds of RUNS calls, after one that does not count."""
    seconds = []
    for _ in range(RUNS + 1):
        torch.get_device_module(device).synchronize(device)
        started_s = time.perf_counter()
        work()
        torch.get_device_module(device).synchronize(device)
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[1:])


@torch.inference_mode()
def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_options(parser)
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048, 4096], metavar="N",
                        help="rows and columns of the matrices (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    device = common.select_device(args.device)
    dtype = common.select_dtype(args.dtype, device)
    exact = common.load_model(args.model, torch.device("cpu"), torch.float32).model
    features = torch.zeros(1, exact.config.num_mel_bins, 2 * exact.config.max_source_positions)
    with FlopCounterMode(display=False) as counter:
        exact.model.encoder(features)
    model = common.load_model(args.model, device, dtype).model
    features = features.to(device, dtype)
    rate = counter.get_total_flops() / fastest(device, lambda: common.encode(model, features))
    products = {}
    for size in args.sizes:
        a, b = torch.randn(2, size, size).to(device, dtype)
        products[size] = 2 * size**3 / fastest(device, lambda a=a, b=b: a @ b)
    best = max(products.values())
    print(f"{device} in {common.dtype_name(dtype)}: encoder {rate / 1e9:.0f} GFLOP/s, {rate / best:.2f} of the "
          f"{best / 1e9:.0f} of a matrix product")  # fmt: skip


if __name__ == "__main__":
    main()
