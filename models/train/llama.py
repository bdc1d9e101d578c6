"""A Llama-architecture decoder in torch: training, scoring and batched greedy decoding.

Weights carry transformers' names, so that a state dict saved here loads there (source: modeling_llama.py of
transformers; RoPE in its rotate-half convention).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.train.family import CONTEXT, HEAD_DIM, Recipe

NORM_EPSILON = 1e-5
ROPE_THETA = 10000.0


class _Attention(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.heads = recipe.heads
        self.q_proj = nn.Linear(recipe.hidden, recipe.hidden, bias=False)
        self.k_proj = nn.Linear(recipe.hidden, recipe.hidden, bias=False)
        self.v_proj = nn.Linear(recipe.hidden, recipe.hidden, bias=False)
        self.o_proj = nn.Linear(recipe.hidden, recipe.hidden, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries, rotated keys and values, each [batch, heads, length, HEAD_DIM]."""
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, self.heads, HEAD_DIM).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def merge(self, heads: Tensor) -> Tensor:
        return self.o_proj(heads.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(recipe.hidden, recipe.intermediate, bias=False)
        self.up_proj = nn.Linear(recipe.hidden, recipe.intermediate, bias=False)
        self.down_proj = nn.Linear(recipe.intermediate, recipe.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(recipe.hidden, NORM_EPSILON)
        self.self_attn = _Attention(recipe)
        self.post_attention_layernorm = nn.RMSNorm(recipe.hidden, NORM_EPSILON)
        self.mlp = _Mlp(recipe)


class Llama(nn.Module):
    """The decoder; input and output embeddings are tied."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.vocabulary = recipe.vocabulary
        self.embed_tokens = nn.Embedding(recipe.vocabulary.size, recipe.hidden)
        self.layers = nn.ModuleList(_Block(recipe) for _ in range(recipe.layers))
        self.norm = nn.RMSNorm(recipe.hidden, NORM_EPSILON)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / ((2 * recipe.layers) ** 0.5 if is_residual else 1))
        frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = torch.outer(torch.arange(CONTEXT).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return hidden states [batch, length, hidden] of ids [batch, length]; padding must come last."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.layers:
            q, k, v = block.self_attn.project(block.input_layernorm(x), cos.to(x.dtype), sin.to(x.dtype))
            x = x + block.self_attn.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits over the vocabulary of normed hidden states."""
        return F.linear(hidden, self.embed_tokens.weight)

    @torch.no_grad()
    def decode(self, ids: Tensor, lengths: Tensor, new_tokens: int, end_id: int) -> tuple[Tensor, Tensor]:
        """Continue prompts greedily.

        ids: int64 [batch, longest], padded on the right; lengths: int64 [batch], tokens of each prompt.
        Returns the new ids, int64 [batch, new_tokens] (end_id from the first end on), and for each of them
        (log-probability, entropy in nats, top-2 margin), float32 [batch, new_tokens, 3].
        """
        batch, longest = ids.shape
        device = ids.device
        size = longest + new_tokens
        rows = torch.arange(batch, device=device)
        shape = (batch, self.layers[0].self_attn.heads, size, HEAD_DIM)
        cache = [(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in self.layers]
        places = torch.arange(size, device=device)
        x = self.embed_tokens(ids)
        for block, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = block.self_attn.project(
                block.input_layernorm(x), self.cos[:longest], self.sin[:longest]
            )
            keys[:, :, :longest], values[:, :, :longest] = k, v
            x = x + block.self_attn.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits = self.logits(self.norm(x[rows, lengths - 1]))
        chosen = torch.full((batch, new_tokens), end_id, device=device)
        signals = torch.zeros(batch, new_tokens, 3, device=device)
        ended = torch.zeros(batch, dtype=torch.bool, device=device)
        for step in range(new_tokens):
            token = torch.where(ended, end_id, logits.argmax(-1))
            chosen[:, step], signals[:, step] = token, token_signals(logits, token)
            ended |= token == end_id
            if bool(ended.all()):
                break
            at = lengths + step
            x = self.embed_tokens(token)[:, None]
            cos, sin = self.cos[at][:, None, None], self.sin[at][:, None, None]
            visible = (places[None] <= at[:, None])[:, None, None]
            for block, (keys, values) in zip(self.layers, cache, strict=True):
                q, k, v = block.self_attn.project(block.input_layernorm(x), cos, sin)
                keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
                attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
                x = x + block.self_attn.merge(attended)
                x = x + block.mlp(block.post_attention_layernorm(x))
            logits = self.logits(self.norm(x[:, 0]))
        return chosen, signals


def token_signals(logits: Tensor, token: Tensor) -> Tensor:
    """Return (log-probability of the token, entropy in nats, top-2 probability margin), [..., 3]."""
    log_probs = logits.float().log_softmax(-1)
    probs = log_probs.exp()
    top = probs.topk(2, -1).values
    return torch.stack(
        (
            log_probs.gather(-1, token[..., None])[..., 0],
            -(probs * log_probs).sum(-1),
            top[..., 0] - top[..., 1],
        ),
        -1,
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
