"""An evaluation: every sample under every way to hold the cache, one record for each answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate import lm
from lukv_gguf.evaluate.methods import REPEATING, Cell, TableFile, Tables, table_key
from lukv_gguf.evaluate.session import Model, Options, Session, State
from lukv_gguf.evaluate.store import Record, Store
from lukv_gguf.evaluate.tasks import Prompt, Sample, tokenize
from lukv_gguf.gguf_header import read_header
from lukv_gguf.metadata import PREFIX, LukvMetadata
from lukv_gguf.replay import Replay, longest, make_replays

Progress = Callable[[str, int, int], None]
"""Called with what is being done, answers done, and answers in all."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes
    ----------
    cells
        The ways to hold the cache, the full one first for each type of K and V.
    samples
        Contexts with questions.
    texts
        Texts for language modelling.
    seed
        The samples' seed, for the records.
    query_aware
        Whether the question is read before anything is evicted; otherwise the context alone is cached first.
    state_bytes
        Memory for states of contexts that several cells share.
    """

    cells: Sequence[Cell]
    samples: Sequence[Sample] = ()
    texts: Sequence[lm.Text] = ()
    seed: int = 0
    query_aware: bool = False
    options: Options = field(default_factory=Options)
    state_bytes: int = 2 << 30


def model_key(path: Path) -> str:
    """A hash that tells models apart, whatever ``lukv.*`` keys they carry."""
    header = read_header(path)
    digest = hashlib.sha256(header.raw[header.infos_start : header.infos_end])
    for key, pair in header.pairs.items():
        if not key.startswith(PREFIX):
            digest.update(header.raw[pair.start : pair.end])
    with path.open("rb") as file:
        file.seek(header.data_start)
        digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def evaluate(
    plan: Plan, model: Path, tables: Tables, tokenizer: Any, store: Store, folder: Path, progress: Progress
) -> list[Record]:
    """Measure what the store does not hold yet.

    Parameters
    ----------
    model
        The GGUF file.
    folder
        Where the copy of the model that carries the tables is written; it is removed at the end.

    Returns
    -------
    list of Record
        All records of the plan, those from earlier runs included.

    Raises
    ------
    LukvError
        The model cannot be run, or a table is missing.
    """
    run = _Run(plan, model, tables, tokenizer, store, folder, progress)
    try:
        run.answer_questions()
        run.model_language()
    finally:
        run.close()
    return run.found


class _Run:
    def __init__(
        self, plan: Plan, model: Path, tables: Tables, tokenizer: Any, store: Store, folder: Path, progress: Progress
    ) -> None:
        self._plan, self._model, self._tokenizer, self._store = plan, model, tokenizer, store
        self._folder, self._progress = folder, progress
        self._model_key = model_key(model)
        self._tables: dict[tuple[str, str], LukvMetadata | None] = {
            (cell.method, cell.metric): None if cell.is_full else tables.table(cell.method, cell.metric)
            for cell in plan.cells
        }
        self._table_file = TableFile(model, folder / "tables")
        self._states: dict[tuple[str, str, str], State] = {}
        self._can_share = True
        n_text = sum(len(lm.MEASURES) for _ in plan.texts)
        self._total = len(plan.cells) * (sum(len(sample.questions) for sample in plan.samples) + n_text)
        self.found: list[Record] = []

    def close(self) -> None:
        self._table_file.close()

    def answer_questions(self) -> None:
        prompts = [(sample, tokenize(self._tokenizer, sample)) for sample in self._plan.samples]
        for group in self._groups(prompts):
            self._states.clear()
            for cell in self._plan.cells:
                todo = [pair for pair in group if self._missing(cell, pair[0])]
                if todo:
                    with self._load(cell) as model:
                        for sample, prompt in todo:
                            self._ask(model, cell, sample, prompt)
        self._states.clear()

    def model_language(self) -> None:
        for text in self._plan.texts:
            todo = [cell for cell in self._plan.cells if not self._found_all(cell, text)]
            if not todo:
                continue
            for kv_type in dict.fromkeys(cell.kv_type for cell in todo):
                full = next(cell for cell in self._plan.cells if cell.is_full and cell.kv_type == kv_type)
                with self._load(full) as model:
                    reference = lm.read_full(model, text, kv_type, self._folder, self._tokenizer.end_tokens)
                with reference:
                    for cell in [cell for cell in todo if cell.kv_type == kv_type]:
                        with self._load(cell) as model:
                            replays = self._replays(cell, list(text.tokens[: text.n_context]), is_chat=False)
                            for measure, values in lm.measure(
                                model, text, cell, reference, self._tokenizer.end_tokens, replays
                            ).items():
                                self._add({**self._key(cell, f"lm_{measure}", text, 0), **values})

    def _groups(self, prompts: list[tuple[Sample, Prompt]]) -> Iterator[list[tuple[Sample, Prompt]]]:
        """Samples whose shared states fit into memory together."""
        header = read_header(self._model)
        arch = header.value("general.architecture")

        def number(key: str, otherwise: int) -> int:
            value = header.value(f"{arch}.{key}")
            return int(value) if isinstance(value, (int, float)) else otherwise

        n_head = number("attention.head_count", 1)
        d_head = number("attention.key_length", number("embedding_length", 128) // max(1, n_head))
        per_token = 4 * d_head * number("block_count", 1) * number("attention.head_count_kv", n_head)  # K and V, f16
        kinds = len({(cell.metric, cell.kv_type) for cell in self._plan.cells if cell.policy == "prefill"}) or 1
        group: list[tuple[Sample, Prompt]] = []
        size = 0
        for pair in prompts:
            size += len(pair[1].prefix) * per_token * kinds
            if group and size > self._plan.state_bytes:
                yield group
                group, size = [], len(pair[1].prefix) * per_token * kinds
            group.append(pair)
        if group:
            yield group

    def _load(self, cell: Cell) -> Model:
        table = self._tables[cell.method, cell.metric]
        if table is None:
            return Model(self._model, cell.overrides(), self._plan.options)
        self._table_file.select(table)
        try:
            return Model(self._table_file.path, cell.overrides(), self._plan.options)
        except LukvError:
            raise LukvError(
                f"llama.cpp does not load {self._model} with a table for {cell.metric}; "
                "`lukv-gguf metrics` lists the metrics that run natively"
            ) from None

    def _ask(self, model: Model, cell: Cell, sample: Sample, prompt: Prompt) -> None:
        replays = self._replays(cell, prompt.prefix, sample.is_chat)
        room = max(max(map(len, prompt.suffixes)) + sample.n_answer, longest(replays))
        n_ctx = len(prompt.prefix) + room
        if self._plan.query_aware:
            for i, suffix in enumerate(prompt.suffixes):
                with model.session(n_ctx, cell.kv_type, not cell.is_full) as session:
                    session.read(prompt.prefix + suffix)
                    session.commit()
                    self._answer(session, cell, sample, i)
            return
        with model.session(n_ctx, cell.kv_type, not cell.is_full) as session:
            self._read_context(session, cell, sample, prompt, replays)
            session.commit()
            state = session.save() if len(prompt.suffixes) > 1 else None
            for i, suffix in enumerate(prompt.suffixes):
                if state is not None:
                    session.load(state)
                session.read(suffix)
                self._answer(session, cell, sample, i)

    def _replays(self, cell: Cell, prefix: list[int], is_chat: bool) -> list[Replay]:
        table = self._tables[cell.method, cell.metric]
        if table is None or cell.metric not in REPEATING:
            return []
        return make_replays(self._tokenizer, prefix, int(table.metric_params["chunk"]), is_chat=is_chat)

    def _read_context(
        self, session: Session, cell: Cell, sample: Sample, prompt: Prompt, replays: Sequence[Replay]
    ) -> None:
        """Read it, or take it from a cell that has: before the eviction, all of policy ``prefill`` hold the same."""
        key = (cell.metric, cell.kv_type, sample.key)
        if cell.policy == "prefill" and key in self._states:
            if session.load(self._states[key]):
                return
            self._can_share = False  # a runtime that restores only what was saved with the same table
            self._states.clear()
        session.read(prompt.prefix)
        session.repeat(replays)
        if cell.policy == "prefill" and self._can_share:
            self._states[key] = session.save()

    def _answer(self, session: Session, cell: Cell, sample: Sample, number: int) -> None:
        question = sample.questions[number]

        def is_done(tokens: list[int]) -> bool:
            return sample.is_complete(self._tokenizer.decode(tokens), question)

        answer = self._tokenizer.decode(session.generate(sample.n_answer, self._tokenizer.end_tokens, is_done))
        record = {
            **self._key(cell, sample.task, sample, number),
            "score": sample.score_answer(answer, question),
            "answer": answer,
            "references": question.references,
            "depth": question.depth,
            **session.work(),
        }
        self._add(record)

    def _missing(self, cell: Cell, sample: Sample) -> bool:
        """Whether a sample has to be asked; what is there already counts as found."""
        keys = [self._key(cell, sample.task, sample, i) for i in range(len(sample.questions))]
        return not self._take(cell, keys)

    def _found_all(self, cell: Cell, text: lm.Text) -> bool:
        return self._take(cell, [self._key(cell, f"lm_{measure}", text, 0) for measure in lm.MEASURES])

    def _take(self, cell: Cell, keys: list[Mapping[str, Any]]) -> bool:
        records = [self._store.get(key) for key in keys]
        if None in records:  # asked as a whole: an interrupted one begins again
            return False
        self.found += records  # type: ignore[arg-type]
        self._tell(cell)
        return True

    def _key(self, cell: Cell, task: str, asked: Sample | lm.Text, question: int) -> dict[str, Any]:
        return {
            "model": self._model_key,
            "task": task,
            "length": asked.length,
            "context": asked.index,
            "sample": asked.key,
            "question": question,
            "seed": self._plan.seed,
            "query_aware": self._plan.query_aware,
            "n_ubatch": self._plan.options.n_ubatch,
            **asdict(cell),
            "table": table_key(self._tables[cell.method, cell.metric]),
        }

    def _add(self, record: dict[str, Any]) -> None:
        self._store.add(record)
        self.found.append(record)
        self._tell(Cell(*(record[name] for name in ("method", "metric", "ratio", "policy", "kv_type"))))

    def _tell(self, cell: Cell) -> None:
        name = " ".join(str(part) for part in (cell.method, cell.metric, cell.policy, cell.ratio) if part)
        self._progress(name, len(self.found), self._total)
