"""What the three scripts share, in the order of the data: the device, the model, the audio, and recognition.

    path -> waveform -> chunks -> input_features -> token_ids
"""
import argparse
import atexit
import contextlib
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import soundfile
from tqdm import tqdm

# Where torch_npu is installed and CANN is not, a plain `import torch` fails; start_npu imports it with care.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else the C++ of torch writes a backtrace for what it raises
import torch

MODEL = "kotoba-tech/kotoba-whisper-v2.0"
SAMPLING_RATE, WINDOW_S = 16_000, 30  # of every Whisper, Hz and s
CHUNK_LENGTH_S = 15  # what the model's authors use
PROMPT_LENGTH = 4  # <|startoftranscript|>, language, task, <|notimestamps|>
MAX_NEW_TOKENS = 448 - PROMPT_LENGTH  # every Whisper decoder has 448 positions
CLAMPED_FLOAT16 = 64_504  # the largest float16 less 1000, as in WhisperEncoderLayer
CHECK_EVERY = 8  # tokens after which decoding asks whether all rows have ended
SILENCE_DBFS = -60.0  # speech is louder, the noise of a quiet 16-bit recording is not
LOUDEST_SAMPLE = 100.0  # 40 dB above full scale: floats beyond are integers written as they are, or damage
LEVEL_WINDOW_S, LEVEL_HOP_S = 0.3, 0.01  # longer than the closure of a stop consonant or of a small tsu
SHORTEST_TAIL_S = 1.0  # Whisper invents text for a scrap of speech
FAR_QUIETER = 100  # 20 dB, in power
READ_AHEAD = 1 << 20  # bytes: more than a page of an Ogg file, than libFLAC reads at once, or than a picture in a tag
RECORDING_STARTS = {
    "OGG": rb"OggS\x00[\x00\x01\x04\x05].*?(OggS\x00\x02)",
    "MP3": rb"(ID3[\x02-\x04]\x00|\xff[\xe0-\xff]..(?:.{9}|.{17}|.{32})(?:Xing|Info)|(?<=TAG.{125})\xff[\xe0-\xff])",
}
OTHER_STARTS = rb"((?:RIFF|RIFX|RF64)....WAVE|FORM....AIF|[.]snd\x00\x00|caff\x00\x01|fLaC\x00\x00\x00\x22)"
TWO_MP3_FRAMES = 2882  # bytes at most: what libsndfile leaves unread where they are all padding
RESCUE = "ffmpeg -i FILE x.wav saves what can be saved"
# ffmpeg names the codec that a message is from. Those of pictures do not matter, as where a file begins mid-stream.
PICTURE_MESSAGE = r"\[(h26|hevc|vvc|av1|libdav1d|vp\d|mpeg\d|msmpeg|mjpeg|png|gif|bmp|webp|vc1|wmv\d|flv|theora)"
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"  # characters that end a line or steer a terminal


class SetupError(Exception):
    """The options, the device or the model cannot be used; the message is one line for the user."""


class DeviceError(SetupError):
    """What was asked of the device failed, or the model computed NaN on it."""


class OutOfMemoryError(DeviceError):
    """It did not fit the device's memory; a smaller batch may."""


class AudioError(Exception):
    """One file cannot be read; the message is one line for the user."""


# --- Options ---


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or a float from low to high."""

    def parse(text: str) -> float:
        """The number that the text is."""
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        limits = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(message: str) -> str:
    """A message with escapes for the line breaks and other control characters that a file's name may have."""
    return re.sub(CONTROL, lambda match: repr(match[0])[1:-1], message)


def notice(message: str) -> None:
    """One line on stderr, above the progress bar; in one piece, for other processes may write there too."""
    try:
        tqdm.write(one_line(message) + "\n", file=sys.stderr, end="")
    except OSError:  # a full disk: the results matter more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def write_stdout(text: str) -> None:
    """Write results. Raises BrokenPipeError where the reader has gone, as head does, and SetupError."""
    if sys.stdout is None:
        raise SetupError("cannot write to stdout: it is closed")
    try:
        tqdm.write(text, end="")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at exit
        if isinstance(error, BrokenPipeError):
            raise
        raise SetupError(f"cannot write to stdout: {error.strerror}") from error


