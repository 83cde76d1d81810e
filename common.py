"""What the three scripts share: the device, the model, the audio, and from these the transcript.

    path -> waveform -> chunks -> input_features -> token_ids -> segments

torch, transformers and librosa take seconds to import, so the functions that need them import them: a usage error
is answered before.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from tqdm import tqdm

if TYPE_CHECKING:
    import torch
    import transformers

MODEL = "kotoba-tech/kotoba-whisper-v2.0"
CHUNK_LENGTH_S = 15  # what the model's authors use
PROMPT_LENGTH = 4  # <|startoftranscript|>, language, task, <|notimestamps|>
MAX_NEW_TOKENS = 448 - PROMPT_LENGTH  # every Whisper decoder has 448 positions
CHECK_EVERY = 8  # tokens after which decoding asks whether all rows have ended
SILENCE_DBFS = -60.0  # speech is louder, the noise of a quiet 16-bit recording is not
LOUDEST_SAMPLE = 100.0  # 40 dB above full scale: floats beyond are integers written as they are, or damage
LEVEL_WINDOW_S, LEVEL_HOP_S = 0.3, 0.01  # longer than the closure of a stop consonant or of a small tsu
SHORTEST_TAIL_S = 1.0  # Whisper invents text for a scrap of speech
COMPRESSION_RATIO_LIMIT = 2.4  # openai/whisper's; none of 14,746 true outputs of this model exceeds 2.12

CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"  # characters that end a line or steer a terminal


class SetupError(Exception):
    """The options, the device or the model cannot be used; the message is one line for the user."""


class DeviceError(SetupError):
    """What was asked of the device failed."""


class OutOfMemoryError(DeviceError):
    """It did not fit the device's memory; a smaller batch may."""


class AudioError(Exception):
    """One file cannot be transcribed; the message is one line for the user."""


@dataclass
class Segment:
    """What was said in one chunk; start and end in seconds from the beginning of the file."""

    start: float
    end: float
    text: str = ""
    compression_ratio: float = 0.0
    token_limit: bool = False  # decoding ended at the token limit: text may be missing

    @property
    def looping(self) -> bool:
        """The text repeats itself like that of a decoder caught in a loop."""
        return self.compression_ratio > COMPRESSION_RATIO_LIMIT


@dataclass
class Transcript:
    """One file: its segments in order, its length in seconds, its silent chunks, and why it failed if it did.

    taken_s is its part of the time: that of each batch is divided among the batch's chunks.
    """

    path: str
    segments: list[Segment] = field(default_factory=list)
    duration: float = 0.0
    silent: int = 0
    taken_s: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Recognizer:
    """A model on its device, its feature extractor and tokenizer, and the bias that suppress_bias describes."""

    model: transformers.WhisperForConditionalGeneration
    extractor: transformers.WhisperFeatureExtractor
    tokenizer: transformers.WhisperTokenizerFast
    bias: torch.Tensor


# --- Options ---


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: an int or a float from low to high."""

    def parse(text: str) -> float:
        """The number; raises argparse.ArgumentTypeError."""
        try:
            if low <= (value := kind(text)) <= high:
                return value
        except ValueError:
            pass
        limits = f"from {low} to {high}" if high < float("inf") else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {limits}")

    return parse


def device_name(text: str) -> str:
    """An argparse type: npu, npu:N, cuda, cuda:N or cpu."""
    if not re.fullmatch(r"cpu|(npu|cuda)(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not npu, npu:N, cpu, cuda or cuda:N")
    return text


def add_model_options(add: Callable) -> None:
    """Declare the options that all scripts have; add is a parser's add_argument."""
    add("--model", default=MODEL, help="model id on the hub, or a local folder (default: %(default)s)")
    add("--device", type=device_name, help="npu, npu:N, cpu, cuda or cuda:N (default: the NPU; where none is usable, "
        "the CPU with a warning)")  # fmt: skip
    add("--dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto",
        help="auto is float16 on an accelerator and, on a CPU, bfloat16 where the processor computes it natively "
        "(AMX or AVX512-BF16), else float32 (default: %(default)s)")  # fmt: skip


# --- Running and writing ---


