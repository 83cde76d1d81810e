"""What the three scripts share, in the order in which a recording passes through it.

    path -> waveform -> chunks -> input_features -> token_ids
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

# Else `import torch` fails where torch_npu is installed and CANN is not; start_npu turns that into one line.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else the C++ of torch writes a backtrace for what it raises
# Waiting threads of OpenMP then go to sleep soon. By default they spin, which makes everything ten times slower where
# another job uses one of the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
import torch

MODEL = "kotoba-tech/kotoba-whisper-v2.0"
SAMPLING_RATE, WINDOW_S = 16_000, 30  # of every Whisper, Hz and s
N_POSITIONS = 448  # of every Whisper decoder
START_LENGTH = 4  # the number of tokens in <|startoftranscript|>, language, task, <|notimestamps|>
MAX_NEW_TOKENS = N_POSITIONS - START_LENGTH
MAX_PROMPT_TOKENS = N_POSITIONS // 2 - 1  # as in openai/whisper


class SetupError(Exception):
    """The options, the device or the model cannot be used; the message is one line for the user."""


class DeviceError(SetupError):
    """The device failed, or the model computed NaN on it."""


class OutOfMemoryError(DeviceError):
    """The batch did not fit the device's memory; a smaller one may."""


class AudioError(Exception):
    """One recording cannot be read; the message is one line for the user."""


# --- Options and output ---

CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"  # characters that end a line or steer a terminal


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: an int or a float that is not below low and not above high."""

    def parse(text: str) -> float:
        """The number that the text is."""
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        limits = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {limits}")

    return parse


def add_model_options(
    parser: argparse.ArgumentParser, without_npu: str = "the CPU is used, with a warning", max_new_tokens: int = 256
) -> None:
    """Declare the options that all three scripts have; without_npu says what happens where no NPU is usable."""
    add = parser.add_argument_group("model, device and decoding").add_argument
    add("--model", type=os.path.expanduser, default=MODEL, metavar="NAME", help="A model on the hub, which the first "
        "run downloads (1.5 GB), or a local folder. (default: %(default)s)")  # fmt: skip
    add("--device", metavar="NAME", help="npu, npu:N, cpu, cuda or cuda:N. (default: the NPU; where none is usable, "
        f"{without_npu})")  # fmt: skip
    add("--dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto",
        help="auto is float16 on an accelerator. On a CPU it is bfloat16 where the processor computes that natively "
        "(AMX or AVX512-BF16), else float32. (default: %(default)s)")  # fmt: skip
    add("--max-new-tokens", type=number(int, 1, MAX_NEW_TOKENS), default=max_new_tokens, metavar="N",
        help=f"The most tokens that a chunk may have, from 1 to {MAX_NEW_TOKENS}. (default: %(default)s)")
    add("--chunk-length", type=number(float, 1, WINDOW_S), default=15, metavar="SECONDS",  # as the model's authors do
        help=f"The longest stretch that is decoded at once in recordings over {WINDOW_S} s. (default: %(default)s)")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(message: str) -> str:
    """The message with escapes for line breaks and other control characters, which a file's name may have."""
    return re.sub(CONTROL, lambda match: repr(match[0])[1:-1], message)


def notice(message: str) -> None:
    """Write one line to stderr, above a progress bar: the script's name and the message."""
    program = os.path.basename(sys.argv[0])
    if torch.distributed.is_torchelastic_launched():
        program += f", rank {os.environ.get('RANK')}"
    with contextlib.suppress(OSError):  # a full disk: the results matter more
        if sys.stderr is not None:
            tqdm.write(one_line(f"{program}: {message}") + "\n", file=sys.stderr, end="")


def write_stdout(text: str) -> None:
    """Write results. Raises BrokenPipeError where the reader has gone, and SetupError where stdout takes nothing."""
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


def interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt with the signal's number, so that SIGTERM and SIGHUP end the run as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def run_script(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Call run(args) and return the exit status; where the run ends early, one line on stderr says why."""
    with contextlib.suppress(AttributeError):  # a StringIO in the place of stdout takes any text
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale and the file names
    signals = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    signals = [number for number in signals if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in signals:
        signal.signal(number, interrupt)
    try:
        return run(args)
    except BrokenPipeError:  # the reader of stdout, such as head, has seen enough
        return 141
    except (SetupError, OSError) as error:
        message, status = f"error: {first_line(error)}", 2
    except KeyboardInterrupt as error:
        [number] = error.args or [signal.SIGINT]
        message, status = f"interrupted by {signal.Signals(number).name}", 128 + number
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
    notice(message)
    return status


# --- Device ---


NPU_REMEDIES = {  # what to do, by what torch_npu or CANN says
    "No module named 'torch_npu'|undefined symbol": "install the torch-npu that goes with torch "
    + torch.__version__.partition("+")[0],
    "libascend_hal|driver": "mount the driver, /usr/local/Ascend/driver, into the container",
    "lib[a-z_]+[.]so|ASCEND_[A-Z]+|set_env|500001": "source /usr/local/Ascend/cann/set_env.sh (CANN 8.5 and later) or "
    "/usr/local/Ascend/ascend-toolkit/set_env.sh, and install the Python packages that CANN needs",
    "": "see in npu-smi info what holds it",
}


def select_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The named device; without a name the NPU or else, with a warning that says why, the CPU.

    Process local_rank of a machine takes the NPU or GPU of that number unless another is named. To be called before
    transformers is imported. Raises SetupError where the named device cannot be used.
    """
    if name is not None and not re.fullmatch(r"cpu|(npu|cuda)(:\d{1,3})?", name):
        raise SetupError(f"--device {name}: not npu, npu:N, cpu, cuda or cuda:N")
    kind, _, index = (name or "npu").partition(":")
    if kind == "npu":
        try:
            return torch.device("npu", start_npu(int(index) if index else None, local_rank))
        except SetupError as error:
            if name is not None:
                raise SetupError(f"--device {name}: {error}; or use --device cpu") from error
            notice(f"warning: no NPU here, so the CPU is used: {error}; --device cpu leaves this line out")
            return torch.device("cpu")
    sys.modules.setdefault("torch_npu", None)  # else transformers imports it, which fails where CANN is absent
    index = int(index or local_rank)
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise SetupError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
                         "name one of these, or cpu")  # fmt: skip
    return torch.device(kind, index if kind == "cuda" else None)


def start_npu(index: int | None, local_rank: int) -> int:
    """Start an NPU, by default number local_rank modulo their count; returns its index. Raises SetupError."""
    try:
        import torch_npu
    except Exception as error:  # torch_npu raises a plain Exception where CANN is incomplete
        sys.modules["torch_npu"] = None  # else transformers imports it again, unguarded
        raise npu_error("torch_npu cannot be loaded", error) from error
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
        raise npu_error(f"npu:{index or 0} does not start", error) from error
    if hasattr(torch_npu, "npu_gelu"):
        use_exact_gelu(torch_npu)
    return index


def npu_error(problem: str, error: BaseException) -> SetupError:
    """The error to raise where an NPU does not start: the problem, its cause in brackets, and what to do."""
    remedy = next(remedy for said, remedy in NPU_REMEDIES.items() if re.search(said, str(error), re.IGNORECASE))
    return SetupError(f"{problem} ({first_line(error)}): {remedy}")


def use_exact_gelu(torch_npu) -> None:
    """Make transformers call the exact GELU on an NPU; to be called before a model is loaded.

    F.gelu of torch_npu 2.9.0 computes the tanh approximation, but Whisper was trained with the exact function.
    """
    gelu_of_torch = torch.nn.functional.gelu

    def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        """What is called in the place of torch's own."""
        function = torch_npu.npu_gelu if x.device.type == "npu" else gelu_of_torch
        return function(x, approximate=approximate)

    torch.nn.functional.gelu = gelu


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named dtype; auto is the fastest that computes well on the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.float16
    # No public function says so.
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as --dtype takes it."""
    return str(dtype).removeprefix("torch.")


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
    """The versions and the device that a measurement depends on; the name of a CPU says what bfloat16 it computes."""
    import transformers

    name, torch_npu, cann = platform.machine(), None, None
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    features = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
    name += f" with {' and '.join(filter(features.get, features)) or 'neither AMX nor AVX512-BF16'}"
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device.index)
    if device.type == "npu":
        torch_npu = sys.modules["torch_npu"].__version__
        with contextlib.suppress(AttributeError):
            cann = torch.npu.utils.get_cann_version()
    return {
        "device": str(device), "device_name": name, "torch": torch.__version__, "torch_npu": torch_npu, "cann": cann,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),  # macOS has none
    }  # fmt: skip


# --- Model ---


def untimed(stage: str) -> None:
    """Do nothing. eval_performance.py puts a stopwatch in the place of this."""


@dataclass(frozen=True)
class Recognizer:
    """A Whisper model on its device, with all that is needed to use it.

    The tensors are on the device too. initial_tokens, (n,) int64, come before every text: the prompt's, if there is
    one, and the START_LENGTH of start_sequence. token_mask, (2, n_vocab) float32: added to the logits; -inf forbids a
    token. Row 0 is for the first token of a text, row 1 for all others. lap is called with the name of each stage of
    the work when it ends.
    """

    model: torch.nn.Module
    extractor: Callable  # WhisperFeatureExtractor
    tokenizer: Callable
    initial_tokens: torch.Tensor
    token_mask: torch.Tensor
    lap: Callable[[str], None] = untimed


def download_model(name: str) -> str:
    """The folder with the files of a model on the hub, downloaded if they are not there yet. Raises SetupError."""
    import huggingface_hub

    try:
        patterns = ["*.json", "*.txt", "model.safetensors", "model-*.safetensors"]
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # no such model, a full disk, whatever the network raises
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or type(cause).__name__  # what the network says has 600 characters
        remedy = "check the name (a private model needs hf auth login); where the hub cannot be reached, set "
        remedy += "HF_ENDPOINT=https://hf-mirror.com, or name a folder that has the model"
        hub = huggingface_hub.constants.ENDPOINT
        raise SetupError(f"--model {name}: no such folder, and no download from {hub} ({reason}): {remedy}") from error


def prompt_tokens(tokenizer, text: str) -> list[int]:
    """The ids of <|startofprev|> and the tokens of a prompt; none where it is blank. Raises SetupError."""
    if not text.strip():
        return []
    try:
        text.encode()
        ids = tokenizer.get_prompt_ids(text).tolist()
    except ValueError as error:  # a special token, or bytes that are not UTF-8
        raise SetupError(f"--prompt must be plain text: {first_line(error)}") from error
    if (n_tokens := len(ids) - 1) > MAX_PROMPT_TOKENS:
        limit = f"more than the {MAX_PROMPT_TOKENS} that may come before a text"
        raise SetupError(f"--prompt: its {n_tokens} tokens are {limit}: leave out what matters least")
    return ids


def start_sequence(generation, tokenizer, language: str, task: str) -> list[int]:
    """The ids of the START_LENGTH tokens that stand right before every text, as model.generate would choose them.

    Raises SetupError where the model does not know the language, and ValueError where its tokenizer is another model's.
    """
    languages = getattr(generation, "lang_to_id", None) or {}
    if f"<|{language}|>" not in languages:
        known = " ".join(sorted(token.strip("<|>") for token in languages))
        none = "none (it is English only, or needs the generation_config.json of its openai/whisper model)"
        raise SetupError(f"--language {language}: not a language of this model, which knows {known or none}")
    ids = [generation.decoder_start_token_id, languages[f"<|{language}|>"], generation.task_to_id[task],
           generation.no_timestamps_token_id]  # fmt: skip
    names = ["<|startoftranscript|>", f"<|{language}|>", f"<|{task}|>", "<|notimestamps|>"]
    if (found := tokenizer.convert_ids_to_tokens(ids)) != names:
        raise ValueError(f"its generation_config.json and its tokenizer do not fit: {found} in place of {names}")
    return ids


def needs_cpu_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention is cpu_attention: torch's own is slow in bfloat16 on a CPU that does not have AMX."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def cpu_attention(module, query, key, value, attention_mask, **options) -> tuple[torch.Tensor, None]:
    """Attention as transformers asks for it: (batch, n_heads, n, head_dim) each to (batch, n, n_heads, head_dim).

    In the encoder one head after another, so that its scores stay in the processor's cache; in the decoder in float32.
    The queries are scaled already, as in all of Whisper.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if module.is_causal or query.shape[2] < key.shape[2]:
        states = query.float(), key.float(), value.float()
        context, weights = sdpa_attention_forward(module, *states, attention_mask, **options)
        return context.to(query.dtype), weights
    context, scores = torch.empty_like(query), query.new_empty(query.shape[2], key.shape[2])
    for q, k, v, out in zip(*(states.flatten(0, 1) for states in (query, key, value, context)), strict=True):
        torch.softmax(torch.mm(q, k.T, out=scores), -1, out=scores)
        torch.mm(scores, v, out=out)
    return context.transpose(1, 2), None


def load_weights(folder: str, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """The model of a folder, from safetensors and without remote code. Raises ValueError where weights are missing."""
    import transformers

    transformers.AttentionInterface.register("cpu_attention", cpu_attention)
    transformers.AttentionMaskInterface.register("cpu_attention", transformers.masking_utils.sdpa_mask)
    model, report = transformers.WhisperForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, use_safetensors=True, output_loading_info=True
    )
    extra = [key for key in report["unexpected_keys"] if ".layers." in key]
    if bad := [*report["missing_keys"], *report["mismatched_keys"], *extra]:
        raise ValueError(f"{len(bad)} weights are missing, too many or of another shape, among them {bad[0]}")
    return model.eval()


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, language: str = "ja", task: str = "transcribe",
    prompt: str = "",
) -> Recognizer:  # fmt: skip
    """Load a Whisper model from the hub or a local folder; prompt is a text with names and terms of the recordings.

    Raises SetupError where it cannot be loaded whole, does not know the language, does not fit the device, or where the
    prompt is too long.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # what it warns of is checked here, and said in one line
    folder = name if os.path.isdir(name) else download_model(name)
    try:
        import librosa.sequence  # noqa: F401  (here, where it counts as loading, and is one line if numba fails)

        if adapter := [file for file in os.listdir(folder) if file.startswith("adapter_")]:
            remedy = "merge it into the model first (merge_and_unload of peft), and name the folder of the result"
            raise SetupError(f"--model {name}: its LoRA adapter ({adapter[0]}) would not be applied: {remedy}")
        generation = transformers.GenerationConfig.from_pretrained(folder)
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        try:  # transformers 5 saves a list under this name, which transformers 4 does not load and does not need
            tokenizer = transformers.WhisperTokenizerFast.from_pretrained(folder, extra_special_tokens={})
        except Exception as error:  # transformers gives a false reason: it asks for the library protobuf
            raise ValueError("its tokenizer.json or tokenizer_config.json is missing or broken") from error
        initial_tokens = prompt_tokens(tokenizer, prompt) + start_sequence(generation, tokenizer, language, task)
        model = load_weights(folder, dtype, "cpu_attention" if needs_cpu_attention(device, dtype) else "sdpa")
        config = model.config
        shape = extract_features(extractor, np.zeros(1, np.float32)).shape[1:]
        if shape != (needed := (config.num_mel_bins, 2 * config.max_source_positions)):
            raise ValueError(f"its preprocessor_config.json gives {tuple(shape)} mel bins and frames, not {needed}")
        # Two logits processors of transformers do the same, but make an NPU sort the vocabulary at every token.
        token_mask = torch.zeros(2, config.vocab_size)
        token_mask[:, generation.suppress_tokens or []] = -math.inf
        token_mask[0, generation.begin_suppress_tokens or []] = -math.inf
    except SetupError:
        raise
    except Exception as error:  # broken files raise OSError, ValueError, KeyError, SafetensorError and others
        remedy = "are its folder and the installed packages complete?"
        raise SetupError(f"cannot load the model {name}: {first_line(error)} ({remedy})") from error
    with device_errors(device):
        initial_tokens, token_mask = torch.tensor(initial_tokens, device=device), token_mask.to(device)
        return Recognizer(model.to(device), extractor, tokenizer, initial_tokens, token_mask)


# --- Audio: path -> waveform -> chunks ---

LOUDEST_SAMPLE = 100.0  # 40 dB above full scale: samples beyond are integers written as floats, or damage
MAX_BLOCK = 1 << 22  # samples of all channels that are read at once
STRETCH_S = 8  # a channel on which nothing moves for so long is left out of the mix if something moves on another
STEADY_DB, STEADY_WINDOW_S = 3, 0.1  # least variation of speech; the steadiest of 475 inputs has 4.9 dB
QUIET = 1e-6  # a mean square, -60 dBFS: Whisper's features are cut off not far below
SHORTEST_STEADY_S = 2  # a word that is cut out tightly can be steady for 1.5 s
LEVEL_HOP_S = 0.01  # from one measurement of loudness to the next
PAUSE_S = 0.3  # longer than the silence inside a stop consonant or a small tsu, which is no pause
SHORTEST_TAIL_S = 1.0  # Whisper invents text for a scrap of speech


@dataclass(eq=False)
class Chunk:
    """A stretch of a recording that is decoded at once; start and end in seconds from the recording's beginning."""

    start: float
    end: float
    waveform: np.ndarray  # (n_samples,) float32 at SAMPLING_RATE


