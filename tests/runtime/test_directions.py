"""What gates know modules by: exact, computed once, shared, and freed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import RequestError
from mergeroute.routers.token_routing import TokenRouting
from mergeroute.runtime.directions import GateTables, spectrum
from mergeroute.runtime.module_stack import ResidentModule
from mergeroute.runtime.types import TokenGate

CPU = torch.device("cpu")
RANK, WIDTH = 4, 12
LAYERS = ("first", "second")
MODULES = ("a", "b", "c")
SETTINGS = [
    TokenRouting("arrow"),
    TokenRouting("arrow", top_k=1, temperature=0.5, none=1.0, smoothing=0.5, norm="raw"),
]


def make_resident(digest: str) -> ResidentModule:
    generator = torch.Generator().manual_seed(ord(digest))
    deltas = {
        layer: LowRank(
            torch.randn(9, RANK, generator=generator), torch.randn(RANK, WIDTH, generator=generator)
        )
        for layer in LAYERS
    }
    gates = {layer: torch.randn(WIDTH, generator=generator) for layer in LAYERS}
    return ResidentModule(digest, digest, deltas, gates)


@dataclass
class Residents:
    """Modules that are resident, and a note of who was asked for: its directions are computed."""

    asked: list[str] = field(default_factory=list)
    meanwhile: Callable[[str], object] = lambda _: None

    def __call__(self, digest: str) -> ResidentModule:
        self.asked.append(digest)
        self.meanwhile(digest)
        return make_resident(digest)


def gate(method: str, modules: tuple[str, ...] = MODULES, *, directions: int = 0) -> TokenGate:
    return TokenGate(TokenRouting(method, directions=directions), modules)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_whatever_settings_are_asked_for_a_module_is_decomposed_once_and_a_gate_read_once() -> None:
    residents = Residents()
    tables = GateTables(residents, device=CPU)
    wanted = [*(gate("spectr", directions=count) for count in range(50)), gate("arrow")]
    layers = {id(tables.table(one).layers) for one in wanted}
    assert residents.asked == list(MODULES)
    assert len(layers) == 2
    assert len(tables._directions) == len(MODULES)
    for modules in (MODULES, MODULES[:2], MODULES[1:]):
        tables.table(gate("spectr", modules))
        tables.table(gate("phatgoose", modules))
    assert residents.asked == 2 * list(MODULES)


@pytest.mark.parametrize("modules", [MODULES, ("a",)])
def test_more_directions_than_there_are_is_all_of_them(modules: tuple[str, ...]) -> None:
    tables = GateTables(Residents(), device=CPU)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    found = {}
    for count in (1, RANK, RANK + 1, 2**31 - 1):
        table = tables.table(gate("spectr", modules, directions=count))
        found[count] = table.layers["first"].scores(x, table.gate.routing)
    assert torch.equal(found[RANK], found[RANK + 1])
    assert torch.equal(found[RANK], found[2**31 - 1])
    arrow = tables.table(gate("arrow", modules))
    assert torch.allclose(found[1], arrow.layers["first"].scores(x, arrow.gate.routing), atol=1e-6)


def test_gates_that_differ_in_their_settings_share_what_they_know() -> None:
    tables = GateTables(Residents(), device=CPU)
    one, other = (tables.table(TokenGate(routing, MODULES)) for routing in SETTINGS)
    assert one.gate != other.gate
    for layer in LAYERS:
        ours, theirs = one.layers[layer].directions, other.layers[layer].directions
        assert ours.data_ptr() == theirs.data_ptr()
    fewer = tables.table(TokenGate(SETTINGS[0], MODULES[:2]))
    assert fewer.layers["first"].directions.shape[1] == 2


def test_what_is_kept_of_sets_of_modules_is_bounded() -> None:
    residents = Residents()
    tables = GateTables(residents, device=CPU)
    first = tables.table(gate("arrow"))
    for one in map(chr, range(ord("d"), ord("d") + 40)):
        tables.table(gate("arrow", (one,)))
        assert tables.table(gate("arrow")).layers is first.layers, "it was asked for just now"
    assert len(tables._stacks) == 16
    tables.table(gate("arrow", ("d",)))
    assert residents.asked.count("d") == 1, "its directions are known as long as it is resident"


def test_an_evicted_module_leaves_nothing_behind() -> None:
    residents = Residents()
    tables = GateTables(residents, device=CPU)
    wanted = [gate("arrow"), gate("spectr"), gate("phatgoose"), gate("arrow", ("b", "c"))]
    for one in wanted:
        tables.table(one)
    tables.forget("a")
    assert list(tables._stacks) == [("arrow", ("b", "c"))]
    assert {digest for digest, _ in tables._directions} == {"b", "c"}
    residents.asked.clear()
    for one in wanted:
        tables.table(one)
    assert residents.asked == ["a", "a"]  # its changes, and its gates


@pytest.mark.parametrize("evicted", MODULES[:2])
def test_a_module_that_is_evicted_while_a_table_is_built_leaves_nothing_behind(
    evicted: str,
) -> None:
    residents = Residents()
    tables = GateTables(residents, device=CPU)
    residents.meanwhile = lambda digest: tables.forget(evicted) if digest == "b" else None
    table = tables.table(gate("arrow"))
    assert len(table.layers["first"].members) == len(MODULES)
    assert not tables._stacks
    assert {digest for digest, _ in tables._directions} == set(MODULES) - {evicted}


def test_a_table_that_is_ready_waits_for_none_that_is_built(pool: ThreadPoolExecutor) -> None:
    building, may_go_on = threading.Event(), threading.Event()

    def wait(digest: str) -> None:
        if digest == "z":
            building.set()
            may_go_on.wait(30)

    tables = GateTables(Residents(meanwhile=wait), device=CPU)
    ready = tables.table(gate("arrow"))
    slow = pool.submit(tables.table, gate("arrow", ("z",)))
    try:
        assert building.wait(30)
        again = pool.submit(tables.table, gate("arrow")).result(timeout=10)
        assert again.layers is ready.layers
        assert not slow.done()
    finally:
        may_go_on.set()
    assert "first" in slow.result(30).layers


def test_threads_that_ask_for_the_same_at_once_build_it_once(pool: ThreadPoolExecutor) -> None:
    both = threading.Barrier(2)
    residents = Residents()
    tables = GateTables(residents, device=CPU)

    def ask() -> object:
        both.wait(30)
        return tables.table(gate("spectr")).layers

    asked: list[Future[object]] = [pool.submit(ask) for _ in range(2)]
    assert asked[0].result(30) is asked[1].result(30)
    assert residents.asked == list(MODULES)


def test_a_module_that_cannot_be_routed_keeps_none_of_the_others_from_it() -> None:
    def resident(digest: str) -> ResidentModule:
        own = make_resident(digest)
        return ResidentModule("bare", digest, own.deltas, {}) if digest == "b" else own

    tables = GateTables(resident, device=CPU)
    with pytest.raises(RequestError, match=r"'bare' .* ships no gate for 'first'"):
        tables.table(gate("phatgoose"))
    assert len(tables.table(gate("phatgoose", ("a", "c"))).layers["first"].members) == 2
    assert len(tables.table(gate("arrow")).layers["first"].members) == 3


def test_directions_are_exact_where_the_spectrum_is_flat() -> None:
    """Power iteration fails there: the first singular value is 1 % above the second."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(40, 6, generator=generator))[0] for _ in range(2))
    singular = torch.tensor([1.01, 1, 1, 1, 1, 0.5])
    delta = LowRank.from_svd(u, singular, v.T)
    found = spectrum(delta)
    assert found.vectors.shape == (6, 40)
    assert found.vectors.dtype == found.singular.dtype == torch.float32
    assert torch.allclose(found.singular, singular, atol=1e-5)
    assert abs(float(found.vectors[0] @ v[:, 0])) == pytest.approx(1, abs=1e-4)
    gauge = torch.randn(6, 6, generator=generator)
    same = spectrum(LowRank(delta.left @ torch.linalg.inv(gauge), gauge @ delta.right))
    assert abs(float(same.vectors[0] @ found.vectors[0])) == pytest.approx(1, abs=1e-3)
    x = torch.randn(40, generator=generator)
    length = (found.singular * (found.vectors @ x)).norm()
    assert float(length) == pytest.approx(float((delta.dense() @ x).norm()), rel=1e-4)