def exit_status(program: str, run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a script; its exit status, after one line on stderr where the run ended early."""
    with contextlib.suppress(AttributeError):  # a StringIO in its place takes any text
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # whatever the locale and the file names
    try:
        return run(args)
    except BrokenPipeError:  # the reader of stdout, such as head, has seen enough
        return 141
    except (SetupError, OSError) as error:
        message, status = f"error: {first_line(error)}", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(one_line(f"{program}: {message}"), file=sys.stderr)
    return status


def one_line(message: str) -> str:
    """A message with escapes for the line breaks and other control characters that a file's name may have."""
    return re.sub(CONTROL, lambda match: repr(match[0])[1:-1], message)


def to_json(value: object, indent: int | None = None) -> str:
    """JSON that is UTF-8 even where a file's name is not: the name's odd bytes become escapes of lone surrogates."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace").decode()


def write_stdout(text: str) -> None:
    """Write results. Raises BrokenPipeError where the reader has gone, as head does, and SetupError."""
    try:
        tqdm.write(text, end="")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at exit
        if isinstance(error, BrokenPipeError):
            raise
        raise SetupError(f"cannot write to stdout: {error.strerror}") from error


def write_whole(path: str, content: str) -> None:
    """Write a UTF-8 file so that it is there whole or not at all, however the program ends. Raises OSError."""
    folder, name = os.path.split(os.path.realpath(path))
    special = os.path.exists(path) and not os.path.isfile(path)  # such as /dev/stdout, which must not be replaced
    mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]  # the name and an extension might be too long
    temporary = path if special else os.path.join(folder, f".{mark}.part")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(content)
            if not special:
                file.flush()
                os.fsync(file.fileno())  # else it may be there and empty after a power cut
        if not special:
            os.replace(temporary, os.path.join(folder, name))
    finally:
        if not special:
            with contextlib.suppress(OSError):
                os.remove(temporary)


def write_report(path: str, report: dict) -> None:
    """Write what --json asks for; NaN becomes null, for JSON has none. Raises SetupError."""
    report = json.loads(json.dumps(report), parse_constant=lambda name: None)
    try:
        write_whole(path, to_json(report, indent=1))
    except OSError as error:
        raise SetupError(f"--json {path}: {error.strerror}") from error


# --- Device and model ---


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def start_npu(index: int) -> str | None:
    """Make npu:index ready; None, or the reason why it cannot be used and what to do about it."""
    import torch

    try:
        import torch_npu  # noqa: F401  (adds torch.npu)
    except (ImportError, RuntimeError) as error:
        sys.modules["torch_npu"] = None  # else transformers imports it again, unguarded
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            return f"torch_npu is not installed: install the torch-npu that goes with torch {torch.__version__}"
        remedy = "source /usr/local/Ascend/ascend-toolkit/set_env.sh and try again"
        if "libascend_hal" in str(error):
            remedy = "mount the driver, /usr/local/Ascend/driver, into the container"
        return f"torch_npu cannot load CANN ({first_line(error)}): {remedy}"
    try:
        count = torch.npu.device_count() if torch.npu.is_available() else 0
        if count == 0:
            visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
            return f"no NPU is visible (ASCEND_RT_VISIBLE_DEVICES: {visible}): see what npu-smi info lists"
        if index >= count:
            return f"npu:{index} is out of range: npu:0 to npu:{count - 1} are visible"
        torch.npu.set_device(index)
        # Else torch_npu 2.9.0.post1 sends conv1d through its slow legacy compiler on Ascend910B.
        torch.npu.config.allow_internal_format = False
        torch.npu.set_compile_mode(jit_compile=False)
        torch.zeros(1, device=f"npu:{index}")  # a busy NPU counts as available until it is used
        torch.npu.synchronize()
    except (RuntimeError, AssertionError) as error:
        return f"npu:{index} does not start ({first_line(error)}): see in npu-smi info what holds it"
    return None


def select_device(name: str | None) -> tuple[torch.device, str | None]:
    """The named device; without a name the NPU, else the CPU and a warning that says why not the NPU.

    Under torchrun each process of a machine has a device of its own, and its part of the CPU's threads.
    To be called before transformers is imported. Raises SetupError where the named device cannot be used.
    """
    # Where torch_npu is installed and CANN is not, a plain `import torch` fails; start_npu imports it with care.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    import torch

    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if n_processes > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // n_processes))
    kind, _, index = (name or "npu").partition(":")
    index = int(index or os.environ.get("LOCAL_RANK", "0"))
    if kind == "npu":
        problem = start_npu(index)
        if problem is None:
            return torch.device("npu", index), None
        if name is None:
            return torch.device("cpu"), f"running on the CPU, not on an NPU: {problem}"
        raise SetupError(f"--device {name}: {problem}")
    sys.modules.setdefault("torch_npu", None)  # else transformers imports it, which fails where CANN is absent
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise SetupError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(kind, index if kind == "cuda" else None), None


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named dtype; auto is the fastest that computes well on the device."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.float16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


@contextlib.contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn what torch raises where a device is full or lost into a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        if re.search("out of memory|can't allocate memory", str(error)):
            raise OutOfMemoryError(f"{device} failed: {first_line(error)} (see what else holds its memory)") from error
        raise DeviceError(f"{device} failed: {first_line(error)} (see whether it still answers)") from error


def answers(device: torch.device) -> bool:
    """Whether the device still computes."""
    import torch

    try:
        return (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).tolist() == [[2, 2], [2, 2]]
    except RuntimeError:
        return False


def suppress_bias(generation_config, n_vocab: int) -> torch.Tensor:
    """What to add to the scores of the first token and to those of the others: (2, n_vocab) float32, 0 or -inf.

    It takes the place of two logits processors of transformers, which compute torch.isin over the whole vocabulary at
    every token, for which an NPU sorts it on its host. The token ids are the same.
    """
    import torch

    bias = torch.zeros(2, n_vocab)
    bias[:, generation_config.suppress_tokens or []] = -float("inf")
    bias[0, generation_config.begin_suppress_tokens or []] = -float("inf")
    # generate would make processors of them, and takes them from here even where it is passed a config without.
    generation_config.suppress_tokens = generation_config.begin_suppress_tokens = None
    return bias


def import_transformers() -> types.ModuleType:
    """transformers without scikit-learn and SciPy: seconds of importing, for losses and for assisted generation."""
    import transformers.utils.import_utils

    transformers.utils.import_utils._sklearn_available = transformers.utils.import_utils._scipy_available = False
    return transformers


def download_model(name: str) -> str:
    """The folder with the files of a model on the hub, downloaded if they are not there yet. Raises SetupError."""
    import huggingface_hub

    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise SetupError(f"--model {name}: no such folder, nor the form of a model id (owner/name)")
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    patterns = ["*.json", "*.txt", "model.safetensors", "model-*.safetensors"]
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # the network raises whatever it likes
        raise SetupError(
            f"cannot download the model {name}: {first_line(error)} Without access to huggingface.co set "
            "HF_ENDPOINT=https://hf-mirror.com, name a local folder with --model, or set HF_HUB_OFFLINE=1 to use what "
            "was downloaded before."
        ) from error


def load_model(name: str, device: torch.device, dtype: torch.dtype, language: str = "ja") -> Recognizer:
    """Load a Whisper model from the hub or a local folder, from safetensors and without remote code.

    Raises SetupError where it cannot be loaded whole, does not know the language, or does not fit the device.
    """
    transformers = import_transformers()
    folder = name if os.path.isdir(name) else download_model(name)
    try:
        kind = transformers.WhisperConfig.get_config_dict(folder)[0].get("model_type")
        if kind != "whisper":
            raise ValueError(f"a model of type {kind}, not whisper")
        languages = getattr(transformers.GenerationConfig.from_pretrained(folder), "lang_to_id", {})
        if f"<|{language}|>" not in languages:
            known = " ".join(sorted(token.strip("<|>") for token in languages)) or "none (it is not multilingual)"
            raise SetupError(f"--language {language}: not a language of {name}, which knows {known}")
        processor = transformers.WhisperProcessor.from_pretrained(folder)
        model, report = transformers.WhisperForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
        )
        if bad := [*report["missing_keys"], *report["mismatched_keys"]]:
            raise ValueError(f"{len(bad)} weights are missing or of another shape, among them {bad[0]}")
    except SetupError:
        raise
    except Exception as error:  # broken files raise OSError, ValueError, KeyError, SafetensorError and others
        raise SetupError(f"cannot load the model {name}: {first_line(error)} (is it whole?)") from error
    bias = suppress_bias(model.generation_config, model.config.vocab_size)
    return move(Recognizer(model.eval(), processor.feature_extractor, processor.tokenizer, bias), device, dtype)


def move(recognizer: Recognizer, device: torch.device, dtype: torch.dtype) -> Recognizer:
    """The same weights on another device; the model is moved, not copied. Raises SetupError where it does not fit."""
    with device_errors(device):
        use_plain_kernels(recognizer.model)
        model = recognizer.model.to(device, dtype)
        use_cpu_kernels(model)
        return replace(recognizer, model=model, bias=recognizer.bias.to(device))


# --- bfloat16 on a CPU: torch's own attention emulates it where there is no AMX, and reads weights at half speed ---


def use_cpu_kernels(model: transformers.WhisperForConditionalGeneration) -> None:
    """Give a model in bfloat16 on a CPU that has it the functions below; leave any other as it is."""
    import torch
    import transformers

    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    transformers.AttentionInterface.register("cpu_attention", cpu_attention)
    transformers.AttentionMaskInterface.register("cpu_attention", transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation("cpu_attention")
    for layer in model.model.encoder.layers:
        layer.forward = functools.partial(cpu_encoder_layer, layer)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 1)  # oneDNN's order, for few rows
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
            module.forward = functools.partial(cpu_linear, module)


def use_plain_kernels(model: transformers.WhisperForConditionalGeneration) -> None:
    """Undo use_cpu_kernels, so that the model can be moved."""
    import torch

    if model.config._attn_implementation != "cpu_attention":
        return
    model.set_attn_implementation("sdpa")
    for layer in model.model.encoder.layers:
        del layer.forward
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.to_dense(), requires_grad=False)
            del module.forward
    model.tie_weights()


def cpu_linear(linear: torch.nn.Linear, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
    """activation(x @ weight.T + bias), for a packed weight: (..., n_in) to (..., n_out)."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, activation, [], "none")


def cpu_encoder_layer(layer, hidden_states: torch.Tensor, *arguments, **options) -> tuple[torch.Tensor]:
    """WhisperEncoderLayer.forward for one window, (1, n, d_model), one head at a time: its scores stay in the cache.

    They are rounded to bfloat16, which adds nothing to the error of the output: its other roundings outweigh it.
    """
    import torch

    attention, add, [x] = layer.self_attn, torch.ops.mkldnn._linear_pointwise.binary, hidden_states
    normed = layer.self_attn_layer_norm(x)
    query = attention.q_proj(normed).mul_(attention.scaling)
    key, value = attention.k_proj(normed), attention.v_proj(normed)
    context, scores = torch.empty_like(x), x.new_empty(len(x), len(x))
    heads = [states.split(attention.head_dim, 1) for states in (query, key, value, context)]
    for q, k, v, out in zip(*heads, strict=True):
        torch.mm(q, k.T, out=scores)
        torch.softmax(scores, -1, out=scores)
        torch.mm(scores, v, out=out)
    x = add(context, x, attention.out_proj.weight, attention.out_proj.bias, "add")
    hidden = cpu_linear(layer.fc1, layer.final_layer_norm(x), "gelu")
    return (add(hidden, x, layer.fc2.weight, layer.fc2.bias, "add")[None],)


def cpu_attention(module, query, key, value, attention_mask, **options) -> tuple[torch.Tensor, None]:
    """Attention of transformers, (batch, n_heads, n, head_dim) each: (batch, n, n_heads, head_dim).

    One query at a time, as in decoding, it is two products of matrix and vector in float32.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query3, key3, value3 = (states.float().flatten(0, 1) for states in (query, key, value))
    weights = torch.bmm(key3, query3.transpose(1, 2)).transpose(1, 2).softmax(-1)
    context = torch.bmm(value3.transpose(1, 2), weights.transpose(1, 2)).to(query.dtype)
    return context.view(query.shape).transpose(1, 2), None


def arrange_cross_attention(cache: transformers.EncoderDecoderCache) -> None:
    """Lay out the keys and values of the encoder's output as cpu_attention reads them fastest, once for all tokens."""
    for layer in cache.cross_attention_cache.layers:
        layer.keys = layer.keys.float()
        layer.values = layer.values.transpose(2, 3).contiguous().float().transpose(2, 3)


# --- Random weights and the environment ---


def random_recognizer(device: torch.device, dtype: torch.dtype) -> Recognizer:
    """The exact architecture of kotoba-whisper-v2.0 with seeded random weights: speed and numerics without a download.

    Architecture and special ids are those of its config.json and of whisper-large-v3's generation_config.json. It has
    no tokenizer: its text is the token ids.
    """
    import torch
    from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS_MULTI

    transformers = import_transformers()
    torch.manual_seed(0)
    ends = {"pad_token_id": 50256, "bos_token_id": 50257, "eos_token_id": 50257, "decoder_start_token_id": 50258}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=51866, num_mel_bins=128, d_model=1280, encoder_layers=32, decoder_layers=2,
        encoder_attention_heads=20, decoder_attention_heads=20, encoder_ffn_dim=5120, decoder_ffn_dim=5120, **ends,
    ))  # fmt: skip
    model.generation_config = transformers.GenerationConfig(
        is_multilingual=True, lang_to_id={"<|ja|>": 50266}, task_to_id={"translate": 50359, "transcribe": 50360},
        no_timestamps_token_id=50364, prev_sot_token_id=50362, return_timestamps=False, max_length=448,
        suppress_tokens=[t for t in NON_SPEECH_TOKENS_MULTI if t < 50257] + [50258, *range(50359, 50364)],
        begin_suppress_tokens=[220, 50257], **ends,
    )  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    bias = suppress_bias(model.generation_config, model.config.vocab_size)
    tokenizer = types.SimpleNamespace(
        eos_token_id=50257, decode=lambda token_ids, skip_special_tokens: " ".join(map(str, token_ids))
    )
    return move(Recognizer(model.eval(), extractor, tokenizer, bias), device, dtype)


