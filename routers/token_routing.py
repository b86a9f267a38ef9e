"""TokenRouting: how modules are weighed for every token and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from ..adapters.digest import json_digest
from ..adapters.errors import RouterError

METHODS = {"arrow": 3, "spectr": 3, "phatgoose": 2}
"""Methods, and how many modules a token takes unless told otherwise."""

NORMS = ("unit", "raw")


@dataclass(frozen=True)
class TokenRouting:
    """Every layer scores the modules by its own input; the softmax of the best is their weights.

    method:
        arrow: |v·x|, v the direction that the module's change of the layer amplifies most.
        spectr: |V x| over several such directions.
        phatgoose: LN(x)·LN(v)/√i with a vector v that was trained for the module, and ships in it.
    top_k: modules that share a token, the best ones; 0 takes all, None the method's default.
    temperature: 0.0001 to 10,000; below 1 sharpens.
    directions: of spectr: so many of the first ones alike; 0 takes all, by their singular values.
    norm: of arrow and spectr: `unit` scales x to a root mean square of 1, so that a direction at
        random scores about 1 whatever the width; `raw` takes x as it is, as PEFT does.
    none: score of a slot in the softmax that stands for the backbone; None has no such slot.
    smoothing: share of the tokens before in a running mean of the scores, in [0, 1).

    Raises:
        RouterError: a value is out of range, or has no meaning for the method.

    Source: Ostapenko et al. 2024, Arrow, arXiv:2405.11157; Fleshman and Van Durme 2025, SpectR,
    arXiv:2504.03454; Tang et al. 2024, SMILE, arXiv:2408.10174 (some directions alike); Muqeeth et
    al. 2024, PHATGOOSE, arXiv:2402.05859.
    """

    method: str
    top_k: int | None = None
    temperature: float = 1.0
    directions: int = 0
    norm: str = "unit"
    none: float | None = None
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        is_known = isinstance(self.method, str) and self.method in METHODS
        _require(self, "method", f"one of {', '.join(METHODS)}", is_known)
        if self.top_k is None:
            object.__setattr__(self, "top_k", METHODS[self.method])
        self._check_ranges()
        if self.method != "spectr":
            _require(self, "directions", f"0 with {self.method}: spectr alone", not self.directions)
        if self.method == "phatgoose":
            _require(self, "norm", "unit with phatgoose, which always scales", self.norm == "unit")
        for name in ("temperature", "none", "smoothing"):  # 1 and 1.0 are one setting
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

    def _check_ranges(self) -> None:
        for name in ("top_k", "directions"):
            fits = _is_count(getattr(self, name))
            _require(self, name, "a whole number, 0 (all) or more", fits)
        fits = _is_within(self.temperature, 1e-4, 1e4)
        _require(self, "temperature", "between 0.0001 and 10,000", fits)
        _require(self, "norm", f"one of {', '.join(NORMS)}", self.norm in NORMS)
        fits = self.none is None or _is_within(self.none, -1e4, 1e4)
        _require(self, "none", "null, or a score between -10,000 and 10,000", fits)
        fits = _is_within(self.smoothing, 0, 1) and self.smoothing < 1
        _require(self, "smoothing", "at least 0 and below 1", fits)

    @classmethod
    def parse(cls, value: object) -> TokenRouting:
        """Read a method's name, or a mapping of settings with its `method`: what the field
        `routing` of a request holds, and `router.json`.

        Raises:
            RouterError: it is neither, or a setting is unknown or out of range.
        """
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise RouterError(
                f"routing is {value!r}, allowed is one of {', '.join(METHODS)}, or a mapping such "
                'as {"method": "arrow", "top_k": 1}'
            )
        known = [setting.name for setting in fields(cls)]
        for key in value:
            if key not in known:
                raise RouterError(f"routing has the key {key!r}, allowed are {', '.join(known)}")
        if "method" not in value:
            raise RouterError(f"routing has no method: name one of {', '.join(METHODS)}")
        return cls(**value)

    @cached_property
    def digest(self) -> str:
        """Content digest: two settings route alike when, and only when, theirs are equal."""
        return json_digest(asdict(self))

    @property
    def settings(self) -> dict[str, Any]:
        """The method and what differs from its defaults: a JSON value that `parse` reads."""
        default = asdict(TokenRouting(self.method))
        changed = {name: value for name, value in asdict(self).items() if value != default[name]}
        return {"method": self.method, **changed}

    def __str__(self) -> str:
        method, *changed = self.settings.items()
        settings = ", ".join(f"{name}={value}" for name, value in changed)
        return f"{method[1]}({settings})" if settings else str(method[1])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_within(value: object, low: float, high: float) -> bool:
    """Whether it is a number in the range; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _require(routing: TokenRouting, name: str, rule: str, holds: bool) -> None:
    if not holds:
        raise RouterError(f"routing's {name} is {getattr(routing, name)!r}, allowed is {rule}")
