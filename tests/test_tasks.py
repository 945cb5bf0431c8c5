"""The evaluation's tasks: what is hidden can be found, and scores are what the benchmarks say."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate import longbench, ruler, scoring
from lukv_gguf.evaluate.tasks import Question, Sample, novel, tokenize


class Words:
    """A tokenizer of words and marks, with a chat template."""

    def encode(self, text: str) -> list[str]:
        return re.findall(r"\w+|\W", text)

    def decode(self, tokens: Sequence[str]) -> str:
        return "".join(tokens)

    def begin_tokens(self, text: str) -> list[str]:
        return ["<s>", *self.encode(text)]

    def frame_user_message(self) -> tuple[str, str]:
        return "user: ", "\nassistant: "


def make(task: str, length: int = 2000, n: int = 1, seed: int = 0) -> list[Sample]:
    return list(ruler.make_samples(task, Words(), length, n, seed))


class TestRuler:
    @pytest.mark.parametrize("length", [1200, 6000])
    @pytest.mark.parametrize("task", ruler.tasks())
    def test_fills_the_length_and_no_more(self, task: str, length: int) -> None:
        for sample in make(task, length, 3):
            prompt = tokenize(Words(), sample)
            together = len(prompt.prefix) + max(map(len, prompt.suffixes)) + sample.n_answer
            assert 0.75 * length < together <= length
            assert 1 <= len(sample.questions) <= 4

    @pytest.mark.parametrize("task", ruler.tasks())
    def test_depends_on_seed_and_number_only(self, task: str) -> None:
        first, second = make(task, n=2)
        assert make(task)[0] == first and first.context != second.context
        assert make(task, seed=1)[0].context != first.context

    @pytest.mark.parametrize("task", [task for task in ruler.tasks() if task.startswith("niah")])
    def test_each_needle_is_there_once(self, task: str) -> None:
        (sample,) = make(task)
        needles = re.findall(r"One of the pass (?:numbers|codes) of (\S+) is ([\w-]+)\.", sample.context)
        assert len(set(needles)) == len(needles)
        for question in sample.questions:
            keys = re.search(r"of (.*) in the text", question.text).group(1).replace(" and ", ", ").split(", ")
            assert {value for key, value in needles if key in keys} == set(question.references)
            assert len(question.references) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
            if question.depth is not None:
                place = sample.context.index(question.references[0]) / len(sample.context)
                assert place == pytest.approx(question.depth, abs=0.15)

    def test_chain_of_variables(self) -> None:
        (sample,) = make("vt")
        (question,) = sample.questions
        value = re.search(r"the value (\d+)", question.text).group(1)
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.context):
            values[name] = values.get(source, source)
        assert [name for name, found in values.items() if found == value] == list(question.references)
        assert len(question.references) == 5

    def test_common_words(self) -> None:
        (sample,) = make("cwe", 6000)
        (question,) = sample.questions
        listed = Counter(re.findall(r"\d+\. (\w+)", sample.context.rpartition("Remember them.")[2]))
        assert {word for word, _ in listed.most_common(10)} == set(question.references)
        assert set(listed.values()) == {30, 3}

    def test_frequent_words(self) -> None:
        (sample,) = make("fwe")
        (question,) = sample.questions
        words = Counter(sample.context.partition("\n")[2].split()).most_common(5)
        assert words[0][0] == "...." and [word for word, _ in words[1:4]] == list(question.references)
        assert len({times for _, times in words}) == 5  # no ties that make the answer a matter of luck

    @pytest.mark.parametrize("task", ["qa_1", "qa_2"])
    def test_documents_answer_the_questions(self, task: str) -> None:
        for sample in make(task, n=5):
            born = dict(re.findall(r"(\w+ \w+) was born in (\w+)", sample.context))
            trade = dict(re.findall(r"(\w+ \w+) was born in .*trained as a (\w+)\.", sample.context))
            founder = dict(re.findall(r"The (\w+ of \w+) was founded by (\w+ \w+) in", sample.context))
            for question in sample.questions:
                house = re.search(r"the ((?!founder)\w+ of \w+)", question.text)
                person = (
                    founder[house.group(1)]
                    if house
                    else re.search(r"(?:town|trade) was (\w+ \w+)", question.text).group(1)
                )
                answer = person if "Who" in question.text else (born if "town" in question.text else trade)[person]
                assert question.references == (answer,)
                assert (house is not None and "Who" not in question.text) == (task == "qa_2")

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(0, 400))
    def test_fill_is_the_most_that_fits(self, sizes: list[int], room: int) -> None:
        texts = ["x " * size for size in sizes]

        class Spaces:
            def encode(self, text: str) -> list[str]:
                return text.split()

        if sizes[0] > room:
            with pytest.raises(LukvError, match="--lengths"):
                ruler.fill(room, Spaces(), lambda n: "".join(texts[:n]), len(texts))
            return
        n = ruler.fill(room, Spaces(), lambda n: "".join(texts[:n]), len(texts))
        assert sum(sizes[:n]) <= room and (n == len(sizes) or sum(sizes[: n + 1]) > room)

    def test_errors(self) -> None:
        with pytest.raises(LukvError, match="niah_single_1"):
            make("nothing")
        for task in ruler.tasks():
            with pytest.raises(LukvError, match="--lengths"):
                make(task, 100)

    def test_prose_is_not_the_calibration_text(self) -> None:
        from lukv_gguf import calibration

        text = calibration.load_default("prose")[0]
        paragraphs = novel("persuasion") + novel("northanger_abbey")
        assert len(paragraphs) > 2000 and not any(paragraph in text for paragraph in paragraphs if len(paragraph) > 80)


class TestScores:
    def test_ruler(self) -> None:
        assert scoring.match_all("They are 12 and ABC.", ("12", "abc", "7", "8")) == 0.5
        assert scoring.match_any("in Paris", ("London", "PARIS")) == 1.0
        assert scoring.match_any("nowhere", ("London",)) == 0.0

    def test_question_answering(self) -> None:
        assert scoring.qa_f1("The answer, Paris!", ("paris answer", "Rome")) == 1.0  # articles and marks do not count
        assert scoring.qa_f1("a red house", ("red car",)) == 0.5
        assert scoring.qa_f1("", ("x",)) == 0.0
        assert scoring.qa_f1_zh("北京，是首都。", ("北京是首都",)) == 1.0

    def test_rouge(self) -> None:
        assert scoring.rouge_l("the cat sat", ("the cat sat", "a dog")) == pytest.approx(1.0)
        # longest common subsequence "police the gunman": precision and recall 3/4
        assert scoring.rouge_l("police kill the gunman", ("police ended the gunman",)) == pytest.approx(0.75, abs=1e-6)
        assert scoring.rouge_l("", ("a summary",)) == 0.0
        assert scoring.rouge_l_zh("会议讨论了预算", ("会议讨论了预算",)) == pytest.approx(1.0)

    def test_classes(self) -> None:
        classes = ("Date", "City", "Other city", "Food")
        assert scoring.classification("City", ("City",), classes) == 1.0
        assert scoring.classification("Date or Food", ("Food",), classes) == 0.5
        assert scoring.classification("Other city", ("Other city",), classes) == 1.0  # "city" is part of the right name
        assert scoring.classification("Date", ("Food",), classes) == 0.0

    def test_numbers(self) -> None:
        assert scoring.retrieval("Paragraph 7, not 3", ("Paragraph 7",)) == 0.5
        assert scoring.retrieval("none", ("Paragraph 7",)) == 0.0
        assert scoring.retrieval_zh("段落12", ("段落12",)) == 1.0
        assert scoring.count("There are 5.", ("5",)) == 1.0
        assert scoring.count("5 or 6 or 7", ("6",)) == pytest.approx(1 / 3)

    def test_code(self) -> None:
        assert scoring.code_similarity("\n# a comment\n```\nreturn x\nmore", ("return x",)) == 1.0
        assert scoring.code_similarity("abcd", ("abxd",)) == 0.75
        assert scoring.code_similarity("", ("return x",)) == 0.0

    @given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3))
    def test_any_text_has_a_score(self, answer: str, references: list[str]) -> None:
        for name in ("match_all", "match_any", "qa_f1", "retrieval", "count", "code_similarity"):
            assert 0.0 <= scoring.SCORES[name](answer, references) <= 1.0
        assert 0.0 <= scoring.classification(answer, references, [*references, "x"]) <= 1.0

    def test_missing_package_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "rouge", None)
        with pytest.raises(LukvError, match="longbench"):
            scoring.rouge_l("a", ("a",))

    def test_more_text_cannot_change_a_complete_answer(self) -> None:
        sample = Sample("t", 1, 0, "", (Question("", ("12", "34")),), 8)
        assert not sample.is_complete("12", sample.questions[0]) and sample.is_complete("12, 34", sample.questions[0])
        line = Sample("t", 1, 0, "", (Question("", ("a b",)),), 8, "qa_f1", first_line=True)
        assert line.is_complete("\na b\nc", line.questions[0]) and not line.is_complete("\na b", line.questions[0])
        assert line.score_answer("\na b\nc", line.questions[0]) == 1.0


def record(**changes: object) -> dict[str, object]:
    return {"input": "Who?", "context": "Ann came. " * 20, "answers": ["Ann"], "all_classes": None, **changes}


class TestLongBench:
    @pytest.mark.parametrize("task", longbench.names())
    def test_every_format(self, tmp_path: Path, task: str) -> None:
        answers = {"retrieval": ["Paragraph 3"], "retrieval_zh": ["段落3"], "count": ["3"]}
        kind = longbench._TASKS[task]
        right = answers.get(kind.score, ["北京" if kind.score.endswith("zh") else "Food"])
        classes = ["Food", "City"] if kind.score == "classification" else None
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(record(answers=right, all_classes=classes)) + "\n")
        assert longbench.tasks(tmp_path) == [task]
        (sample,) = longbench.make_samples(task, Words(), tmp_path, 4000, 5)
        (question,) = sample.questions
        assert "Ann came." in sample.context and "Ann came." not in question.text
        assert sample.score_answer(right[0], question) == pytest.approx(1.0)
        assert sample.score_answer("9 完全不同 zzz", question) == pytest.approx(0.0, abs=0.4)
        assert ("user: " in "".join(tokenize(Words(), sample).prefix)) == sample.is_chat

    def test_own_prompts_and_folders(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "config").mkdir()
        (tmp_path / "data" / "hotpotqa.jsonl").write_text(json.dumps(record()) + "\n" + json.dumps(record()) + "\n")
        (tmp_path / "config" / "dataset2prompt.json").write_text(
            json.dumps({"hotpotqa": "Read {context} and say: {input}"})
        )
        samples = list(longbench.make_samples("hotpotqa", Words(), tmp_path, 4000, 5))
        assert len(samples) == 2 and samples[0].questions[0].text == " and say: Who?"
        assert samples[0].context.startswith("Read Ann")

    def test_long_context_loses_its_middle(self, tmp_path: Path) -> None:
        words = " ".join(f"w{i}" for i in range(3000))
        (tmp_path / "qasper.jsonl").write_text(json.dumps(record(context=words)) + "\n")
        (sample,) = longbench.make_samples("qasper", Words(), tmp_path, 1000, 1)
        prompt = tokenize(Words(), sample)
        assert len(prompt.prefix) + len(prompt.suffixes[0]) + sample.n_answer <= 1000
        assert "w0 " in sample.context and "w2999" in sample.context and "w1500 " not in sample.context

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            "[]",
            json.dumps({"input": "x"}),
            json.dumps(record(answers=[])),
            json.dumps(record(context=3)),
            json.dumps(record(answers="Ann")),
        ],
    )
    def test_bad_records(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "qasper.jsonl").write_text(line + "\n")
        with pytest.raises(LukvError, match=r"qasper\.jsonl, line 1"):
            list(longbench.make_samples("qasper", Words(), tmp_path, 1000, 1))

    def test_bad_folders(self, tmp_path: Path) -> None:
        with pytest.raises(LukvError, match="no LongBench file"):
            longbench.tasks(tmp_path)
        with pytest.raises(LukvError, match="unknown"):
            list(longbench.make_samples("x", Words(), tmp_path, 1000, 1))
        (tmp_path / "qasper.jsonl").write_bytes(b"\xff\xfe\n")
        with pytest.raises(LukvError, match="UTF-8"):
            list(longbench.make_samples("qasper", Words(), tmp_path, 1000, 1))
        (tmp_path / "dataset2prompt.json").write_text('{"qasper": "no place"}')
        with pytest.raises(LukvError, match="context"):
            list(longbench.make_samples("qasper", Words(), tmp_path, 1000, 1))


def test_novels_are_whole() -> None:
    for name in ("persuasion", "northanger_abbey"):
        assert sum(map(len, novel(name))) > 400_000 and all(np.char.str_len(novel(name)) > 0)
