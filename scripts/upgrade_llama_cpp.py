"""Move the patches to another version of llama-cpp-python, and say which hunks no longer fit.

    python scripts/upgrade_llama_cpp.py 0.3.37                    # only try
    python scripts/upgrade_llama_cpp.py 0.3.37 --output patches   # and write the moved patches

Each patch is applied as it is where that works, else merged hunk by hunk: three ways, between the version that
build_llama_cpp.py pins, the same with the patch, and the new version. Only patches of which every hunk fits are written.
Afterwards: pin the version and the hash that are printed, then build and test, because code that merges may still have
changed its meaning (native/ is built on internals of llama.cpp).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from build_llama_cpp import ROOT, SDIST, cache_dir, fail, fetch_sdist, git_apply, sha256

_FILE = re.compile(r"^(?=diff --git )", re.M)
_HUNK = re.compile(r"^(?=@@ )", re.M)


@dataclass(frozen=True)
class Hunk:
    """One hunk of a patch: the n-th of its file."""

    patch: str
    path: str
    number: int
    count: int
    head: str
    text: str

    @property
    def diff(self) -> str:
        """A patch that holds this hunk alone."""
        return self.head + self.text

    def __str__(self) -> str:
        return f"{self.patch}: {self.path}: hunk {self.number} of {self.count}: {self.text.splitlines()[0]}"


@dataclass(frozen=True)
class Patch:
    """A patch file: the reason it gives, and its hunks."""

    name: str
    reason: str
    hunks: tuple[Hunk, ...]

    @classmethod
    def read(cls, path: Path) -> Patch:
        """Parse a file of patches/."""
        reason, *files = _FILE.split(path.read_text())
        hunks = []
        for text in files:
            head, *parts = _HUNK.split(text)
            target = re.search(r"^\+\+\+ b/(.+)$", head, re.M)
            if target is None:
                fail(f"{path.name}: a file without a name: {head.splitlines()[0]}")
            hunks += [Hunk(path.name, target[1], i, len(parts), head, part) for i, part in enumerate(parts, 1)]
        return cls(path.name, reason, tuple(hunks))

    @property
    def paths(self) -> list[str]:
        """The files that it changes."""
        return list(dict.fromkeys(hunk.path for hunk in self.hunks))

    @property
    def diff(self) -> str:
        """All hunks, file by file."""
        of_file = {path: [hunk for hunk in self.hunks if hunk.path == path] for path in self.paths}
        return "".join(hunks[0].head + "".join(hunk.text for hunk in hunks) for hunks in of_file.values())


def apply(diff: str, tree: Path) -> bool:
    """Apply a patch without fuzz to a tree, and return whether it fits. Nothing changes if any of it does not."""
    return git_apply(diff, tree).returncode == 0


def merge(hunk: Hunk, old: Path, new: Path) -> bool:
    """Bring a hunk for `old` into `new` by a three-way merge. Nothing changes if it does not fit."""
    target = new / hunk.path
    if not target.exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        patched = Path(folder) / hunk.path
        patched.parent.mkdir(parents=True)
        patched.write_bytes((old / hunk.path).read_bytes())
        if not apply(hunk.diff, Path(folder)):
            fail(f"{hunk} does not fit the version it was made for")
        command = ["git", "merge-file", "--stdout", target, old / hunk.path, patched]
        merged = subprocess.run(command, capture_output=True)
    if merged.returncode == 0:
        target.write_bytes(merged.stdout)
    return merged.returncode == 0


def move(patch: Patch, old: Path, new: Path) -> list[Hunk]:
    """Apply a patch to both trees, and return the hunks that do not fit the new one."""
    misfits = [] if apply(patch.diff, new) else [hunk for hunk in patch.hunks if not merge(hunk, old, new)]
    if not apply(patch.diff, old):
        fail(f"{patch.name} does not fit the version it was made for")
    return misfits


def extract(sdist: Path, paths: list[str], tree: Path) -> None:
    """Unpack some files of a source archive, as far as it has them."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.name in paths:
                archive.extract(member, tree, filter="data")


def difference(path: str, before: bytes, after: Path) -> str:
    """What changed in a file, as a patch."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("a", before), ("b", after.read_bytes())):
            target = Path(folder) / name / path
            target.parent.mkdir(parents=True)
            target.write_bytes(content)
        command = ["git", "diff", "--no-index", "--no-prefix", f"a/{path}", f"b/{path}"]
        return subprocess.run(command, cwd=folder, text=True, capture_output=True).stdout


def move_all(patches: list[Patch], old: Path, new: Path) -> tuple[dict[str, str], list[Hunk]]:
    """Move patches that build on each other from one tree to another, which both end up patched.

    Returns
    -------
    moved : dict
        The text of each patch of which every hunk fits, by its name.
    misfits : list of Hunk
        Those that do not.
    """
    moved, misfits = {}, []
    for patch in patches:
        before = {path: (new / path).read_bytes() for path in patch.paths if (new / path).exists()}
        found = move(patch, old, new)
        misfits += found
        if not found:
            moved[patch.name] = patch.reason + "".join(difference(path, before[path], new / path) for path in patch.paths)
    return moved, misfits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of llama-cpp-python on PyPI")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the moved patches there")
    arguments = parser.parse_args()

    downloads = cache_dir() / "downloads"
    patches = [Patch.read(path) for path in sorted((ROOT / "patches").glob("*.patch"))]
    paths = [path for patch in patches for path in patch.paths]
    pinned = fetch_sdist(downloads)
    sdist = fetch_sdist(downloads, f"{SDIST.partition('==')[0]}=={arguments.version}", expected=None)
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "old", Path(folder) / "new"
        for archive, tree in ((pinned, old), (sdist, new)):
            tree.mkdir()
            extract(archive, paths, tree)
        moved, misfits = move_all(patches, old, new)
    for patch in patches:
        print(f"{patch.name}: {'fits' if patch.name in moved else 'does NOT fit'}")
    for hunk in misfits:
        print(f"\n{hunk}\n{hunk.text.partition(chr(10))[2]}", end="")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name, text in moved.items():
            (arguments.output / name).write_text(text)
    print(f'\nSDIST = "llama-cpp-python=={arguments.version}"\nSDIST_SHA256 = "{sha256(sdist)}"')
    sys.exit(bool(misfits))


if __name__ == "__main__":
    main()
