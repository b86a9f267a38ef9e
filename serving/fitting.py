"""Fit a bank's router on prompts: what `mergeroute router fit` and `mergeroute build` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..adapters.bank import Bank
from ..adapters.build import Progress
from ..adapters.errors import BankError, DataError, RouterError
from ..adapters.rerouting import check_apart, with_router
from ..routers.base import Encode, Query, Scorer, Signal
from ..routers.curve import CurvePoint, draws, learning_curve
from ..routers.data import Example, read_examples
from ..routers.ensemble import Ensemble
from ..routers.learned import Fitted
from ..routers.loading import signal_of
from ..routers.policies import Policy
from ..routers.report import Case, RouterReport, report
from ..routers.router import RequestRouter
from ..routers.settings import (
    EnsembleSettings,
    LearnedSettings,
    RulesSettings,
    SignalSettings,
)
from ..routers.store import save_router
from ..routers.training import (
    Labelled,
    Readings,
    called,
    fit_readings,
    read,
    shortened,
    split,
    without_duplicates,
)
from ..runtime.loading import load_tokenizer
from ..runtime.torch_engine import TorchEngine
from .chat import chat_prompt, text_prompt
from .errors import ApiError
from .router_options import FitOptions, as_rules, usual_signal
from .schemas.messages import Message

Home = Callable[[str], str | None]
"""The module that serves a task; None: none does."""


@dataclass(frozen=True)
class Trial:
    """A router fitted on four fifths of the prompts, asked the last fifth.

    cases: its decisions. curve: accuracy by number of samples, where it was asked for.
    """

    cases: tuple[Case, ...]
    report: RouterReport
    curve: tuple[CurvePoint, ...] = ()

    def document(self) -> dict[str, Any]:
        """A JSON value."""
        return {**self.report.document(), "curve": [vars(point) for point in self.curve]}


@dataclass(frozen=True)
class FittedRouter:
    """A router that was fitted on all prompts, to be written.

    fitted: the learned scorer; in an ensemble by its place. own, none, equal: prompts of modules,
    prompts of no module, and those given again. trial: None where prompts were too few for one.
    """

    settings: LearnedSettings | EnsembleSettings
    fitted: Mapping[int, Fitted] | Fitted
    own: int
    none: int
    equal: int
    trial: Trial | None

    def write(self, folder: Path) -> None:
        """Write the router's files into a folder."""
        save_router(folder, self.settings, fitted=self.fitted)

    def document(self) -> dict[str, Any]:
        """A JSON value with settings and figures."""
        return {
            "object": "router-fit",
            "router": self.settings.model_dump(mode="json", exclude_none=True),
            "prompts": {"own": self.own, "none": self.none, "equal": self.equal},
            "held_out": self.trial and self.trial.document(),
        }


def fit_bank(
    path: Path,
    out: Path,
    options: FitOptions,
    *,
    data: Path,
    none: Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = lambda stage, total: lambda: None,
) -> tuple[Bank, FittedRouter]:
    """Write a bank that is another one but for its router, which is fitted on prompts.

    data: prompts with the module that serves each. none: prompts that no module serves.

    Raises:
        DataError: a file, or a line of it, cannot be used.
        MergerouteError: the bank cannot be read or written, or no router be fitted.
    """
    check_apart(path, out)
    made: list[FittedRouter] = []

    def write(bank: Bank, folder: Path) -> None:
        if not bank.modules:
            raise BankError(f"bank {bank.name!r} has no modules: a router has nothing to choose")
        modules = {module.name: module.description for module in bank.modules}
        options.check(list(modules))  # here, and the prompts too: a backbone takes long to load
        prompts = labelled(
            load_tokenizer(bank.backbone.path),
            read_prompts(data, none, homes_of(bank), modules=list(modules)),
        )
        usual = usual_signal(bank.router_path)
        with TorchEngine.load(bank.backbone.path, device=device, dtype=dtype) as engine:
            router = fit_router(
                options.with_signal(usual, layers=engine.layers),
                prompts,
                modules=modules,
                encode=engine.encode,
                backbone=bank.backbone.digest,
                progress=progress,
            )
        router.write(folder)
        made.append(router)

    bank = with_router(path, out, write_router=write, name=options.name, force=options.force)
    return bank, made[0]


def homes_of(bank: Bank) -> Home:
    """By task, the module that serves it: its own, or the one that its own was folded into."""

    @cache
    def home(task: str) -> str | None:
        module = bank.module_of(task)
        return None if module is None else module.name

    return home


def read_prompts(
    data: Path, none: Path | None, home: Home, *, modules: Sequence[str]
) -> list[tuple[Example, str | None]]:
    """Examples, and the module that serves each; None: no module.

    home: module of a task. modules: those that must have prompts.

    Raises:
        DataError: a file or line cannot be used, a module has no prompts, a task no module, or one
            prompt two homes.
    """
    found: list[tuple[Example, str | None]] = []
    for example in read_examples(data, needs=("task",)):
        found.append((example, module := home(str(example.task))))
        if module is None:
            raise DataError(
                f"{example.where}: task {example.task!r} is no module ({', '.join(modules)}); "
                "prompts that no module serves go to a file of their own, of none"
            )
    if missing := set(modules) - {module for _, module in found}:
        raise DataError(
            f"{data} holds no prompt of module {min(missing)!r}: add some with its task"
        )
    found += [(example, None) for example in (read_none(none, home) if none else ())]
    _check_prompts(found)
    return found


def read_none(path: Path, home: Home) -> list[Example]:
    """Examples that no module serves. home: module of a task.

    Raises:
        DataError: a file or line cannot be used, or a line names a task that a module serves.
    """
    examples = read_examples(path)
    for example in examples:
        if example.task and home(example.task) is not None:
            raise DataError(
                f"{example.where}: task {example.task!r} is a module's: move the line to data, or "
                "drop the task"
            )
    return examples


