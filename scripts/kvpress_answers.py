"""Answers of kvpress to prompts of `scripts/eval_against_kvpress.py`, which runs this in kvpress's own environment.

    python scripts/kvpress_answers.py PROMPTS.json ANSWERS.json

The same as kvpress's pipeline does (its press around the context, then the questions one by one, greedily), on tokens
instead of texts, so that both sides read the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from kvpress import KeyDiffPress, LUKVPress
from transformers import AutoModelForCausalLM, DynamicCache


def main(prompts_path: str, answers_path: str) -> None:
    """Read prompts, write answers: for each method a list of tokens for each question of each prompt."""
    request = json.loads(Path(prompts_path).read_text())
    model_path = Path(request["model"])
    torch.set_num_threads(request["n_threads"])
    model = AutoModelForCausalLM.from_pretrained(
        model_path.parent, gguf_file=model_path.name, dtype=torch.float32
    ).eval()
    answers: dict[str, list[list[list[int]]]] = {}
    for name, pruned in request["methods"].items():
        press = None
        if pruned is not None:
            press = LUKVPress(
                KeyDiffPress(), compression_ratio=1.0 - request["ratio"], sink=request["sink"], window=request["recent"]
            )
            press._budget_curves = np.repeat(np.array(pruned)[None], 99, axis=0)  # it would otherwise fetch a curve
        answers[name] = []
        for prompt in request["prompts"]:
            answers[name].append(answer(model, press, prompt, set(request["end_tokens"])))
            print(f"{name} {len(answers[name])}/{len(request['prompts'])}", file=sys.stderr, flush=True)
    Path(answers_path).write_text(json.dumps(answers))


@torch.inference_mode()
def answer(model, press, prompt: dict, end_tokens: set[int]) -> list[list[int]]:
    """Greedy answers to the questions of one context."""
    cache = DynamicCache()
    context = torch.tensor([prompt["prefix"]])
    if press is None:
        model.model(input_ids=context, past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=context, past_key_values=cache)
    n_context = context.shape[1]
    answers = []
    for suffix in prompt["suffixes"]:
        tokens, said = suffix, []
        position = n_context
        for _ in range(prompt["n_answer"]):
            positions = torch.arange(position, position + len(tokens))[None]
            logits = model(
                input_ids=torch.tensor([tokens]), past_key_values=cache, position_ids=positions, logits_to_keep=1
            ).logits
            position += len(tokens)
            tokens = [int(logits[0, -1].argmax())]
            if tokens[0] in end_tokens:
                break
            said += tokens
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :n_context], layer.values[:, :, :n_context]
        answers.append(said)
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
