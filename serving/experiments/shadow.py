"""Shadows: a share of an experiment's requests is answered once more by another variant, after
their own answer, where nobody has to wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from ...adapters.errors import MergerouteError
from ..context import Context
from ..errors import ApiError
from ..responses.progress import Progress, usage
from ..schemas.completions import ChatRequest, GenerationBody
from ..terms import Terms
from .again import begin, follow, unstreamed
from .definition import Experiment, ShadowSettings
from .hashing import BUCKETS, bucket
from .live import LiveExperiments
from .plan import Plan
from .records import ShadowPair
from .scorers import Asked, ScorerError, Scoring
from .spare import BusyError, Spare

if TYPE_CHECKING:
    from ..service import Service
    from ..telemetry.record import RequestRecord

logger = logging.getLogger(__name__)

AT_ONCE = 4
_LOOK_S = 0.02
_LONGEST_S = 600.0
_MOST_ERROR = 300


class Shadows:
    """The shadows of a server. Of one event loop, but for `stop`. What they do is counted in
    `LiveExperiments.shadow_counts`: started, compared, dropped, failed.
    """

    def __init__(self, service: Service, live: LiveExperiments) -> None:
        self._service = service
        self._live = live
        self._scoring = Scoring()
        self._tasks: set[asyncio.Task[None]] = set()
        self._spare = Spare(lambda: service.hosted)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopped = False

    def offer(self, record: RequestRecord) -> None:
        """A request is over: answer it once more, if it is drawn and there is capacity to spare."""
        experiment = self._drawn(record)
        if experiment is None or self._is_stopped:
            return
        if len(self._tasks) >= AT_ONCE:
            self._count(experiment, "dropped")
            return
        self._loop = asyncio.get_running_loop()
        task = self._loop.create_task(self._shadow(record, experiment))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def stop(self) -> None:
        """Cancel all, and begin no more. Any thread, a signal's handler too."""
        self._is_stopped = True
        for task in list(self._tasks):
            if self._loop is not None:
                with suppress(RuntimeError):  # the loop is closed, and its tasks with it
                    self._loop.call_soon_threadsafe(task.cancel)

    def _drawn(self, record: RequestRecord) -> Experiment | None:
        """The experiment that wants a shadow of the request, if any."""
        enrolment, is_answered = record.enrolment, record.error is None and record.status == 200
        if enrolment is None or not (is_answered and record.progress):
            return None
        if not enrolment.is_exposed or enrolment.is_forced:  # which is not counted
            return None
        running = self._live.snapshot.by_name.get(enrolment.experiment)
        wanted = running.experiment.shadow if running and running.state == "running" else None
        if running is None or wanted is None or wanted.variant == enrolment.variant:
            return None
        is_wanted = is_drawn(record.request_id, running.experiment, wanted)
        return running.experiment if is_wanted else None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("a shadow failed", exc_info=error)

    async def _shadow(self, record: RequestRecord, experiment: Experiment) -> None:
        try:
            await asyncio.sleep(_LOOK_S)  # for the engine to come round, and the answer to leave
            self._spare.check()
            self._count(experiment, "started")
            async with asyncio.timeout(_LONGEST_S):
                pair = await self._pair(record, experiment)
        except (BusyError, asyncio.CancelledError):
            self._count(experiment, "dropped")
        except (MergerouteError, TimeoutError) as error:
            self._count(experiment, "failed")
            logger.info("shadow of %s: %s", record.request_id, error)
        else:
            if not self._is_stopped:
                self._live.recorder.shadow(pair)
                self._count(experiment, "compared")

    async def _pair(self, record: RequestRecord, experiment: Experiment) -> ShadowPair:
        assert experiment.shadow is not None
        variant = experiment.by_name[experiment.shadow.variant]
        began, at = time.perf_counter(), time.time()
        target = self._live.snapshot.target_of(variant.target)
        shadow = await self._answered(record, Plan(target, seed=record.assignments[0].seed))
        score, error = await self._scored(experiment.shadow, record.progress, shadow)
        assert record.assigned is not None
        return ShadowPair(
            request_id=record.request_id,
            experiment=experiment.name,
            variant=variant.name,
            at=at,
            agrees=_told(shadow) == _told(record.progress),
            length=usage(record.progress)["completion_tokens"],
            other_length=usage(shadow)["completion_tokens"],
            latency_ms=_milliseconds(record.assigned, record.progress),
            other_latency_ms=_milliseconds(began, shadow),
            score=score,
            error=error,
        )

    async def _answered(self, record: RequestRecord, plan: Plan) -> list[Progress]:
        """The answer of another target, by a way that records nothing.

        Raises:
            BusyError: others need the capacity, or its modules are not in memory.
            MergerouteError: it cannot be had.
        """
        body = unstreamed(record.progress[0].choice.body)
        context = Context(record.headers, request_id=record.request_id)
        assignments = await self._service.assign(body, context, plan)
        self._spare.check(len(assignments) * body.n)
        terms = Terms(deadline=time.monotonic() + _LONGEST_S)
        with ExitStack() as held:
            for each in assignments:
                hosted = each.hosted
                needed = hosted.needed(each.decision)
                if not held.enter_context(hosted.residency.hold_resident(needed)):
                    raise BusyError("its modules would have to be read")
            progress = await begin(body, assignments, terms)
        with self._spare.taking(progress):
            await self._followed(progress)
        return progress

    async def _followed(self, progress: Sequence[Progress]) -> None:
        """Wait for the end, and give way as soon as others need the capacity."""
        engine = progress[0].choice.assignment.hosted.engine
        before = self._spare.others(engine)
        working = asyncio.ensure_future(follow(progress))
        try:
            while not (await asyncio.wait((working,), timeout=_LOOK_S))[0]:
                self._spare.check()
                if _is_at_its_prompt(progress) and self._spare.others(engine) > before:
                    raise BusyError("another prompt would have to wait for this one")
            await working
        finally:
            working.cancel()
            with suppress(asyncio.CancelledError, MergerouteError):
                await working

    async def _scored(
        self, settings: ShadowSettings, given: Sequence[Progress], shadow: Sequence[Progress]
    ) -> tuple[float | None, str | None]:
        """Of the first choices: a score, or why there is none."""
        if settings.scorer is None:
            return None, None
        asked, (answer, other) = asked_of(given[0].choice.body, given[0]), (given[0], shadow[0])
        try:
            score = await self._scoring.score(settings.scorer, asked, answer.text, other.text)
        except ScorerError as error:
            return None, str(error)[:_MOST_ERROR]
        return score, None

    def _count(self, experiment: Experiment, result: str) -> None:
        self._live.shadow_counts[experiment.name, result] += 1


