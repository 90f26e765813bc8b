"""Byte-level tokenizers that frame and pad as the published ones do, built in code."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" first, as in the published vocabulary


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """Build a CLIP tokenizer of 514 tokens, at most 77 a prompt.

    The end of text has the highest id: the text encoder pools there.
    """
    tokens = [*_BYTES, *(byte + "</w>" for byte in _BYTES), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)


def t5_tokenizer(max_length: int = 512) -> Any:
    """Build a tokenizer of 259 tokens that pads and ends a prompt as T5's does.

    Not a ``T5Tokenizer``: that class has no bytes to fall back on, and reads all text outside its
    vocabulary as the same unknown token.
    """
    tokens = ["<pad>", "</s>", "<unk>", *_BYTES]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )
