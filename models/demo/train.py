"""Train the demo model from nothing: its text, its tokenizer, its weights, its model card figures.

Run by ``make demo-model``. Deterministic for a given version of PyTorch, kind of processor and number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import MIX, TASKS, Turn, held_out_turns, training_turns

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 512
CONTEXT = 512
SEED = 20261122
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the project's own text; each digit is a token of its own."""
    turns = islice(training_turns(random.Random(SEED)), 20_000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (END_OF_TEXT, TURN_START, TURN_END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system\nuser\nassistant\n"] * 200
    tokenizer.train_from_iterator([*roles, *(f"{turn.question}\n{turn.answer}" for turn in turns)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def packed_rows(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (token ids, labels) of ``length`` tokens: whole conversations, the loss on the answers only."""
    turns = training_turns(rng)
    while True:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            turn = next(turns)
            question = tokenizer.encode(prompt_text(turn.question), add_special_tokens=False)
            answer = tokenizer.encode(turn.answer + TURN_END, add_special_tokens=False)
            tail = tokenizer.encode("\n", add_special_tokens=False)
            ids += question + answer + tail
            labels += [IGNORED] * len(question) + answer + [IGNORED] * len(tail)
        yield ids[:length], labels[:length]


def prompt_text(question: str) -> str:
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    rng = random.Random(SEED + 1)
    short, long = packed_rows(tokenizer, rng, 160), packed_rows(tokenizer, rng, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = 100
    model.train()
    started_at = time.monotonic()
    for step in range(steps):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = 2e-3 * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = list(islice(long, 12)) if step % 8 == 7 else list(islice(short, 40))
        ids = torch.tensor([row for row, _ in rows])
        labels = torch.tensor([row for _, row in rows])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            elapsed_s = time.monotonic() - started_at
            print(f"step {step:5d}  loss {loss.item():.4f}  {elapsed_s:6.0f} s", flush=True)


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> list[str]:
    tokenizer.padding_side = "left"
    batch = tokenizer([prompt_text(turn.question) for turn in turns], return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=160, do_sample=False
    )
    return list(tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, per_task: int) -> dict[str, float]:
    """Return the share of held-out questions answered to the letter, for each task and over all of them."""
    model.eval()
    shares = {}
    for task in TASKS:
        turns = held_out_turns(task, per_task)
        given = answers(model, tokenizer, turns)
        wrong = [(turn, got) for turn, got in zip(turns, given, strict=True) if got != turn.answer]
        shares[task] = 1 - len(wrong) / per_task
        for turn, got in wrong[:3]:
            print(f"  {task}: {turn.question!r} -> {got!r}, not {turn.answer!r}")
    shares["all"] = sum(shares[task] for task in TASKS) / len(TASKS)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens, mix {MIX}", flush=True)
    train(model, tokenizer, args.steps)
    model.save_pretrained(args.out, safe_serialization=True)
    tokenizer.save_pretrained(args.out)  # before the evaluation, whose padding it would keep
    shares = exact_match(model, tokenizer, per_task=200)
    print(json.dumps(shares))
    results = {
        "exact_match_held_out": {task: round(share, 4) for task, share in shares.items()},
        "questions_per_task": 200,
        "steps": args.steps,
        "torch": torch.__version__.split("+")[0],
    }
    (args.out / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
