"""The command `lukv-gguf`: it parses and prints, nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lukv_gguf import __version__, defaults
from lukv_gguf.errors import LukvError

if TYPE_CHECKING:  # imported where they are used, so that --help answers at once
    import numpy as np
    from rich.text import Text

    from lukv_gguf.bench import BenchResult
    from lukv_gguf.metadata import LukvMetadata

EXIT_INTERRUPTED = 130

_LEVELS = (0.01, 0.05, 0.10, 0.20, 0.35, 0.50, 0.75, 0.95)
_BLOCKS = "·▁▂▃▄▅▆▇█"
_DIGITS = ".12345678"  # for a terminal without block characters
_COLOURS = ("grey50", "#46337f", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#d8e219", "#fde725")
_TERMINAL_COLUMNS = 80
_LABEL_COLUMNS = 8
_CELL_COLUMNS = 2
_STAGE_NAMES = {"answer": "answering", "refine": "refining", "measure": "measuring layers", "write": "writing the model"}


class _OneLineError(click.ClickException):
    """An error as one line on stderr."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message.replace("\n", " "))
        self.exit_code = exit_code

    def show(self, file: Any = None) -> None:
        click.echo(f"lukv-gguf: error: {self.message}", file=file, err=True)


class _Group(click.Group):
    """A group whose commands fail with one line, never with a traceback (unless --debug asks for it)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "lukv-gguf"
            raise _OneLineError(f"{error.format_message()} See '{path} --help'.", error.exit_code) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("lukv-gguf: interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except LukvError as error:
            raise _OneLineError(str(error)) from None
        except Exception as error:
            if ctx.params["debug"] or getattr(error, "errno", None) == errno.EPIPE:  # click knows about closed pipes
                raise
            if isinstance(error, OSError):
                raise _OneLineError(str(error)) from None
            kind = type(error).__name__
            raise _OneLineError(f"unexpected {kind}: {error} (run 'lukv-gguf --debug …' for details)") from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lukv-gguf")
@click.option("--debug", is_flag=True, help="Show a traceback if something unexpected happens.")
def cli(debug: bool) -> None:
    """LU-KV for GGUF models: an answer from a fraction of the KV cache."""


def main() -> None:
    """Entry point of the program."""
    for name in ("SIGTERM", "SIGHUP"):  # the latter not on Windows
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup has set SIG_IGN
            signal.signal(number, _interrupt)
    cli(prog_name="lukv-gguf")


def _protocol_options(command: Any) -> Any:
    """The options of a profile, for the commands that make one."""
    options = [
        click.option("--sink", type=click.IntRange(min=0), default=defaults.SINK, show_default=True,
                     help="Tokens never evicted at the start."),
        click.option("--recent", type=click.IntRange(min=0), default=defaults.RECENT, show_default=True,
                     help="Tokens never evicted at the end."),
        click.option("--objective", type=click.Choice(["relative", "paper"]), default=defaults.OBJECTIVE,
                     show_default=True, help="Importance relative to the residual stream, or as in the paper."),
        click.option("--group", type=click.Choice(["mean", "max"]), default="mean", show_default=True,
                     help="How the query heads that share a KV head are combined."),
        click.option("--calibration", type=click.Choice(["prose", "code", "dialogue"]), default="prose",
                     show_default=True, help="Calibration text and questions that come with the program."),
        click.option("--context", type=click.Path(path_type=Path), metavar="FILE",
                     help="Your own calibration text, with --questions."),
        click.option("--questions", type=click.Path(path_type=Path), metavar="FILE",
                     help='Its questions: JSON, {"questions": ["…"]}.'),
        click.option("--n-context", type=click.IntRange(min=1), default=defaults.N_CONTEXT, show_default=True,
                     help="Most tokens of the calibration text."),
        click.option("--n-query", type=click.IntRange(min=1), help="Questions to ask.  [default: all]"),
        click.option("--k-max", "max_new_tokens", type=click.IntRange(min=1), default=defaults.K_MAX,
                     show_default=True, help="Most tokens of an answer."),
        click.option("--grid", "n_ratio", type=click.IntRange(min=1), default=defaults.N_RATIO,
                     show_default=True, help="Ratios to solve for."),
        click.option("--engine", type=click.Choice(["auto", "llama", "torch"]), default="auto", show_default=True,
                     help="Who answers the questions: the model in llama.cpp, or the torch reference with all weights in "
                     "memory; auto takes torch for at most 10⁹ weights, and on a CUDA device that they fit."),
        click.option("--refine", type=click.IntRange(min=0), metavar="STEPS",
                     show_default=f"{defaults.REFINE_STEPS} with the engine torch, {defaults.REFINE_STEPS_GPU} on a GPU, else 0",
                     help="Steps of gradient descent on the divergence from the full cache; needs the engine torch."),
        click.option("--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, mps."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _calibration_text(options: dict[str, Any]) -> tuple[str, list[str]]:
    """Take the options of the calibration text out, and return what they name."""
    from lukv_gguf import calibration

    context, questions = options.pop("context"), options.pop("questions")
    if (context is None) != (questions is None):
        raise click.UsageError("--context and --questions go together.")
    name = options.pop("calibration")
    return calibration.load(context, questions) if context else calibration.load_default(name)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@click.option("-r", "--ratio", type=float, default=defaults.RATIO, show_default=True,
              help="Kept fraction of the whole KV cache, in (0, 1].")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT",
              help="Output file.  [default: MODEL-lukv.gguf beside the input]")
@click.option("-f", "--force", is_flag=True,
              help="Overwrite an existing output. One that carries a LU-KV table is replaced in any case.")
@click.option("--policy", type=click.Choice(["capacity", "prefill"]), default=defaults.POLICY, show_default=True,
              help="When to evict: from a head that is full, or once after the prompt.")
@click.option("--profile", "profile_path", type=click.Path(path_type=Path), metavar="PROFILE",
              help="Take the budgets from this file (lukv-gguf profile) instead of profiling.")
@click.option("--metric", metavar="NAME[:PARAM=VALUE]…",
              help=f"Score that ranks a head's tokens, see `lukv-gguf metrics`.  [default: {defaults.METRIC}, or the profile's]")
@click.option("--scorer", "scorer_path", type=click.Path(path_type=Path), metavar="SCORER",
              help="Weights of the metric foresight (lukv-gguf train-scorer).")
@click.option("--allocation", type=click.Choice(["lukv", "uniform", "pyramidkv", "adakv"]),
              default=defaults.ALLOCATION, show_default=True, help="How the budget is split over heads.")
@click.option("--floor", type=float, show_default=f"{defaults.REFINED_FLOOR} for refined lukv, {defaults.FLOOR} for lukv, else 0",
              help="Share of the ratio that no head falls below, 0 to 1.")
@click.option("--blend", type=float, show_default=f"{defaults.BLEND} for lukv that is not refined, else 0",
              help="Share of uniform budgets mixed in, 0 to 1.")
@_protocol_options
@click.pass_context
def embed(ctx: click.Context, model: Path, output: Path | None, force: bool, **options: Any) -> None:
    """Profile a model, solve its budgets, and write a copy that carries them.

    The copy is a normal model everywhere: tensors and all other metadata stay the same, byte for byte.
    """
    _set_thread_policy()
    from lukv_gguf.embed import checkpoint_folder, default_output, embed_model
    from lukv_gguf.gguf_header import read_header

    calibration_text = _calibration_text(options)
    if options["profile_path"] is not None:
        protocol = {param.name: param.opts[0] for param in profile.params if param.name in ctx.params}
        for name in protocol.keys() - {"model", "output", "force", "metric", "scorer_path"}:
            if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{protocol[name]} is for profiling; with --profile it says nothing.")
            options.pop(name, None)
    started = time.monotonic()
    read_header(model)  # first of all, whether there is such a model
    output = output or default_output(model)
    with _saying_how_to_resume(checkpoint_folder(output)), _progress_bars() as progress:
        meta = embed_model(
            model, output, overwrite=force, calibration_text=calibration_text, progress=progress, **options
        )
    click.echo(f"written  {output}")
    click.echo(f"keeps    {meta.ratio:.1%} of the KV cache, policy {meta.policy}, metric {meta.metric}")
    click.echo(f"heads    {_spread(meta.budget)}")
    click.echo(f"time     {time.monotonic() - started:.1f} s{_peak_memory()}")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PROFILE",
              help="Output file.  [default: MODEL-profile.npz beside the input]")
@click.option("-f", "--force", is_flag=True,
              help="Overwrite an existing output, and drop what an interrupted run with other parameters left.")
@click.option("--metric", default=defaults.METRIC, show_default=True, metavar="NAME[:PARAM=VALUE]…,…",
              help="Scores that rank a head's tokens, separated by commas; see `lukv-gguf metrics`.")
@click.option("--scorer", "scorer_path", type=click.Path(path_type=Path), metavar="SCORER",
              help="Weights of the metric foresight (lukv-gguf train-scorer).")
@click.option("--refine-ratio", type=float, default=defaults.RATIO, show_default=True,
              help="Kept fraction at which the budgets are refined; those of other ratios follow.")
@_protocol_options
def profile(
    model: Path, output: Path | None, force: bool, metric: str, scorer_path: Path | None = None, **options: Any
) -> None:
    """Measure a model's heads, and write what was found to one file.

    `embed --profile` turns it into budgets, for any ratio and for any quantisation of the model. With the engine llama
    an interrupted run goes on where it was when the same command is given again.
    """
    _set_thread_policy()
    from lukv_gguf import metrics
    from lukv_gguf.checkpoint import discard_folder
    from lukv_gguf.embed import checkpoint_folder
    from lukv_gguf.gguf_header import check_writable, name_beside, read_header
    from lukv_gguf.profile import Protocol, profile_metrics
    from lukv_gguf.profile_file import save_profiles
    from lukv_gguf.scorer import load_scorer

    context, questions = _calibration_text(options)
    device = options.pop("device")
    header = read_header(model)
    output = output or name_beside(model, "-profile").with_suffix(".npz")
    check_writable(output, 1 << 20)
    _refuse_existing(output, force)
    chosen = metrics.parse_list(metric, None if scorer_path is None else load_scorer(scorer_path))
    started = time.monotonic()
    with _saying_how_to_resume(checkpoint_folder(output)), _progress_bars() as progress:
        profiles = profile_metrics(
            header.path,
            chosen,
            context=context,
            questions=questions,
            protocol=Protocol(**options),
            device=device,
            progress=progress,
            checkpoint=checkpoint_folder(output),
            start_over=force,
        )
    save_profiles(output, profiles)
    discard_folder(checkpoint_folder(output))
    click.echo(f"written  {output}")
    for name, found in profiles.items():
        click.echo(f"{name:<{max(map(len, profiles))}} at 20 %: {_spread(found.budget_at(0.2))}; optimality gap {found.gap.mean():.1%}")
    click.echo(f"time     {time.monotonic() - started:.1f} s{_peak_memory()}")


@cli.command("train-scorer")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="SCORER",
              help="Output file.  [default: MODEL-scorer.npz beside the input]")
@click.option("-f", "--force", is_flag=True,
              help="Overwrite an existing output, and drop what an interrupted run with other parameters left.")
@click.option("--calibration", "names", type=click.Choice(["prose", "code", "dialogue"]), multiple=True,
              help="Texts that come with the program, may be given again.  [default: all, or those of --context]")
@click.option("--context", "contexts", type=click.Path(path_type=Path), metavar="FILE", multiple=True,
              help="Your own text, with --questions; may be given again.")
@click.option("--questions", type=click.Path(path_type=Path), metavar="FILE", multiple=True,
              help='Its questions: JSON, {"questions": ["…"]}.')
@click.option("--n-context", type=click.IntRange(min=1), default=defaults.N_CONTEXT, show_default=True,
              help="Most tokens of a text.")
@click.option("--n-query", type=click.IntRange(min=1), help="Questions to ask about each.  [default: all]")
@click.option("--k-max", "max_new_tokens", type=click.IntRange(min=1), default=defaults.K_MAX, show_default=True,
              help="Most tokens of an answer.")
@click.option("--hidden", "n_hidden", type=click.IntRange(min=1), default=16, show_default=True, help="Hidden units for each head.")
@click.option("--steps", "n_step", type=click.IntRange(min=1), default=600, show_default=True, help="Steps of Adam for each layer.")
@click.option("--learning-rate", type=float, default=3e-3, show_default=True, help="Its largest rate.")
@click.option("--loss", type=click.Choice(["mass", "hinge"]), default="mass", show_default=True,
              help="Pairs weighed by what they cost, or all alike as in the paper.")
@click.option("--golden-ratio", "ratio", type=float, default=defaults.RATIO, show_default=True, help="Kept fraction of Golden Eviction.")
@click.option("--window", type=click.IntRange(min=1), default=32, show_default=True, help="Last queries that the scorer sees.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the weights and the pairs.")
@click.option("--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, mps.")
def train(
    model: Path, output: Path | None, force: bool, names: tuple[str, ...], contexts: tuple[Path, ...],
    questions: tuple[Path, ...], n_context: int, n_query: int | None, max_new_tokens: int, device: str, **options: Any,
) -> None:
    """Train the scorer of the metric foresight on future attention (ForesightKV), and write it to one file.

    `profile` and `embed` take it with --scorer. An interrupted run goes on where it was when the same command is given again.
    """
    _set_thread_policy()
    from lukv_gguf import calibration
    from lukv_gguf.checkpoint import discard_folder
    from lukv_gguf.embed import checkpoint_folder
    from lukv_gguf.gguf_header import check_writable, name_beside, read_header
    from lukv_gguf.profile import Protocol
    from lukv_gguf.scorer import save_scorer
    from lukv_gguf.train_scorer import Training, train_scorer

    if len(contexts) != len(questions):
        raise click.UsageError("--context and --questions go together.")
    texts = [calibration.load(*pair) for pair in zip(contexts, questions)]
    texts += [calibration.load_default(name) for name in names or (() if texts else ("prose", "code", "dialogue"))]
    header = read_header(model)
    output = output or name_beside(model, "-scorer").with_suffix(".npz")
    check_writable(output, 1 << 20)
    _refuse_existing(output, force)
    started = time.monotonic()
    with _saying_how_to_resume(checkpoint_folder(output)), _progress_bars() as progress:
        scorer = train_scorer(
            header.path, texts, Training(**options),
            Protocol(n_context=n_context, n_query=n_query, max_new_tokens=max_new_tokens), device=device,
            progress=progress, checkpoint=checkpoint_folder(output), start_over=force,
        )  # fmt: skip
    save_scorer(output, scorer)
    discard_folder(checkpoint_folder(output))
    n_layer, n_head_kv = scorer.shape[:2]
    click.echo(f"written  {output}")
    click.echo(f"scorer   {scorer.digest}: {n_layer} x {n_head_kv} networks of {scorer.n_hidden} hidden units")
    click.echo(f"trained  on {scorer.provenance['tokens']} tokens and {scorer.provenance['questions']} questions")
    click.echo(f"time     {time.monotonic() - started:.1f} s{_peak_memory()}")


@cli.command("metrics")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_metrics(as_json: bool) -> None:
    """List the scores that rank a head's tokens: what they need and cost, and where they run."""
    from lukv_gguf import metrics

    rows = []
    for metric in map(metrics.get, metrics.names()):
        runs = ["profile", "native"] if metric.native else ["profile"]
        rows.append({"name": metric.name, "summary": metric.summary, "parameters": metric.params,
                     "needs": metric.needs.names(), "cost": metric.cost, "runs": runs})  # fmt: skip
    if as_json:
        click.echo(json.dumps({"metrics": rows}))
        return
    for row in rows:
        click.echo(f"{row['name']}: keeps {row['summary']}")
        settings = ", ".join(f"{name} {value:g}" for name, value in row["parameters"].items())
        for label, text in (("parameters", settings), ("needs", ", ".join(["keys", *row["needs"]])),
                            ("cost", row["cost"]), ("runs in", " and ".join(row["runs"]))):  # fmt: skip
            if text:
                click.echo(f"  {label:<11}{text}")


