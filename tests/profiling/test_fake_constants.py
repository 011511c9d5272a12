"""What a plan knows of values: a mask of ones that a model makes in floats, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig

from memrt.loading import load
from memrt.planning import Shape, batches_of
from memrt.profiling.fake import fake_tensors, is_fake, real_integers
from tests.strategies.runs import assert_planned


def test_a_constant_that_is_read_as_booleans_is_real_until_it_is_written_to() -> None:
    with fake_tensors(), real_integers():
        ones, zeros = torch.ones(2, 3), torch.zeros(2)
        assert is_fake(ones)
        mask = ones.to(torch.bool)
        assert not is_fake(mask)
        assert mask.shape == (2, 3)
        assert mask.all()
        assert ones.to(torch.int64).sum() == 6
        assert not zeros.bool().any()
        ones[0] = 0.0
        assert is_fake(ones.to(torch.bool))
        assert is_fake(torch.empty(2).to(torch.bool))


def test_no_draw_is_below_zero_until_it_is_written_to() -> None:
    """A layer is drawn for where LayerDrop is 0 too, in transformers 5.17."""
    with fake_tensors(), real_integers():
        draw = torch.rand([])
        assert is_fake(draw)
        assert not draw < 0.0
        assert not (torch.rand(3) < 0).any()
        assert is_fake(draw < 0.1)
        draw.sub_(1.0)
        assert is_fake(draw < 0.0)
        assert is_fake(torch.randn([]) < 0.0)


def test_what_depends_on_values_is_refused_in_words() -> None:
    for operator, run in (
        ("_local_scalar_dense", lambda: torch.rand(2).sum().item()),
        ("nonzero", lambda: torch.rand(2).nonzero()),
    ):
        with (
            pytest.raises(ValueError, match=rf"depends on values .*{operator}.* memrt profile"),
            fake_tensors(),
            real_integers(),
        ):
            run()


def test_a_decoder_that_is_given_no_mask_is_planned_to_the_byte() -> None:
    """BART makes its decoder's mask of ones in floats, and drops it where all of it is true."""
    config = BartConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64
    )
    config.encoder_attention_heads = config.decoder_attention_heads = 4
    config.decoder_ffn_dim, config.max_position_embeddings = 64, 32
    window = batches_of(config, Shape(batch_size=2, sequence_length=16))
    assert_planned(lambda: load(config, seed=0), [], window)
