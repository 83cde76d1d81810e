"""A simulated torch_npu: with this folder's parent on PYTHONPATH, `import torch_npu` gives a device named npu.

Its tensors hold a CPU tensor each and compute with it, but as an Ascend910B computes and fails according to the source
of torch_npu 2.9.0 (Ascend/pytorch 12d689a) and its op-plugin (7213914):

    F.gelu          the tanh form whatever is asked for: op_plugin_functions.yaml, gelu: aclnnGelu(self, out)
    npu_gelu        exact: aclnnGeluV2; use_compatible_impl, which makes F.gelu exact, only from 2.9.0.post1 on
    convolution     float32 in HF32 (11 bits of mantissa) while conv.allow_hf32, which is True at first
    mm, addmm, bmm  the same while matmul.allow_hf32, which is False at first
    halves          products are added in float32 and rounded once: the Cube's L0C is float32, and Fixpipe writes it out
                    with quantPre F322F16 or F322BF16 (docs/api/context/Fixpipe.md of cannmirror/asc-devkit)
    allow_hf32      the value is stored, then AclSetCompileopt may fail: core/npu/register/OptionRegister.cpp
    copies          from the host wait for the stream unless they are non_blocking: CopyKernelOpApi.cpp
    task queue      an asynchronous failure is raised once; after that operations are dropped and copies back give what
                    the memory held before: core/npu/NPUQueue.cpp, Enqueue and MakeSureQueueEmpty
    start           _cann_package_check raises a bare Exception: utils/npu_intercept.py; aclInit runs at the first use
                    of a device: core/npu/sys_ctrl/npu_sys_ctrl.cpp
    out of memory   NPUCachingAllocator.cpp, NPUWorkspaceAllocator.cpp, NPUErrorCodes.h, EL0004 of CANN's runtime

It checks the program around the numbers too: tensors of the CPU and the NPU must not meet in one operation, work is
counted, and so is what the device has not been waited for. It needs
torch.utils.backend_registration._setup_privateuseone_for_python_backend, which torch has from 2.10 on. Environment
variables tell it what to be:

    FAKE_NPU_FAULT   missing     torch_npu is not installed
                     cann        CANN is not installed or its set_env.sh was not sourced
                     driver      the driver is not mounted into the container
                     opp         CANN's set_env.sh was sourced in part
                     no-device   everything is installed but there is no NPU
                     busy        the NPU is listed but does not start
                     hf32        setting allow_hf32 fails
                     hf32-stuck  setting allow_hf32 changes nothing
                     no-gelu     there is no npu_gelu
                     lost        the NPU stops answering at a matrix product
                     stumble     one matrix product fails
                     async       one matrix product fails and its error shows at the next operation
                     cat         what is appended to a KV cache of 256 tokens or more is lost
                     swap        the second convolution gives the rows of a batch in reverse order
    FAKE_NPU_AFTER   how many matrix products go well before (0)
    FAKE_NPU_ERROR   a relative error that LayerNorm and attention make (0)
    FAKE_NPU_COUNT   how many NPUs there are (1)
    FAKE_NPU_BYTES   the largest tensor that fits the NPU's memory (no limit)
    FAKE_NPU_VERSION (2.9.0)
"""
import os
import types

FAULT = os.environ.get("FAKE_NPU_FAULT", "")
COUNT = 0 if FAULT == "no-device" else int(os.environ.get("FAKE_NPU_COUNT", "1"))
AFTER = int(os.environ.get("FAKE_NPU_AFTER", "0"))
MAX_BYTES = float(os.environ.get("FAKE_NPU_BYTES", "inf"))
KERNEL_ERROR = float(os.environ.get("FAKE_NPU_ERROR", "0"))
OOM = "NPU out of memory. Tried to allocate 16.00 MiB (NPU 0; 29.50 GiB total capacity; 27.10 GiB already allocated)"
__version__ = os.environ.get("FAKE_NPU_VERSION", "2.9.0")
if FAULT == "missing":
    raise ModuleNotFoundError("No module named 'torch_npu'", name="torch_npu")
