"""Loading a backbone into memory: device, dtype, and what cannot be served."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from ..adapters.checkpoint import MODEL_DTYPES
from ..adapters.errors import EngineError, UnsupportedModelError
from .merged_experts import install_merged_experts


def choose_device(name: str) -> torch.device:
    """`auto` takes the GPU when there is one.

    Raises:
        EngineError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r} is unknown: auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(
            f"device {name!r} is not there ({torch.cuda.device_count()} GPUs are visible): "
            "use --device cpu or install a CUDA build of torch"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and on CPUs that multiply it in hardware, else float32.

    Raises:
        EngineError: no such dtype.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_bfloat16() else torch.float32
    if name not in MODEL_DTYPES:
        raise EngineError(f"dtype {name!r} is unknown: auto, {', '.join(MODEL_DTYPES)}")
    return MODEL_DTYPES[name]


def load_model(
    path: Path, *, device: torch.device, dtype: torch.dtype, depth: int | None = None
) -> Any:  # noqa: ANN401
    """A causal language model in evaluation mode; only safetensors are read. transformers' own
    progress bar is switched off: who loads a model shows what it waits for.

    depth: how many of its layers to read, the first ones; None: all.

    Raises:
        UnsupportedModelError: transformers cannot make a causal language model of the folder, or
            tensors are missing, which it would fill with random numbers.
        CheckpointError: merged experts beside it are damaged.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        with _without_report(depth):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                config=None if depth is None else _cut_config(path, depth),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModelError(f"{path} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"{path} lacks the tensor {missing[0]!r} ({len(missing)} in all): the checkpoint is "
            "incomplete, copy it again"
        )
    if device.type == "cpu":
        _leave_files(model)
    install_merged_experts(model, path)
    return model.to(device).eval()


def _cut_config(path: Path, depth: int) -> Any:  # noqa: ANN401
    """The configuration of a model of the first layers."""
    config = transformers.AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=False
    )
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    text.num_hidden_layers = depth
    return config


@contextmanager
def _without_report(depth: int | None) -> Iterator[None]:
    """transformers warns of every layer that is left out on purpose."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    if depth is not None:
        log.addFilter(is_no_report)
    try:
        yield
    finally:
        log.removeFilter(is_no_report)


@torch.no_grad()
def _leave_files(model: Any) -> None:  # noqa: ANN401
    """Copy weights that are mapped from a file: one that is overwritten while it is served would
    change them, and one that is cut short would end the process (SIGBUS).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def load_tokenizer(path: Path) -> Any:  # noqa: ANN401
    """The checkpoint's fast tokenizer.

    Raises:
        UnsupportedModelError: there is none.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(f"{path} has no usable tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{path} has no fast tokenizer (tokenizer.json): save one there"
        )
    return tokenizer


def context_length(config: Any, wanted: int | None) -> int:  # noqa: ANN401
    """Most tokens of a sequence: what is wanted, else what the model was trained for, up to 4,096.

    Raises:
        UnsupportedModelError: the configuration states no limit.
        EngineError: the model cannot take as many.
    """
    trained: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if trained is None:
        raise UnsupportedModelError(
            f"a {config.model_type} model states no max_position_embeddings: "
            "choose a backbone with rotary or learned positions"
        )
    if wanted is None:
        return min(trained, 4096)
    if not 2 <= wanted <= trained:
        raise EngineError(f"max_length is {wanted}, the backbone allows 2 to {trained}")
    return wanted


def end_tokens(model: Any) -> frozenset[int]:  # noqa: ANN401
    """The generation configuration's end tokens, else the model's."""
    stated = model.generation_config.eos_token_id if model.generation_config else None
    if stated is None:
        stated = model.config.get_text_config().eos_token_id
    if stated is None:
        return frozenset()
    return frozenset([stated] if isinstance(stated, int) else stated)


def _cpu_has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
