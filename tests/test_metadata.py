"""The lukv.* keys in a file: what goes in comes out, and nothing else changes."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import write_tiny

from lukv_gguf import gguf_header, metadata
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import encode_pair, read_header, rewrite
from lukv_gguf.metadata import LukvMetadata, embed, read_metadata, strip

N_LAYER, N_HEAD_KV = 3, 2
TYPE = gguf.GGUFValueType


def make_metadata(n_layer: int = N_LAYER, n_head_kv: int = N_HEAD_KV, **changes: Any) -> LukvMetadata:
    ratios = np.array([0.25, 0.5, 0.75])
    pattern = np.linspace(-0.2, 0.2, n_layer * n_head_kv).reshape(n_layer, n_head_kv)
    fields: dict[str, Any] = {
        "ratio": 0.3,
        "metric": "keydiff",
        "metric_params": {"window": 32, "epsilon": 0.02},
        "sink": 4,
        "recent": 16,
        "policy": "capacity",
        "budget": 0.3 + pattern,
        "profile_ratios": ratios,
        "profile_budget": ratios[:, None, None] + pattern,
        "provenance": {"tool": "lukv-gguf test", "source": "naïve 文"},
    }
    return LukvMetadata(**{**fields, **changes})


def assert_same(left: LukvMetadata, right: LukvMetadata) -> None:
    for field in dataclasses.fields(LukvMetadata):
        np.testing.assert_equal(getattr(left, field.name), getattr(right, field.name), err_msg=field.name)


def raw_pairs(path: Path) -> list[tuple[str, bytes]]:
    header = read_header(path)
    return [(key, header.raw[pair.start : pair.end]) for key, pair in header.pairs.items()]


def write_with_keys(model: Path, target: Path, pairs: dict[str, tuple[TYPE, Any] | None]) -> None:
    """Copy a model with some lukv.* keys replaced, or removed where the value is None."""
    add = [encode_pair(key, *value) for key, value in pairs.items() if value is not None]
    rewrite(read_header(model), target, lambda key: key in pairs, add)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("metadata") / "tiny.gguf"
    extra = {"test.flag": True, "test.half": 0.5, "test.list": [1, 2, 3], "test.nested": [["a", "b"], ["c"]]}
    write_tiny(path, n_layer=N_LAYER, n_head_kv=N_HEAD_KV, n_ff=32, extra=extra)
    return path


@pytest.fixture
def embedded(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny-lukv.gguf"
    embed(tiny_model, path, make_metadata())
    return path


def test_round_trip(embedded: Path) -> None:
    assert_same(read_metadata(embedded), make_metadata())


def test_file_without_keys(tiny_model: Path) -> None:
    assert read_metadata(tiny_model) is None


def test_other_readers_see_the_declared_types(embedded: Path) -> None:
    fields = gguf.GGUFReader(embedded).fields
    assert fields["lukv.enabled"].types == [TYPE.BOOL] and fields["lukv.enabled"].contents() is True
    assert fields["lukv.version"].types == [TYPE.UINT32] and fields["lukv.version"].contents() == 1
    assert fields["lukv.ratio"].types == [TYPE.FLOAT32]
    assert fields["lukv.policy"].contents() == "capacity"
    assert fields["lukv.layers"].contents() == N_LAYER and fields["lukv.heads_kv"].contents() == N_HEAD_KV
    assert fields["lukv.metric.window"].types == [TYPE.UINT32]
    assert fields["lukv.metric.epsilon"].types == [TYPE.FLOAT32]
    assert fields["lukv.budget"].types == [TYPE.ARRAY, TYPE.FLOAT32]
    np.testing.assert_array_equal(fields["lukv.budget"].contents(), make_metadata().budget.ravel())
    assert len(fields["lukv.profile.budget"].contents()) == 3 * N_LAYER * N_HEAD_KV


def test_tensors_and_other_keys_stay_byte_identical(tiny_model: Path, embedded: Path) -> None:
    kept = [pair for pair in raw_pairs(embedded) if not pair[0].startswith("lukv.")]
    assert kept == raw_pairs(tiny_model)
    before, after = gguf.GGUFReader(tiny_model).tensors, gguf.GGUFReader(embedded).tensors
    assert [(t.name, t.tensor_type, t.shape.tolist()) for t in before] == [
        (t.name, t.tensor_type, t.shape.tolist()) for t in after
    ]
    for old, new in zip(before, after):
        assert old.data.tobytes() == new.data.tobytes()


def test_strip_is_the_reverse(tiny_model: Path, embedded: Path, tmp_path: Path) -> None:
    strip(embedded, tmp_path / "stripped.gguf")
    assert (tmp_path / "stripped.gguf").read_bytes() == tiny_model.read_bytes()


def test_strip_removes_damaged_keys(tiny_model: Path, embedded: Path) -> None:
    write_with_keys(embedded, embedded, {"lukv.version": (TYPE.UINT32, 9)})
    strip(embedded, embedded)
    assert embedded.read_bytes() == tiny_model.read_bytes()


def test_strip_without_keys(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(LukvError, match="nothing to strip"):
        strip(tiny_model, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_embedding_again_replaces_the_keys(embedded: Path) -> None:
    first = embedded.read_bytes()
    embed(embedded, embedded, make_metadata(policy="prefill", provenance={}, enabled=False))
    assert_same(read_metadata(embedded), make_metadata(policy="prefill", provenance={}, enabled=False))
    embed(embedded, embedded, make_metadata())
    assert embedded.read_bytes() == first


def test_in_place_can_be_refused(tiny_model: Path) -> None:
    with pytest.raises(LukvError, match="the output is the input"):
        embed(tiny_model, tiny_model, make_metadata(), in_place_ok=False)


def test_in_place_through_a_link_leaves_the_linked_file(tiny_model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(tiny_model)
    embed(link, link, make_metadata())
    assert not link.is_symlink() and read_metadata(link) is not None
    assert read_metadata(tiny_model) is None


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_of_the_model_is_kept(tmp_path: Path, alignment: int) -> None:
    model, target = tmp_path / "m.gguf", tmp_path / "m-lukv.gguf"
    writer = gguf.GGUFWriter(model, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_block_count(N_LAYER)
    writer.add_head_count_kv(N_HEAD_KV)
    quantised = np.arange(3 * 34, dtype=np.uint8).reshape(3, 34)
    writer.add_tensor("odd", np.arange(5, dtype=np.float16))
    writer.add_tensor("quantised", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    embed(model, target, make_metadata())
    reader = gguf.GGUFReader(target)
    assert reader.data_offset % alignment == 0
    assert reader.tensors[1].data.tobytes() == quantised.tobytes()
    strip(target, target)
    assert target.read_bytes() == model.read_bytes()


names = st.from_regex(r"[a-z0-9_-]{1,12}(\.[a-z0-9_-]{1,8})?", fullmatch=True)
numbers = st.integers(0, 2**32 - 1) | st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def records(draw: st.DrawFn) -> LukvMetadata:
    n_ratios = draw(st.integers(1, 5))
    grid = draw(st.lists(st.integers(1, 100), min_size=n_ratios, max_size=n_ratios, unique=True))
    ratios = np.sort(grid) / 100.0
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    noise = rng.uniform(-1.0, 1.0, (n_ratios, N_LAYER, N_HEAD_KV))
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    room = np.minimum(ratios, 1.0 - ratios) / np.abs(noise).max(axis=(1, 2))
    budgets = np.clip(ratios[:, None, None] + noise * room[:, None, None], 0.0, 1.0)
    return LukvMetadata(
        ratio=float(ratios[-1]),
        metric=draw(names),
        metric_params=draw(st.dictionaries(names, numbers, max_size=4)),
        sink=draw(st.integers(0, 2**32 - 1)),
        recent=draw(st.integers(0, 2**32 - 1)),
        policy=draw(st.sampled_from(metadata.POLICIES)),
        budget=budgets[-1],
        profile_ratios=ratios,
        profile_budget=budgets,
        provenance=draw(st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"])), max_size=4)),
        enabled=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=records())
def test_any_record_survives(tiny_model: Path, tmp_path: Path, record: LukvMetadata) -> None:
    path = tmp_path / "any.gguf"
    embed(tiny_model, path, record)
    assert_same(read_metadata(path), record)
    strip(path, path)
    assert path.read_bytes() == tiny_model.read_bytes()


BUDGET = make_metadata().budget.ravel().copy()
PROFILE = make_metadata().profile_budget.ravel().copy()


def changed(values: np.ndarray, index: int, value: float) -> np.ndarray:
    values = values.copy()
    values[index] = value
    return values


DAMAGES = {
    "another version": ("lukv.version", (TYPE.UINT32, 2), "is 2"),
    "a wrong type": ("lukv.version", (TYPE.INT32, 1), "must be of type UINT32"),
    "ratio zero": ("lukv.ratio", (TYPE.FLOAT32, 0.0), r"\(0, 1\]"),
    "ratio too large": ("lukv.ratio", (TYPE.FLOAT32, 1.5), r"\(0, 1\]"),
    "ratio not a number": ("lukv.ratio", (TYPE.FLOAT32, np.nan), r"\(0, 1\]"),
    "ratio as text": ("lukv.ratio", (TYPE.STRING, "0.3"), "FLOAT32"),
    "no metric name": ("lukv.metric", (TYPE.STRING, ""), "not a name"),
    "a parameter as text": ("lukv.metric.window", (TYPE.STRING, "32"), "FLOAT32 or UINT32"),
    "a parameter not finite": ("lukv.metric.epsilon", (TYPE.FLOAT32, np.inf), "must be a number"),
    "sink of another type": ("lukv.sink", (TYPE.FLOAT32, 4.0), "UINT32"),
    "unknown policy": ("lukv.policy", (TYPE.STRING, "sometimes"), "capacity or prefill"),
    "layers of another model": ("lukv.layers", (TYPE.UINT32, 30), "the model has 3"),
    "heads of another model": ("lukv.heads_kv", (TYPE.UINT32, 8), "the model has 2"),
    "budget too short": ("lukv.budget", (TYPE.ARRAY, BUDGET[:-1]), "has 5 values, expected 6"),
    "budget too long": ("lukv.budget", (TYPE.ARRAY, np.append(BUDGET, 0.3)), "has 7 values"),
    "budget empty": ("lukv.budget", (TYPE.ARRAY, []), "has 0 values"),
    "budget not an array": ("lukv.budget", (TYPE.FLOAT32, 0.3), "ARRAY"),
    "budget not a number": ("lukv.budget", (TYPE.ARRAY, changed(BUDGET, 3, np.nan)), "nan for layer 1, head 1"),
    "budget negative": ("lukv.budget", (TYPE.ARRAY, changed(BUDGET, 0, -0.1)), "layer 0, head 0"),
    "budget above one": ("lukv.budget", (TYPE.ARRAY, changed(BUDGET, 5, 1.1)), "layer 2, head 1"),
    "budget far from ratio": ("lukv.budget", (TYPE.ARRAY, BUDGET + 0.05), "far from its ratio"),
    "no profile": ("lukv.profile.ratios", (TYPE.ARRAY, []), "is empty"),
    "ratios descending": ("lukv.profile.ratios", (TYPE.ARRAY, [0.75, 0.5, 0.25]), "ascending"),
    "ratios not a number": ("lukv.profile.ratios", (TYPE.ARRAY, [0.25, np.nan, 0.75]), "ascending"),
    "profile too short": ("lukv.profile.budget", (TYPE.ARRAY, PROFILE[:-1]), "has 17 values, expected 18"),
    "profile not a number": ("lukv.profile.budget", (TYPE.ARRAY, changed(PROFILE, 7, np.nan)), "nan"),
    "profile far from ratio": ("lukv.profile.budget", (TYPE.ARRAY, changed(PROFILE, 17, 0.1)), "far from its ratio"),
    "provenance not text": ("lukv.provenance.tool", (TYPE.UINT32, 1), "STRING"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_key_is_named(embedded: Path, damage: str) -> None:
    key, value, complaint = DAMAGES[damage]
    write_with_keys(embedded, embedded, {key: value})
    with pytest.raises(LukvError, match=complaint) as caught:
        read_metadata(embedded)
    message = str(caught.value)
    assert str(embedded) in message and "lukv-gguf strip" in message and "\n" not in message
    assert key in message


@pytest.mark.parametrize("key", sorted(metadata.TYPES))
def test_missing_key_is_named(embedded: Path, key: str) -> None:
    write_with_keys(embedded, embedded, {key: None})
    with pytest.raises(LukvError, match=f"{key} is missing"):
        read_metadata(embedded)


def test_array_of_another_type(embedded: Path) -> None:
    name = b"lukv.budget"
    pair = struct.pack(f"<Q{len(name)}sIIQ6d", len(name), name, TYPE.ARRAY, TYPE.FLOAT64, 6, *BUDGET)
    rewrite(read_header(embedded), embedded, lambda key: key == "lukv.budget", [pair])
    with pytest.raises(LukvError, match="lukv.budget must hold FLOAT32"):
        read_metadata(embedded)


def test_budget_for_another_model(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(LukvError, match="lukv.budget is for 4 layers x 2 KV heads, the model has 3 layers x 2"):
        embed(tiny_model, tmp_path / "out.gguf", make_metadata(n_layer=4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"ratio": 0.0}, "lukv.ratio"),
        ({"sink": -1}, "lukv.sink"),
        ({"recent": 1.5}, "lukv.recent"),
        ({"policy": ""}, "lukv.policy"),
        ({"metric": "key diff"}, "lukv.metric"),
        ({"metric_params": {"window": -1}}, "lukv.metric.window"),
        ({"metric_params": {"window": True}}, "lukv.metric.window"),
        ({"budget": np.full(6, 0.3)}, "lukv.budget"),
        ({"profile_budget": np.full((2, N_LAYER, N_HEAD_KV), 0.3)}, "lukv.profile.budget"),
        ({"provenance": {"Source File": "x"}}, "lukv.provenance.Source File"),
        ({"version": 2}, "lukv.version"),
        ({"enabled": 1}, "lukv.enabled"),
    ],
)
def test_a_record_is_always_valid(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(LukvError, match=key):
        make_metadata(**changes)


def test_a_key_twice(embedded: Path) -> None:
    rewrite(read_header(embedded), embedded, lambda key: False, [encode_pair("lukv.ratio", TYPE.FLOAT32, 0.3)])
    with pytest.raises(LukvError, match="lukv.ratio appears twice"):
        read_metadata(embedded)


def test_every_truncation_is_found(embedded: Path, tmp_path: Path) -> None:
    whole = embedded.read_bytes()
    data_start = read_header(embedded).data_start
    cuts = {*range(0, 64), *np.linspace(64, data_start, 300, dtype=int).tolist(), data_start + 1, len(whole) - 64}
    cut_file = tmp_path / "cut.gguf"
    for cut in sorted(cuts):
        cut_file.write_bytes(whole[:cut])
        with pytest.raises(LukvError, match="truncated" if cut >= 4 else "not a GGUF"):
            read_metadata(cut_file)
        with pytest.raises(LukvError):
            embed(cut_file, tmp_path / "out.gguf", make_metadata())
    assert not (tmp_path / "out.gguf").exists()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_header_bytes_never_crash(embedded: Path, data: st.DataObject) -> None:
    whole = bytearray(embedded.read_bytes())
    header_size = read_header(embedded).infos_end
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, header_size - 1))] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(whole)
        file.flush()
        try:
            read_metadata(file.name)
        except LukvError:
            pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF"),
        (b"GGU", "not a GGUF"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF"),
        (struct.pack("<4sIII", b"GGUF", 1, 0, 0), "version 1 is not supported"),
        (struct.pack("<4sIQQ", b"GGUF", 4, 0, 0), "version 4 is not supported"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), "truncated"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**64 - 1), "truncated"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 99), "damaged"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**62) + b"\xff" * 64, "truncated"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(LukvError, match=message):
        read_metadata(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(LukvError, match="no such file"):
        read_metadata(tmp_path / "none.gguf")
    with pytest.raises(LukvError, match="not a file"):
        read_metadata(tmp_path)


def test_gguf_that_is_no_language_model(tmp_path: Path) -> None:
    path = tmp_path / "clip.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + encode_pair("general.architecture", TYPE.STRING, "clip"))
    with pytest.raises(LukvError, match="clip.block_count is missing"):
        embed(path, path, make_metadata())


class TestFailedWrites:
    """Whatever goes wrong while writing: one clear error, the old target intact, nothing beside it."""

    @pytest.fixture
    def target(self, tmp_path: Path) -> Path:
        folder = tmp_path / "out"
        folder.mkdir()
        (folder / "model.gguf").write_bytes(b"old")
        return folder / "model.gguf"

    def check(
        self, tiny_model: Path, target: Path, message: str, expected: type[BaseException] = LukvError, **kwargs: Any
    ) -> None:
        with pytest.raises(expected, match=message) as caught:
            embed(tiny_model, target, make_metadata(), **kwargs)
        assert "\n" not in str(caught.value)
        assert target.read_bytes() == b"old"
        assert list(target.parent.iterdir()) == [target]

    def test_too_little_space(self, tiny_model: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        self.check(tiny_model, target, "disk is full: 1 MiB needed, 0 MiB free")

    @pytest.mark.parametrize(
        ("number", "message"),
        [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk quota"), (errno.EIO, "it broke")],
    )
    def test_write_fails(
        self, tiny_model: Path, target: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
    ) -> None:
        def fail(descriptor: int) -> None:
            raise OSError(number, "it broke")

        monkeypatch.setattr(gguf_header.os, "fsync", fail)
        self.check(tiny_model, target, f"cannot write .*{message}")

    @pytest.mark.parametrize(
        ("number", "message"), [(errno.EROFS, "file system is read-only"), (errno.EACCES, "no permission")]
    )
    def test_read_only_folder(
        self, tiny_model: Path, target: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(number, "refused")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
        self.check(tiny_model, target, f"cannot write .*{message}")

    def test_rename_fails(self, tiny_model: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> None:
            raise OSError(errno.EBUSY, "Device or resource busy")

        monkeypatch.setattr(gguf_header.os, "replace", refuse)
        self.check(tiny_model, target, "cannot write .*busy")

    def test_interrupted(self, tiny_model: Path, target: Path) -> None:
        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        self.check(tiny_model, target, "^$", KeyboardInterrupt, progress=interrupt)

    def test_input_shrinks_meanwhile(self, tiny_model: Path, target: Path, tmp_path: Path) -> None:
        model = tmp_path / "shrinking.gguf"
        shutil.copy(tiny_model, model)
        header = read_header(model)
        with model.open("r+b") as file:
            file.truncate(header.data_start + 10)
        with pytest.raises(LukvError, match="became shorter"):
            rewrite(header, target, lambda key: False, [])
        assert target.read_bytes() == b"old" and list(target.parent.iterdir()) == [target]

    def test_no_such_folder(self, tiny_model: Path, tmp_path: Path) -> None:
        with pytest.raises(LukvError, match="no such folder"):
            embed(tiny_model, tmp_path / "none" / "out.gguf", make_metadata())

    def test_target_is_a_folder(self, tiny_model: Path, tmp_path: Path) -> None:
        with pytest.raises(LukvError, match="is a folder"):
            embed(tiny_model, tmp_path, make_metadata())


class TestSplitModels:
    """The keys go into the first shard; the others are found by its name."""

    @pytest.fixture
    def shards(self, tiny_model: Path, tmp_path: Path) -> list[Path]:
        paths = [tmp_path / f"m-{i + 1:05d}-of-00002.gguf" for i in range(2)]
        for i, path in enumerate(paths):
            split = [encode_pair("split.count", TYPE.UINT16, 2), encode_pair("split.no", TYPE.UINT16, i)]
            rewrite(read_header(tiny_model), tmp_path / "any.gguf", lambda key: False, split)
            (tmp_path / "any.gguf").rename(path)
        return paths

    def test_other_shards_are_linked(self, shards: list[Path], tmp_path: Path) -> None:
        target = gguf_header.name_beside(shards[0], "-lukv")
        assert target.name == "m-lukv-00001-of-00002.gguf"
        for _ in range(2):  # the second time the links are there
            embed(shards[0], target, make_metadata())
        assert read_metadata(target) is not None and read_metadata(shards[0]) is None
        assert (tmp_path / "m-lukv-00002-of-00002.gguf").samefile(shards[1])

    def test_in_place(self, shards: list[Path], tmp_path: Path) -> None:
        embed(shards[0], shards[0], make_metadata())
        assert sorted(tmp_path.iterdir()) == shards

    def test_another_shard(self, shards: list[Path], tmp_path: Path) -> None:
        with pytest.raises(LukvError, match="name the first one, …-00001-of-00002.gguf"):
            embed(shards[1], tmp_path / "out.gguf", make_metadata())

    def test_a_name_that_hides_the_shards(self, shards: list[Path], tmp_path: Path) -> None:
        with pytest.raises(LukvError, match="must be named …-00001-of-00002.gguf"):
            embed(shards[0], tmp_path / "out.gguf", make_metadata())

    def test_missing_shard(self, shards: list[Path]) -> None:
        shards[1].unlink()
        with pytest.raises(LukvError, match="00002-of-00002.gguf: this shard of the model is missing"):
            embed(shards[0], shards[0], make_metadata())

    def test_foreign_shard_in_the_way(self, shards: list[Path], tmp_path: Path) -> None:
        (tmp_path / "x-00002-of-00002.gguf").write_bytes(b"other")
        with pytest.raises(LukvError, match="exists and is not a shard"):
            embed(shards[0], tmp_path / "x-00001-of-00002.gguf", make_metadata())
        assert not (tmp_path / "x-00001-of-00002.gguf").exists()

    def test_links_are_taken_back(self, shards: list[Path], tmp_path: Path) -> None:
        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            embed(shards[0], tmp_path / "x-00001-of-00002.gguf", make_metadata(), interrupt)
        assert sorted(tmp_path.iterdir()) == shards

    def test_links_are_not_possible(
        self, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(gguf_header.os, "link", refuse)
        with pytest.raises(LukvError, match="cannot link .*write beside the input"):
            embed(shards[0], tmp_path / "x-00001-of-00002.gguf", make_metadata())
        assert sorted(tmp_path.iterdir()) == shards


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m.gguf", "m-lukv.gguf"),
        ("m-lukv.gguf", "m-lukv.gguf"),
        ("m.Q4_1.gguf", "m.Q4_1-lukv.gguf"),
        ("m", "m-lukv"),
        ("m-00001-of-00003.gguf", "m-lukv-00001-of-00003.gguf"),
    ],
)
def test_name_beside(name: str, expected: str) -> None:
    assert gguf_header.name_beside(Path("a") / name, "-lukv") == Path("a") / expected


def test_to_dict_has_short_decimals() -> None:
    record = make_metadata().to_dict()
    assert record["ratio"] == 0.3
    assert record["metric_params"] == {"window": 32, "epsilon": 0.02}
    assert record["budget"][0][0] == 0.1
    assert np.shape(record["profile_budget"]) == (3, N_LAYER, N_HEAD_KV)