def environment(device: torch.device) -> dict[str, object]:
    """The versions, the device and the settings that a measurement depends on."""
    import torch
    import transformers

    name, report = platform.machine(), {"torch_npu": None, "cann": None, "allow_hf32": None}
    if device.type != "cpu":
        name = getattr(torch, device.type).get_device_name(device.index)
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    if device.type == "npu":
        report["allow_hf32"] = {"matmul": torch.npu.matmul.allow_hf32, "conv": torch.npu.conv.allow_hf32}
        with contextlib.suppress(AttributeError):
            report["cann"] = sys.modules["torch_npu"].npu.utils.get_cann_version()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        report["torch_npu"] = importlib.metadata.version("torch-npu")
    return report | {
        "device": str(device), "device_name": name, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
    }  # fmt: skip


# --- Audio ---


def sweep(rate: int) -> np.ndarray:
    """The default input of the evaluations: a sine from 200 to 800 Hz in three seconds, (3 * rate,) float32."""
    t = np.arange(3 * rate) / rate
    return (0.5 * np.sin(2 * np.pi * (200 * t + 100 * t**2))).astype(np.float32)


def check_file(path: str) -> None:
    """Raise AudioError where there is no file that could hold audio."""
    if not os.path.isfile(path):
        raise AudioError("not a regular file" if os.path.exists(path) else "no such file or folder")
    if os.path.getsize(path) == 0:
        raise AudioError("empty (0 bytes)")
    if not os.access(path, os.R_OK):
        raise AudioError("no permission to read it")