@cli.command("export-curve")
@click.argument("profile_path", type=click.Path(path_type=Path), metavar="PROFILE")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="CURVE.npy", required=True,
              help="Output file.")
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--metric", help="Which of the profile's metrics.  [default: the only one]")
def export_curve(profile_path: Path, output: Path, force: bool, metric: str | None) -> None:
    """Write a profile as the LU-KV project and kvpress read it: [99, layers, KV heads], pruned fractions."""
    from lukv_gguf.profile_file import choose_profile
    from lukv_gguf.profile_file import export_curve as export

    _refuse_existing(output, force)
    chosen = choose_profile(profile_path, metric)
    export(output, chosen)
    click.echo(f"written  {output}")
    click.echo(f"for      {chosen.metric}, sink {chosen.sink}, window {chosen.recent}")


@cli.command("import-curve")
@click.argument("curve", type=click.Path(path_type=Path), metavar="CURVE.npy")
@click.option("--model", type=click.Path(path_type=Path), metavar="MODEL.gguf", required=True,
              help="The model that it was made for.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PROFILE", required=True,
              help="Output file.")
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--metric", required=True, help="The metric that it was made for.")
@click.option("--sink", type=click.IntRange(min=0), default=defaults.SINK, show_default=True,
              help="Its tokens never evicted at the start.")
