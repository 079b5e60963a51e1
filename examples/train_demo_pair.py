"""Train the target and draft that pipeinfer_dask ships, from the Python standard library.

The corpus is the source of the running interpreter's own standard library, its
tests included (about 9 M tokens), so the script needs no download. The library's
licence is the PSF Licence Agreement; the models are trained on it, and none of
its files is shipped.

Three steps, each deterministic by ``--seed`` (and the interpreter's version and
thread count):

1. a byte-level BPE tokenizer of 4,096 tokens, shared by both models;
2. the target, a Llama of 5.5 M parameters, trained on the text: hidden matrices
   by Muon, the rest by AdamW; warm-up, constant rate, linear decay;
3. the draft, a Llama of 1.6 M parameters, distilled from the target's
   distribution on the same text.

Sequences are short for most of the training and reach the full context of 512
tokens in the decay, where it matters.

A run that was stopped goes on from its last checkpoint in ``--work``, with the
number of steps that it is given then. The shipped target has the default number;
the shipped draft was made by two runs in one ``--work``: ``--draft-steps 420``,
and then ``--draft-steps 600``, which went on from step 400.

On 2 cores of a Xeon (Sapphire Rapids, no AMX) that nothing else uses, a step takes
about 2.5 s for the target and 1.2 s for the draft: 50 and 12 minutes. Setting
``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` to several GB in the
environment saves a tenth: glibc then keeps the large activations' pages between
steps.

Usage::

    .venv/bin/python examples/train_demo_pair.py --output pipeinfer_dask/models/demo_pair
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
CONTEXT = 512
END = "<|endoftext|>"
BATCH_TOKENS = 8192  # per optimizer step
MICRO_BATCH_TOKENS = 4096  # per forward pass: bounds the memory of the logits
VALIDATION_PERCENT = 2
STEPS_HELP = f"Steps of {BATCH_TOKENS} tokens."


def llama(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


TARGET = llama(hidden=256, layers=6, intermediate=704, heads=4, kv_heads=2)
DRAFT = llama(hidden=192, layers=2, intermediate=512, heads=3, kv_heads=1)


def python_files(root: Path) -> tuple[list[str], list[str]]:
    """Return the texts of a folder's Python files: (training, validation)."""
    split: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "__pycache__" in name:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the library tests its own decoder on such files
        percent = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
        split[percent < VALIDATION_PERCENT].append(text)
    return split


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one tensor of token ids, [tokens], each file behind one ``END``."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.append(0)
        ids.extend(encoding.ids)
    return torch.tensor(ids)


def batches(data: torch.Tensor, context: int, seed: int, step: int) -> Iterator[torch.Tensor]:
    """Yield the micro-batches [rows, context + 1] of one step, drawn without replacement.

    Windows start at a random offset that changes with every pass over the data.
    """
    rows = BATCH_TOKENS // context
    windows = (len(data) - 1) // context - 1
    epoch, first = divmod(step * rows, windows)
    order = np.random.default_rng((seed, context, epoch))
    offset = int(order.integers(context))
    starts = np.resize(order.permutation(windows), windows + rows)[first : first + rows]
    micro = MICRO_BATCH_TOKENS // context
    for low in range(0, rows, micro):
        yield torch.stack(
            [data[s : s + context + 1] for s in (offset + starts[low : low + micro] * context)]
        )