def require_files(paths: Iterable[str]) -> None:
    """Raise SetupError where one of the paths is no file that could hold audio."""
    for path in paths:
        try:
            check_file(path)
        except AudioError as error:
            raise SetupError(f"{path}: {error}") from error


def read_blocks(path: str) -> Iterator[tuple[int, np.ndarray]]:
    """The samples of an audio file, mixed down, second by second: (sampling rate in Hz, (n,) float32), at least once.

    What libsndfile cannot open goes through the ffmpeg program. Raises AudioError.
    """
    check_file(path)
    try:
        # By descriptor: given a name, soundfile takes x.raw for audio without a header.
        with open(path, "rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            yield from sound_blocks(sound)
    except OSError as error:
        raise AudioError(error.strerror or first_line(error)) from error
    except soundfile.LibsndfileError as error:
        if shutil.which("ffmpeg") is None:
            raise AudioError(
                f"not audio that libsndfile reads ({error.error_string.rstrip('.')}); for m4a, mp4, webm and others "
                "put the ffmpeg program on the PATH"
            ) from error
        yield from ffmpeg_blocks(path)


def sound_blocks(sound: soundfile.SoundFile) -> Iterator[tuple[int, np.ndarray]]:
    """The samples of an open file, as read_blocks gives them. Raises AudioError."""
    rate, n_read = sound.samplerate, 0
    try:
        while len(block := sound.read(min(rate, 1 << 20), dtype="float32", always_2d=True)):
            if not (loudest := np.abs(block).max()) <= LOUDEST_SAMPLE:
                loud = f"samples of {loudest:g} where 1 is full scale"
                wrong = loud if loudest < np.inf else "NaN or infinite samples"
                raise AudioError(f"{wrong} in the second after {n_read / rate:.0f} s")
            n_read += len(block)
            yield rate, block.mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"damaged after {n_read / rate:.0f} s: {error.error_string.rstrip('.')}") from error
    if n_read == 0:
        raise AudioError("no audio in it (0 samples)")


