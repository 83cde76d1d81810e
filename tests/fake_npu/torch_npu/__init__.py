"""A simulated torch_npu: with this folder's parent on PYTHONPATH, `import torch_npu` gives a device named npu.

Its tensors hold a CPU tensor each and compute with it, so the numbers are the CPU's. What it checks is the program
around them: tensors of the CPU and the NPU must not meet in one operation, work is counted, and so is what the
device has not been waited for. It needs torch.utils.backend_registration._setup_privateuseone_for_python_backend,
which torch has from 2.10 on. Environment variables make it fail as the real one does:

    FAKE_NPU_FAULT   missing     torch_npu is not installed
                     cann        CANN is not installed or its set_env.sh was not sourced
                     driver      the driver is not mounted into the container
                     no-device   everything is installed but there is no NPU
                     busy        the NPU is listed but does not start
                     lost        the NPU stops answering at a matrix product
                     stumble     one matrix product fails
    FAKE_NPU_AFTER   how many matrix products go well before (0)
    FAKE_NPU_COUNT   how many NPUs there are (1)
    FAKE_NPU_BYTES   the largest tensor that fits the NPU's memory (no limit)

The texts of the failures are those of torch_npu 2.9 and 2.13.
"""
import os
import types

FAULT = os.environ.get("FAKE_NPU_FAULT", "")
COUNT = 0 if FAULT == "no-device" else int(os.environ.get("FAKE_NPU_COUNT", "1"))
AFTER = int(os.environ.get("FAKE_NPU_AFTER", "0"))
MAX_BYTES = float(os.environ.get("FAKE_NPU_BYTES", "inf"))
if FAULT == "missing":
    raise ModuleNotFoundError("No module named 'torch_npu'", name="torch_npu")
if FAULT in ("cann", "driver"):
    library = {"cann": "libhccl.so", "driver": "libascend_hal.so"}[FAULT]
    raise ImportError(f"{library}: cannot open shared object file: No such file or directory", name="_C")

import torch  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map  # noqa: E402
from torch.utils.backend_registration import (  # noqa: E402
    _DummyDeviceGuard,
    _setup_privateuseone_for_python_backend,
)

# launches: operations; syncs: times the host waited; pending: launches since it last waited
STATS = {"launches": 0, "syncs": 0, "pending": 0, "to_device": 0, "to_host": 0, "products": 0}
VIEWS = {"view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze",
         "squeeze", "detach", "alias", "as_strided", "split", "unbind", "_reshape_alias"}  # fmt: skip


def waited() -> None:
    """The host has waited for the device."""
    STATS["syncs"] += 1
    STATS["pending"] = 0


