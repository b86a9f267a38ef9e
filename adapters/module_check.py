"""Whether what a module changes is there in a backbone, in its shape and of its kind."""

from __future__ import annotations

from torch import Tensor

from .delta import LowRank
from .errors import ModuleError
from .shapes import Shapes


def check_layer(module: str, layer: str, delta: LowRank, shapes: Shapes) -> None:
    """Refuse a delta that fits no matrix of the backbone, or holds NaN or inf.

    Raises:
        ModuleError: it names the layer and what to do.
    """
    layers = shapes.matrices
    if layer not in layers:
        raise ModuleError(
            f"module {module!r} changes {layer!r}, no layer of the backbone: "
            + _remedy(layer, shapes)
        )
    if delta.shape != tuple(layers[layer]):
        raise ModuleError(
            f"module {module!r} changes {layer!r} by a {delta.shape[0]} x {delta.shape[1]} matrix, "
            f"the backbone's is {layers[layer][0]} x {layers[layer][1]}: it was trained on another "
            "base"
        )
    if not (delta.left.isfinite().all() and delta.right.isfinite().all()):
        raise ModuleError(f"module {module!r} holds NaN or inf in {layer!r}: its training diverged")


def check_kind(module: str, layer: str, shapes: Shapes, *, is_embedding: bool) -> None:
    """Refuse a linear layer's factors in an embedding, and the other way round.

    Raises:
        ModuleError: it names the layer and what to do.
    """
    if is_embedding and layer not in shapes.embeddings:
        raise ModuleError(
            f"module {module!r} changes {layer!r} as an embedding, which is a linear layer of the "
            "backbone: its factors are to be called lora_A and lora_B"
        )
    if not is_embedding and layer in shapes.embeddings:
        raise ModuleError(
            f"module {module!r} changes {layer!r} as a linear layer, which is an embedding of the "
            "backbone: its factors are to be called lora_embedding_A and lora_embedding_B"
        )


def check_vector(module: str, name: str, vector: Tensor, shapes: Shapes) -> None:
    """Refuse a vector that fits no norm or bias of the backbone, or holds NaN or inf.

    Raises:
        ModuleError: it names the parameter and what to do.
    """
    if name not in shapes.vectors:
        raise ModuleError(
            f"module {module!r} changes {name!r}, no norm weight, norm bias or linear bias of the "
            "backbone: was it built on another base?"
        )
    if tuple(vector.shape) != (shapes.vectors[name],):
        raise ModuleError(
            f"module {module!r} changes {name!r} by a vector of shape {tuple(vector.shape)}, the "
            f"backbone's has {shapes.vectors[name]} entries: it was built on another base"
        )
    if not vector.isfinite().all():
        raise ModuleError(f"module {module!r} holds NaN or inf in {name!r}: its training diverged")


def check_gate(module: str, layer: str, gate: Tensor, delta: LowRank | None) -> None:
    """Refuse a gate vector beside no change of that layer, of another size, or without direction.

    delta: the module's change of that layer.

    Raises:
        ModuleError: it names the layer and what to do.
    """
    if delta is None:
        raise ModuleError(
            f"module {module!r} has a gate for {layer!r}, which it does not change: gates belong "
            "to linear layers that it changes"
        )
    if tuple(gate.shape) != (delta.shape[1],):
        raise ModuleError(
            f"module {module!r} has a gate of shape {tuple(gate.shape)} for {layer!r}, whose input "
            f"has {delta.shape[1]} entries: it was trained on another base"
        )
    if not gate.isfinite().all():
        raise ModuleError(f"module {module!r} holds NaN or inf in the gate of {layer!r}")
    if bool((gate == gate[0]).all()):
        raise ModuleError(
            f"module {module!r} has a gate for {layer!r} with all entries equal, which points "
            "nowhere: was it saved before training? Remove the file of gates, or train them"
        )


def _remedy(layer: str, shapes: Shapes) -> str:
    leaf = layer.rpartition(".")[2]
    similar = next((known for known in shapes.matrices if known.endswith(f".{leaf}")), None)
    if leaf in ("lm_head", "embed_out", "embed_tokens", "wte", "embed_in"):
        return "its head and embedding are not among them: train on the inner layers"
    if similar:
        return f"the backbone calls such a layer {similar!r}: was it trained on another base?"
    return f"the backbone's layers end in {sorted({n.rpartition('.')[2] for n in shapes.matrices})}"
