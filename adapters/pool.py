"""A pool of modules made smaller: alike ones merged into one, or each of them recompressed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from .delta import LowRank, concat
from .energy import cosines, gram
from .errors import BankError
from .lego import lego
from .lora import Module
from .ranks import component_bytes
from .shapes import Shapes
from .truncation import spectrum

FoldMethod = Literal["lego", "svd"]

_ZERO = 1e-6
"""What is left of a change, up to this share of what went into it, is rounding."""


def likeness(
    modules: Sequence[Module], shapes: Shapes, *, on_layer: Callable[[], None] = lambda: None
) -> Tensor:
    """Cosines [m, m] between modules, over all their deltas and vectors together.

    A tied head counts with its embedding. on_layer: called after each of `layers_of`.
    """
    wholes = [module.resolved(shapes) for module in modules]
    inner = torch.zeros(len(modules), len(modules), dtype=torch.float64)
    for layer in layers_of(modules, shapes):
        owners = torch.tensor([k for k, whole in enumerate(wholes) if layer in whole])
        inner[owners[:, None], owners] += gram([wholes[k][layer] for k in owners.tolist()])
        on_layer()
    for name in _vectors_of(modules):
        stacked = _stacked(modules, name).double()
        inner += stacked @ stacked.T
    return cosines(inner)


def layers_of(modules: Iterable[Module], shapes: Shapes) -> list[str]:
    """The layers that any of the modules changes, sorted."""
    return sorted({layer for module in modules for layer in module.resolved(shapes)})


def groups(cosine: Tensor, count: int) -> list[list[int]]:
    """Indices of `count` groups of modules that are alike, each sorted, by their first members.

    cosine: [m, m]. count: in 1 to m - 1.

    Source: average linkage (UPGMA), Sokal and Michener 1958, over the distances 1 - cosine.
    """
    distances = (1 - cosine).clamp_min(0).fill_diagonal_(0)
    tree = linkage(squareform(distances.numpy(), checks=False), method="average")
    labels = cut_tree(tree, n_clusters=count)[:, 0].tolist()
    found: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        found.setdefault(label, []).append(index)
    return list(found.values())


def used_groups(cosine: Tensor, shares: Sequence[float], count: int) -> list[list[int]]:
    """Indices of `count` groups of modules, each sorted, by their first members: at every step the
    two become one whose changes, of equal norm, lose least by it in squares, weighed by how much
    they are used. So modules that are alike meet first, then those that are seldom used.

    cosine: [m, m]. shares: of the traffic, above 0. count: in 1 to m - 1.

    Source: Ward 1963, Hierarchical Grouping to Optimize an Objective Function, with weights.
    """
    parts = torch.tensor(shares, dtype=torch.float64).diag()  # [groups, m]
    while len(parts) > count:
        total = parts.sum(1)
        means = parts / total[:, None]
        products = means @ cosine.double() @ means.T
        apart = products.diagonal()[:, None] + products.diagonal() - 2 * products
        loss = apart / (1 / total[:, None] + 1 / total)
        pair = divmod(int(loss.fill_diagonal_(torch.inf).argmin()), len(parts))
        parts[min(pair)] += parts[max(pair)]
        parts = torch.cat([parts[: max(pair)], parts[max(pair) + 1 :]])
    return [group.nonzero().flatten().tolist() for group in parts]


def merge_modules(
    members: Sequence[Module],
    *,
    name: str,
    shapes: Shapes,
    method: FoldMethod,
    shares: Sequence[float] | None = None,
    keeps_rank: bool = False,
) -> Module:
    """One module that stands for several, of the size of one: in every layer it has the largest
    rank among them.

    Linear layers, embeddings and heads are merged alike. `svd` truncates the mean of the deltas;
    `lego` clusters their units, and members that leave a layer as it is do not count there.
    Vectors are averaged. A tied head follows its embedding where it does so in every member.

    shares: what each member counts in the means of `svd` and of vectors; they sum to 1. Default:
    all alike. keeps_rank: `svd` gives the mean itself, of the members' ranks together.

    Raises:
        BankError: nothing is left: the members cancel each other out.
    """
    wholes = [member.resolved(shapes) for member in members]
    parts = [1 / len(members)] * len(members) if shares is None else shares
    deltas = {}
    for layer in layers_of(members, shapes):
        own = [
            (whole[layer], part)
            for whole, part in zip(wholes, parts, strict=True)
            if layer in whole
        ]
        merged = _merged(own, method, keeps_rank)
        if merged.norm() > _ZERO * max(delta.norm() for delta, _ in own):
            deltas[layer] = merged
    vectors = {n: torch.tensor(parts) @ _stacked(members, n) for n in _vectors_of(members)}
    vectors = {n: vector for n, vector in vectors.items() if vector.any()}
    if not deltas and not vectors:
        names = ", ".join(member.name for member in members)
        raise BankError(f"modules {names} cancel each other out: fold to a larger number")
    embeddings = frozenset().union(*(member.embeddings for member in members)) & deltas.keys()
    ties_head = all(member.ties_head for member in members)
    backbones = (b for b in members[0].backbones if all(b in m.backbones for m in members))
    module = Module(name, deltas, vectors, embeddings, ties_head, tuple(backbones))
    return _with_tied_head(module, shapes)


def without_double_head(module: Module, shapes: Shapes) -> Module:
    """The same module, with a tied head's delta said once, by its embedding."""
    if shapes.tied is None or not module.ties_head or shapes.tied[0] not in module.deltas:
        return module
    return replace(
        module, deltas={n: delta for n, delta in module.deltas.items() if n != shapes.tied[1]}
    )