@click.option("--recent", type=click.IntRange(min=0), default=1, show_default=True,
              help="Its tokens never evicted at the end.")
def import_curve(
    curve: Path, model: Path, output: Path, force: bool, metric: str, sink: int, recent: int
) -> None:
    """Make a profile from a curve of the LU-KV project: [99, layers, KV heads], pruned fractions."""
    from lukv_gguf import metrics
    from lukv_gguf.gguf_header import read_header
    from lukv_gguf.metadata import model_shape, shape_text
    from lukv_gguf.profile_file import import_curve as import_
    from lukv_gguf.profile_file import save_profiles

    _refuse_existing(output, force)
    header = read_header(model)
    chosen = metrics.parse(metric)
    name = str(header.value("general.name") or model.stem)
    profile = import_(curve, chosen.name, chosen.params, sink, recent, name)
    found, wanted = profile.budget.shape[1:], model_shape(header)
    if found != wanted:
        raise LukvError(f"{curve}: made for {shape_text(*found)}, {model} has {shape_text(*wanted)}")
    save_profiles(output, {chosen.name: profile})
    click.echo(f"written  {output}")


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="MODEL.gguf|PROFILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it: .png, .svg or .html.")
@click.option("--metric", help="Which of a profile's metrics.  [default: the only one]")
@click.option("--compare", type=click.Path(path_type=Path), metavar="PROFILE", multiple=True,
              help="Profiles of other texts, for the rank correlations; may be given again.")
