"""Text to token ids and labels: the embedded text and its tokenizer, and who is trained on.

An example is ``input_ids [tokens]`` with ``labels [tokens]``: a label is the token's own id where
the model is trained to produce it, and -100 (which PyTorch's cross-entropy skips) where it is
given: the prompt, and every chat turn but the assistant's. Models shift labels by one themselves,
so the label at position 0 is never used: an example trains something only if ``labels[1:]`` does.

Costs 8 bytes a token while examples are made (two int32). The default for a machine without data or
network is real English, the language reference that CPython carries in ``pydoc_data.topics``, and a
byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) trained on it within a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = [
    "IGNORED_LABEL",
    "Encoded",
    "byte_level_tokenizer",
    "document_frame",
    "embedded_text",
    "encode_chat",
    "encode_documents",
    "encode_pairs",
    "encode_stream",
]

IGNORED_LABEL = -100

_PAD, _BOS, _EOS = "<|pad|>", "<|bos|>", "<|eos|>"
_NUM_BYTES = 256
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")

# The generation block tells transformers which characters are the assistant's own.
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One tokenised example; ``line`` is where it came from (0 for a text stream)."""

    input_ids: NDArray[np.int32]  # [tokens]
    labels: NDArray[np.int32]  # [tokens]
    line: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def is_trainable(self) -> bool:
        return bool((self.labels[1:] != IGNORED_LABEL).any())

    @property
    def num_masked(self) -> int:
        """Tokens that are not trained on."""
        return int((self.labels == IGNORED_LABEL).sum())

    @property
    def num_cut(self) -> int:
        """Tokens that were left out before: none, ``cut`` comes last."""
        return 0

    def cut(self, length: int) -> Encoded:
        return Encoded(self.input_ids[:length], self.labels[:length], self.line)


def embedded_text() -> str:
    """All of ``pydoc_data.topics`` in alphabetical order; it varies with the Python version."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"


def byte_level_tokenizer(text: str, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``text``: every string survives encode and decode.

    The vocabulary is smaller than ``vocab_size`` where the text has no more pairs to merge.
    """
    from transformers import PreTrainedTokenizerFast

    special_tokens = [_PAD, _BOS, _EOS]
    smallest = _NUM_BYTES + len(special_tokens)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size!r}: must be an integer of at least {smallest}, "
            f"which is {_NUM_BYTES} bytes and {len(special_tokens)} special tokens"
        )
    if not text:
        raise ValueError("text='': the tokenizer is trained on this text, so it must not be empty")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        # Sorted, because alphabet() comes in an order of its own in every process.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        chat_template=_CHAT_TEMPLATE,
        # "Cleaning up" joins spaces to punctuation, which would break decode(encode(s)) == s.
        clean_up_tokenization_spaces=False,
    )