def test_modules_of_any_ranks_share_a_table() -> None:
    ranks = dict(zip(MODULES, (1, 7, 3), strict=True))
    generator = torch.Generator().manual_seed(0)
    changes = {
        digest: LowRank(
            torch.randn(9, rank, generator=generator), torch.randn(rank, WIDTH, generator=generator)
        )
        for digest, rank in ranks.items()
    }
    tables = GateTables(
        lambda digest: ResidentModule(digest, digest, {"first": changes[digest]}, {}), device=CPU
    )
    x = torch.randn(5, WIDTH, generator=generator)
    for count in (0, 2):
        routing = TokenRouting("spectr", norm="raw", directions=count)
        found = tables.table(TokenGate(routing, MODULES)).layers["first"].scores(x, routing)
        for score, change in zip(found.T, changes.values(), strict=True):
            dense = change.dense()
            if count:
                dense = torch.linalg.svd(dense)[2][: min(count, change.rank)]
            assert torch.allclose(score, (x @ dense.T).norm(dim=1), rtol=1e-4)


def test_a_change_that_is_zero_has_no_directions_and_its_layer_no_say() -> None:
    nothing = LowRank(torch.zeros(9, RANK), torch.zeros(RANK, WIDTH))
    assert len(spectrum(nothing).singular) == 0

    def resident(digest: str) -> ResidentModule:
        own = make_resident(digest)
        deltas = {**own.deltas, "first": nothing} if digest == "b" else own.deltas
        return ResidentModule(digest, digest, deltas, own.gates)

    table = GateTables(resident, device=CPU).table(gate("arrow"))
    assert table.layers["first"].members == [0, 2]
    assert table.layers["second"].members == [0, 1, 2]
