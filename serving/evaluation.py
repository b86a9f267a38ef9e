"""What `mergeroute eval` measures: a bank on held-out prompts, beside its experts and merges."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..adapters.bank import Bank
from ..adapters.build import BuildTools, Progress, build
from ..adapters.digest import file_digest
from ..adapters.errors import BankError
from ..adapters.experts import Expert
from ..adapters.recipe import Recipe
from ..routers.data import Example, read_examples
from ..runtime.loading import choose_device, choose_dtype
from .asking import Asker, Outcome
from .building import calibrator
from .figures import (
    AUTO,
    BACKBONE,
    EXPERTS,
    ORACLE,
    Bytes,
    Figures,
    Report,
    Results,
    figures_of,
    mean_of,
    shortfalls,
)
from .hosting import Placement, host_banks
from .scoring import Metric, MetricName, metric
from .service import Service
from .variants import (
    GivenExperts,
    check_sources,
    given_experts,
    open_experts,
    original_model,
    recorded_moe,
    recorded_recipe,
    static_recipe,
)

_WHAT = {
    BACKBONE: "the backbone alone",
    AUTO: "the blend of the bank's router",
    ORACLE: "the task's own module, pinned",
    EXPERTS: "the task's own expert as it was given to the build",
}


@dataclass(frozen=True)
class EvalOptions:
    """What is measured.

    max_tokens: most tokens of an answer. oracle: the task's module pinned, too. experts: the
    experts the bank was built from, too. compare: merge methods, `ties` or `ties:density=0.5`.
    limit: most prompts of a task, the first of the file; None: all.
    """

    metric: MetricName = MetricName.EXACT
    max_tokens: int = 256
    oracle: bool = False
    experts: bool = False
    compare: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class _Run:
    """What all parts of one evaluation share."""

    examples: Sequence[Example]
    metric: Metric
    options: EvalOptions
    placement: Placement
    progress: Progress

    @contextmanager
    def asker(self, bank: Bank, label: str) -> Iterator[Asker]:
        """A bank in memory for the length of the block. label: what is said to be loading."""
        loaded = self.progress(f"loading {label}", 1)
        service = Service(host_banks([bank], self.placement))
        loaded()
        try:
            yield Asker(service, self.metric, max_tokens=self.options.max_tokens)
        finally:
            service.stop()

    def ask(
        self,
        asker: Asker,
        system: str,
        target: Callable[[Example], str],
        *,
        tasks: Sequence[str] | None = None,
    ) -> list[Outcome]:
        """Ask the examples of some tasks, or all."""
        chosen = [e for e in self.examples if tasks is None or e.task in tasks]
        return asker.ask(chosen, target, step=self.progress(system, len(chosen)))


def evaluate(
    bank: Bank,
    data: Path,
    options: EvalOptions = EvalOptions(),
    *,
    placement: Placement,
    progress: Progress = lambda stage, total: lambda: None,
) -> Report:
    """Score a bank on the prompts of a data file; one model is in memory at a time.

    Raises:
        DataError: the file, or a line of it, cannot be used.
        BankError: experts or merges are asked for, and the bank does not know its recipe, or what
            it was built from has changed.
        MergerouteError: something cannot be read, built or served.
    """
    moe = recorded_moe(bank)
    recipe = None if moe else _checked_recipe(bank, options)
    if moe and options.compare:
        raise BankError(
            f"bank {bank.name!r} has merged experts of one sparse model, and static merges are of "
            "dense experts: leave out --compare"
        )
    examples = read_examples(data, needs=("task", "answer"))
    run = _Run(
        _first(examples, options.limit), metric(options.metric), options, placement, progress
    )
    merges = {name: static_recipe(recipe, name) for name in options.compare} if recipe else {}
    tasks = list(dict.fromkeys(str(example.task) for example in examples))
    experts: list[Expert] = []
    if recipe and options.experts:
        experts = open_experts(recipe, tasks, sources=bank.sources)
    results = _ask_bank(run, bank)
    if recipe and experts:
        given = given_experts(recipe, experts)
        results[EXPERTS] = [outcome for each in given for outcome in _ask_experts(run, each)]
    if moe and options.experts:
        original = GivenExperts(original_model(moe, sources=bank.sources), tuple(tasks), False)
        results[EXPERTS] = _ask_experts(run, original)
    for name, merge in merges.items():
        results[name] = _ask_merge(run, name, merge, sources=bank.sources)
    paths = {expert.name: expert.path for expert in experts}
    return _report(run, bank, results, data=data, sizes=_sizes(bank, paths))


def _checked_recipe(bank: Bank, options: EvalOptions) -> Recipe | None:
    recipe = recorded_recipe(bank)
    if recipe is None and (options.experts or options.compare):
        raise BankError(
            f"bank {bank.name!r} does not say what it was built from, so its experts and other "
            "merges of them cannot be measured: leave out --experts and --compare, or build it "
            "with 'mergeroute build'"
        )
    return recipe


def _first(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The first examples of each task."""
    if limit is None:
        return list(examples)
    taken: dict[str | None, int] = {}
    chosen = []
    for example in examples:
        taken[example.task] = taken.get(example.task, 0) + 1
        if taken[example.task] <= limit:
            chosen.append(example)
    return chosen


