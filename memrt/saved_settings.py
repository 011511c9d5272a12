"""Whether saved state is of these strategies with these settings; asked before anything is loaded.

State goes with the settings that made it: a basis with its rank and interval, a draw with its seed.
Loaded into others it would win over what this run was told, or fail at a later step.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from memrt.strategy import Strategy

__all__ = ["check_settings"]


def check_settings(
    written: Sequence[Mapping[str, Any]], strategies: Sequence[Strategy], *, source: str
) -> None:
    """Refuse state of other strategies or other settings: `written` holds what `to_json` gave.

    Settings of `exact` strategies may differ: they change no number. `source` names the state.
    """
    saved = {str(each["name"]): each for each in written}
    here = {strategy.name: strategy for strategy in strategies}
    if saved.keys() != here.keys():
        raise ValueError(
            f"{source} was written with strategies {sorted(saved) or 'none'}, this run has "
            f"{sorted(here) or 'none'}; resume with the same strategies, or load its weights alone "
            "(from_pretrained, load_state_dict) and start a new run"
        )
    for name, strategy in here.items():
        if not strategy.exact and _plain(strategy.to_json()) != _plain(saved[name]):
            raise ValueError(
                f"{source} was written with {_described(saved[name], strategy)}, this run has "
                f"{strategy}; resume with the same settings"
            )


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON gives it back: lists in place of tuples."""
    return json.loads(json.dumps(dict(settings), default=str))


def _described(settings: Mapping[str, Any], strategy: Strategy) -> str:
    """Saved settings as a strategy prints them; those that it refuses, all of them."""
    options = {option: value for option, value in settings.items() if option != "name"}
    try:
        return str(type(strategy)(**options))
    except (TypeError, ValueError):
        listed = ", ".join(f"{option}={value!r}" for option, value in options.items())
        return f"{strategy.name}({listed})"
