"""Why a router reads the last turn alone unless told otherwise, on the zoo's own prompts."""

from __future__ import annotations

from random import Random

from examples.zoo.tasks import load_tasks, router_examples, target_tasks
from mergeroute.routers.base import Query
from mergeroute.routers.loading import signal_of
from mergeroute.routers.policies import Policy
from mergeroute.routers.router import RequestRouter
from mergeroute.routers.settings import SignalSettings
from mergeroute.routers.training import Labelled, fit
from mergeroute.runtime.torch_engine import TorchEngine
from mergeroute.serving.chat import user_prompt
from mergeroute.serving.cli import DEMO_BANK

TRAINED, ASKED = 20, 8
"""Prompts a task."""
EARLIER = 4
"""Turns of one task, mostly another, before the turn that is to be routed."""


def test_the_last_turn_routes_a_conversation_that_changes_its_task_better_than_its_mean() -> None:
    with TorchEngine.load(DEMO_BANK / "backbone", dtype="float32") as engine:
        tasks = target_tasks(load_tasks())
        turns = {
            task.name: [
                user_prompt(engine.tokenizer, example.prompt).turns[0]
                for example in router_examples(task, TRAINED + ASKED)
            ]
            for task in tasks
        }
        names = list(turns)
        rows = [Labelled(Query((t,)), name) for name in names for t in turns[name][:TRAINED]]
        draw = Random(0)
        asked = [
            (name, Query((*draw.sample(turns[draw.choice(names)], EARLIER), turn)))
            for name in names
            for turn in turns[name][TRAINED:]
        ]

        def right(recency: float | None) -> float:
            settings = SignalSettings(layer=1, recency=recency)
            signal = signal_of(settings, encode=engine.encode)
            scorer = fit("prototype", signal, rows, modules=names)
            router = RequestRouter(scorer, Policy.parse("softmax | top_k(1) | quantise"))
            return sum(router.route(query).best == name for name, query in asked) / len(asked)

        last, weighted = right(SignalSettings(layer=1).recency), right(0.5)
    assert last > 0.95
    assert last > weighted