def _ask_bank(run: _Run, bank: Bank) -> dict[str, list[Outcome]]:
    """Backbone, router and pinned modules, on one engine."""
    homes = _homes(run, bank)
    with run.asker(bank, bank.name) as asker:
        results = {BACKBONE: run.ask(asker, BACKBONE, lambda _: bank.backbone.name)}
        results[AUTO] = run.ask(asker, AUTO, lambda _: AUTO)
        if run.options.oracle and homes:
            tasks = list(homes)
            results[ORACLE] = run.ask(asker, ORACLE, lambda e: homes[str(e.task)], tasks=tasks)
    return results


def _homes(run: _Run, bank: Bank) -> dict[str, str]:
    """The module of each task that has one."""
    found = {str(e.task): bank.module_of(str(e.task)) for e in run.examples}
    return {task: module.name for task, module in found.items() if module is not None}


def _ask_experts(run: _Run, given: GivenExperts) -> list[Outcome]:
    """Each of these experts on the prompts of its own task."""
    label = EXPERTS if given.is_pinned else f"expert {given.names[0]}"
    with run.asker(given.bank, label) as asker:
        return run.ask(
            asker, label, lambda e: str(e.task) if given.is_pinned else AUTO, tasks=given.names
        )


def _ask_merge(
    run: _Run, name: str, recipe: Recipe, *, sources: Mapping[str, str]
) -> list[Outcome]:
    """Build a static merge of the same sources in a temporary folder and ask it everything."""
    with tempfile.TemporaryDirectory(prefix="mergeroute-") as folder:
        device = choose_device(run.placement.device)
        tools = BuildTools(device, run.progress, calibrator(recipe, device, run.progress))
        bank = build(recipe, Path(folder) / "bank", tools=tools)
        check_sources(recipe, bank.sources, recorded=sources)
        with run.asker(bank, name) as asker:
            return run.ask(asker, name, lambda _: AUTO)


def _sizes(bank: Bank, experts: Mapping[str, Path]) -> Bytes:
    return Bytes(
        backbone=_weight_bytes(bank.backbone.path),
        modules={module.name: _weight_bytes(module.path) for module in bank.modules},
        experts={name: _weight_bytes(path) for name, path in experts.items()},
    )


def _report(run: _Run, bank: Bank, results: Results, *, data: Path, sizes: Bytes) -> Report:
    tasks = list(dict.fromkeys(str(example.task) for example in run.examples))
    homes = _homes(run, bank)
    entries = (bank.recipe or {}).get("experts", ())
    is_sparse = isinstance(entries, dict)  # experts of one model have no tasks of their own
    known = {*tasks} if is_sparse else {*homes, *(expert["name"] for expert in entries)}
    is_routed = bank.router_path is not None
    figures = {
        task: figures_of(
            task, _of_task(task, results), sizes, home=homes.get(task), is_routed=is_routed
        )
        for task in tasks
    }
    own = tuple(figures[task] for task in tasks if task in known)
    return Report(
        about=_about(run, bank, data, sizes.backbone),
        systems={name: _what(name, is_sparse=is_sparse) for name in results},
        tasks=own,
        generic=tuple(figures[task] for task in tasks if task not in known),
        left_out=_left_out(own),
        notes=tuple(_notes(run, bank, own)),
    )


def _what(system: str, *, is_sparse: bool) -> str:
    """What a system is, in words. is_sparse: the bank has merged experts of one model."""
    if is_sparse and system == EXPERTS:
        return "the model as it was, with all its experts"
    return _WHAT.get(system, f"static merge {system}")


def _of_task(task: str, results: Results) -> dict[str, list[Outcome]]:
    groups = {name: [o for o in all_ if o.example.task == task] for name, all_ in results.items()}
    return {name: group for name, group in groups.items() if group}


def _left_out(tasks: Sequence[Figures]) -> tuple[str, ...]:
    return tuple(f.task for f in tasks if EXPERTS in f.scores and f.normalised is None)


def _about(run: _Run, bank: Bank, data: Path, backbone_bytes: int) -> dict[str, Any]:
    unused = sorted({key for example in run.examples for key in example.unused})
    packages = ("mergeroute", "torch", "transformers")
    device = choose_device(run.placement.device)
    return {
        "bank": {
            "name": bank.name,
            "digest": bank.digest,
            "backbone_digest": bank.backbone.digest,
            "backbone_bytes": backbone_bytes,
        },
        "data": {
            "file": data.name,
            "digest": file_digest(data),
            "prompts": len(run.examples),
            "unused_keys": unused,
        },
        "metric": str(run.options.metric),
        "max_tokens": run.options.max_tokens,
        "limit": run.options.limit,
        "device": str(device),
        "dtype": str(choose_dtype(run.placement.dtype, device)).removeprefix("torch."),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


def _notes(run: _Run, bank: Bank, tasks: Sequence[Figures]) -> Iterator[str]:
    """What the figures alone do not say."""
    homes = _homes(run, bank)
    if not run.options.experts:
        yield "normalised scores are absent: they need --experts"
    if left_out := _left_out(tasks):
        yield f"no normalised score, as the expert scores 0: {', '.join(left_out)}"
    if bank.modules and bank.router_path is None:
        yield "the bank has no router: auto is the backbone"
    asked = {homes[figures.task] for figures in tasks if figures.task in homes}
    if unasked := [module.name for module in bank.modules if module.name not in asked]:
        yield f"modules without prompts in the data: {', '.join(unasked)}"
    if bank.router_path is not None and (mean := mean_of(tasks, "mean")):
        yield from shortfalls(mean.scores)
    if not tasks:
        yield "no task of the data is a module or an expert of the bank: all count as generic"


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