def run_script(program: str, run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a script; its exit status, after one line on stderr where the run ended early."""
    while (unused := os.open(os.devnull, os.O_RDWR)) <= 2:  # else files opened later would take a closed stream's place
        pass
    os.close(unused)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
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
    notice(f"{program}: {message}")
    return status


def check_outputs(option: str, folder: str, outputs: Iterable[str], inputs: Iterable[str]) -> None:
    """Make the folder that an option names. Raises SetupError where it cannot, or an output is one of the inputs."""
    owners = {os.path.realpath(path): path for path in inputs}
    for output in outputs:
        if owner := owners.get(os.path.realpath(output)):
            raise SetupError(f"{option}: {output} would overwrite {owner}: name another place")
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise SetupError(f"{option} {folder}: there is a file of that name") from None
    except OSError as error:
        raise SetupError(f"{option} {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SetupError(f"{option} {folder}: no permission to write in this folder")


def check_report(path: str, inputs: Iterable[str]) -> None:
    """Raise SetupError where the file of --json cannot be written, or is one of the inputs."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise SetupError(f"--json {path}: not a regular file")
    check_outputs("--json", os.path.dirname(path) or ".", [path], inputs)


def to_json(value: object, indent: int | None = None) -> str:
    """JSON that is UTF-8 even where a file's name is not: the name's odd bytes become escapes of lone surrogates."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace").decode()


def write_whole(path: str, content: str) -> None:
    """Write a UTF-8 file so that it is there whole or not at all, however the program ends. Raises OSError."""
    path = os.path.realpath(path)  # a link stays one
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(16)}.part")  # no other process has this one
    try:
        with open(temporary, "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else it may be there and empty after a power cut
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_report(path: str, report: dict) -> None:
    """Write what --json asks for; NaN becomes null, for JSON has none. Raises SetupError."""
    report = json.loads(json.dumps(report), parse_constant=lambda name: None)
    try:
        write_whole(path, to_json(report, indent=1))
    except OSError as error:
        raise SetupError(f"--json {path}: {error.strerror}") from error


# --- Device ---


def npu_problem(error: BaseException) -> str:
    """What an NPU says that does not start, and what to do: the same trouble shows at the import or at any call."""
    scripts = [f"/usr/local/Ascend/{name}/set_env.sh" for name in ("cann", "ascend-toolkit")]
    there = [script for script in scripts if os.path.exists(script)]
    source = there[0] if there else f"{scripts[0]} (CANN 8.5 and later) or {scripts[1]} (before)"
    remedy = "see in npu-smi info what holds it"
    if re.search("libascend_hal|driver", str(error), re.IGNORECASE):
        remedy = "mount the driver, /usr/local/Ascend/driver, into the container"
    elif re.search("lib[a-z_]+[.]so|ASCEND_[A-Z]+|set_env|500001", str(error)):
        remedy = f"source {source}, and install the Python packages that CANN needs"
    return f"({first_line(error)}): {remedy}"


def start_npu(index: int | None, local_rank: int) -> int:
    """Make npu:index ready, or that of a process of torchrun: its index. Raises SetupError where it cannot be used."""
    try:
        import torch_npu  # adds torch.npu
    except Exception as error:  # torch_npu raises that too, where CANN is there in part
        sys.modules["torch_npu"] = None  # else transformers imports it again, unguarded
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            remedy = f"install the torch-npu that goes with torch {torch.__version__}"
            raise SetupError(f"torch_npu is not installed: {remedy}") from error
        raise SetupError(f"torch_npu cannot be loaded {npu_problem(error)}") from error
    try:
        count = torch.npu.device_count() if torch.npu.is_available() else 0
        if count == 0:
            visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
            raise SetupError(f"no NPU is visible (ASCEND_RT_VISIBLE_DEVICES: {visible}): see what npu-smi info lists")
        index = local_rank % count if index is None else index  # several processes may share an NPU
        if index >= count:
            raise SetupError(f"npu:{index} is out of range: npu:0 to npu:{count - 1} are visible")
        torch.npu.set_device(index)
        # Else torch_npu 2.9.0.post1 sends conv1d through its slow legacy compiler on Ascend910B.
        torch.npu.config.allow_internal_format = False
        torch.npu.set_compile_mode(jit_compile=False)
        torch.zeros(1, device=f"npu:{index}")  # a busy NPU counts as available until it is used
        torch.npu.synchronize()
    except (RuntimeError, AssertionError) as error:
        raise SetupError(f"npu:{index or 0} does not start {npu_problem(error)}") from error
    if hasattr(torch_npu, "npu_gelu"):
        # F.gelu of torch_npu 2.9.0 is the tanh form, which the models were not trained with. transformers calls it by
        # this name after the convolutions, and keeps it in each layer of a model loaded later.
        gelu = torch.nn.functional.gelu
        torch.nn.functional.gelu = lambda x, approximate="none": (
            torch_npu.npu_gelu if x.device.type == "npu" else gelu
        )(x, approximate=approximate)
    return index


def select_device(name: str | None, local_rank: int = 0, n_processes: int = 1) -> tuple[torch.device, str | None]:
    """The named device; without a name the NPU, else the CPU and a warning that says why not the NPU.

    The n_processes of a machine share its NPUs and the CPU's threads evenly; this one is the local_rank-th. To be
    called before transformers is imported. Raises SetupError where the named device cannot be used.
    """
    if n_processes > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // n_processes))
    kind, _, index = (name or "npu").partition(":")
    if kind == "npu":
        try:
            return torch.device("npu", start_npu(int(index) if index else None, local_rank)), None
        except SetupError as error:
            if name is None:
                return torch.device("cpu"), f"running on the CPU, not on an NPU: {error}"
            raise SetupError(f"--device {name}: {error}") from error
    sys.modules.setdefault("torch_npu", None)  # else transformers imports it, which fails where CANN is absent
    index = int(index or local_rank)
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise SetupError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(kind, index if kind == "cuda" else None), None


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named dtype; auto is the fastest that computes well on the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.float16
    # There is no public way to ask; where these names go, /proc/cpuinfo knows it too.
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def default_batch_size(device: torch.device) -> int:
    """How many chunks are decoded together: on an accelerator they share the launches of each token."""
    return 8 if device.type == "cpu" else 16


@contextlib.contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn what torch raises where a device is full or lost into a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        if re.search("out of memory|can't allocate memory|Failed to (apply for|allocate) memory|EL0004", str(error)):
            raise OutOfMemoryError(f"{device} failed: {first_line(error)} (see what else holds its memory)") from error
        raise DeviceError(f"{device} failed: {first_line(error)} (see whether it still answers)") from error


def environment(device: torch.device) -> dict[str, object]:
    """The versions, the device and the settings that a measurement depends on."""
    import transformers

    name, report = platform.machine(), {"torch_npu": None, "cann": None, "allow_hf32": None}
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device.index)
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    if device.type == "npu":
        torch_npu = sys.modules["torch_npu"]
        report["torch_npu"] = torch_npu.__version__
        report["allow_hf32"] = {"matmul": torch.npu.matmul.allow_hf32, "conv": torch.npu.conv.allow_hf32}
        with contextlib.suppress(AttributeError):
            report["cann"] = torch_npu.npu.utils.get_cann_version()
    return report | {
        "device": str(device), "device_name": name, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
    }  # fmt: skip


# --- Model ---


@dataclass(frozen=True)
class Recognizer:
    """A Whisper model on its device, its WhisperFeatureExtractor and tokenizer, and on the device too what never
    changes: prompt, (PROMPT_LENGTH,) int64, and bias, (2, n_vocab) float32, 0 or -inf: what to add to the logits of the
    first token and to those of the others.
    """

    model: torch.nn.Module
    extractor: Callable
    tokenizer: Callable
    prompt: torch.Tensor
    bias: torch.Tensor


def import_transformers() -> types.ModuleType:
    """transformers, with what is used of it, and without scikit-learn and SciPy: seconds of importing for nothing.

    It takes seconds all the same, and it imports torch_npu where select_device has not.
    """
    import transformers.utils.import_utils

    # There is no public way to have it do without; where these names go, importing only takes longer.
    transformers.utils.import_utils._sklearn_available = transformers.utils.import_utils._scipy_available = False
    transformers.WhisperForConditionalGeneration  # noqa: B018  (imported when it is used)
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
        remedy = "set HF_ENDPOINT=https://hf-mirror.com, name a local folder with --model, or set HF_HUB_OFFLINE=1 to "
        problem = f"cannot download the model {name}: {first_line(error)} Without access to huggingface.co {remedy}"
        raise SetupError(f"{problem}use what was downloaded before.") from error


def prompt_of(config, generation, processor, language: str, task: str) -> torch.Tensor:
    """The token ids that every decoding begins with: (PROMPT_LENGTH,) int64.

    Raises ValueError where these, or the other parts of a model folder, do not fit each other.
    """
    for name in ("decoder_start_token_id", "task_to_id", "no_timestamps_token_id"):
        if getattr(generation, name, None) is None:
            raise ValueError(f"generation_config.json has no {name}")
    if task not in generation.task_to_id:
        raise ValueError(f"it has no task {task}")
    language_id, task_id = generation.lang_to_id[f"<|{language}|>"], generation.task_to_id[task]
    prompt = [generation.decoder_start_token_id, language_id, task_id, generation.no_timestamps_token_id]
    tokens = ["<|startoftranscript|>", f"<|{language}|>", f"<|{task}|>", "<|notimestamps|>"]
    suppressed = [*(generation.suppress_tokens or []), *(generation.begin_suppress_tokens or [])]
    largest, extractor = max(*prompt, *suppressed, processor.tokenizer.eos_token_id), processor.feature_extractor
    for what, value, expected in [
        ("mel bins of the feature extractor", extractor.feature_size, config.num_mel_bins),
        ("sampling rate of the feature extractor", extractor.sampling_rate, SAMPLING_RATE),
        ("window of the feature extractor", extractor.n_samples, WINDOW_S * SAMPLING_RATE),
        ("frames of the feature extractor", extractor.nb_max_frames, 2 * config.max_source_positions),
        ("positions of the decoder", config.max_target_positions, MAX_NEW_TOKENS + PROMPT_LENGTH),
        ("tokens in the vocabulary", config.vocab_size, max(config.vocab_size, 1 + largest)),
        ("tokens of the prompt", processor.tokenizer.convert_ids_to_tokens(prompt), tokens),
    ]:
        if value != expected:
            raise ValueError(f"{what}: {value}, not {expected}")
    return torch.tensor(prompt)


def cpu_attention(module, query, key, value, attention_mask, **options) -> tuple[torch.Tensor, None]:
    """Attention of transformers, (batch, n_heads, n, head_dim) each: (batch, n, n_heads, head_dim).

    torch's own emulates bfloat16 where there is no AMX. Here a single query, as in decoding, is two products of matrix
    and vector in float32; a whole window goes one head at a time, so that its scores stay in the cache: they are
    rounded to bfloat16, which its other roundings outweigh.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    n_query, n_key = query.shape[2], key.shape[2]
    if n_query == 1:
        query3, key3, value3 = (states.float().flatten(0, 1) for states in (query, key, value))
        weights = torch.bmm(key3, query3.transpose(1, 2)).transpose(1, 2).softmax(-1)
        context = torch.bmm(value3.transpose(1, 2), weights.transpose(1, 2)).to(query.dtype)
        return context.view(query.shape).transpose(1, 2), None
    if n_query < n_key or module.is_causal:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    context, scores = query.new_empty(query.transpose(1, 2).shape), query.new_empty(n_query, n_key)
    heads = (states.flatten(0, 1) for states in (query, key, value))
    for q, k, v, out in zip(*heads, (out for row in context for out in row.unbind(1)), strict=True):
        torch.mm(q, k.T, out=scores)
        torch.softmax(scores, -1, out=scores)
        torch.mm(scores, v, out=out)
    return context, None


def use_cpu_kernels(model: torch.nn.Module) -> None:
    """Give a model in bfloat16 on a CPU, which is not moved any more, cpu_attention and packed weights."""
    import transformers

    transformers.AttentionInterface.register("cpu_attention", cpu_attention)
    transformers.AttentionMaskInterface.register("cpu_attention", transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation("cpu_attention")
    # oneDNN reads weights in an order of its own, for which torch has no public function: without these two, a step of
    # the decoder takes a third longer. Where they go, so may these lines.
    pack, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(pack(module.weight.detach(), 1), requires_grad=False)
            module.forward = lambda x, m=module: linear(x, m.weight, m.bias, "none", [], "none")


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, language: str = "ja", task: str = "transcribe"
) -> Recognizer:
    """Load a Whisper model from the hub or a local folder, from safetensors and without remote code.

    Raises SetupError where it cannot be loaded whole, does not know the language, or does not fit the device.
    """
    transformers = import_transformers()
    folder = name if os.path.isdir(name) else download_model(name)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type != "whisper":
            raise ValueError(f"a model of type {config.model_type}, not whisper")
        generation = transformers.GenerationConfig.from_pretrained(folder)
        languages = getattr(generation, "lang_to_id", None) or {}
        if f"<|{language}|>" not in languages:
            known = " ".join(sorted(token.strip("<|>") for token in languages)) or "none (it is not multilingual)"
            raise SetupError(f"--language {language}: not a language of {name}, which knows {known}")
        processor = transformers.WhisperProcessor.from_pretrained(folder)
        prompt = prompt_of(config, generation, processor, language, task)
        # In place of two logits processors of transformers, for which an NPU sorts the vocabulary at every token.
        bias = torch.zeros(2, config.vocab_size)
        bias[:, generation.suppress_tokens or []] = -math.inf
        bias[0, generation.begin_suppress_tokens or []] = -math.inf
        model, report = transformers.WhisperForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
        )
        extra = [key for key in report["unexpected_keys"] if ".layers." in key]
        if bad := [*report["missing_keys"], *report["mismatched_keys"], *extra]:
            raise ValueError(f"{len(bad)} weights are missing, too many or of another shape, among them {bad[0]}")
    except SetupError:
        raise
    except Exception as error:  # broken files raise OSError, ValueError, KeyError, SafetensorError and others
        raise SetupError(f"cannot load the model {name}: {first_line(error)} (is it whole?)") from error
    with device_errors(device):
        model = model.eval().to(device)
        if device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            use_cpu_kernels(model)  # after which it cannot be moved any more
        return Recognizer(model, processor.feature_extractor, processor.tokenizer, prompt.to(device), bias.to(device))