if FAULT in ("cann", "driver"):
    library = {"cann": "libhccl.so", "driver": "libascend_hal.so"}[FAULT]
    raise ImportError(f"{library}: cannot open shared object file: No such file or directory", name="_C")
if FAULT == "opp":
    raise Exception("ASCEND_OPP_PATH environment variable is not set. Please check whether the opp package has been "
                    "installed. If exist, please run 'source set_env.sh' in the CANN installation path.")  # fmt: skip

import torch  # noqa: E402
from torch.utils.backend_registration import (  # noqa: E402
    _DummyDeviceGuard,
    _setup_privateuseone_for_python_backend,
)

# launches: operations; syncs: times the host waited; pending: launches since it last waited
STATS = {"launches": 0, "syncs": 0, "pending": 0, "to_device": 0, "to_host": 0, "products": 0}
QUEUE = {"error": None, "dead": False, "memory": {}}  # what it will raise; whether it drops work; what results replaced
VIEWS = {"view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze",
         "squeeze", "detach", "alias", "as_strided", "split", "unbind", "_reshape_alias"}  # fmt: skip


def waited() -> None:
    """The host has waited for the device."""
    raise_once()
    STATS["syncs"] += 1
    STATS["pending"] = 0


def raise_once() -> None:
    """What the task queue does after an asynchronous failure: it raises, and from then on it drops all work."""
    if QUEUE["error"]:
        error, QUEUE["error"], QUEUE["dead"] = QUEUE["error"], None, True
        raise RuntimeError(error)


def hf32(x):
    """float32 rounded to 11 bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + (1 << 11)) & ~((1 << 12) - 1)).view(torch.float32)


def widen(value):
    """A tensor of halves in float32."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compute(func, name, args, kwargs):
    """The result of an operation as the device's kernel gives it."""
    if name == "gelu" and not torch_npu_module.compatible:
        return func(*args, **kwargs | {"approximate": "tanh"})
    cubes = {"convolution": torch_npu_module.conv, "mm": torch_npu_module.matmul, "bmm": torch_npu_module.matmul,
             "addmm": torch_npu_module.matmul}  # fmt: skip
    if name in cubes and cubes[name].rounds and args[0].dtype == torch.float32:
        factors = args[1:3] if name == "addmm" else args[:2]
        first = int(name == "addmm")
        args = (*args[:first], *map(hf32, factors), *args[first + 2 :])
    half = args[0].dtype if (name in cubes or name == "scaled_dot_product_attention") else None
    if half in (torch.float16, torch.bfloat16):
        args, kwargs = each(widen, args), {key: widen(value) for key, value in kwargs.items()}
    output = func(*args, **kwargs)
    output = output if half is None else output.to(half)
    if FAULT == "swap" and name == "convolution" and args[3] == [2]:
        output = output.flip(0)
    if FAULT == "cat" and name == "cat" and output.dim() == 4 and args[0][0].dim() == 4 and args[0][0].shape[2] >= 256:
        output[:, :, 256:] = 0
    if KERNEL_ERROR and name in ("native_layer_norm", "layer_norm", "scaled_dot_product_attention"):
        first, *rest = output if isinstance(output, tuple) else (output,)
        error = KERNEL_ERROR * torch.sin(1e5 * first.float())  # the same for the same values, as a kernel's is
        first = (first.float() * (1 + error)).to(first.dtype)
        output = (first, *rest) if isinstance(output, tuple) else first
    return output