def ffmpeg_blocks(path: str) -> Iterator[tuple[int, np.ndarray]]:
    """The samples of whatever ffmpeg reads, as read_blocks gives them."""
    # file: keeps a name like concat:x from being taken for a protocol; a w64 stream may be of any length.
    command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-i", f"file:{path}", "-map", "0:a:0"]
    command += ["-c:a", "pcm_f32le", "-f", "w64", "pipe:1"]
    with (
        tempfile.TemporaryFile() as messages,  # a pipe that nobody reads could block ffmpeg
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        try:
            with soundfile.SoundFile(process.stdout.fileno(), closefd=False) as sound:
                yield from sound_blocks(sound)
        except soundfile.LibsndfileError:
            pass  # ffmpeg wrote nothing, and says why
        else:
            process.wait()
        finally:
            process.kill()
        messages.seek(0)
        lines = messages.read().decode(errors="replace").strip().splitlines()
        if lines or process.wait() != 0:  # ffmpeg goes on past some damage, and then its status is 0
            reason = lines[-1] if lines else "ffmpeg does not say why"
            raise AudioError(f"damaged, or not audio ({reason}); ffmpeg -i FILE x.wav saves what can be saved")


def levels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Mean square of a waveform without its offset, over LEVEL_WINDOW_S, every LEVEL_HOP_S: (n >= 1,) float64."""
    hop = min(len(waveform), max(1, round(LEVEL_HOP_S * rate)))
    frames = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    energy = np.var(frames, axis=1, dtype=np.float64)
    window = min(len(energy), round(LEVEL_WINDOW_S / LEVEL_HOP_S))
    return np.convolve(energy, np.full(window, 1 / window), "valid")


def quietest_cut(waveform: np.ndarray, rate: int) -> int:
    """Index of the quietest moment in the latter half of a waveform; of equally quiet ones the last."""
    half = len(waveform) // 2
    level = levels(waveform[half:], rate)
    quietest = len(level) - 1 - int(np.argmin(level[::-1]))
    return max(1, half + quietest * max(1, round(LEVEL_HOP_S * rate)) + round(LEVEL_WINDOW_S / 2 * rate))


def split_at_pauses(
    blocks: Iterable[np.ndarray], rate: int, chunk_length_s: float, window_s: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Chunks that tile the blocks without gap or overlap: (index of the first sample, waveform).

    Audio that fits a window of window_s seconds is one chunk. Of longer audio, each stretch of chunk_length_s
    seconds is cut at the quietest moment of its latter half. Little more than a window is held in memory.
    """
    longest, window = round(chunk_length_s * rate), round(window_s * rate)
    tail = min(longest // 2, round(SHORTEST_TAIL_S * rate))
    blocks, ended = iter(blocks), False
    buffer, start = np.empty(0, np.float32), 0
    while not ended:
        held, n_held = [buffer], len(buffer)
        while n_held <= window + tail and not ended:
            block = next(blocks, None)
            ended = block is None
            if not ended:
                held.append(block)
                n_held += len(block)
        buffer = np.concatenate(held)
        if start == 0 and len(buffer) <= window:
            break  # the whole file fits
        while len(buffer) > longest + (0 if ended else tail):
            cut = quietest_cut(buffer[: min(longest, len(buffer) - tail)], rate)
            yield start, buffer[:cut]
            start, buffer = start + cut, buffer[cut:]
    if len(buffer):
        yield start, buffer


def read_chunks(path: str, extractor, chunk_length_s: float) -> Iterator[tuple[float, float, np.ndarray | None]]:
    """The chunks of an audio file: start and end in seconds, waveform (n_samples,) float32 at the extractor's rate.

    The waveform is None where nothing in the chunk is louder than SILENCE_DBFS. Raises AudioError.
    """
    blocks = read_blocks(path)
    rate, first_block = next(blocks)
    blocks = itertools.chain([first_block], (block for _, block in blocks))
    for first, chunk in split_at_pauses(blocks, rate, chunk_length_s, extractor.chunk_length):
        start, end = first / rate, (first + len(chunk)) / rate
        if levels(chunk, rate).max() < 10 ** (SILENCE_DBFS / 10):
            yield start, end, None
        elif rate == extractor.sampling_rate:
            yield start, end, chunk
        else:
            import librosa

            yield start, end, librosa.resample(chunk, orig_sr=rate, target_sr=extractor.sampling_rate)


# --- Transcription ---


def extract_features(extractor: transformers.WhisperFeatureExtractor, waveform: np.ndarray) -> torch.Tensor:
    """input_features (1, n_mels, n_frames) float32 on the CPU: the log-mel spectrogram of WhisperFeatureExtractor.

    On one core it takes half the extractor's time, most of which goes into the magnitude of complex numbers. Raises
    ValueError where the waveform does not fit the model's window, which would cut it off.
    """
    import torch

    if len(waveform) > extractor.n_samples:
        raise ValueError(f"{len(waveform)} samples do not fit a window of {extractor.n_samples}")
    padded = torch.from_numpy(np.pad(waveform, (0, extractor.n_samples - len(waveform))))
    window = torch.hann_window(extractor.n_fft)
    spectrum = torch.stft(padded, extractor.n_fft, extractor.hop_length, window=window, return_complex=True)[:, :-1]
    power = spectrum.real**2 + spectrum.imag**2
    mel = torch.from_numpy(extractor.mel_filters.T.astype(np.float32)) @ power
    log_mel = mel.clamp_(min=1e-10).log10_()
    return ((torch.maximum(log_mel, log_mel.max() - 8) + 4) / 4)[None]


def prompt_ids(model: transformers.WhisperForConditionalGeneration, language: str, task: str) -> list[int]:
    """The PROMPT_LENGTH token ids that every decoding begins with."""
    config = model.generation_config
    language_id, task_id = config.lang_to_id[f"<|{language}|>"], config.task_to_id[task]
    return [config.decoder_start_token_id, language_id, task_id, config.no_timestamps_token_id]


def encode(model: transformers.WhisperForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    """The encoder's output for input_features on its device, (batch, n_positions, d_model)."""
    import torch

    n_rows = 1 if model.device.type == "cpu" else len(features)  # a CPU computes out of its caches
    return torch.cat([model.model.encoder(rows).last_hidden_state for rows in features.split(n_rows)])


def decode(
    recognizer: Recognizer, encoded: torch.Tensor, language: str, task: str, max_new_tokens: int
) -> list[list[int]]:
    """Greedy decoding of an encoder's output: the rows that generate describes, as model.generate would give them.

    The host does less for a token than in model.generate, and it waits for the device once in CHECK_EVERY tokens.
    """
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    model, end = recognizer.model, recognizer.tokenizer.eos_token_id
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    token_ids = torch.tensor([prompt_ids(model, language, task)] * len(encoded), device=model.device)
    positions = torch.arange(PROMPT_LENGTH + max_new_tokens, device=model.device)
    position, bias, columns = positions[:PROMPT_LENGTH], recognizer.bias[0], []
    ended = torch.zeros(len(encoded), dtype=torch.bool, device=model.device)
    for i in range(max_new_tokens):
        hidden = model.model.decoder(
            input_ids=token_ids, encoder_hidden_states=encoded, past_key_values=cache, cache_position=position
        ).last_hidden_state[:, -1]
        if i == 0 and model.config._attn_implementation == "cpu_attention":
            arrange_cross_attention(cache)
        columns.append((model.proj_out(hidden).float() + bias).argmax(-1))
        ended |= columns[-1] == end
        if (i + 1) % CHECK_EVERY == 0 and ended.all():
            break
        token_ids, bias = columns[-1][:, None], recognizer.bias[1]
        position = positions[PROMPT_LENGTH + i : PROMPT_LENGTH + i + 1]
    rows = torch.stack(columns, 1).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def generate(
    recognizer: Recognizer, features: list[torch.Tensor], language: str, task: str, max_new_tokens: int
) -> list[list[int]]:
    """Recognise a batch greedily: the token ids of each row, without the prompt, to the end-of-text id or the limit.

    Raises DeviceError.
    """
    import torch

    model = recognizer.model
    with torch.inference_mode(), device_errors(model.device):
        encoded = encode(model, torch.cat(features).to(model.device, model.dtype))
        return decode(recognizer, encoded, language, task, max_new_tokens)


def generate_halving(
    recognizer: Recognizer, features: list[torch.Tensor], batch_size: int, *options
) -> tuple[list[list[int] | str], int]:
    """What generate gives, in batches that fit the device's memory: the rows, and the size that the batches came to.

    Where the device fails at a batch, or the memory does not hold a single chunk, a row is the error's message.
    """
    import torch

    rows = []
    while len(rows) < len(features):
        batch = features[len(rows) : len(rows) + batch_size]
        try:
            rows += generate(recognizer, batch, *options)
        except DeviceError as error:
            if isinstance(error, OutOfMemoryError) and len(batch) > 1:
                batch_size = len(batch) // 2
            else:
                rows += [str(error)] * len(batch)
        else:
            continue
        if recognizer.model.device.type != "cpu":
            with contextlib.suppress(RuntimeError):  # a lost device cannot even do this
                getattr(torch, recognizer.model.device.type).empty_cache()  # here, where no error holds the tensors
    return rows, batch_size


def ahead(items: Iterable) -> Iterator:
    """The same items, each made in a background thread while the caller works on the one before."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, iterator, end)
            yield item


def prepare(
    paths: Iterable[str], extractor: transformers.WhisperFeatureExtractor, chunk_length_s: float, batch_size: int
) -> Iterator[list[tuple]]:
    """Batches with up to batch_size chunks to decode, of several files: lists of (transcript, segment, features).

    features is None where the chunk is silent, segment too at the end of a file.
    """
    batch, n_features = [], 0
    for path in paths:
        transcript = Transcript(path)
        try:
            for start, end, waveform in read_chunks(path, extractor, chunk_length_s):
                if transcript.error is not None:  # the device failed at an earlier chunk
                    break
                features = None if waveform is None else extract_features(extractor, waveform)
                batch.append((transcript, Segment(start, end), features))
                n_features += features is not None
                if n_features == batch_size:
                    yield batch
                    batch, n_features = [], 0
        except AudioError as error:
            transcript.error = str(error)
        except MemoryError:
            transcript.error = "there is not enough memory to read it"
        batch.append((transcript, None, None))
    yield batch


def refuse(message: str) -> None:
    """Take a notice for an error: raises SetupError."""
    raise SetupError(message)


def transcribe(
    recognizer: Recognizer, paths: Iterable[str], language: str, task: str, max_new_tokens: int,
    chunk_length_s: float, batch_size: int, on_progress: Callable[[float], None] = lambda seconds: None,
    on_notice: Callable[[str], None] = refuse,
) -> Iterator[Transcript]:  # fmt: skip
    """The transcript of each file, in order.

    Chunks of several files share a batch, and while an accelerator decodes one batch the next is read. on_progress is
    told the seconds of audio done since it was last called, on_notice that the batches had to become smaller. What
    the device fails at fails its files. Raises DeviceError once the device no longer answers.
    """
    device, started = recognizer.model.device, time.perf_counter()
    batches = prepare(paths, recognizer.extractor, chunk_length_s, batch_size)
    if device.type != "cpu":  # whose OpenMP threads would wait for each other: half the speed
        batches = ahead(batches)
    for batch in batches:
        features = [row for _, _, row in batch if row is not None]
        rows, fitting = generate_halving(recognizer, features, batch_size, language, task, max_new_tokens)
        if fitting < batch_size:
            on_notice(f"{device} is out of memory in batches of {batch_size}: --batch-size {fitting} from here on")
            batch_size = fitting
        now = time.perf_counter()
        share_s, started = (now - started) / (len(features) or len(batch)), now
        row_of = iter(rows)
        for transcript, segment, row in batch:
            if row is not None or not features:
                transcript.taken_s += share_s
            if segment is None:
                yield transcript
                continue
            transcript.duration = segment.end
            if row is None:
                transcript.silent += 1
            else:
                finish_segment(transcript, segment, next(row_of), recognizer.tokenizer)
            on_progress(segment.end - segment.start)
        if any(isinstance(row, str) for row in rows) and not answers(device):
            if batch[-1][1] is not None:  # the rest of this file is in batches to come
                yield batch[-1][0]
            raise DeviceError(f"{device} no longer answers")


def finish_segment(transcript: Transcript, segment: Segment, row: list[int] | str, tokenizer) -> None:
    """Give a segment the text of its token ids, and the transcript the segment; or the error that there is instead."""
    if isinstance(row, str):
        transcript.error = row
        return
    text = tokenizer.decode(row, skip_special_tokens=True)
    segment.text = re.sub(CONTROL, " ", text).strip()
    data = segment.text.encode()
    segment.compression_ratio = len(data) / len(zlib.compress(data))
    segment.token_limit = row[-1] != tokenizer.eos_token_id
    transcript.segments.append(segment)
