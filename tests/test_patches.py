"""The patches fit the pinned source exactly, and where they do not fit another one, the hunk is named."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_llama_cpp  # noqa: E402
import upgrade_llama_cpp as upgrade  # noqa: E402

PATCHES = [upgrade.Patch.read(path) for path in sorted((ROOT / "patches").glob("*.patch"))]
GRAPH = "vendor/llama.cpp/src/llama-graph.cpp"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those files of the pinned source that are patched."""
    tree = tmp_path_factory.mktemp("source")
    sdist = build_llama_cpp.fetch_sdist(build_llama_cpp.cache_dir() / "downloads")
    upgrade.extract(sdist, [path for patch in PATCHES for path in patch.paths], tree)
    return tree


@pytest.fixture
def trees(source: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of it."""
    return tuple(Path(shutil.copytree(source, tmp_path / name)) for name in ("old", "new"))


def test_they_fit_without_fuzz_or_offset(source: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / "tree")
    for patch in PATCHES:
        assert patch.reason.strip(), f"{patch.name} gives no reason"
        done = upgrade.git_apply(patch.diff, tree)
        assert done.returncode == 0 and "offset" not in done.stderr, done.stderr


def test_a_parsed_patch_is_the_file() -> None:
    for patch in PATCHES:
        assert patch.reason + patch.diff == (ROOT / "patches" / patch.name).read_text()


def test_the_hunk_that_no_longer_fits_is_named(trees: tuple[Path, Path]) -> None:
    old, new = trees
    patch = next(patch for patch in PATCHES if GRAPH in patch.paths)
    replacing = next(hunk for hunk in patch.hunks if "\n-" in hunk.text)  # a hunk that takes a line away
    removed = next(line[1:] for line in replacing.text.splitlines() if line.startswith("-"))
    (new / replacing.path).write_text((new / replacing.path).read_text().replace(removed, removed + " // changed"))
    before = {path: path.read_bytes() for path in new.rglob("*") if path.is_file()}

    moved, misfits = upgrade.move_all(PATCHES, old, new)
    assert misfits == [replacing]
    of_file = [hunk for hunk in patch.hunks if hunk.path == replacing.path]
    where = f"hunk {of_file.index(replacing) + 1} of {len(of_file)}"
    assert str(replacing).startswith(f"{patch.name}: {replacing.path}: {where}: @@ -")
    assert moved.keys() == {other.name for other in PATCHES} - {patch.name}
    assert any(path.read_bytes() != content for path, content in before.items())


def test_a_file_that_is_gone_is_named(trees: tuple[Path, Path]) -> None:
    old, new = trees
    (new / GRAPH).unlink()
    _, misfits = upgrade.move_all(PATCHES, old, new)
    assert misfits == [hunk for patch in PATCHES for hunk in patch.hunks if hunk.path == GRAPH]


def test_patches_move_with_code_that_changed_around_them(source: Path, trees: tuple[Path, Path], tmp_path: Path) -> None:
    """Lines above, and a changed line of a hunk's context: exact application fails, the merge does not."""
    old, new = trees
    text = (new / GRAPH).read_text()
    context = "= static_cast<const llama_kv_cache_context *>(mctx);\n\n    auto inp = build_attn_inp_kv_impl"
    assert text.count(context) == 1
    changed = "// a new line\n" * 7 + text.replace(context, context.replace("inp = ", "the_input = "))
    (new / GRAPH).write_text(changed)
    graph = next(patch for patch in PATCHES if GRAPH in patch.paths)
    assert not upgrade.apply(graph.diff, new)

    moved, misfits = upgrade.move_all(PATCHES, old, new)
    assert not misfits and moved.keys() == {patch.name for patch in PATCHES}
    again = shutil.copytree(source, tmp_path / "again")
    (again / GRAPH).write_text(changed)
    for name, text in moved.items():
        (tmp_path / name).write_text(text)
        assert upgrade.apply(upgrade.Patch.read(tmp_path / name).diff, again), name
    assert (again / GRAPH).read_bytes() == (new / GRAPH).read_bytes() != changed.encode()
