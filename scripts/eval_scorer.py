"""Optimality gap of a trained scorer on texts that it was not trained on, beside other metrics and its own features.

    python scripts/eval_scorer.py MODEL.gguf [--test prose] [--n-context 2000] [--n-query 20] [--k-max 24]

For each text of the program's three, the scorer is trained on the two others, and ranks this one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import ClassVar

import click
from torch import Tensor

from lukv_gguf import calibration, metrics
from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import LayerState, Metric, Needs
from lukv_gguf.metrics.foresight import Foresight
from lukv_gguf.profile import Protocol, profile_metrics
from lukv_gguf.scorer import FEATURES
from lukv_gguf.train_scorer import Training, train_scorer

TEXTS = ("prose", "code", "dialogue")


class Feature(Metric):
    """One feature of the scorer as a metric, or its opposite."""

    summary, cost = "a feature of foresight", "that of foresight"
    index: ClassVar[int]
    sign: ClassVar[int]

    @property
    def needs(self) -> Needs:
        return Foresight().needs

    def score(self, state: LayerState) -> Tensor:
        return self.sign * Foresight().inputs(state)[..., self.index]


def feature(index: int, sign: int) -> Metric:
    """The metric of that feature, by its name with the sign before it."""
    return type("Feature", (Feature,), {"name": "- +"[sign + 1] + FEATURES[index], "index": index, "sign": sign})()


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--test", "tests", type=click.Choice(TEXTS), multiple=True, default=TEXTS, show_default=True)
@click.option("--metric", "names", default="keydiff,knorm,snapkv,expectedattention,criticalkv-expectedattention,kvzip",
              show_default=True, help="Beside the scorer.")
@click.option("--n-context", default=2000, show_default=True, help="Most tokens of a text.")
@click.option("--n-query", default=20, show_default=True)
@click.option("--k-max", default=24, show_default=True)
@click.option("--loss", default=Training.loss, show_default=True)
@click.option("--steps", default=Training.n_step, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(model: Path, tests: tuple[str, ...], names: str, n_context: int, n_query: int, k_max: int, loss: str, steps: int,
         seed: int) -> None:
    """Print one JSON object for each text: the gap at 20 %, as a share of the importance, mean over heads."""
    protocol = Protocol(n_context=n_context, n_query=n_query, max_new_tokens=k_max)
    training = Training(loss=loss, n_step=steps, seed=seed)
    try:
        for test in tests:
            started = time.monotonic()
            scorer = train_scorer(model, [calibration.load_default(name) for name in TEXTS if name != test], training, protocol)
            trained = time.monotonic() - started
            chosen = [Foresight(scorer), *metrics.parse_list(names)]
            chosen += [feature(i, sign) for i in range(len(FEATURES)) for sign in (1, -1)]
            context, questions = calibration.load_default(test)
            found = profile_metrics(model, chosen, context=context, questions=questions, protocol=protocol)
            gaps = {name: round(float(profile.gap.mean()), 4) for name, profile in found.items()}
            click.echo(json.dumps({"test": test, "training_s": round(trained), "gap": dict(sorted(gaps.items(), key=lambda item: item[1]))}))
    except LukvError as error:
        raise SystemExit(f"eval_scorer: error: {error}") from None


if __name__ == "__main__":
    main()
