"""What of a run goes elsewhere: loggers that `training.report_to` names, and the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.integrations import get_reporting_integration_callbacks

__all__ = ["hub_errors", "require_callbacks", "require_hub"]

# OSError, and the errors of whichever HTTP client this version of the Hub's library has
_HUB_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)


def require_callbacks(report_to: Sequence[str]) -> None:
    """Refuse loggers that are not installed, which a Trainer notices when its model is loaded."""
    for name in report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (RuntimeError, ImportError, ValueError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"training.report_to={name!r}: {text}") from error


def require_hub(arguments: Any) -> None:
    """Refuse a push to a Hub that knows no login, or cannot be reached; nothing is made there."""
    if arguments.push_to_hub:
        with hub_errors(arguments):
            HfApi().whoami(token=arguments.hub_token)


@contextmanager
def hub_errors(arguments: Any) -> Iterator[None]:
    """What a Trainer that pushes to the Hub raises when it cannot reach it, as one sentence."""
    try:
        yield
    except _HUB_ERRORS as error:
        if not arguments.push_to_hub:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"training.push_to_hub=true: the Hub cannot be used ({text}); log in with `hf auth "
            "login` where there is a network, or set it to false"
        ) from error