def stored_bytes(modules: Sequence[Module], dtypes: Sequence[str]) -> int:
    """What modules take as they are, layers that change nothing left out; see `ranks_within`."""
    layers = _layers(modules, dtypes)
    return _vector_bytes(modules) + sum(layer.cost * layer.stored_rank for layer in layers)


@dataclass(frozen=True)
class _Layer:
    """A delta of one module. shares: of the module's energy, by component, descending. cost: bytes
    of a component.
    """

    module: int
    name: str
    stored_rank: int
    shares: Tensor
    cost: int


def ranks_within(
    modules: Sequence[Module], dtypes: Sequence[str], budget: int
) -> list[dict[str, int]]:
    """The ranks of every module's layers, with which all modules together take `budget` bytes.

    The rank is the same everywhere; bytes that are left buy one more component where it holds the
    largest share of its module's energy per byte. A layer that changes nothing is left out.

    dtypes: what each module's factors are stored in. Vectors take float32.

    Raises:
        BankError: not even rank 1 fits, or the modules already do.
    """
    layers, exact = list(_layers(modules, dtypes)), _vector_bytes(modules)
    before = stored_bytes(modules, dtypes)
    if budget >= before:
        raise BankError(
            f"the modules take {before:,} bytes and fit {budget:,} as they are: give a smaller size"
        )

    def nbytes(rank: int) -> int:
        return exact + sum(layer.cost * min(rank, len(layer.shares)) for layer in layers)

    most = max((len(layer.shares) for layer in layers), default=0)
    common = bisect_right(range(1, most + 1), budget, key=nbytes)
    if common == 0:
        raise BankError(
            f"{budget:,} bytes are too little for {len(modules)} modules: rank 1 takes "
            f"{nbytes(1):,}; fold them into fewer first"
        )
    found: list[dict[str, int]] = [{} for _ in modules]
    for layer in layers:
        found[layer.module][layer.name] = min(common, len(layer.shares))
    for layer in _topped_up(layers, common, budget - nbytes(common)):
        found[layer.module][layer.name] += 1
    return found