def inspect(path: Path, as_json: bool, plot: Path | None, metric: str | None, compare: tuple[Path, ...]) -> None:
    """Show the LU-KV table that a model carries, or what a profile measured."""
    from lukv_gguf.metadata import read_metadata

    if _is_profile(path):
        _inspect_profile(path, as_json, plot, metric, compare)
        return
    if metric or compare:
        raise click.UsageError("--metric and --compare are for profiles.")
    meta = read_metadata(path)
    if as_json:
        click.echo(json.dumps({"embedded": meta is not None, **(meta.to_dict() if meta else {})}))
    elif meta is None:
        click.echo(f"{path}: no LU-KV table")
    else:
        _print_metadata(path, meta)
    if plot is not None:
        if meta is None:
            raise LukvError(f"{path}: no LU-KV table to draw")
        from lukv_gguf.embed import profile_of
        from lukv_gguf.plots import plot_profile

        plot_profile(profile_of(meta, path.name), plot, meta.ratio)
        click.echo(f"written  {plot}", err=as_json)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT",
              help="Output file.  [default: MODEL-stripped.gguf beside the input]")
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing output.")
def strip(model: Path, output: Path | None, force: bool) -> None:
    """Write a copy of a model without its LU-KV table."""
    from lukv_gguf.embed import strip_model

    with _progress_bars() as progress:
        written = strip_model(model, output, overwrite=force, progress=progress)
    click.echo(f"written  {written}")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@click.option("--n-ctx", type=click.IntRange(min=1), required=True, help="Context to allocate, in tokens.")