class NpuTensor(torch.Tensor):
    """A tensor on a simulated NPU: a wrapper around a CPU tensor, `inner`."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int):
        if inner.nbytes > MAX_BYTES:
            raise RuntimeError(OOM)
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


def each(function, value):
    """A value with the function done to what is in its lists and tuples; torch's tree_map takes most of the time."""
    if type(value) in (list, tuple):
        return type(value)([each(function, item) for item in value])
    return function(value)


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
    tensors = []
    each(lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None, (*args, *kwargs.values()))
    ours = [tensor for tensor in tensors if isinstance(tensor, NpuTensor)]
    copies = name in ("_to_copy", "copy_", "_copy_from")
    if ours and not copies and any(t.dim() > 0 and not isinstance(t, NpuTensor) for t in tensors):
        raise RuntimeError(
            "Expected all tensors to be on the same device. Expected NPU tensor, please check whether the input "
            f"tensor device is correct. ({name}) ERR01002 OPS invalid type"
        )
    if len({tensor.device for tensor in ours}) > 1 and not copies:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found several NPUs ({name})")
    if ours or kwargs.get("device") is not None:
        raise_once()
    if name in ("mm", "addmm", "bmm"):
        STATS["products"] += 1
        n_late = STATS["products"] - AFTER
        if (FAULT == "lost" and n_late > 0) or (FAULT == "stumble" and n_late == 1):
            raise RuntimeError("NPU function error: aclrtSynchronizeStream, error code is 507018\n[ERROR] task abort")
        if FAULT == "async" and n_late == 1:
            QUEUE["error"] = (f"The Inner error is reported as above. The process exits for this inner error, and the "
                              f"current working operator name is {name}.\nSince the operator is called asynchronously")
    device = kwargs.get("device")
    target = torch.device(device) if device is not None else (ours[0].device if ours else None)
    STATS["launches"] += name not in VIEWS
    STATS["pending"] += name not in VIEWS
    inner_kwargs = {key: each(unwrap, value) for key, value in kwargs.items()}
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    output = compute(func, name, each(unwrap, tuple(args)), inner_kwargs)
    if QUEUE["dead"] and isinstance(output, torch.Tensor) and name not in VIEWS:
        output = QUEUE["memory"].get((output.shape, output.dtype), torch.zeros_like(output)).clone()
    elif isinstance(output, torch.Tensor):
        QUEUE["memory"][output.shape, output.dtype] = output
    if name == "copy_":
        to_device, from_device = isinstance(args[0], NpuTensor), isinstance(args[1], NpuTensor)
        STATS["to_device"] += to_device and not from_device
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if to_device and not from_device and blocking and args[0].numel():  # an empty copy returns at once
            waited()
        if from_device and not to_device:
            STATS["to_host"] += 1
            waited()
        return args[0]
    if name == "_to_copy" and not ours and not kwargs.get("non_blocking") and output.numel():
        waited()
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
        return each(wrap, output)


class Cube:
    """torch.npu.matmul and torch.npu.conv."""

    def __init__(self, allowed: bool):
        self.allowed = allowed

    @property
    def rounds(self) -> bool:
        return self.allowed or (FAULT == "hf32-stuck" and self is torch_npu_module.conv)

    @property
    def allow_hf32(self) -> bool:
        return self.allowed

    @allow_hf32.setter
    def allow_hf32(self, value: bool) -> None:
        self.allowed = value
        if FAULT == "hf32":
            raise RuntimeError(
                "AclSetCompileopt:torch_npu/csrc/core/npu/register/OptionRegister.cpp:24 NPU function error: "
                "AclSetCompileopt(aclCompileOpt::ACL_ALLOW_HF32, allow_hf32.c_str()), error code is 500001\n[ERROR] "
                "2026-01-01-00:00:00 (PID:7, Device:0, RankID:-1) ERR00100 PTA call acl api failed\n[Error]: The "
                "internal ACL of the system is incorrect."
            )


class NpuModule(types.ModuleType):
    """What torch_npu adds to torch as torch.npu."""

    def __init__(self):
        super().__init__("torch.npu")
        self.index = 0
        self.config = types.SimpleNamespace(allow_internal_format=True)
        self.matmul, self.conv, self.compatible = Cube(False), Cube(True), False
        if __version__ != "2.9.0":
            self.use_compatible_impl = lambda is_enable: setattr(self, "compatible", is_enable)

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
        if device is not None and not 0 <= torch.device("npu", device).index < COUNT:
            raise AssertionError("Invalid device id")
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


if FAULT != "no-gelu":

    def npu_gelu(input, *, approximate="none"):
        """aclnnGeluV2."""
        if approximate not in ("none", "tanh"):
            raise RuntimeError("NPU error, approximate argument must be either none or tanh.")
        raise_once()
        STATS["launches"] += 1
        STATS["pending"] += 1
        output = torch.ops.aten.gelu.default(input.inner, approximate=approximate)
        return NpuTensor(output, input.device.index or 0)


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
