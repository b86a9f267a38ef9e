"""Every error a caller may want to catch.

MergerouteError
├── BlendError              weights or names that make no blend
├── BackboneError           a folder that is no usable checkpoint
│   └── CheckpointError     a file of it is missing, truncated or holds what cannot be used
├── RecipeError             a recipe that cannot be built
├── DataError               a data file with a line that cannot be used (mergeroute.routers)
├── ModuleError             a LoRA folder that cannot be served as it stands
├── BankError               a bank that is missing, corrupt, truncated or of a newer format
├── RouterError             a router that cannot be read, fitted or run (mergeroute.routers)
├── UnknownTargetError      a name that nothing is served under (mergeroute.serving)
└── EngineError             (mergeroute.runtime)
    ├── RequestError        the request itself is at fault: refused before admission
    │   └── ContextLengthError   the prompt does not fit
    ├── UnknownModuleError  a blend names a module that is not loaded
    ├── ModuleUnavailableError   a module's files have gone or changed since it was registered
    ├── QueueFullError      too many requests wait
    ├── EngineStoppedError  the engine is shutting down
    ├── EngineTimeoutError  the engine takes too long to answer
    └── UnsupportedModelError    this architecture cannot be served exactly

and in mergeroute.serving, for what only that layer can know: ApiError (an error with its HTTP
form), SettingsError with UsageError (a file or command line at fault), InspectError.

A message states the value, the rule and the remedy.
"""


class MergerouteError(Exception):
    """Root of all errors raised on purpose."""


class BlendError(MergerouteError, ValueError):
    """Weights or names that make no blend."""


class BackboneError(MergerouteError):
    """A folder that is no usable checkpoint."""


class CheckpointError(BackboneError):
    """A checkpoint's file is missing, truncated or holds what cannot be used."""


class RecipeError(MergerouteError):
    """A recipe that cannot be built."""


class DataError(MergerouteError):
    """A data file with a line that cannot be used."""


class ModuleError(MergerouteError):
    """A LoRA folder that cannot be served as it stands."""


class BankError(MergerouteError):
    """A bank that is missing, corrupt, truncated or of a newer format."""


class RouterError(MergerouteError):
    """A router that cannot be read, fitted or run."""


class UnknownTargetError(MergerouteError):
    """A name that nothing is served under."""


class EngineError(MergerouteError):
    """The engine cannot do what was asked."""


class RequestError(EngineError, ValueError):
    """The request itself is at fault.

    parameter: the field at fault, by its name in `GenerationRequest`; None when it is no one field.
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class ContextLengthError(RequestError):
    """The prompt, or the prompt plus the tokens asked for, does not fit the context."""


class UnknownModuleError(EngineError):
    """A blend names a module that is not loaded."""


class ModuleUnavailableError(EngineError):
    """A module's files have gone or changed since it was registered."""


class QueueFullError(EngineError):
    """Too many requests wait. retry_s: seconds after which trying again may help."""

    def __init__(self, message: str, *, retry_s: int = 1) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class EngineStoppedError(EngineError):
    """The engine is shutting down."""


class EngineTimeoutError(EngineError):
    """The engine takes too long to answer."""


class UnsupportedModelError(EngineError):
    """This architecture cannot be served exactly."""
