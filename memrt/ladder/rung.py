"""The modules of a side network: rungs and the join, and what flows between them.

After the backbone's block i, with H_i its output and S the side's state:

    Z = g S + (1 - g) down_i(H_i),   S = block_i(Z)

and the first state is S = down_0(E) of what the first block was given. A rung hangs below the
backbone's block as its child `ladder`, so that it lies on the block's device and is counted with
its layer. The state lives in a `Stream` from the first block to the join.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memrt.ladder.taps import Gate, Tap
from memrt.profiling.fake import is_fake

__all__ = ["Call", "EncoderEnd", "Join", "Rung", "Stream"]


class Stream:
    """What flows through one stack's ladder during one forward."""

    def __init__(self, name: str, num_layers: int, rungs: Sequence[int]) -> None:
        self.name = name
        self.num_layers = num_layers
        self.rungs = tuple(rungs)
        """The blocks that have one, from 0."""
        self.state: Tensor | None = None
        self.rotary: dict[int, tuple[Any, Any]] = {}
        self.memory: Tensor | None = None
        """Of an encoder: the end of its side network, for the decoder's cross-attention."""
        self.mark: tuple[int, Tensor] | None = None
        """Of an encoder: what its output is known by: its length, [batch, tokens, channels]."""
        self._known: weakref.ref[Tensor] | None = None
        self.encoder: Stream | None = None
        self.position: int | None = None
        """The last block that ran, until the state is taken."""
        self.output: weakref.ref[Tensor] | None = None
        """What the last block gave to a norm that joins."""
        self.up: Tensor | None = None
        """The weight of the join, in front of which no block may be."""

    def enter(self, index: int, call: Call) -> None:
        """Refuse a block out of its turn: the side would be lost, or gradients wrong."""
        if index:
            if self.position is None or self.position >= index:
                raise ValueError(self._out_of_turn(index))
        elif self._is_own_output(call.hidden) or _depends(call.hidden, self.up):
            raise ValueError(self._out_of_turn(index))
        self.position = index

    def _is_own_output(self, hidden: Tensor) -> bool:
        return self.position is not None and self.output is not None and self.output() is hidden

    def _out_of_turn(self, index: int) -> str:
        before = "none" if self.position is None else f"block {self.position}"
        why = f"after {before}" if index else "on what the ladder beside them has given"
        return (
            f"block {index} of {self.name} ran {why}, but beside a ladder every block runs at most "
            "once a forward, from the first to the last; use another strategy for a model that "
            "loops over its blocks, and ladder(checkpoint=True) in place of checkpointed blocks"
        )

    def take(self) -> Tensor:
        """The last state, of which nothing is kept here."""
        state, self.state, self.position, self.output = self.state, None, None, None
        self.rotary.clear()
        assert state is not None, "the join ran before the first block"
        return state

    def remember_rotary(self, ours: Any, side: Any) -> None:
        """The side's position embeddings for the backbone's, known by their first tensor."""
        self.rotary[id(ours[0])] = (ours, side)

    def side_rotary(self, ours: Any) -> Any:
        """What the side's blocks get in place of the backbone's position embeddings."""
        found = self.rotary.get(id(ours[0]))
        if found is None:
            raise ValueError("position embeddings came from elsewhere than the model's own module")
        return found[1]

    def side_memory(self, given: Tensor) -> Tensor:
        """The side encoder's end, for as many rows as the decoder has (beams repeat rows).

        `given` is the backbone encoder's output that the decoder attends to.
        """
        encoder = self.encoder
        memory = None if encoder is None else encoder.memory
        if encoder is None or memory is None:
            raise ValueError(
                "the decoder was given encoder_outputs without a run of the encoder before it, so "
                "that its ladder has nothing to attend to; pass input_ids"
            )
        repeats = given.shape[0] // memory.shape[0]
        if not encoder.knows(given, repeats):
            raise ValueError(
                "the decoder was given encoder_outputs of another run of the encoder than the "
                "last, whose side network's end its ladder attends to; pass input_ids"
            )
        memory = memory[:, : given.shape[1]]  # LED drops what it padded behind its encoder
        return memory if repeats == 1 else memory.repeat_interleave(repeats, dim=0)

    def remember(self, memory: Tensor, output: Tensor, *, settled: bool) -> None:
        """The end of an encoder's side network; `settled`: nothing drops out behind `output`."""
        self.memory = memory
        self.mark = (output.shape[1], _mark(output).clone()) if settled else None
        self._known = None

    def knows(self, given: Tensor, repeats: int) -> bool:
        """Whether `given` is the remembered output, or that with its rows repeated."""
        if self.mark is None or (self._known is not None and self._known() is given):
            return True  # every block of the decoder is given the same tensor
        length, mark = self.mark
        if given.shape[1] < length:  # cut behind the encoder, with its last token
            mark = mark[:, :1]
            marked = _is_marked(given[:, :1], mark, repeats)
        else:
            marked = _is_marked(given, mark, repeats)
        if marked:
            self._known = weakref.ref(given)
        return marked