def read_chunks(path: str, chunk_length_s: float, warn: Callable[[str], None]) -> Iterator[Chunk]:
    """The chunks of a recording, at least one, which tile it.

    warn is called with one line for what may be lost. Raises AudioError.
    """
    import librosa

    n_read, loudest = 0, 0.0  # samples; and the greatest mean square of what may be speech
    with open_sound(path, warn) as sound:
        for waveform in split_at_pauses(mix_down(sound.blocks(), sound.rate), sound.rate, chunk_length_s):
            start, n_read = n_read / sound.rate, n_read + len(waveform)
            if sound.rate != SAMPLING_RATE:
                waveform = librosa.resample(waveform, orig_sr=sound.rate, target_sr=SAMPLING_RATE)
            waveform = waveform[: WINDOW_S * SAMPLING_RATE]  # rounding may add a sample
            if loudest < QUIET and not is_steady(waveform, SAMPLING_RATE):
                loudest = max(loudest, mean_squares(waveform, SAMPLING_RATE, STEADY_WINDOW_S).max())
            yield Chunk(start, n_read / sound.rate, waveform)
    if 0 < loudest < QUIET:
        warn(f"very quiet, {10 * math.log10(loudest):.0f} dBFS where it is loudest: amplify it, or words may be lost")


class Sound:
    """A recording that libsndfile reads once, from its beginning on."""

    def __init__(self, source) -> None:
        """source is an open file or a pipe. Raises AudioError where libsndfile cannot read it."""
        try:
            self.decoder = soundfile.SoundFile(source.fileno(), closefd=False)
        except soundfile.LibsndfileError as error:
            raise AudioError(error.error_string.rstrip(".")) from error
        if (self.decoder.format, self.decoder.subtype) == ("W64", "PCM_32"):
            raise AudioError("32-bit W64, whose floats it takes for integers")
        if self.decoder.frames == 0:
            raise AudioError("it has no samples")
        self.decoder.seekable = lambda: False  # else soundfile seeks after every read, and MP3 is wrong for 40 ms
        self.rate, n_frames = self.decoder.samplerate, self.decoder.frames  # rate in Hz
        is_known = self.decoder.format != "MP3" and n_frames < 1 << 40  # in MP3 it may be an estimate
        self.declared_s = n_frames / self.rate if is_known else 0.0  # 0: not known
        self.read_s, self.problem = 0.0, ""  # how much of it has been read, and one line for what may be lost

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples second by second, as far as the file is whole: (n_channels, n) float32. Raises AudioError for
        samples that cannot be sound."""
        n = min(self.rate, MAX_BLOCK // self.decoder.channels)
        # In FLAC it would read what follows the sound.
        left = self.decoder.frames if self.decoder.format == "FLAC" else math.inf
        try:
            while len(block := self.decoder.read(min(n, left), "float32", always_2d=True)):
                left -= len(block)
                self.read_s += len(block) / self.rate
                channels = np.ascontiguousarray(block.T)  # their mean takes a tenth of the time
                if not (loudest := max(channels.max(), -channels.min())) <= LOUDEST_SAMPLE:  # or NaN
                    raise AudioError(f"samples of {loudest:g} where 1 is full scale")
                yield channels
        except soundfile.LibsndfileError as error:
            self.problem = f"damaged after {self.read_s:.0f} s ({error.error_string.rstrip('.')})"


@contextlib.contextmanager
def open_sound(path: str, warn: Callable[[str], None]) -> Iterator[Sound]:
    """A recording to be read: by libsndfile if it is WAV, AIFF or FLAC or there is no ffmpeg, else by that program.

    At the end warn is called with one line for what may be lost. Raises AudioError.
    """
    check_file(path)
    try:
        with open(path, "rb", buffering=0) as file:
            size, head = os.fstat(file.fileno()).st_size, os.pread(file.fileno(), 12, 0)
            has_ffmpeg, reader = shutil.which("ffmpeg") is not None, None
            if re.match(b"(?i:RIFF)|FORM|fLaC", head) or not has_ffmpeg:  # W64 begins with riff
                try:
                    reader = contextlib.nullcontext(Sound(file))
                except AudioError as error:
                    if not has_ffmpeg:
                        remedy = "for m4a, mp4, webm and others put the ffmpeg program on the PATH"
                        raise AudioError(f"not audio that libsndfile reads ({error}); {remedy}") from error
                    file.seek(0)
            with reader or read_with_ffmpeg(path, head, warn) as sound:
                yield sound
            if sound.read_s == 0:
                raise AudioError(sound.problem or "no samples in it")
            if sound.declared_s - sound.read_s > 1:
                seconds = f"{sound.read_s:.0f} of the {sound.declared_s:.0f} s that it declares"
                sound.problem = f"cut off or damaged: its sound has {seconds}"
            if sound.problem:
                warn(sound.problem)
            warn_of_bytes(file, head, warn)
            if (new_size := os.fstat(file.fileno()).st_size) != size:
                warn(f"it had {size} bytes and now has {new_size}: it is still being written, and more may follow")
    except OSError as error:
        raise AudioError(error.strerror or first_line(error)) from error


def check_file(path: str) -> None:
    """Raise AudioError where there is no file that could hold audio."""
    if not os.path.isfile(path):
        if os.path.isdir(path):
            raise AudioError("a folder: name the files in it")
        is_other = path == "-" or "://" in path or os.path.exists(path)
        raise AudioError("not a regular file: save the sound to one first" if is_other else "no such file or folder")
    if os.path.getsize(path) == 0:
        raise AudioError("empty (0 bytes)")


@contextlib.contextmanager
def read_with_ffmpeg(path: str, head: bytes, warn: Callable[[str], None]) -> Iterator[Sound]:
    """What the ffmpeg program makes of a recording whose first bytes are head. Raises AudioError."""
    sound = None
    with tempfile.TemporaryFile() as messages:  # a pipe that nobody reads could block ffmpeg
        with subprocess.Popen(ffmpeg_command(path, head), stdout=subprocess.PIPE, stderr=messages) as process:
            with contextlib.suppress(AudioError):  # nothing came: ffmpeg says why
                sound = Sound(process.stdout)
            if sound:
                yield sound
        messages.seek(0)
        log = messages.read().decode(errors="replace").strip()
    judge_ffmpeg(sound, process.returncode, log, warn)


def ffmpeg_command(path: str, head: bytes) -> list[str]:
    """The command that makes AU, which libsndfile reads from a pipe, of a recording whose first bytes are head."""
    # async=1 fills gaps of the clock with silence, but drops sound where the clock stands or steps back: so each frame
    # begins when the clock says or, if that is later, at the end of the frame before, which is kept in variable 0. What
    # begins within 0.05 s begins at once: codecs need a start, which older versions of ffmpeg leave in the clock.
    filters = "asetpts='st(1,max(PTS*gt(T,0.05),ld(0)));st(0,ld(1)+S/SR/TB);ld(1)',aresample=async=1"
    # In MP4 and Matroska this keeps the silence before a sound that begins later than the picture; in broadcast streams
    # it would repeat sound where the format changes.
    if re.match(rb"....ftyp|\x1aE\xdf\xa3", head, re.DOTALL):
        filters += ":first_pts=0"
    # file: keeps a name like concat:x from being taken for a protocol. A jump of a transport stream's clock by up to
    # 60 s, not 10, is a gap; a longer one means a new clock.
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-nostats", "-v", "level+info", "-dts_delta_threshold", "60"]
    command += ["-i", f"file:{path}", "-vn", "-af", filters, "-c:a", "pcm_f32be"]
    return [*command, "-f", "au", "-flush_packets", "0", "pipe:1"]  # to flush each packet takes a tenth more time


def judge_ffmpeg(sound: Sound | None, status: int, log: str, warn: Callable[[str], None]) -> None:
    """Set what is known of a sound when ffmpeg has ended: the seconds that it declares, and what may be lost.

    The exit status decides: what ffmpeg says of a recording that it could read is a warning. Raises AudioError.
    """
    inputs, _, _ = log.partition("Stream mapping:")  # two programs of a broadcast may list the same stream
    streams = set(re.findall(r"^\[info\] +Stream #0:(\d+)\S*: (\w+): (\w+)(.*)", inputs, re.MULTILINE))
    # What is said of tags and by the codecs of pictures is no loss of sound.
    pictures = "|".join(codec for _, kind, codec, _ in streams if kind == "Video") or "none"
    no_loss = rf"\[(?:{pictures}) @|\[error\] (?:Incorrect BOM|Error reading)"
    errors = re.findall(rf"^(?!{no_loss}).*\[(?:error|fatal)\] (.*)", log, re.MULTILINE)
    said = "ffmpeg says: " + (errors[0] if errors else log.rpartition("\n")[2])
    if status < 0:
        said = f"ffmpeg was ended by {signal.Signals(-status).name}"
    if sound is None or sound.read_s == 0:
        raise AudioError(f"no sound could be read: {said}")
    if status != 0:
        sound.problem = f"broken off after {sound.read_s:.0f} s: {said}"
    elif errors:
        sound.problem = said
    # Of several streams, the longest gives a recording its duration. A cover is a stream too.
    is_alone = sum("(attached pic)" not in rest for *_, rest in streams) == 1
    sound.declared_s = declared_duration(log) if is_alone and status == 0 else 0.0
    tracks = sorted(int(number) for number, kind, *_ in streams if kind == "Audio")
    unread = [i for i, number in enumerate(tracks) if f"Stream #0:{number} -> " not in log]
    if unread:
        remedy = f"for another: ffmpeg -i FILE -map 0:a:{unread[0]} OTHER.flac"
        warn(f"it has {len(tracks)} audio tracks, of which one was read; {remedy}")


def declared_duration(log: str) -> float:
    """The seconds that a recording's header declares, by what ffmpeg says of it; 0 where it has only guessed them or
    taken them from a clock that began before the recording."""
    match = re.search(r"Input #0, (?!mpeg|ogg)[\s\S]*? Duration: (\d+):(\d+):([\d.]+)", log)
    if match is None or "Estimating duration" in log:
        return 0.0
    hours, minutes, seconds = map(float, match.groups())
    return 3600 * hours + 60 * minutes + seconds


def warn_of_bytes(file, head: bytes, warn: Callable[[str], None]) -> None:
    """Warn of bytes that are missing at the end of a file, or that lie behind the recording and may be another one.

    The file's position is where libsndfile stopped, or 0 where ffmpeg has read. What a WAV or AIFF declares behind that
    belongs to it, such as pictures. Fewer bytes than the limits may be a tag, or what a recorder miscounts.
    """
    size, declared = os.fstat(file.fileno()).st_size, 0
    if re.match(b"RIFF....WAVE|FORM....AIF", head, re.DOTALL):
        length = int.from_bytes(head[4:8], "little" if head[:1] == b"R" else "big")
        # Programs that do not know it yet write 0, the header's length, or 0x7F000000 and more, as sox does to a pipe.
        declared = 8 + length if 36 < length < 0x7F000000 else 0
    if declared - size > 1 << 12:
        warn(f"{declared - size} bytes that its header declares are missing at the end")
    end = max(file.tell(), declared)
    if end and size - end > 1 << 16 and head[:4] != b"riff":  # in W64 an editor's overview may follow
        warn(f"{size - end} bytes behind the end that its header declares were not read")


def mix_down(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """STRETCH_S blocks in one, the channels mixed: (n_channels, n) to (n,) float32.

    A channel of silence, hum, hiss or timecode is left out where somebody may speak on another one. A stretch in which
    nothing moves on any channel is mixed like the one before it. The end of a recording, where it is too short to tell
    whether it is steady, belongs to the stretch before it.
    """
    moving, stretch = slice(None), list(itertools.islice(blocks, STRETCH_S))
    while stretch:
        following = list(itertools.islice(blocks, STRETCH_S))
        if sum(block.shape[1] for block in following) < SHORTEST_STEADY_S * rate:
            stretch, following = stretch + following, []
        channels = np.concatenate(stretch, axis=1)
        if len(channels) > 1:
            step = max(1, rate // SAMPLING_RATE)  # fewer samples have the same level
            found = [i for i, samples in enumerate(channels) if not is_steady(samples[::step], rate // step)]
            moving = found or moving
        yield mix(channels[moving])
        stretch = following


def mix(channels: np.ndarray) -> np.ndarray:
    """The mean of channels, (n_channels, n) to (n,), or the loudest one where they cancel out: where the mean has less
    than half of the power that it has where the channels have nothing in common."""
    mean = channels.mean(0)
    slopes = map(np.diff, (mean, *channels))  # these weigh speech more than a low hum
    mean_power, *powers = [np.dot(slope, slope) for slope in slopes]
    return mean if mean_power >= sum(powers) / len(channels) ** 2 / 2 else channels[np.argmax(powers)]


def is_steady(waveform: np.ndarray, rate: int) -> bool:
    """Whether a waveform is so steady that nobody speaks in it, however loud it is: silence, hum, noise.

    Its slope must be steady too: there a voice stands out from a hum, and from music that television's compressor keeps
    at one level. Less than SHORTEST_STEADY_S is too short to tell, unless it is digital silence.
    """
    for samples in (waveform, np.diff(waveform, prepend=waveform[:1])):
        levels = mean_squares(samples, rate, STEADY_WINDOW_S)
        if levels.max() > np.percentile(levels, 10) * 10 ** (STEADY_DB / 10):
            return False
    return len(waveform) >= SHORTEST_STEADY_S * rate or not levels.any()


def split_at_pauses(blocks: Iterable[np.ndarray], rate: int, chunk_length_s: float) -> Iterator[np.ndarray]:
    """Chunks that tile the blocks without gap or overlap.

    Audio that fits the window of the model is one chunk. Of longer audio, each stretch of chunk_length_s seconds is cut
    at the quietest moment of its latter half. Little more than a window is held in memory.
    """
    longest, limit, buffer = round(chunk_length_s * rate), WINDOW_S * rate, np.empty(0, np.float32)
    tail = min(longest // 2, round(SHORTEST_TAIL_S * rate))
    for block in itertools.chain(blocks, [np.empty(0, np.float32)]):  # the empty one is the end
        buffer = np.concatenate([buffer, block])
        spare = tail if len(block) else 0  # while more may come, at least the shortest tail stays behind a cut
        while len(buffer) > limit + spare:
            limit = longest  # from the first cut on
            cut = quietest_cut(buffer[: min(longest, len(buffer) - tail)], rate)
            yield buffer[:cut]
            buffer = buffer[cut:]
    if len(buffer):
        yield buffer


def quietest_cut(waveform: np.ndarray, rate: int) -> int:
    """Index of the quietest moment in the latter half of a waveform; of equally quiet ones the last."""
    half = len(waveform) // 2
    levels = mean_squares(waveform[half:], rate, PAUSE_S)
    quietest = len(levels) - 1 - int(np.argmin(levels[::-1]))
    return max(1, half + quietest * max(1, round(LEVEL_HOP_S * rate)) + round(PAUSE_S / 2 * rate))


def mean_squares(waveform: np.ndarray, rate: int, window_s: float) -> np.ndarray:
    """The mean square of a waveform, without its offset, in windows of window_s seconds, of which one begins every
    LEVEL_HOP_S: (n >= 1,) float64."""
    hop = min(len(waveform), max(1, round(LEVEL_HOP_S * rate)))
    frames = waveform[: len(waveform) // hop * hop].reshape(-1, hop).astype(np.float64)
    frames -= (frames @ np.full(hop, 1.0) / hop)[:, None]
    energy = np.einsum("ij,ij->i", frames, frames) / hop
    window = min(len(energy), round(window_s / LEVEL_HOP_S))
    return np.convolve(energy, np.full(window, 1 / window), "valid")


# --- Recognition: chunks -> token ids ---

CHECK_EVERY = 8  # tokens after which decoding asks whether all rows have ended
CLAMPED_FLOAT16 = 64_504  # the largest float16 less 1000: WhisperEncoderLayer puts it in the place of what overflows


class Decoded(NamedTuple):
    """What the model makes of a batch."""

    token_ids: list[list[int]]  # of each row, without the initial tokens, to the end of the text or the limit
    no_speech_probs: list[float]  # how likely it is that a row holds no speech
    encoded: torch.Tensor  # the encoder's output, (batch, n_positions, d_model)


def generate(
    recognizer: Recognizer, features: list[torch.Tensor], max_new_tokens: int,
    is_loop: Callable[[int, list[int]], bool] = lambda row, ids: False,
) -> Decoded:  # fmt: skip
    """Encode and decode a batch of features, each as extract_features gives them; is_loop as in decode. Raises
    DeviceError."""
    model = recognizer.model
    with torch.inference_mode(), device_errors(model.device):
        inputs = torch.cat(features).to(model.device, model.dtype)
        recognizer.lap("copy to the device")
        encoded = encode(model, inputs)
        recognizer.lap("encoder")
        decoded = Decoded(*decode(recognizer, encoded, max_new_tokens, is_loop), encoded)
        recognizer.lap("decode")
        return decoded


def extract_features(extractor: Callable, waveform: np.ndarray) -> torch.Tensor:
    """input_features (1, n_mels, n_frames) float32 on the CPU, of at most the model's window."""
    return extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features