@click.option("--depth", type=click.IntRange(min=1), required=True, help="Tokens to read before generation starts.")
@click.option("-r", "--ratio", type=float, help="Kept fraction.  [default: the embedded one]")
@click.option("--n-gen", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate.")
@click.option("--ubatch", "n_ubatch", type=click.IntRange(min=1), default=512, show_default=True,
              help="Tokens per computation while reading.")
@click.option("--threads", "n_threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1,
              show_default="all cores", help="Threads.")
@click.option("-ngl", "--gpu-layers", "n_gpu_layers", type=click.IntRange(min=-1), default=0, show_default=True,
              help="Layers on the GPU, -1 for all.")
@click.option("--kv-type", type=click.Choice(defaults.KV_TYPES), default="f16", show_default=True, help="Type of K and V.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True,
              help="Times that each side runs; the best counts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--histogram", type=click.Path(path_type=Path), metavar="FILE.png|.svg",
              help="Draw how long the generated tokens took, one by one.")
def bench(model: Path, as_json: bool, histogram: Path | None, **options: Any) -> None:
    """Measure memory and speed with LU-KV against the full cache.

    Both sides run in turn, each in a process of its own; so does the full cache with as many cells as LU-KV's heads have
    on average.
    """
    from lukv_gguf.bench import bench as run_bench

    if histogram is not None and histogram.suffix not in (".png", ".svg"):
        raise LukvError(f"{histogram}: a histogram is a .png or an .svg file")
    with _progress_bars() as progress:
        result = run_bench(model, progress=lambda _, done, total: progress("runs", done, total), **options)
    if histogram is not None:
        from lukv_gguf.plots import plot_token_times

        plot_token_times(result.token_times_ms, histogram)
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    else:
        _print_bench(result, on_gpu=options["n_gpu_layers"] != 0)


@cli.command("eval")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@click.option("--suite", "suites", default="smoke", show_default=True, help="Of smoke, ruler, longbench, lm, separated by commas.")
@click.option("--tasks", default="", help="Only these of their tasks.  [default: all]")
@click.option("--methods", default="full,uniform,pyramidkv,adakv,lukv", show_default=True,
              help="Ways to split the budget; with parameters as in lukv:blend=0+floor=0.2 or lukv:profile=FILE.")
@click.option("-r", "--ratios", default=str(defaults.RATIO), show_default=True, help="Kept fractions of the cache, in (0, 1].")
@click.option("--metrics", default="", help="Scores that rank a head's tokens.  [default: those of the profile]")
@click.option("--policies", default="capacity,prefill", show_default=True, help="When to evict.")
@click.option("--kv-types", default="f16", show_default=True, help=f"Types of K and V: {', '.join(defaults.KV_TYPES)}.")
@click.option("--lengths", default="", help="Tokens of a context with its question and answer.  [default: the suite's]")
@click.option("-n", "--n", "n", type=click.IntRange(min=1), help="Contexts of each task and length.  [default: the suite's]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For the contexts.")
@click.option("--query-aware", is_flag=True, help="Read the question before anything is evicted, instead of afterwards.")
@click.option("--longbench", type=click.Path(path_type=Path), metavar="DIR", help="Folder with LongBench's files.")
@click.option("--profile", "profile_path", type=click.Path(path_type=Path), metavar="PROFILE",
              help="Budgets of LU-KV and Ada-KV.  [default: the file's table; what it lacks is profiled]")
@click.option("--threads", "n_threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1,
              show_default="all cores", help="Threads.")
@click.option("-ngl", "--n-gpu-layers", type=click.IntRange(min=-1), default=0, show_default=True,
              help="Layers on the GPU, -1 for all.")
@click.option("--ubatch", "n_ubatch", type=click.IntRange(min=1), default=512, show_default=True,
              help="Tokens per computation while reading.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the results as JSON; - prints them.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the report to this page.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder for answers, results, report and pictures.  [default: MODEL-eval]")
def evaluate(
    model: Path, suites: str, tasks: str, methods: str, ratios: str, metrics: str, policies: str, kv_types: str, lengths: str,
    profile_path: Path | None, n_threads: int, n_gpu_layers: int, n_ubatch: int, json_path: Path | None,
    html_path: Path | None, output: Path | None, **options: Any,
) -> None:
    """Compare ways to split the cache over heads on tasks, against the full cache.

    A context is cached first and then asked about. Every answer is kept in DIR: an interrupted run goes on where it was
    when the same command is given again, and another one asks only what is new.
    """
    _set_thread_policy()
    from lukv_gguf.evaluate.evaluation import Request, run, write_json
    from lukv_gguf.evaluate.session import Options

    request = Request(
        suites=_names(suites),
        tasks=_names(tasks),
        methods=_names(methods),
        metrics=_names(metrics),
        ratios=_numbers("--ratios", ratios, float),
        policies=_names(policies),
        kv_types=_names(kv_types),
        lengths=_numbers("--lengths", lengths, int),
        profile=profile_path,
        options=Options(n_threads, n_gpu_layers, n_ubatch),
        **options,
    )
    folder = output or Path(f"{model.stem}-eval")

    def make_profile(path: Path, names: list[str]) -> None:
        click.echo(f"profiling {model} for {', '.join(names)}", err=True)
        with click.Context(profile) as ctx:
            ctx.invoke(profile, model=model, output=path, force=True, metric=",".join(names))

    with _evaluation_bar() as progress:
        try:
            found = run(model, folder, request, make_profile, progress)
        except KeyboardInterrupt:
            click.echo(f"lukv-gguf: {folder} keeps the answers so far; the same command goes on from there", err=True)
            raise
    from lukv_gguf.evaluate import report  # matplotlib: not needed before

    write_json(folder / "results.json", found)
    drawn = report.pictures(found.results, found.records)
    report.write_page(html_path or folder / "report.html", found.results, drawn, found.model, found.facts)
    report.write_pictures(folder, drawn)
    if json_path is not None and str(json_path) == "-":
        click.echo(json.dumps(found.to_dict()))
        return
    if json_path is not None:
        write_json(json_path, found)
    from rich.console import Console

    console = Console(highlight=False)
    for table in report.tables(found.results):
        console.print(table)
        console.print()
    click.echo(f"written  {html_path or folder / 'report.html'}")


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(name) for name in _names(text)]
    except ValueError:
        raise click.UsageError(f"{option} takes numbers separated by commas, not {text!r}.") from None