def shrink_module(module: Module, ranks: Mapping[str, int], method: FoldMethod) -> Module:
    """A module recompressed, layer by layer; layers without a rank are dropped. `svd` keeps the
    largest components; `lego` clusters the module's own units, with their norms restored.
    """

    def shrunk(delta: LowRank, rank: int) -> LowRank:
        if method == "svd":
            return delta.compact(rank=rank)
        return lego([delta], rank=rank, reweight="parameter")

    deltas = {layer: shrunk(module.deltas[layer], rank) for layer, rank in ranks.items()}
    gates = {layer: gate for layer, gate in module.gates.items() if layer in deltas}
    return replace(module, deltas=deltas, embeddings=module.embeddings & deltas.keys(), gates=gates)


def relative_error(found: Module, wanted: Module, shapes: Shapes) -> float:
    """|wanted - found| / |wanted|, Frobenius, over all deltas and vectors together."""
    new, old = found.resolved(shapes), wanted.resolved(shapes)
    lost = total = 0.0
    for layer in old.keys() | new.keys():
        own = [old[layer]] if layer in old else []
        other = [new[layer].scaled(-1)] if layer in new else []
        lost += concat([*own, *other]).norm() ** 2
        total += sum(delta.norm() ** 2 for delta in own)
    for name in _vectors_of((found, wanted)):
        one, other_vector = _stacked((wanted, found), name).double()
        lost += float((one - other_vector).square().sum())
        total += float(one.square().sum())
    return float((lost / total) ** 0.5)


def _merged(
    deltas: Sequence[tuple[LowRank, float]], method: FoldMethod, keeps_rank: bool
) -> LowRank:
    """A layer's deltas, each with what it counts, as one."""
    rank = max(1, *(delta.rank for delta, _ in deltas))
    if method == "lego":
        return lego([delta for delta, _ in deltas], rank=rank)
    mean = concat([delta.scaled(part) for delta, part in deltas])
    return mean.compact(rank=min(mean.rank, *mean.shape) if keeps_rank else rank)


def _with_tied_head(module: Module, shapes: Shapes) -> Module:
    """A tied head either equals its embedding, and is not stored, or is a delta of its own."""
    if shapes.tied is None or shapes.tied[0] not in module.deltas:
        return module
    embedding, head = module.deltas[shapes.tied[0]], module.deltas.get(shapes.tied[1])
    is_same = (
        head is not None
        and torch.equal(embedding.left, head.left)
        and torch.equal(embedding.right, head.right)
    )
    return without_double_head(replace(module, ties_head=is_same), shapes)


def _layers(modules: Sequence[Module], dtypes: Sequence[str]) -> Iterator[_Layer]:
    for index, (module, dtype) in enumerate(zip(modules, dtypes, strict=True)):
        energy = sum(delta.norm() ** 2 for delta in module.deltas.values())
        for name, delta in module.deltas.items():
            values = spectrum(delta) if delta.rank else torch.zeros(0)
            shares = values[values > _ZERO * values[:1]].double().square() / energy
            if len(shares):
                cost = component_bytes(delta.shape, dtype)
                yield _Layer(index, name, delta.rank, shares, cost)


def _vector_bytes(modules: Sequence[Module]) -> int:
    return sum(4 * vector.numel() for module in modules for vector in module.vectors.values())


def _topped_up(layers: Sequence[_Layer], common: int, left: int) -> Iterator[_Layer]:
    """The layers that get one component more than the common rank."""
    longer = [layer for layer in layers if len(layer.shares) > common]
    longer.sort(key=lambda layer: -float(layer.shares[common]) / layer.cost)
    for layer in longer:
        if layer.cost <= left:
            left -= layer.cost
            yield layer


def _vectors_of(modules: Iterable[Module]) -> list[str]:
    return sorted({name for module in modules for name in module.vectors})


def _stacked(modules: Sequence[Module], name: str) -> Tensor:
    """A vector of every module, [m, n]; zeros for who leaves it as it is."""
    size = next(m.vectors[name].numel() for m in modules if name in m.vectors)
    return torch.stack([m.vectors.get(name, torch.zeros(size)) for m in modules])