def _check_prompts(prompts: Sequence[tuple[Example, str | None]]) -> None:
    """None is blank, and none is given for two modules, or for one and for none."""
    earlier: dict[tuple[str, ...], tuple[Example, str | None]] = {}
    for example, module in prompts:
        if not example.prompt.strip():
            raise DataError(f"{example.where}: the prompt is blank: give a text")
        first, home = earlier.setdefault(example.user_turns, (example, module))
        if home != module:
            raise DataError(
                f"{example.where}: the prompt {shortened(example.prompt)} is given for "
                f"{called(module)}, and in {first.where} for {called(home)}: decide for one"
            )


def labelled(tokenizer: Any, prompts: Sequence[tuple[Example, str | None]]) -> list[Labelled]:  # noqa: ANN401
    """Examples as the server's router would see them."""
    return [Labelled(query_of(tokenizer, example), module) for example, module in prompts]


def query_of(tokenizer: Any, example: Example) -> Query:  # noqa: ANN401 - transformers is untyped
    """What the server's router would look at.

    Raises:
        DataError: the backbone's chat template refuses it; it names the line.
    """
    is_lone = [message.role for message in example.messages] == ["user"]
    if is_lone and not tokenizer.chat_template:
        return Query(text_prompt(tokenizer, example.prompt).turns)
    messages = [Message(role=m.role, content=m.content) for m in example.messages]
    try:
        return Query(chat_prompt(tokenizer, messages).turns)
    except ApiError as error:
        raise DataError(f"{example.where}: {error}") from error


def fit_router(
    options: FitOptions,
    examples: Sequence[Labelled],
    *,
    modules: Mapping[str, str],
    encode: Encode,
    backbone: str | None = None,
    progress: Progress = lambda stage, total: lambda: None,
) -> FittedRouter:
    """Fit a router on all examples, after measuring one that was fitted on four fifths of them.
    Its thresholds come from cross-validation.

    modules: descriptions by name. backbone: digest of what `encode` runs.

    Raises:
        RouterError: prompts are too few, of one module only or contradictory, or a setting is out
            of range.
    """
    options.check(list(modules))
    different = without_duplicates(examples)
    turns = sum(len(example.query.turns) for example in different)
    assert options.signal is not None, "settle the signal first"
    signal = signal_of(options.signal, encode=encode, capacity=turns)
    readings = read(signal, different, step=progress("reading prompts", len(different)))
    fitting = _Fitting(options, modules, signal, readings)
    trial = fitting.trial(different, progress)
    step = progress("fitting the router", 1)
    scorer = fitting.fitted(range(len(different)))
    step()
    none = readings.labels.count(None)
    return FittedRouter(
        settings=fitting.settings(backbone),
        fitted={1: scorer} if options.rules else scorer,
        own=len(different) - none,
        none=none,
        equal=len(examples) - len(different),
        trial=trial,
    )


@dataclass(frozen=True)
class _Fitting:
    """Prompts that are read, and what is fitted on them. modules: descriptions by name."""

    options: FitOptions
    modules: Mapping[str, str]
    signal: Signal
    readings: Readings

    def fitted(self, places: Sequence[int]) -> Fitted:
        """The scorer of some of the prompts."""
        return fit_readings(
            self.options.scorer,
            self.signal,
            self.readings.rows(places),
            modules=list(self.modules),
            descriptions=self.modules if self.options.reads_text_alone else None,
        )

    def router(self, places: Sequence[int]) -> RequestRouter:
        """The whole router of some of the prompts."""
        scorer: Scorer = self.fitted(places)
        if self.options.rules:
            scorer = Ensemble((as_rules(self.options.rules), scorer))
        return RequestRouter(scorer, Policy.parse(self.options.policy))

    def settings(self, backbone: str | None) -> LearnedSettings | EnsembleSettings:
        """What router.json will say."""
        options = self.options
        learned = LearnedSettings(
            scorer=options.scorer,
            modules=tuple(self.modules),
            signal=options.signal or SignalSettings(),
            policy=options.policy,
            backbone=backbone,
        )
        if not options.rules:
            return learned
        rules = RulesSettings(rules=options.rules)
        return EnsembleSettings(members=(rules, learned), policy=options.policy, backbone=backbone)

    def trial(self, examples: Sequence[Labelled], progress: Progress) -> Trial | None:
        """The same fitted on four fifths, asked the last fifth; None where they are too few."""
        kept, left = split(examples)
        held_out = [examples[place] for place in left]
        step = progress("measuring on a fifth", 1)
        try:
            router = self.router(kept)
        except RouterError:  # if they are at fault, and not just too few, so is the fit on all
            return None
        decisions = router.route_all([example.query for example in held_out])
        step()
        cases = [Case(e.module, decision) for e, decision in zip(held_out, decisions, strict=True)]
        curve: list[CurvePoint] = []
        if self.options.with_curve and any(case.module for case in cases):
            curve = self._curve(kept, held_out, progress)
        return Trial(tuple(cases), report(cases, modules=list(self.modules)), tuple(curve))

    def _curve(
        self,
        kept: Sequence[int],
        held_out: Sequence[Labelled],
        progress: Progress,
    ) -> list[CurvePoint]:
        labels = [self.readings.labels[place] for place in kept]
        count = sum(len(sets) for _, sets in draws(labels))
        return learning_curve(
            lambda places: self.router([kept[k] for k in places]),
            labels,
            held_out,
            step=progress("accuracy by samples", count),
        )
