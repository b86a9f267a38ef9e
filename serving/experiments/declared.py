"""Experiments that serve.yaml declares: made and started where they are new, changed where the file
has changed. What was done over HTTP meanwhile stays, until the file says something else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import ApiError, SettingsError
from ..targets import Targets
from . import lifecycle
from .database import DatabaseDownError
from .definition import Experiment
from .experiment_store import Experiments
from .lifecycle import Author
from .live import LiveExperiments

logger = logging.getLogger(__name__)

FILE = Author("serve.yaml", "declared")


def declare(live: LiveExperiments, documents: Sequence[Experiment], targets: Targets) -> None:
    """Bring what the file declares about, all or nothing. Those that run are not started again, and
    those that were paused or concluded stay so. Where the database does not answer, it is done as
    soon as it does, and what is wrong then is logged.

    Raises:
        SettingsError: one cannot be had.
    """

    def change() -> None:
        with live.changing() as experiments:
            for document in documents:
                _declare(experiments, document, targets)

    def change_late() -> None:
        try:
            change()
        except SettingsError as error:
            logger.error("what serve.yaml declares is not done: %s", error)
        else:
            logger.info("what serve.yaml declares is done")

    try:
        change()
    except DatabaseDownError as error:
        logger.error("the experiments of serve.yaml wait for the database: %s", error)
        live.later(change_late)


def _declare(experiments: Experiments, document: Experiment, targets: Targets) -> None:
    try:
        if document.name not in {stored.name for stored in experiments.list()}:
            lifecycle.create(experiments, document, targets, FILE)
            lifecycle.start(experiments, document.name, targets, FILE)
        elif _is_news(experiments, document):
            if experiments.get(document.name).state == "concluded":
                logger.warning("%s is concluded: what serve.yaml says has no effect", document.name)
            else:
                lifecycle.redefine(experiments, document, targets, FILE)
    except DatabaseDownError:
        raise
    except ApiError as error:
        raise SettingsError(f"experiments: {document.name}: {error}") from error


def _is_news(experiments: Experiments, document: Experiment) -> bool:
    """Whether the file says something else than when it was last read."""
    history = experiments.history(document.name)
    declared = [stored.document for stored in history if stored.changed_by == FILE.who]
    return not declared or document.salted(declared[-1].salt) != declared[-1]