def endless(recognizer: Recognizer) -> Recognizer:
    """The same one, which never chooses the end of the text: it decodes to the limit, whatever the model finds."""
    bias = recognizer.bias.clone()
    bias[:, recognizer.tokenizer.eos_token_id] = -math.inf
    return replace(recognizer, bias=bias)


# --- Audio: path -> chunks ---


def sweep() -> np.ndarray:
    """The default input of the evaluations: a sine from 200 to 800 Hz in three seconds, (48000,) float32."""
    t = np.arange(3 * SAMPLING_RATE) / SAMPLING_RATE
    return (0.5 * np.sin(2 * np.pi * (200 * t + 100 * t**2))).astype(np.float32)


def check_file(path: str) -> None:
    """Raise AudioError where there is no file that could hold audio."""
    if not os.path.isfile(path):
        raise AudioError("not a regular file" if os.path.exists(path) else "no such file or folder")
    if os.path.getsize(path) == 0:
        raise AudioError("empty (0 bytes)")
    if not os.access(path, os.R_OK):
        raise AudioError("no permission to read it")


def mix_down(block: np.ndarray) -> np.ndarray:
    """The mean of all channels, (n, n_channels) to (n,) float32. Raises AudioError for what is no audio.

    Where it is far quieter than a channel, because channels cancel out or most are silent, it is that channel.
    """
    if not (loudest := np.abs(block).max()) <= LOUDEST_SAMPLE:
        is_number = loudest < np.inf
        raise AudioError(f"samples of {loudest:g} where 1 is full scale" if is_number else "NaN or infinite samples")
    slopes = np.diff(block, axis=0, prepend=block[:1])  # in which speech outdoes a hum
    mix_power, powers = np.square(slopes.mean(axis=1)).mean(), np.square(slopes).mean(axis=0)
    return block.mean(axis=1) if mix_power >= powers.max() / FAR_QUIETER else block[:, powers.argmax()]