class NpuTensor(torch.Tensor):
    """A tensor on a simulated NPU: a wrapper around a CPU tensor, `inner`."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int):
        if inner.nbytes > MAX_BYTES:
            raise RuntimeError(f"NPU out of memory. Tried to allocate {inner.nbytes / 2**20:.2f} MiB (NPU {index})")
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("npu", index), requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor, index: int):
        self.inner = inner.detach()

    def __repr__(self, *args, **kwargs):
        return f"{repr(self.inner)[:-1]}, device='{self.device}')"

    def tolist(self):
        STATS["to_host"] += 1
        waited()
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the "
                        "tensor to host memory first.")  # fmt: skip

    @classmethod
    def __torch_dispatch__(cls, func, types_, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def unwrap(value):
    return value.inner if isinstance(value, NpuTensor) else value


def dispatch(func, args, kwargs):
    """Run one operation on the CPU tensors inside, and wrap its results."""
    # In inference mode composite operations arrive whole; a real device sees their parts.
    name = func._schema.name.removeprefix("aten::")
    if name == "dropout":  # not in training: nothing to do
        return args[0]
    if name != "scaled_dot_product_attention":  # one fused kernel, aclnnFlashAttentionScore
        parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, NpuTensor)]
    copies = name in ("_to_copy", "copy_", "_copy_from")
    if ours and not copies and any(t.dim() > 0 and not isinstance(t, NpuTensor) for t in tensors):
        raise RuntimeError(
            "Expected all tensors to be on the same device. Expected NPU tensor, please check whether the input "
            f"tensor device is correct. ({name}) ERR01002 OPS invalid type"
        )
    if len({tensor.device for tensor in ours}) > 1 and not copies:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found several NPUs ({name})")
    if name in ("mm", "addmm", "bmm"):
        STATS["products"] += 1
        n_late = STATS["products"] - AFTER
        if (FAULT == "lost" and n_late > 0) or (FAULT == "stumble" and n_late == 1):
            raise RuntimeError("NPU function error: aclrtSynchronizeStream, error code is 507018\n[ERROR] task abort")
    device = kwargs.get("device")
    target = torch.device(device) if device is not None else (ours[0].device if ours else None)
    STATS["launches"] += name not in VIEWS
    STATS["pending"] += name not in VIEWS
    inner_kwargs = tree_map(unwrap, kwargs)
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    output = func(*tree_map(unwrap, args), **inner_kwargs)
    if name == "copy_":
        to_device, from_device = isinstance(args[0], NpuTensor), isinstance(args[1], NpuTensor)
        STATS["to_device"] += to_device and not from_device
        if from_device and not to_device:
            STATS["to_host"] += 1
            waited()
        return args[0]
    if name == "_local_scalar_dense" or (name == "_to_copy" and target.type == "cpu"):
        STATS["to_host"] += 1
        waited()
        return output
    same = {id(tensor.inner): tensor for tensor in ours}  # an in-place operation returns its argument

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        return same.get(id(value)) if id(value) in same else NpuTensor(value, target.index or 0)

    # In inference mode a view of a tensor from outside it is no inference tensor either.
    with torch.inference_mode(torch.is_inference_mode_enabled() and not (name in VIEWS and not ours[0].is_inference())):
        return tree_map(wrap, output)


class NpuModule(types.ModuleType):
    """What torch_npu adds to torch as torch.npu."""

    def __init__(self):
        super().__init__("torch.npu")
        self.index = 0
        self.config = types.SimpleNamespace(allow_internal_format=True)
        self.matmul = types.SimpleNamespace(allow_hf32=False)
        self.conv = types.SimpleNamespace(allow_hf32=True)

    def is_available(self):
        return COUNT > 0

    def device_count(self):
        return COUNT

    def current_device(self):
        return self.index

    def set_device(self, device):
        index = device if isinstance(device, int) else (torch.device(device).index or 0)
        if index >= COUNT:
            raise RuntimeError("NPU function error: c10_npu::SetDevice(device), error code is 107001\nInvalid device")
        if FAULT == "busy":
            raise RuntimeError(
                "Initialize:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:217 NPU function error: aclInit, error "
                "code is 507008\n[ERROR] ERR00100 PTA call acl api failed"
            )
        self.index = index

    def set_compile_mode(self, jit_compile):
        pass

    def synchronize(self, device=None):
        waited()

    def get_device_name(self, device=None):
        return "Ascend910B4 (simulated)"

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def manual_seed(self, seed):
        pass

    manual_seed_all = manual_seed

    def empty_cache(self):
        if FAULT == "lost" and STATS["products"] > AFTER:
            raise RuntimeError("NPU function error: aclrtSynchronizeDevice, error code is 507018")

    def memory_allocated(self, device=None):
        return 0

    max_memory_allocated = memory_allocated

    def reset_peak_memory_stats(self, device=None):
        pass

    def is_bf16_supported(self):
        return True

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


def npu_fusion_attention(*args, **kwargs):
    """transformers imports the name; sdpa attention does not call it."""
    raise NotImplementedError


class DeviceGuard(_DummyDeviceGuard):
    def device_count(self):
        return COUNT


def creates_tensor(operation) -> bool:
    """It makes a tensor on a given device out of no other tensor, as torch.zeros does."""
    schema = operation._schema
    if any("Tensor" in str(argument.type) for argument in schema.arguments):
        return False
    named = any(argument.name == "device" for argument in schema.arguments)
    odd = any(part in schema.name for part in ("sparse", "quantized", "cudnn", "nested", "from_file", "dep_token"))
    return named and not odd and [str(result.type) for result in schema.returns] == ["Tensor"]


def register() -> torch.library.Library:
    """Make the device known to torch; the registrations last as long as the returned library."""
    # Without this, model.to(dtype) on the device keeps the old tensors inside.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _setup_privateuseone_for_python_backend("npu", backend_module=torch_npu_module, device_guard=DeviceGuard())
    library = torch.library.Library("aten", "IMPL")
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        packet, _, overload = name.partition(".")
        if namespace != "aten" or not hasattr(torch.ops.aten, packet):
            continue
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
        if operation is None or not creates_tensor(operation):
            continue

        def kernel(*args, operation=operation, **kwargs):
            device = kwargs.get("device") or torch.device("npu", torch_npu_module.index)
            return dispatch(operation, args, {**kwargs, "device": device})

        library.impl(name, kernel, "PrivateUse1")

    def copy_from(source, destination, non_blocking=False):
        return dispatch(torch.ops.aten.copy_.default, (destination, source, non_blocking), {})

    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


torch_npu_module = NpuModule()
_library = register()
npu = torch_npu_module