def _depends(hidden: Tensor, weight: Tensor | None) -> bool:
    """Whether backward would come from a hidden state to this weight."""
    nodes, seen = [] if weight is None else [hidden.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is weight:
            return True
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
    return False


def _mark(output: Tensor) -> Tensor:
    """What an encoder's output is known by: some channels of every row's first and last token."""
    return output.detach()[:, :: max(1, output.shape[1] - 1), :8]


def _is_marked(given: Tensor, mark: Tensor, repeats: int) -> bool:
    found, wanted = _mark(given), mark.repeat_interleave(repeats, dim=0)
    return found.shape == wanted.shape and (is_fake(given) or torch.equal(found, wanted))


# ---------------------------------------------------------------- rungs


class Call:
    """One call of a backbone's block, by the names of its arguments."""

    def __init__(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Any) -> None:
        self.names = names
        self.args = args
        self.kwargs = dict(kwargs)

    @property
    def hidden(self) -> Tensor:
        """What the block was given."""
        result: Tensor = self.args[0] if self.args else self.kwargs[self.names[0]]
        return result

    @property
    def cache(self) -> Any:
        """The key-value cache, if there is one."""
        values = (*self.args, *self.kwargs.values())
        return next((value for value in values if hasattr(value, "get_seq_length")), None)

    def without_cache(self) -> Call:
        """The same without a key-value cache that holds nothing yet."""
        cache = self.cache
        if cache is None or cache.get_seq_length():
            return self
        args = tuple(None if value is cache else value for value in self.args)
        kwargs = {name: None if v is cache else v for name, v in self.kwargs.items()}
        return Call(self.names, args, kwargs)

    def others(self) -> Iterator[tuple[str, Any]]:
        """Names and values of everything but the hidden state."""
        yield from zip(self.names[1:], self.args[1:], strict=False)
        first = () if self.args else (self.names[0],)
        yield from ((name, value) for name, value in self.kwargs.items() if name not in first)


_BIASES = ("position_bias", "encoder_decoder_position_bias")
"""Biases on attention scores that a block hands on in its output."""


def _handed_on(name: str, output: Any) -> Any:
    """A bias in a block's output, where LongT5 has its attentions' weights between the two."""
    place = 1 if name == _BIASES[0] else 3 if len(output) > 3 else 2
    return output[place] if place < len(output) else None


class Rung(nn.Module):
    """What hangs below one block of the backbone."""

    heads: Tensor | None

    def __init__(self, stream: Stream, index: int) -> None:
        super().__init__()
        self.stream = stream
        self.index = index
        self.stem: Tap | None = None
        self.tap: Tap | None = None
        self.gate: Gate | None = None
        self.block: nn.Module | None = None
        self.end: Join | EncoderEnd | None = None
        self.residual: bool = False
        self.checkpointed: bool = False
        self.register_buffer("heads", None)

    def prepare(self, call: Call) -> None:
        """Before the backbone's block: its turn; room in the cache for the side's blocks."""
        self.stream.enter(self.index, call)
        if self.stem is not None and call.cache is not None:
            grow_cache(call.cache, self.stream.num_layers, self.stream.rungs)

    def forward(self, call: Call, output: Any) -> Any:
        """Climb one rung; returns the block's output, joined with the side's after the last."""
        stream = self.stream
        hidden = output[0] if isinstance(output, tuple) else output
        if self.stem is not None:
            stream.state = self.stem(call.hidden)
        if self.tap is not None and self.gate is not None and self.block is not None:
            assert stream.state is not None, "a block ran before the first"
            mixed = self.tap(hidden, stream.state, self.gate())
            stream.state = None  # or it would outlive its use
            stream.state = self._climb(mixed, self._arguments(call, output))
        if self.end is None:
            if self.index + 1 == stream.num_layers:
                stream.output = weakref.ref(hidden)
            return output
        ended = self.end(hidden)
        return (ended, *output[1:]) if isinstance(output, tuple) else ended

    def _arguments(self, call: Call, output: Any) -> dict[str, Any]:
        """What the side's block is called with beside its state."""
        arguments = {}
        for name, value in call.others():
            if name == "position_embeddings" and value is not None:
                value = self.stream.side_rotary(value)
            elif name == "encoder_hidden_states" and value is not None:
                value = self.stream.side_memory(value)
            elif name in _BIASES and self.heads is not None:
                value = _handed_on(name, output)
                if value is not None:  # [..., heads, queries, keys], of LongT5 block by block
                    value = value.detach().index_select(-3, self.heads)
            arguments[name] = value
        return arguments

    def _climb(self, mixed: Tensor, arguments: dict[str, Any]) -> Tensor:
        assert self.block is not None
        if self.checkpointed and self.training and torch.is_grad_enabled():
            result = _checkpointed(self.block, mixed, arguments)
        else:
            with _uncaptured():
                result = self.block(mixed, **arguments)
        result = result[0] if isinstance(result, tuple) else result
        climbed: Tensor = mixed + result if self.residual else result
        return climbed


def _checkpointed(block: nn.Module, mixed: Tensor, arguments: dict[str, Any]) -> Any:
    # tensors go in as positional arguments: only those pass the saved-tensor hooks
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    rest = {n: None if hasattr(v, "get_seq_length") else v for n, v in arguments.items()}
    rest = {name: value for name, value in rest.items() if name not in names}

    def recomputed(mixed: Tensor, *values: Tensor) -> Any:
        with _uncaptured():
            return block(mixed, **rest, **dict(zip(names, values, strict=True)))

    return checkpoint(recomputed, mixed, *(arguments[n] for n in names), use_reentrant=False)


@contextmanager
def _uncaptured() -> Iterator[None]:
    """transformers records hidden states and attentions by class; these are not the model's."""
    module = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(module, "_active_collector", None)
    if collector is None or collector.get() is None:
        yield
        return
    token = collector.set(None)
    try:
        yield
    finally:
        collector.reset(token)


def grow_cache(cache: Any, num_layers: int, rungs: Sequence[int]) -> None:
    """Give a key-value cache a layer for every side block, of the kind of its backbone block's.

    In the model's own cache they are reordered, cropped and moved with the backbone's.
    """
    parts = (
        getattr(cache, "self_attention_cache", None),
        getattr(cache, "cross_attention_cache", None),
    )
    for part in [part for part in parts if part is not None] or [cache]:
        if part.layer_class_to_replicate is not None or len(part.layers) > num_layers:
            continue  # it grows by itself, or has grown
        if part.get_seq_length():
            raise ValueError(
                "the key-value cache was filled without the ladder; start from an empty one"
            )
        part.layers.extend([copy.deepcopy(part.layers[index]) for index in rungs])


# ---------------------------------------------------------------- ends


class Join(nn.Module):
    """Brings the side's last state up to the backbone's width and joins both.

    "exact": H + up(S), with up starting at zero, so that the model starts as the backbone.
    "lst": up(S). "lst_merged": g up(S) + (1 - g) H, with g a scalar gate, 1/2 at first (the option
    `merge_last` of the authors' code). "qst": (1 - a) up(S) + a H, with a one learned number a
    channel and up as a linear layer begins, with a bias, as in the authors' code.
    """

    def __init__(
        self, stream: Stream, hidden: int, side: int, *, form: str, norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.stream = stream
        self.form = form
        self.norm = norm
        self.up = nn.Linear(side, hidden)
        for each in (stream, stream.encoder):
            if each is not None:
                each.up = self.up.weight
        if form == "exact":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        elif form in ("lst", "lst_merged"):
            nn.init.normal_(self.up.weight, std=0.01)
            nn.init.zeros_(self.up.bias)
        self.mixture = nn.Parameter(torch.ones(hidden)) if form == "qst" else None
        self.gate = Gate("scalar", side) if form == "lst_merged" else None

    def forward(self, hidden: Tensor) -> Tensor:
        """The joined hidden state [..., hidden]."""
        state = self.stream.take()
        if self.stream.encoder is not None and torch.is_grad_enabled():
            self.stream.encoder.memory = None  # generation needs it once more for every token
        lifted: Tensor = self.up(state if self.norm is None else self.norm(state))
        if self.form == "lst":
            return lifted
        if self.form == "exact":
            return hidden + lifted
        share = self._share().to(lifted.dtype)
        return (1 - share) * lifted + share * hidden

    def _share(self) -> Tensor:
        """How much of the backbone's state is in the joined one, [1] or [hidden]."""
        if self.gate is not None:
            gate: Tensor = self.gate()
            return 1 - gate
        assert self.mixture is not None
        return torch.sigmoid(self.mixture)


class EncoderEnd(nn.Module):
    """The end of an encoder's side network: what the side decoder attends to."""

    def __init__(self, stream: Stream, *, norm: nn.Module | None) -> None:
        super().__init__()
        self.stream = stream
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        """The backbone's state as it is: its decoder reads the backbone's encoder."""
        state = self.stream.take()
        memory = state if self.norm is None else self.norm(state)
        self.stream.remember(memory, hidden, settled=not self.training)
        return hidden
