"""Text that every machine has: documentation inside the installed libraries.

Passages are the topics of `pydoc_data.topics` and the docstrings of the standard library and of the project's
dependencies. Sources are parsed with `ast`, never imported, and no text is ever stored in the package: a manifest of
hashes says which passages a figure was measured on. A passage's own hash decides whether it belongs to the held-out
split, so the split does not depend on library versions.
"""

import ast
import hashlib
import inspect
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

MIN_CHARACTERS = 80
MAX_CHARACTERS = 3000
HELD_OUT_ONE_IN = 50
STDLIB = "stdlib"
TOPICS = "pydoc_data/topics.py"
DOC_CALLS = ("add_docstr", "_add_docstr", "add_newdoc", "add_docstr_all", "add_newdoc_for_scalar_type", "merge_dicts")
SKIPPED_FOLDERS = {
    "test", "tests", "testing", "_vendor", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo",
    "__pycache__",
}  # fmt: skip
REPEATED_PACKAGE_CAP = {"transformers": 3_000_000, "sympy": 4_000_000}
HELD_OUT_PACKAGES = (STDLIB, "torch", "numpy", "networkx", "onnx", "onnxscript", "onnx_ir", "rich", "sympy", "mpmath")
CORPUS_PACKAGES = (
    STDLIB, "torch", "numpy", "networkx", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "rich", "safetensors",
    "tokenizers", "typer", "sympy", "mpmath", "jinja2", "fsspec", "filelock", "google", "ml_dtypes", "setuptools",
    "packaging", "click", "pygments", "markdown_it", "huggingface_hub", "transformers",
)  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """One piece of text and the file it comes from, such as `torch/nn/modules/linear.py`."""

    source: str
    text: str

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the text with white space collapsed."""
        return hashlib.sha256(" ".join(self.text.split()).encode()).hexdigest()[:16]

    @property
    def package(self) -> str:
        """The entry of `CORPUS_PACKAGES` it belongs to."""
        first = self.source.split("/")[0]
        return first if first in CORPUS_PACKAGES else STDLIB

    @property
    def held_out(self) -> bool:
        """True for about one passage in `HELD_OUT_ONE_IN`, decided by the passage's own hash."""
        return int(self.digest[:8], 16) % HELD_OUT_ONE_IN == 0


def clean(text: str) -> str:
    """Dedent, drop trailing blanks, keep at most one empty line in a row."""
    text = inspect.cleandoc(text).replace("\r", "")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_long(text: str, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Cut a text at empty lines into parts of at most `limit` characters (a single longer paragraph is truncated)."""
    part = ""
    for paragraph in text.split("\n\n"):
        if part and len(part) + len(paragraph) + 2 > limit:
            yield part
            part = ""
        part = f"{part}\n\n{paragraph}" if part else paragraph[:limit]
    if part:
        yield part


def statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All statements below `body`, without descending into expressions (most of a tree, and free of docstrings)."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from statements(getattr(node, name, ()))


def raw_texts(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, and texts passed to calls such as `add_docstr(...)`."""
    for node in statements([tree]):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node, clean=False)
            if documented:
                yield documented
        for call in (getattr(node, "value", None), *getattr(node, "decorator_list", ())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", None)) in DOC_CALLS:
                for inner in ast.walk(call):
                    if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                        yield inner.value


def parse_passages(source: str, code: str) -> list[Passage]:
    """The passages of one source file, in order; none when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return []
    texts: Iterable[str]
    if source == TOPICS:
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    else:
        texts = raw_texts(tree)
    found = []
    for text in texts:
        for part in split_long(clean(text)):
            if len(part) >= MIN_CHARACTERS and sum(map(str.isascii, part)) > 0.97 * len(part):
                found.append(Passage(source, part))
    return found


def package_root(package: str) -> Path | None:
    """The folder to which source paths of `package` are relative; None if it is not installed. Imports nothing."""
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).parent


def package_sources(package: str) -> list[str]:
    """Sorted relative paths of a package's Python files; empty when it is not installed."""
    root = package_root(package)
    if root is None:
        return []
    if package == STDLIB:
        found = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in SKIPPED_FOLDERS]
    else:
        found = list((root / package).rglob("*.py"))
    relative = [path.relative_to(root) for path in found]
    return sorted(path.as_posix() for path in relative if not SKIPPED_FOLDERS & set(path.parts))


def read_source(source: str) -> list[Passage]:
    """Passages of one relative source path, found in its package or the standard library; empty when missing."""
    package = source.split("/")[0]
    in_stdlib = package.removesuffix(".py") in sys.stdlib_module_names
    root = package_root(STDLIB if in_stdlib else package)
    if root is None:
        return []
    try:
        return parse_passages(source, (root / source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []


def deduplicate(passages: Iterable[Passage]) -> list[Passage]:
    """Keep the first passage of each hash."""
    first: dict[str, Passage] = {}
    for passage in passages:
        first.setdefault(passage.digest, passage)
    return list(first.values())


def cap_characters(passages: Sequence[Passage], limit: int) -> list[Passage]:
    """A stable choice (by hash) of passages that holds at most `limit` characters."""
    kept, total = [], 0
    for passage in sorted(passages, key=lambda passage: passage.digest):
        total += len(passage.text)
        if total > limit:
            break
        kept.append(passage)
    return kept


def read_corpus(packages: Sequence[str] = CORPUS_PACKAGES) -> list[Passage]:
    """Every passage of the installed `packages`, deduplicated; takes about a minute for all of them."""
    passages: list[Passage] = []
    for package in packages:
        found = deduplicate(passage for source in package_sources(package) for passage in read_source(source))
        if package in REPEATED_PACKAGE_CAP:
            found = cap_characters(found, REPEATED_PACKAGE_CAP[package])
        passages.extend(found)
    return deduplicate(passages)


def shuffled(passages: Sequence[Passage], seed: int) -> list[Passage]:
    """The passages in an order that depends only on `seed` and on their hashes."""
    ordered = sorted(passages, key=lambda passage: passage.digest)
    random.Random(seed).shuffle(ordered)
    return ordered


def drop_near_duplicates(held_out: Sequence[Passage], training: Sequence[Passage]) -> list[Passage]:
    """Held-out passages of which at most half the characters are in lines that also occur in the training text."""

    def lines(passage: Passage) -> list[str]:
        return [line.strip() for line in passage.text.splitlines() if len(line.strip()) > 20]

    known = {line for passage in training for line in lines(passage)}
    kept = []
    for passage in held_out:
        own = lines(passage)
        repeated = sum(len(line) for line in own if line in known)
        if own and repeated <= 0.5 * sum(map(len, own)):
            kept.append(passage)
    return kept


def make_manifest(passages: Sequence[Passage]) -> dict[str, list[list[str | int]]]:
    """Hash and number of characters of each passage, by source path; the paths and the hashes are sorted."""
    manifest: dict[str, list[list[str | int]]] = {}
    for passage in sorted(passages, key=lambda passage: (passage.source, passage.digest)):
        manifest.setdefault(passage.source, []).append([passage.digest, len(passage.text)])
    return manifest


def read_manifest(manifest: dict[str, list[list[str | int]]]) -> list[Passage]:
    """The passages of a manifest that the installed libraries contain; parses only the files it names.

    They are in the order of their hashes, so that every first part of them is a fair sample of all sources.
    """
    found: list[Passage] = []
    for source, wanted in manifest.items():
        here = {passage.digest: passage for passage in read_source(source)}
        found.extend(here[str(digest)] for digest, _ in wanted if digest in here)
    return sorted(found, key=lambda passage: passage.digest)
