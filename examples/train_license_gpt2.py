#!/usr/bin/env python3
"""Train the example checkpoint: a small GPT-2 that knows the Apache License by heart.

A checkpoint with random weights shows that a pipeline runs, but not that its results are right. Its logits
are nearly flat, so rounding alone can change the greedy token. This checkpoint is trained until its greedy
continuation is a known text. Then any error in conversion, loading or decoding shows as a wrong word. The
model overfits on purpose and has no other use.

The result is an ordinary Hugging Face folder: config.json, generation_config.json, model.safetensors
(float32), tokenizer.json and tokenizer_config.json. The saved files are loaded again and checked. The exit
status is 1 if the continuation differs from the text of the license.

This program needs torch, transformers and tokenizers. It takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging

HERE = Path(__file__).resolve().parent

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 640
CONTEXT = 256

PROMPT = "Licensed under the Apache License"
MIN_NEW_TOKENS = 60

LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01
WINDOW_LENGTHS = (32, 64, 128, CONTEXT)
TOKENS_PER_STEP = 2048


def train_tokenizer(text: str) -> Tokenizer:
    """Train a byte-level BPE tokenizer on ``text``.

    The vocabulary has all bytes, so it can encode any input and needs no unknown token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def build_model(vocab_size: int, end_of_text: int) -> GPT2LMHeadModel:
    """Build the untrained model. It has no dropout, because it must memorize the text."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=CONTEXT,
        n_embd=96,
        n_layer=6,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    model = GPT2LMHeadModel(config)
    # Generation needs a token to pad finished rows, and GPT-2 has no padding token.
    model.generation_config.pad_token_id = end_of_text
    return model


def training_windows(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return one full-length window for each position where the text or a word starts.

    Each window is encoded separately from its first character. At the start of a prompt, a word has no space
    before it and so gets other tokens than within the text. The model must learn these tokens too. After the
    text come the end-of-text token and the text again, so every window is full.

    *Shape:* (windows, CONTEXT), int64.
    """
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    whole = [*tokenizer.encode(text).ids, end_of_text]
    starts = [0, *(match.start() for match in re.finditer(r"\b\w", text) if match.start() > 0)]
    windows = []
    for start in starts:
        ids = [*tokenizer.encode(text[start:]).ids, end_of_text]
        while len(ids) < CONTEXT:
            ids += whole
        windows.append(ids[:CONTEXT])
    return torch.tensor(windows)


def train(model: GPT2LMHeadModel, windows: torch.Tensor, steps: int) -> None:
    """Minimize the next-token loss on random windows, cut to a random length.

    A step has more windows if they are shorter. So the model learns the first positions, which have little
    context, from many places of the text.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    model.train()
    began = time.monotonic()
    for step in range(1, steps + 1):
        length = random.choice(WINDOW_LENGTHS)
        rows = torch.randint(len(windows), (TOKENS_PER_STEP // length,))
        batch = windows[rows, :length]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", file=sys.stderr)
    model.eval()


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, output: Path) -> None:
    """Write the model and the tokenizer as one Hugging Face folder.

    The input names are set because transformers 4 would otherwise add token type ids. GPT-2 treats these as
    tokens and adds their embeddings. The class name is one that transformers 4 and 5 both accept; version 5 by
    default writes a name that version 4 refuses.
    """
    model.save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output)
    path = output / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text(encoding="utf-8"))
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def check(folder: Path, tokenizer: Tokenizer, text: str) -> str:
    """Load the saved files and return the greedy continuation of the prompt.

    Raises:
        ValueError: The loaded tokenizer differs from the trained one, or the continuation, with or without
            the key-value cache, does not follow ``text`` for at least ``MIN_NEW_TOKENS`` tokens.
    """
    loaded = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    if loaded.encode(text) != tokenizer.encode(text).ids:
        raise ValueError("the loaded tokenizer gives other ids than the trained one")

    prompt = loaded(PROMPT, return_tensors="pt")
    prompt_length = prompt["input_ids"].shape[1]
    expected = loaded.encode(text[text.index(PROMPT) :])[prompt_length:]
    wanted = min(len(expected), CONTEXT - prompt_length)
    if wanted < MIN_NEW_TOKENS:
        raise ValueError(f"only {wanted} tokens follow the prompt in the text")

    for use_cache in (True, False):
        output = model.generate(**prompt, max_new_tokens=wanted, do_sample=False, use_cache=use_cache)
        generated = output[0, prompt_length:].tolist()
        same = common_prefix_length(generated, expected)
        if same < MIN_NEW_TOKENS:
            raise ValueError(f"the continuation (use_cache={use_cache}) leaves the text after {same} tokens")
    return loaded.decode(generated)


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the leading items that two sequences share."""
    for count, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return count
    return min(len(left), len(right))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small GPT-2 on the text of the Apache License.")
    parser.add_argument("--output", type=Path, default=HERE / "license-gpt2", help="folder to write")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--text", type=Path, default=HERE.parent / "LICENSE", help="text to learn")
    return parser.parse_args()


def main() -> int:
    """Train, save and check the model. Return the exit status."""
    arguments = parse_arguments()
    text = arguments.text.read_text(encoding="utf-8")
    if PROMPT not in text:
        print(f"error: {arguments.text} does not contain {PROMPT!r}", file=sys.stderr)
        return 1

    # This program prints its own progress. Encoding the whole text would also cause a warning about its length.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The number of threads is fixed too, because the order of floating-point sums depends on it.
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)

    tokenizer = train_tokenizer(text)
    model = build_model(tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT))
    windows = training_windows(tokenizer, text)
    print(f"{model.num_parameters()} parameters, {len(windows)} windows", file=sys.stderr)
    train(model, windows, arguments.steps)
    save(model, tokenizer, arguments.output)

    try:
        continuation = check(arguments.output, tokenizer, text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(PROMPT + continuation)
    return 0


if __name__ == "__main__":
    sys.exit(main())