def is_drawn(request_id: str, experiment: Experiment, settings: ShadowSettings) -> bool:
    """Whether a request is of the share that is answered once more: the same on every server, and
    whatever its variant. A salt has no colon, so that no experiment hashes alike.
    """
    return bucket(f"shadow:{experiment.salt}", request_id) < settings.share * BUCKETS


def asked_of(body: GenerationBody, first: Progress) -> Asked:
    """What a scorer is told of a request: a chat's messages, else the first prompt as a text."""
    if isinstance(body, ChatRequest):
        return [m.model_dump(mode="json", exclude_unset=True) for m in body.messages]
    prompt = body.prompts[0]
    if isinstance(prompt, str):
        return prompt
    return str(first.choice.assignment.hosted.tokenizer.decode(prompt))


def _is_at_its_prompt(progress: Sequence[Progress]) -> bool:
    """Whether a prompt is still computed, before which no later one is; other servers see to that
    themselves, and do not tell.
    """
    return progress[0].choice.relay is None and not all(each.arrivals for each in progress)


def _told(progress: Collection[Progress]) -> list[tuple[str, str | None]]:
    return [(each.text, each.finish_reason) for each in progress]


def _milliseconds(began: float, progress: Sequence[Progress]) -> float:
    """To the last token."""
    arrivals = [each.arrivals[-1] for each in progress if each.arrivals]
    if not arrivals:
        raise ApiError("there is no token to compare", code="no_tokens")
    return 1000 * (max(arrivals) - began)
