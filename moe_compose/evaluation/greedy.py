"""Where greedy decoding parts ways.

The reference decodes; then one pass of the model over what it decoded tells where the model would
have taken another token first, which is where its own decoding would have left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compose.calibration.tokens import TokenSet
from moe_compose.evaluation.result import Greedy
from moe_compose.runtime import Runner

#: Longest prompt, in tokens.
PROMPT = 32


def divergence(reference: Runner, model: Runner, tokens: TokenSet, steps: int) -> list[Greedy]:
    """Decode `steps` tokens after the beginning of each domain's longest sequence.

    Args:
        reference: decodes; `steps` passes.
        model: is held to it; one pass.
        tokens: where prompts come from.
        steps: at least 1.
    """
    prompts = [_prompt(tokens, domain) for domain in range(len(tokens.domains))]
    texts = list(prompts)
    for _ in range(steps):
        chosen = [row[-1:] for row in _first_ranked(reference, texts)]
        texts = [torch.cat([ids, new]) for ids, new in zip(texts, chosen, strict=True)]
    found = []
    ranked = _first_ranked(model, [ids[:-1] for ids in texts])
    for name, prompt, ids, ours in zip(tokens.domains, prompts, texts, ranked, strict=True):
        differs = (ours[len(prompt) - 1 :] != ids[len(prompt) :]).nonzero()
        first = int(differs[0]) if len(differs) else None
        found.append(Greedy(name, len(prompt), steps, first))
    return found


def _prompt(tokens: TokenSet, domain: int) -> Tensor:
    longest = max((s for s in tokens.sequences if s.domain == domain), key=lambda s: len(s.ids))
    return torch.tensor(longest.ids[:PROMPT])


def _first_ranked(runner: Runner, texts: Sequence[Tensor]) -> list[Tensor]:
    """The token that is ranked first after every position, `[S]` a text; ties by lower id."""
    found: dict[int, Tensor] = {}

    def take(index: int, logits: Tensor) -> None:
        found[index] = logits[0].float().argmax(-1).cpu()

    runner.run([ids[None] for ids in texts], logits=take)
    return [found[i] for i in range(len(texts))]
