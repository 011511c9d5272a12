"""What `memrt train` measures while it runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from memrt.cli.train_console import Speed


@pytest.mark.parametrize(("num_counted_steps", "num_tokens"), [(0, 300), (1, 200)])
def test_the_speed_of_a_resumed_run_is_that_of_its_own_tokens(
    num_counted_steps: int, num_tokens: int
) -> None:
    speed = Speed(num_counted_steps=num_counted_steps)
    state = SimpleNamespace(num_input_tokens_seen=1_000_000)  # as the checkpoint has it
    for _ in range(3):
        speed.on_step_begin(None, state, None)
        state.num_input_tokens_seen += 100
        speed.on_step_end(None, state, None)
    assert speed.num_tokens == num_tokens
    assert speed.tokens_per_second is not None