class Part(io.RawIOBase):
    """The bytes from start to end of an open file, as a file of its own."""

    def __init__(self, file: io.FileIO, start: int, end: int):
        self.file, self.start, self.end = file, start, end
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As any file's."""
        base = {os.SEEK_SET: self.start, os.SEEK_CUR: self.file.tell(), os.SEEK_END: self.end}[whence]
        return self.file.seek(max(self.start, base + offset)) - self.start

    def readinto(self, buffer) -> int:
        """As any file's."""
        return self.file.readinto(memoryview(buffer)[: max(0, self.end - self.file.tell())])


def sound_blocks(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """The samples of an open file, second by second: (n, n_channels) float32. Raises AudioError."""
    n_read, limit = 0, sound.frames if sound.format == "FLAC" else math.inf  # in FLAC it would read on into the next
    try:
        while n := min(sound.samplerate, 1 << 20, limit - n_read):
            if not len(block := sound.read(n, dtype="float32", always_2d=True)):
                break
            n_read += len(block)
            yield block
        if sound.format == "OGG" and n_read < sound.frames:  # libsndfile passes over a hole
            raise AudioError(f"damaged: {n_read / sound.frames:.1%} of it can be read; {RESCUE}")
    except soundfile.LibsndfileError as error:
        raise AudioError(f"damaged after {n_read / sound.samplerate:.0f} s: {error.error_string}") from error


def riff_end(file: io.FileIO, start: int, size: int) -> int:
    """Where the recording at start ends: at size or, in WAV and AIFF, before the next, which libsndfile chokes on."""
    header = os.pread(file.fileno(), 8, start)
    end = start + 8 + int.from_bytes(header[4:], "little" if header[:4] == b"RIFF" else "big")
    return end if header[:4] in (b"RIFF", b"RIFX", b"FORM") and os.pread(file.fileno(), 4, end) == header[:4] else size


def next_recording(file: io.FileIO, start: int, sound: soundfile.SoundFile) -> int | None:
    """Where the next recording begins in a file of which libsndfile has read the one at start; the file's size if none.

    libsndfile stops after the frames that the head of an MP3 file promises and, but for what it reads ahead, at the end
    of the first recording of another format. None where it may have stopped early: it guesses the length of an MP3 file
    without such a head from the first bit rates, and then gives less than it has decoded.
    """
    position, size, is_mp3 = file.tell(), os.fstat(file.fileno()).st_size, sound.format == "MP3"
    tag = os.pread(file.fileno(), 10, start)  # 28 bits of it are its length
    begin = start + (10 + sum(tag[9 - i] << 7 * i for i in range(4)) if tag[:3] == b"ID3" else 0)
    tagged = is_mp3 and os.pread(file.fileno(), 8, position).startswith((b"TAG", b"APETAGEX", b"LYRICSBE"))
    first = position if is_mp3 else max(begin + 1, position - READ_AHEAD)
    last = position + (TWO_MP3_FRAMES if is_mp3 and not tagged else READ_AHEAD)
    data = os.pread(file.fileno(), last - first, first)
    if found := re.search(RECORDING_STARTS.get(sound.format, OTHER_STARTS), data, re.DOTALL):
        return first + found.start(1)
    if not is_mp3 or tagged:
        return size
    if re.search(b"Xing|Info", os.pread(file.fileno(), 64, begin)):
        return size if last >= size else None
    return None if sound.tell() >= sound.frames and (data or shutil.which("ffmpeg")) else size


def ffmpeg_error(messages: bytes, status: int = 1) -> AudioError | None:
    """What is wrong with the sound according to ffmpeg, which ends with status 0 after some damage; None if nothing."""
    lines = [line for line in messages.decode(errors="replace").splitlines() if not re.match(PICTURE_MESSAGE, line)]
    if any("matches no streams" in line for line in lines):
        return AudioError("no sound in it, only a picture")
    if not lines and status == 0:
        return None
    reason = re.sub(r"^(\[[^]]*\] )+", "", lines[0]) if lines else "ffmpeg does not say why"
    return AudioError(f"damaged, or not audio ({reason}); {RESCUE}")


def ffmpeg_blocks(path: str, skipped_s: float) -> Iterator[tuple[int, np.ndarray]]:
    """The samples of whatever ffmpeg reads, as read_blocks gives them, from skipped_s seconds on.

    They come raw, with no header that could be read in two ways. A first run tells the sampling rate and the number of
    channels: framecrc writes a line of text for a packet.
    """
    # file: keeps a name like concat:x from being taken for a protocol.
    command = ["ffmpeg", "-nostdin", "-v", "repeat+error", "-xerror", "-i", f"file:{path}", "-map", "0:a:0"]
    command += ["-c:a", "pcm_f32le"]
    probe = subprocess.run([*command, "-frames:a", "1", "-f", "framecrc", "pipe:1"], capture_output=True)
    packet = re.search(rb"#sample_rate 0: (\d+)\n(?:#.*\n)*0,.*?,.*?, *(\d+), *(\d+),", probe.stdout)
    if packet is None:
        raise ffmpeg_error(probe.stderr)
    rate, n_samples, n_bytes = map(int, packet.groups())
    n_channels = n_bytes // (4 * n_samples)
    # The timestamps of joined recordings begin anew; those of the samples' number do not.
    filters = f"asetpts=N/SR/TB,atrim=start_sample={round(skipped_s * rate)}"
    command += ["-af", filters, "-ar", str(rate), "-ac", str(n_channels), "-f", "f32le", "pipe:1"]
    with (
        tempfile.TemporaryFile() as messages,  # a pipe that nobody reads could block ffmpeg
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        try:
            while block := process.stdout.read(4 * n_channels * min(rate, 1 << 20)):
                yield rate, mix_down(np.frombuffer(block, "<f4").reshape(-1, n_channels))
            process.wait()
        finally:
            process.kill()
        messages.seek(0)
        if error := ffmpeg_error(messages.read(), process.returncode):
            raise error


def read_blocks(path: str) -> Iterator[tuple[int, np.ndarray]]:
    """The samples of a file, mixed down, second by second: (sampling rate in Hz, (n,) float32), at least once.

    Recordings joined to one file, as by cat, are read one after the other. What libsndfile cannot read goes through
    the ffmpeg program. Raises AudioError.
    """
    check_file(path)
    start, size, read_s, reason = 0, os.path.getsize(path), 0.0, "it goes on after what libsndfile reads"
    try:
        with open(path, "rb", buffering=0) as file:
            while start is not None and start < size:
                end = riff_end(file, start, size)
                # By descriptor: libsndfile loses an interrupt within a Part, and by its name x.raw passes for audio.
                part = file.fileno() if (start, end) == (0, size) else Part(file, start, end)
                with soundfile.SoundFile(part, closefd=False) as sound:
                    sound.seekable = lambda: False  # else it seeks after every read, and MP3 is wrong for 40 ms
                    for block in sound_blocks(sound):
                        read_s += len(block) / sound.samplerate
                        yield sound.samplerate, mix_down(block)
                    start = end if end < size else next_recording(file, start, sound)
        if read_s == 0:  # also where a recorder has not written the length
            start, reason = None, "0 samples"
    except OSError as error:
        raise AudioError(error.strerror or first_line(error)) from error
    except soundfile.LibsndfileError as error:
        start, reason = None, error.error_string.rstrip(".")
    if start is None and shutil.which("ffmpeg") is None:
        remedy = "for m4a, mp4, webm and others put the ffmpeg program on the PATH"
        raise AudioError(f"not audio that libsndfile reads ({reason}); {remedy}")
    if start is None:
        yield from ffmpeg_blocks(path, read_s)


def mean_squares(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Mean square of a waveform without its offset, over LEVEL_WINDOW_S, every LEVEL_HOP_S: (n >= 1,) float64."""
    hop = min(len(waveform), max(1, round(LEVEL_HOP_S * rate)))
    frames = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    energy = np.var(frames, axis=1, dtype=np.float64)
    window = min(len(energy), round(LEVEL_WINDOW_S / LEVEL_HOP_S))
    return np.convolve(energy, np.full(window, 1 / window), "valid")


def quietest_cut(waveform: np.ndarray, rate: int) -> int:
    """Index of the quietest moment in the latter half of a waveform; of equally quiet ones the last."""
    half = len(waveform) // 2
    level = mean_squares(waveform[half:], rate)
    quietest = len(level) - 1 - int(np.argmin(level[::-1]))
    return max(1, half + quietest * max(1, round(LEVEL_HOP_S * rate)) + round(LEVEL_WINDOW_S / 2 * rate))


def split_at_pauses(
    blocks: Iterable[np.ndarray], rate: int, chunk_length_s: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Chunks that tile the blocks without gap or overlap: (index of the first sample, waveform).

    Audio that fits the window of the model is one chunk. Of longer audio, each stretch of chunk_length_s
    seconds is cut at the quietest moment of its latter half. Little more than a window is held in memory.
    """
    longest, window = round(chunk_length_s * rate), WINDOW_S * rate
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


def import_librosa() -> types.ModuleType:
    """librosa, also for a user who may write neither where it is installed nor at home: numba must keep a cache."""
    import librosa

    try:
        librosa.resample  # noqa: B018  (imported when it is used)
    except RuntimeError:
        import numba

        numba.config.CACHE_DIR = folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return librosa


def read_chunks(path: str, chunk_length_s: float) -> Iterator[tuple[float, float, np.ndarray | None]]:
    """The chunks of an audio file: start and end in seconds, waveform (n_samples,) float32 at SAMPLING_RATE.

    The waveform is None where nothing in the chunk is louder than SILENCE_DBFS. Raises AudioError.
    """
    offset_s = end = 0.0
    for rate, blocks in itertools.groupby(read_blocks(path), operator.itemgetter(0)):  # joined recordings may differ
        for first, chunk in split_at_pauses((block for _, block in blocks), rate, chunk_length_s):
            start, end = offset_s + first / rate, offset_s + (first + len(chunk)) / rate
            if mean_squares(chunk, rate).max() < 10 ** (SILENCE_DBFS / 10):
                chunk = None
            elif rate != SAMPLING_RATE:
                chunk = import_librosa().resample(chunk, orig_sr=rate, target_sr=SAMPLING_RATE)
                chunk = chunk[: WINDOW_S * SAMPLING_RATE]  # rounding may make one more
            yield start, end, chunk
        offset_s = end


# --- Recognition: chunks -> token ids ---


def extract_features(extractor: Callable, waveform: np.ndarray) -> torch.Tensor:
    """input_features (1, n_mels, n_frames) float32 on the CPU. Raises ValueError for more than the model's window."""
    if len(waveform) > WINDOW_S * SAMPLING_RATE:
        raise ValueError(f"{len(waveform)} samples do not fit a window of {WINDOW_S} s")
    return extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features


def encode(model: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    """The encoder's output for input_features on its device, (batch, n_positions, d_model).

    A row is NaN where float16 overflowed on the way to the last layer: transformers clamps what overflows.
    """
    encoder, peaks = model.model.encoder, []
    n_rows = 1 if model.device.type == "cpu" else len(features)  # a CPU computes out of its caches
    with encoder.layer_norm.register_forward_pre_hook(lambda _, inputs: peaks.append(inputs[0].abs().amax((1, 2)))):
        encoded = torch.cat([encoder(rows).last_hidden_state for rows in features.split(n_rows)])
    clamped = torch.cat(peaks) >= (CLAMPED_FLOAT16 if model.dtype == torch.float16 else math.inf)
    return encoded.masked_fill(clamped[:, None, None], math.nan)


def decode(
    recognizer: Recognizer, encoded: torch.Tensor, max_new_tokens: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy decoding of an encoder's output: the token ids of each row, as model.generate would give them, to the
    end-of-text id or the limit and without the prompt; and the score, logit plus bias, of each.

    The host does less for a token than in model.generate, and it waits for the device once in CHECK_EVERY tokens.
    Raises DeviceError where a score is NaN or infinite.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    model, end, bias = recognizer.model, recognizer.tokenizer.eos_token_id, recognizer.bias
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    token_ids = recognizer.prompt.expand(len(encoded), -1)  # a copy from the host would wait for the encoder
    positions = torch.arange(PROMPT_LENGTH + max_new_tokens, device=model.device)
    position = positions[:PROMPT_LENGTH]
    ended, chosen = torch.zeros(len(encoded), dtype=torch.bool, device=model.device), []
    for i in range(max_new_tokens):
        hidden = model.model.decoder(
            input_ids=token_ids, encoder_hidden_states=encoded, past_key_values=cache, cache_position=position
        ).last_hidden_state[:, -1]
        if i == 0 and model.config._attn_implementation == "cpu_attention":
            for layer in cache.cross_attention_cache.layers:  # laid out once, as cpu_attention reads them fastest
                layer.keys = layer.keys.float()
                layer.values = layer.values.transpose(2, 3).contiguous().float().transpose(2, 3)
        chosen.append((model.proj_out(hidden).float() + bias[min(i, 1)]).max(-1))
        ended |= chosen[i].indices == end
        if (i + 1) % CHECK_EVERY == 0 and ended.all():
            break
        token_ids, position = chosen[i].indices[:, None], positions[PROMPT_LENGTH + i : PROMPT_LENGTH + i + 1]
    rows = torch.stack([step.indices for step in chosen], 1).tolist()
    rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
    scores = torch.stack([step.values for step in chosen], 1).tolist()
    scores = [of_row[: len(row)] for row, of_row in zip(rows, scores, strict=True)]
    if not np.isfinite(list(itertools.chain(*scores))).all():
        remedy = "--dtype bfloat16 or float32 may hold them" if model.dtype == torch.float16 else "is the model whole?"
        raise DeviceError(f"{model.device} computes NaN or infinity in {str(model.dtype)[6:]}: {remedy}")
    return rows, scores


def generate(recognizer: Recognizer, features: list[torch.Tensor], max_new_tokens: int) -> tuple:
    """What decode gives for a batch of features, token ids and scores, and the encoder's output. Raises DeviceError."""
    model = recognizer.model
    with torch.inference_mode(), device_errors(model.device):
        encoded = encode(model, torch.cat(features).to(model.device, model.dtype))
        return *decode(recognizer, encoded, max_new_tokens), encoded
