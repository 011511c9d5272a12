"""Moments in a basis that moved, against the moments of the gradient seen from there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memrt.optimizers.moment_rotation import rotate_moments_

BETA1, BETA2 = 0.9, 0.99
each_side = pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])


def moments(gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Adam's, from zero."""
    first, second = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for gradient in gradients:
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient.square()
    return first, second


def rotated(gradients: list[Tensor], rotation: Tensor, *, is_left: bool) -> tuple[Tensor, Tensor]:
    first, second = (m.clone() if is_left else m.t().clone() for m in moments(gradients))
    rotate_moments_(
        first,
        second,
        rotation,
        is_left=is_left,
        betas=(BETA1, BETA2),
        step=torch.tensor(float(len(gradients))),
    )
    return (first, second) if is_left else (first.t(), second.t())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_side
def test_a_gradient_that_stays_the_same_has_the_moments_of_its_image(is_left: bool) -> None:
    gradient, rotation = draw(5, 9), torch.linalg.qr(draw(7, 7, seed=1)).Q[:5, :5]
    found = rotated([gradient] * 6, rotation, is_left=is_left)
    expected = moments([rotation @ gradient] * 6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@each_side
def test_signs_and_permutations_move_moments_and_change_none(is_left: bool) -> None:
    gradients = [draw(4, 6, seed=seed) for seed in range(8)]
    rotation = torch.eye(4)[[2, 0, 3, 1]] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = rotated(gradients, rotation, is_left=is_left)
    expected = moments([rotation @ gradient for gradient in gradients])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_that_vary_independently_keep_their_mean_square() -> None:
    """Against squares rotated alone, which are wrong by what a mean adds."""
    means, rotation = 2 * draw(6, 4000), torch.linalg.qr(draw(6, 6, seed=1)).Q
    gradients = [means + draw(6, 4000, seed=10 + seed) for seed in range(400)]
    found = rotated(gradients, rotation, is_left=True)
    first, second = moments([rotation @ gradient for gradient in gradients])
    torch.testing.assert_close(found[0], first, rtol=1e-4, atol=1e-4)
    squares_alone = rotation.square() @ moments(gradients)[1]

    def error(value: Tensor) -> float:
        return float((value - second).norm() / second.norm())

    assert error(found[1]) < 0.12 < 0.3 < error(squares_alone)


def test_no_mean_square_becomes_negative() -> None:
    first, second = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.5], [0.5]])  # of no gradients
    rotate_moments_(
        first,
        second,
        torch.tensor([[0.6, -0.8], [0.8, 0.6]]),
        is_left=True,
        betas=(BETA1, BETA2),
        step=torch.tensor(3.0),
    )
    assert (second >= 0).all()