def learning_rate(step: int, steps: int, decay: float) -> float:
    """Return the rate as a share of its maximum: warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / 50, (steps - step) / (decay * steps))


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def hidden_states(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    return model.model(tokens, use_cache=False).last_hidden_state


def text_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model.lm_head(hidden_states(model, batch[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def distillation_loss(
    model: LlamaForCausalLM, target: LlamaForCausalLM, batch: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        wanted = F.softmax(target.lm_head(hidden_states(target, batch[:, :-1])), dim=-1)
    logits = model.lm_head(hidden_states(model, batch[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))


@torch.no_grad()
def validate(model: LlamaForCausalLM, data: torch.Tensor) -> float:
    """Return the mean cross-entropy, in nats per token, in windows of the full context."""
    model.eval()
    windows = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [text_loss(model, rows).item() * len(rows) for rows in windows.split(8)]
    model.train()
    return sum(losses) / len(windows)


def train(
    config: LlamaConfig,
    data: torch.Tensor,
    validation: torch.Tensor,
    *,
    steps: int,
    seed: int,
    rate: float,
    checkpoint: Path,
    target: LlamaForCausalLM | None = None,
    decay: float = 0.4,
) -> LlamaForCausalLM:
    """Train one model; with ``target``, distil it. Goes on from ``checkpoint`` if it exists."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    opts = optimizers(model, rate)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
        first = saved["step"]
    model.train()
    began = time.monotonic()
    for step in range(first, steps):
        share = learning_rate(step, steps, decay)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * share
        context = CONTEXT if share < 0.5 and step > steps // 2 else CONTEXT // 2
        total = 0.0
        parts = list(batches(data, context, seed, step))
        for part in parts:
            loss = distillation_loss(model, target, part) if target else text_loss(model, part)
            (loss / len(parts)).backward()
            total += loss.item() / len(parts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if step % 20 == 0:
            speed = (step + 1 - first) * BATCH_TOKENS / (time.monotonic() - began)
            click.echo(f"step {step:5d}/{steps}  loss {total:.3f}  {speed:,.0f} tokens/s", err=True)
        if (step + 1) % 200 == 0:
            click.echo(
                f"step {step:5d}/{steps}  validation {validate(model, validation):.3f}", err=True
            )
            states = [opt.state_dict() for opt in opts]
            torch.save(
                {"model": model.state_dict(), "optimizers": states, "step": step + 1}, checkpoint
            )
    return model.eval()


@torch.no_grad()
def agreement(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, validation: torch.Tensor, prompts: int = 40
) -> dict[str, float]:
    """Return how often the draft's first choice is the target's: on text, and on greedy output."""
    prompts = min(prompts, len(validation) // CONTEXT)
    rows = validation[: prompts * CONTEXT].view(prompts, CONTEXT)
    text = target(rows).logits.argmax(-1) == draft(rows).logits.argmax(-1)
    made = target.generate(rows[:, :64], do_sample=False, max_new_tokens=128, eos_token_id=None)
    wanted = made[:, 64:]
    guess = draft(made).logits.argmax(-1)[:, 63:-1]
    return {
        "agreement_text": text.float().mean().item(),
        "agreement_greedy": (guess == wanted).float().mean().item(),
    }


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Where to write.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/demo_pair"),
    show_default=True,
    help="Checkpoints; a stopped run goes on.",
)
@click.option(
    "--corpus",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(sysconfig.get_paths()["stdlib"]),
    help="A folder with Python files. By default the standard library.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--target-steps", default=1200, show_default=True, help=STEPS_HELP)
@click.option("--draft-steps", default=600, show_default=True, help=STEPS_HELP)
def main(
    output: Path,
    work: Path,
    corpus: Path,
    seed: int,
    threads: int,
    target_steps: int,
    draft_steps: int,
) -> None:
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    training_texts, validation_texts = python_files(corpus)
    tokenizer = train_tokenizer(training_texts)
    data, validation = encode(tokenizer, training_texts), encode(tokenizer, validation_texts)
    click.echo(f"{len(data):,} tokens to train on, {len(validation):,} to validate on", err=True)
    if len(data) < 2 * BATCH_TOKENS or len(validation) < CONTEXT:
        raise click.UsageError(
            f"expected at least {2 * BATCH_TOKENS} tokens to train on and {CONTEXT} to validate "
            "on: give a larger --corpus"
        )

    target = train(
        TARGET,
        data,
        validation,
        steps=target_steps,
        seed=seed,
        rate=4e-3,
        checkpoint=work / "target.pt",
    )
    # What ships is 16-bit, so the draft learns from, and all figures are of, the rounded target.
    target = target.half().float()
    draft = train(
        DRAFT,
        data,
        validation,
        steps=draft_steps,
        seed=seed + 1,
        rate=6e-3,
        checkpoint=work / "draft.pt",
        target=target,
    )
    draft = draft.half().float()

    report: dict[str, object] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "seed": seed,
        "corpus_tokens": len(data),
        "target_steps": target_steps,
        "draft_steps": draft_steps,
        "tokens_per_step": BATCH_TOKENS,
        "target_validation_loss": validate(target, validation),
        "draft_validation_loss": validate(draft, validation),
        **agreement(target.eval(), draft.eval(), validation),
    }
    for name, model in (("target", target), ("draft", draft)):
        report[f"{name}_parameters"] = model.num_parameters()
        model.half().save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