def encode(model: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    """The encoder's output for input_features on its device, (batch, n_positions, d_model).

    A row is NaN where float16 overflowed on the way to the last layer, because transformers clamps what overflows.
    """
    encoder, peaks = model.model.encoder, []
    n_rows = 1 if model.device.type == "cpu" else len(features)  # one row at a time stays in a CPU's caches
    with encoder.layer_norm.register_forward_pre_hook(lambda _, inputs: peaks.append(inputs[0].abs().amax((1, 2)))):
        encoded = torch.cat([encoder(rows).last_hidden_state for rows in features.split(n_rows)])
    clamped = torch.cat(peaks) >= (CLAMPED_FLOAT16 if model.dtype == torch.float16 else math.inf)
    return encoded.masked_fill(clamped[:, None, None], math.nan)


def decoder_inputs(recognizer: Recognizer, rows: list[list[int]]) -> torch.Tensor:
    """What the decoder is given to predict each token of the rows (teacher forcing): the initial tokens and all tokens
    but the last, shorter rows padded; (batch, n) int64 on the device."""
    initial = recognizer.initial_tokens.tolist()
    rows = [torch.tensor([*initial, *ids[:-1]]) for ids in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=initial[0]).to(recognizer.model.device)


def decode(
    recognizer: Recognizer, encoded: torch.Tensor, max_new_tokens: int,
    is_loop: Callable[[int, list[int]], bool] = lambda row, ids: False,
) -> tuple[list[list[int]], list[float]]:  # fmt: skip
    """Write the text of each row of an encoder's output, always with the likeliest token, as model.generate does.

    Returns the token ids of each row, without the initial tokens, to the end of the text or the limit, which is lower
    where a prompt takes the positions; and the probability that a row holds no speech: as in openai/whisper that of
    <|nospeech|>, the id before <|notimestamps|>, after <|startoftranscript|>. model.generate waits for the device after
    every token, to ask whether all rows have ended; here that happens once in CHECK_EVERY tokens. Then is_loop is asked
    of each row, with its number and its tokens so far: a row of which it is true ends there. Raises DeviceError for
    NaN.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    model, eos, n_initial = recognizer.model, recognizer.tokenizer.eos_token_id, len(recognizer.initial_tokens)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    positions = torch.arange(N_POSITIONS, device=model.device)

    def forward(token_ids: torch.Tensor, first: int) -> torch.Tensor:
        """The hidden states of the tokens that stand at the positions from first on, (batch, n_tokens, d_model)."""
        return model.model.decoder(
            input_ids=token_ids, encoder_hidden_states=encoded, past_key_values=cache,
            cache_position=positions[first : first + token_ids.shape[1]],
        ).last_hidden_state  # fmt: skip

    hidden = forward(recognizer.initial_tokens.expand(len(encoded), -1), 0)
    no_speech = recognizer.tokenizer.convert_tokens_to_ids("<|notimestamps|>") - 1
    no_speech_probs = model.proj_out(hidden[:, -START_LENGTH]).float().softmax(-1)[:, no_speech]
    if needs_cpu_attention(model.device, model.dtype):  # then once, not at every token
        for layer in cache.cross_attention_cache.layers:
            layer.keys, layer.values = layer.keys.float(), layer.values.float()
    n_most = min(max_new_tokens, N_POSITIONS - n_initial)
    chosen, ended = [], {}  # of each step the likeliest tokens; the token ids of the rows that have ended
    for i in range(n_most):
        scores = model.proj_out(hidden[:, -1]).float() + recognizer.token_mask[min(i, 1)]
        chosen.append(scores.max(-1))
        if (i + 1) % CHECK_EVERY == 0 or i + 1 == n_most:
            for row, ids in enumerate(torch.stack([step.indices for step in chosen], 1).tolist()):
                if row not in ended and (eos in ids or i + 1 == n_most or is_loop(row, ids)):
                    ended[row] = ids[: ids.index(eos) + 1] if eos in ids else ids
            if len(ended) == len(encoded):
                break
        hidden = forward(chosen[i].indices[:, None], n_initial + i)
    rows = [ended[row] for row in range(len(encoded))]
    scores = torch.stack([step.values for step in chosen], 1).tolist()
    if not all(np.isfinite(of_row[: len(row)]).all() for row, of_row in zip(rows, scores, strict=True)):
        raise nan_error(model)
    return rows, no_speech_probs.tolist()


def nan_error(model: torch.nn.Module) -> DeviceError:
    """The error to raise where a model has computed NaN or infinity."""
    remedy = "--dtype bfloat16 or float32 may hold them" if model.dtype == torch.float16 else "is the model whole?"
    return DeviceError(f"{model.device} computes NaN or infinity in {dtype_name(model.dtype)}: {remedy}")


# --- For the evaluations ---


def endless(recognizer: Recognizer) -> Recognizer:
    """A copy that never ends its text and so always decodes to the limit: equal work, whatever the model hears."""
    token_mask = recognizer.token_mask.clone()
    token_mask[:, recognizer.tokenizer.eos_token_id] = -math.inf
    return replace(recognizer, token_mask=token_mask)


def sweep() -> np.ndarray:
    """The default input of the evaluations: a sine from 200 to 800 Hz in three seconds, (48000,) float32."""
    t = np.arange(3 * SAMPLING_RATE) / SAMPLING_RATE
    return (0.5 * np.sin(2 * np.pi * (200 * t + 100 * t**2))).astype(np.float32)


def report_json(report: dict) -> str:
    """The report of an evaluation as JSON, in which NaN and infinity, which JSON does not have, are null."""
    content = json.loads(json.dumps(report), parse_constant=lambda name: None)
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