def document_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """What goes around a document: the ids that this tokenizer puts first, and its EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer.eos_token=None: documents and completions are ended with it; "
            "set tokenizer.eos_token to a token of its vocabulary"
        )
    [bare] = _token_ids(tokenizer, ["a"])
    framed = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    starts = (i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[: next(starts, 0)], int(tokenizer.eos_token_id)


def encode_stream(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> Iterator[Encoded]:
    """One document that arrives in pieces; they join without a token in between."""
    first, end = document_frame(tokenizer)
    yield _given_then_trained([], first)
    for piece in pieces:
        [ids] = _token_ids(tokenizer, [piece])
        yield _given_then_trained([], ids)
    yield _given_then_trained([], [end])


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], lines: Sequence[int]
) -> Iterator[Encoded]:
    """Every token is trained on, and EOS after them."""
    first, end = document_frame(tokenizer)
    for ids, line in zip(_token_ids(tokenizer, texts), lines, strict=True):
        yield _given_then_trained([], [*first, *ids, end], line)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    lines: Sequence[int],
) -> Iterator[Encoded]:
    """The prompt is given, the completion and EOS are trained on.

    The prompt's tokens are always those that it has alone, as at inference. The completion's are
    what follows them in the joint tokenisation, unless that merges characters across the border:
    then they are those that the completion has alone.
    """
    first, end = document_frame(tokenizer)
    whole = [p + c for p, c in zip(prompts, completions, strict=True)]
    prompt_ids, joint_ids = _token_ids(tokenizer, prompts), _token_ids(tokenizer, whole)
    for given, joint, completion, line in zip(
        prompt_ids, joint_ids, completions, lines, strict=True
    ):
        if joint[: len(given)] == given:
            trained = joint[len(given) :]
        else:
            [trained] = _token_ids(tokenizer, [completion])
        yield _given_then_trained([*first, *given], [*trained, end], line)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], line: int = 0
) -> Encoded:
    """Only the assistant's turns are trained on.

    Where they are is told by the template's generation blocks, or else by rendering prefixes.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "tokenizer.chat_template=None: chat messages cannot be rendered; use the tokenizer of "
            "a chat (instruct) model, or set tokenizer.chat_template to a Jinja template"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__}: chat needs character offsets, which only fast "
            "tokenizers have; load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    whole = _render(tokenizer, messages)
    _require_answers(whole, messages)
    if _GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        encoding = tokenizer.apply_chat_template(
            list(messages),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        trained = np.asarray(encoding["assistant_masks"], dtype=bool)
    else:
        ids, trained = _encode_chat_by_prefixes(tokenizer, messages, whole)
    return Encoded(ids, np.where(trained, ids, np.int32(IGNORED_LABEL)), line)


def _encode_chat_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], whole: str
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    encoding = tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    starts, ends = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    trained = np.zeros(len(ids), dtype=bool)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            begin, end = _turn_span(tokenizer, messages, index, whole)
            # A token that reaches over the border holds characters of the prompt: not trained on.
            trained |= (starts >= begin) & (ends <= end) & (ends > starts)
    return ids, trained


def _require_answers(whole: str, messages: Sequence[dict[str, Any]]) -> None:
    """Vision templates silently skip a content that is text and not a list of parts.

    Templates may rewrite a message (reasoning ones leave out thoughts), but its last line stays.
    """
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    if not any(answer.rpartition("\n")[2] in whole for answer in answers):
        raise ValueError(
            "the chat template renders nothing of what the assistant says; it may expect content "
            "in another form than text: set tokenizer.chat_template to one for text"
        )


def _turn_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], index: int, whole: str
) -> tuple[int, int]:
    """Where in the rendering the model would start and stop to write message ``index``."""
    if index == 0:
        raise ValueError(
            "the first message is the assistant's, so no prompt can be rendered before it; put a "
            "user or system message first, or give the chat template {% generation %} blocks"
        )
    before = _render(tokenizer, messages[:index], add_generation_prompt=True)
    after = _render(tokenizer, messages[: index + 1])
    if not whole.startswith(after):
        raise ValueError(
            f"the chat template renders messages 1 to {index + 1} alone in another way than within "
            "the whole conversation, so it does not tell which tokens are the assistant's; give it "
            "{% generation %} blocks, or make one conversation of each assistant turn"
        )
    if not after.startswith(before):
        raise ValueError(
            f"the chat template does not begin message {index + 1} with the prompt that it renders "
            "for it (add_generation_prompt=True), so it does not tell which tokens are the "
            "assistant's; give it {% generation %} blocks"
        )
    return len(before), len(after)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool = False,
) -> str:
    rendered: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return rendered


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        # Longer than the model's maximum is our business: packing and truncation come after.
        verbose=False,
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _given_then_trained(given: Sequence[int], trained: Sequence[int], line: int = 0) -> Encoded:
    input_ids = np.asarray([*given, *trained], dtype=np.int32)
    labels = input_ids.copy()
    labels[: len(given)] = IGNORED_LABEL
    return Encoded(input_ids, labels, line)
