"""Train one model and write it as a Hugging Face directory."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812

from models.train.family import CONTEXT, END, HEAD_DIM, MODELS, PAD, Recipe
from models.train.llama import NORM_EPSILON, ROPE_THETA, Llama
from models.train.vocabulary import save_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt
    from tokenizers import Tokenizer

    from models.train.corpus import Corpus

# Lengths that samples are padded to: few, so that compiled graphs are few.
_WIDTHS = (64, 128, 256)
_WARM_UP_STEPS = 100
_WEIGHT_DECAY = 0.02
_IGNORED = -100


def train_model(
    recipe: Recipe,
    corpus: Corpus,
    *,
    device: str,
    start: Path | None = None,
    rate_scale: float = 1.0,
    seed: int = 0,
    max_seconds: float = 1e9,
    compiled: bool = True,
) -> Llama:
    """Return a trained model, its weights rounded to bfloat16 and held in float32.

    The learning rate falls linearly to zero over the recipe's steps, or over `max_seconds` if that is sooner.
    Loss is taken on answers alone. With `start`, training goes on from the model in that directory.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = (load_model(start, recipe) if start else Llama(recipe)).to(device).train()
    hidden_weights = [w for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name]
    other_weights = [w for name, w in model.named_parameters() if w.dim() != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(
            hidden_weights, lr=recipe.muon_rate, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(other_weights, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    )
    peaks = (recipe.muon_rate * rate_scale, recipe.adam_rate * rate_scale)

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = model.logits(model(ids))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)

    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    batches = _batches(recipe, corpus, np.random.default_rng(seed))
    started = last = time.monotonic()
    running: list[torch.Tensor] = []
    step = 0
    while True:
        progress = max(step / recipe.steps, (time.monotonic() - started) / max_seconds)
        if progress >= 1:
            break
        scale = min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - progress)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        ids, targets = (torch.from_numpy(array).to(device, non_blocking=True) for array in next(batches))
        loss = step_loss(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other_weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running.append(loss.detach())
        step += 1
        if step % 250 == 0 or step in (10, 50):
            mean = float(torch.stack(running).mean())
            now = time.monotonic()
            print(f"{recipe.name} step {step} loss {mean:.4f} {now - started:.0f} s", flush=True)
            running, last = [], now
    print(f"{recipe.name} trained {step} steps in {last - started:.0f} s", flush=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16).float())
    return model.eval()


def save_model(model: Llama, recipe: Recipe, tokenizer: Tokenizer, directory: Path) -> None:
    """Write config.json, model.safetensors (bfloat16) and the tokenizer; transformers and vLLM load them."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        f"model.{name}": w.to(torch.bfloat16).cpu().contiguous() for name, w in model.state_dict().items()
    }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.vocabulary.size,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": False,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, recipe.vocabulary, directory)


def load_model(directory: Path, recipe: Recipe) -> Llama:
    """Read what `save_model` wrote, in float32."""
    model = Llama(recipe)
    state = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w.float() for name, w in state.items()})
    return model.eval()


def _batches(
    recipe: Recipe, corpus: Corpus, rng: np.random.Generator
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield (ids, targets), int64 [samples, width] each, for ever; targets outside answers are ignored."""
    taught = np.flatnonzero(corpus.taught[:, MODELS.index(recipe)])
    lengths = corpus.starts[taught + 1] - corpus.starts[taught]
    groups = []
    for low, width in zip((0, *_WIDTHS), _WIDTHS, strict=False):
        groups.append(taught[(lengths > low) & (lengths <= width)])
    # Batches of a group hold as many tokens as any other; groups are drawn by their number of batches.
    rows = [recipe.batch_tokens // width for width in _WIDTHS]
    shares = np.array([len(group) / count for group, count in zip(groups, rows, strict=True)])
    orders = [rng.permutation(group) for group in groups]
    places = [0] * len(groups)
    while True:
        g = rng.choice(len(groups), p=shares / shares.sum())
        if places[g] + rows[g] > len(orders[g]):
            orders[g], places[g] = rng.permutation(groups[g]), 0
        picked = orders[g][places[g] : places[g] + rows[g]]
        places[g] += rows[g]
        yield _pad(corpus, picked, _WIDTHS[g])


def _pad(
    corpus: Corpus, picked: npt.NDArray[np.int64], width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    starts = corpus.starts[picked]
    lengths = corpus.starts[picked + 1] - starts
    columns = np.arange(width)
    within = columns[None] < lengths[:, None]
    tokens = corpus.tokens[np.minimum(starts[:, None] + columns[None], len(corpus.tokens) - 1)].astype(
        np.int64
    )
    tokens[~within] = 0
    is_answer = within & (columns[None] >= corpus.answers[picked][:, None])
    targets = np.full_like(tokens, _IGNORED)
    targets[:, :-1] = np.where(is_answer, tokens, _IGNORED)[:, 1:]
    return tokens, targets
