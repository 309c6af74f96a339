"""Errors that reach a client, one class a case of API.md's table. Knows no HTTP library.

    ServingError
    ├── InvalidValue              400 invalid_value
    │   └── ContextLengthExceeded 400 context_length_exceeded
    ├── InvalidAdapter            400 invalid_adapter
    ├── IncompatibleAdapter       400 incompatible_adapter
    ├── InvalidApiKey             401 invalid_api_key
    ├── PermissionDenied          403 permission_denied
    ├── NotFound                  404 not_found
    ├── ModelNotFound             404 model_not_found
    ├── MethodNotAllowed          405 method_not_allowed
    ├── RequestTooLarge           413 request_too_large
    ├── RateLimitExceeded         429 rate_limit_exceeded
    ├── InternalError             500 internal_error
    └── Unavailable               503
        ├── Overloaded            503 overloaded
        ├── Draining              503 draining
        ├── EngineUnavailable     503 engine_unavailable
        └── StorageUnavailable    503 storage_unavailable

`StartupError` stands apart: it is for the operator.
"""

from __future__ import annotations

from typing import ClassVar


class ServingError(Exception):
    """Base of all errors with a place in API.md's table. `message` is written for a stranger: no paths, no names of
    other tenants. `param` names the field at fault, like ``messages.0.content``; `reason` the limit that refused, for
    metrics."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None, reason: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.reason = reason


class InvalidValue(ServingError):
    """A malformed body, or a value out of its range."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class ContextLengthExceeded(InvalidValue):
    """The prompt and the tokens asked for do not fit the model's context."""

    code = "context_length_exceeded"


class InvalidAdapter(ServingError):
    """An adapter's files fail a check; the message says which."""

    status, type, code = 400, "invalid_request_error", "invalid_adapter"


class IncompatibleAdapter(ServingError):
    """A sound adapter that does not fit the base model or the server's limits."""

    status, type, code = 400, "invalid_request_error", "incompatible_adapter"


class InvalidApiKey(ServingError):
    """A missing, wrong or disabled key."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class PermissionDenied(ServingError):
    """The caller's role does not allow this."""

    status, type, code = 403, "permission_error", "permission_denied"


class NotFound(ServingError):
    """No such route."""

    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(ServingError):
    """No such model or adapter, or none that the caller may see: the words are the same for both."""

    status, type, code = 404, "invalid_request_error", "model_not_found"


class MethodNotAllowed(ServingError):
    """The route exists, not with this method."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTooLarge(ServingError):
    """The body is larger than the server takes."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class RateLimitExceeded(ServingError):
    """The tenant is over its quota or its queue."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class InternalError(ServingError):
    """A bug of the server."""


class Unavailable(ServingError):
    """The server cannot take work now; try again."""

    status, code = 503, "overloaded"


class Overloaded(Unavailable):
    """The server's queue is full."""


class Draining(Unavailable):
    """The server is shutting down."""

    code = "draining"


class EngineUnavailable(Unavailable):
    """The engine is down or restarting."""

    code = "engine_unavailable"


class StorageUnavailable(Unavailable):
    """The storage of adapters does not answer."""

    code = "storage_unavailable"


class StartupError(Exception):
    """The server cannot start; the message is for its operator and never reaches a client."""
