"""Answering a body once more, for nobody: no exposure, no account, no session, no metrics."""

from __future__ import annotations

from collections.abc import Sequence

from .. import choices
from ..assigning import Assignment
from ..relay import relays
from ..relay.bodies import RelayedChat, RelayedText
from ..responses.progress import Progress
from ..schemas.completions import GenerationBody
from ..streaming import collect
from ..terms import Terms


def unstreamed(body: GenerationBody) -> GenerationBody:
    """The same, answered whole."""
    changed: dict[str, object] = {"stream": False, "stream_options": None}
    if isinstance(body, RelayedChat | RelayedText):
        kept = {n: v for n, v in body.document.items() if n not in ("stream", "stream_options")}
        changed["document"] = kept
    return body.model_copy(update=changed)


async def begin(
    body: GenerationBody, assignments: Sequence[Assignment], terms: Terms
) -> list[Progress]:
    """Start all choices, or none. body: unstreamed.

    Raises:
        MergerouteError: a module cannot be read, or an engine refuses a choice.
    """
    if isinstance(body, RelayedChat | RelayedText):
        started = await relays.start(body, assignments, terms)
    else:
        started = await choices.start(body, assignments, terms)
    return [Progress(choice) for choice in started]


async def follow(progress: Sequence[Progress]) -> None:
    """Wait for all choices to end. Leaving early cancels them.

    Raises:
        MergerouteError: the engine failed on a choice, or its time is up.
    """
    relay = progress[0].choice.relay
    if relay is None:
        await collect(progress)
        return
    try:
        await relay.open()
        relay.whole(progress)
    finally:
        relay.release()