@contextlib.contextmanager
def _evaluation_bar() -> Iterator[Any]:
    """A callback (what, answers done, answers in all) that draws one bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    task: Any = None

    def progress(what: str, done: int, total: int) -> None:
        nonlocal task
        if task is None:
            bars.start()
            task = bars.add_task(what, total=total)
        bars.update(task, description=what, completed=done)

    try:
        yield progress
    finally:
        if task is not None:
            bars.stop()


@contextlib.contextmanager
def _saying_how_to_resume(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint.exists():
            click.echo(f"lukv-gguf: {checkpoint} keeps what is done; the same command goes on from there", err=True)
        raise


def _set_thread_policy() -> None:
    # read when torch is loaded: threads that spin at every barrier stall as soon as anything else wants the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _refuse_existing(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise LukvError(f"{output}: exists; overwrite it with -f or choose another name with -o")


def heatmap(budget: np.ndarray, encoding: str = "utf-8") -> list[Text]:
    """Lines that show kept fractions [L, H]: a row for each head, two columns for each layer, in bands of 80 columns.

    The last row of a band is the mean of each layer. Without block characters in `encoding`, digits stand for them.
    """
    import numpy as np
    from rich.text import Text

    glyphs = _BLOCKS if _can_encode(_BLOCKS, encoding) else _DIGITS

    def cell(value: float) -> tuple[str, str]:
        level = int(np.searchsorted(_LEVELS, value, side="right"))
        return glyphs[level] + " ", _COLOURS[level]

    n_layer, n_head_kv = budget.shape
    band = (_TERMINAL_COLUMNS - _LABEL_COLUMNS) // _CELL_COLUMNS // 5 * 5
    lines = []
    for first in range(0, n_layer, band):
        layers = range(first, min(first + band, n_layer))
        ticks = "".join(f"{layer:<{5 * _CELL_COLUMNS}}" for layer in layers[::5])
        lines.append(Text(f"{'layer':<{_LABEL_COLUMNS}}{ticks}".rstrip(), style="dim"))
        rows = [(f"head {head}", budget[:, head]) for head in range(n_head_kv)] + [("mean", budget.mean(axis=1))]
        for label, values in rows:
            line = Text.assemble(f"{label:<{_LABEL_COLUMNS}}", *(cell(values[layer]) for layer in layers))
            line.rstrip()
            lines.append(line)
        lines.append(Text(""))
    bounds = (0.0, *_LEVELS)
    legend: list[str | tuple[str, str]] = [f"{'kept %':<{_LABEL_COLUMNS}}"]
    for low in bounds:
        legend += [cell(low), (f"<{_LEVELS[0]:.0%}  " if low == 0.0 else f"{low * 100:.0f}+  ", "dim")]
    return [*lines, Text.assemble(*legend)]


def _is_profile(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"  # a profile is a zip archive
    except OSError:
        return False  # reading it as a model tells what is wrong


def _inspect_profile(
    path: Path, as_json: bool, plot: Path | None, metric: str | None, compare: tuple[Path, ...]
) -> None:
    import numpy as np

    from lukv_gguf.profile_file import choose_profile
    from lukv_gguf.stability import rank_correlation, split_half_correlation

    profile = choose_profile(path, metric)
    others = {other.stem: choose_profile(other, profile.metric) for other in compare}
    at = int(np.abs(profile.ratios - defaults.RATIO).argmin())
    ratio = float(profile.ratios[at])
    stability = {}
    if profile.query_budget is not None and len(profile.query_budget) > 1:
        halves = split_half_correlation(profile.query_budget[:, [at]][:, :, profile.budgeted])
        stability["halves of the queries"] = float(halves.mean())
    for name, other in others.items():
        table = other.budget_at(ratio)[None, profile.budgeted]
        stability[name] = float(rank_correlation(profile.budget[[at]][:, profile.budgeted], table)[0])
    if as_json:
        fields = {
            "metric": profile.metric,
            "metric_params": dict(profile.metric_params),
            "sink": profile.sink,
            "recent": profile.recent,
            "ratios": profile.ratios.tolist(),
            "budget": profile.budget.tolist(),
            "gap": [[None if np.isnan(gap) else gap for gap in layer] for layer in profile.gap.tolist()],
            "rank_correlation": stability,
            "provenance": dict(profile.provenance),
        }
        click.echo(json.dumps(fields))
    else:
        measured = bool(np.isfinite(profile.gap).all())
        gap = f"{profile.gap.mean():.1%} of the importance, where every head keeps 20 %" if measured else "not measured"
        rows = {
            "profile": str(path),
            "metric": profile.metric + "".join(f", {name} {value}" for name, value in profile.metric_params.items()),
            "protected": f"first {profile.sink}, last {profile.recent} tokens",
            "grid": f"{len(profile.ratios)} ratios, {profile.ratios[0]:.4g} to {profile.ratios[-1]:.4g}",
            f"heads at {ratio:.0%}": _spread(profile.budget[at]),
            "optimality gap": gap,
            **{f"ρ, {name}": f"{value:.3f}" for name, value in stability.items()},
            **profile.provenance,
        }
        _print_table(rows, profile.budget[at])
    if plot is not None:
        from lukv_gguf.plots import plot_profile

        plot_profile(profile, plot, ratio, others)
        click.echo(f"written  {plot}", err=as_json)


def _print_metadata(model: Path, meta: LukvMetadata) -> None:
    ratios = meta.profile_ratios
    params = "".join(f", {name} {value}" for name, value in meta.metric_params.items())
    rows = {
        "model": str(model),
        "state": "on" if meta.enabled else "off",
        "ratio": f"{meta.ratio:.4g} of the KV cache is kept",
        "policy": meta.policy,
        "metric": meta.metric + params,
        "protected": f"first {meta.sink}, last {meta.recent} tokens",
        "shape": f"{meta.n_layer} layers x {meta.n_head_kv} KV heads",
        "heads": _spread(meta.budget),
        "profile": f"{len(ratios)} ratios, {ratios[0]:.4g} to {ratios[-1]:.4g}",
        **meta.provenance,
    }
    _print_table(rows, meta.budget)


def _print_table(rows: dict[str, str], budget: np.ndarray) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    console.print()
    for line in heatmap(budget, console.encoding):
        console.print(line)


def _peak_memory() -> str:
    try:
        from lukv_gguf.bench import peak_rss
    except ImportError:  # Windows cannot say
        return ""
    return f", {peak_rss() / 2**30:.2f} GiB of memory at the peak"


def _print_bench(result: BenchResult, on_gpu: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"context {result.n_ctx}, {result.depth} tokens in it, ratio {result.ratio:.4g}")
    table.add_column("")
    for name in ("full cache", "LU-KV", "LU-KV / full"):
        table.add_column(name, justify="right")

    def add(label: str, full: float, lukv: float, unit: float, digits: int) -> None:
        table.add_row(label, f"{full / unit:.{digits}f}", f"{lukv / unit:.{digits}f}", f"{lukv / full:.3f}")

    add("KV cache, MiB", result.kv_bytes_stock, result.kv_bytes_lukv, 2**20, 1)
    add("peak memory, MiB", result.peak_rss_stock, result.peak_rss_lukv, 2**20, 0)
    add("reading, tokens/s", result.prefill_tps_stock, result.prefill_tps_lukv, 1, 1)
    add("  its end", result.prefill_end_tps_stock, result.prefill_end_tps_lukv, 1, 1)
    add("  its end, full cache with as many cells", result.prefill_end_tps_stock_same_cells, result.prefill_end_tps_lukv, 1, 1)
    add("generating, tokens/s", result.decode_tps_stock, result.decode_tps_lukv, 1, 1)
    add("  slowest of 100 tokens, ms", result.token_ms_stock, result.token_ms_lukv, 1, 1)
    add("  full cache with as many cells", result.decode_tps_stock_same_cells, result.decode_tps_lukv, 1, 1)
    shares = (("reading", result.commit_share_prefill), ("generating", result.commit_share_decode))
    for label, share in () if on_gpu else shares:
        table.add_row(f"part of the time for commits, {label}", "", f"{share:.2%}", "")
    Console(highlight=False).print(table)


def _spread(budget: np.ndarray) -> str:
    import numpy as np

    low, first, median, third, high = np.quantile(budget, [0.0, 0.25, 0.5, 0.75, 1.0])
    return f"keep {low:.1%} to {high:.1%} (quartiles {first:.1%}, {median:.1%}, {third:.1%})"


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@contextlib.contextmanager
def _progress_bars() -> Iterator[Any]:
    """A callback (stage, done, total) that draws one bar a stage on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if not tasks:  # not before: an error in the checks is then the only output
            bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(_STAGE_NAMES.get(stage, stage))
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


def _interrupt(signal_number: int, frame: Any) -> None:
    raise KeyboardInterrupt  # end like Ctrl-C, so that nothing is left behind


if __name__ == "__main__":
    main()
