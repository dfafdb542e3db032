"""`examples/browser`: the exported model in WebAssembly, in Node and in a headless Chromium, and its page."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import loopq_compile as lq
from loopq_compile import bundled
from loopq_compile.backends.onnx import OnnxExecutable, export
from loopq_compile.sources.loading import Loaded, save_beside
from tests.browser import Browser, find_chromium
from tests.decoding import ids, quantized
from tests.test_examples import load

SOURCE = Path(__file__).parent.parent / "examples" / "browser"
PROMPT = "Return the number of"
NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "E403", "E404", "network")


def node(script: str, *arguments: object, folder: Path = SOURCE) -> subprocess.CompletedProcess[str]:
    """Runs a module in `folder`; the test is skipped without Node of version 20 or newer."""
    program = shutil.which("node")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    if not version or int(version[1:].split(".")[0]) < 20:
        pytest.skip("needs Node 20 or newer")
    command = [str(program), *(["--input-type=module", "-e"] if "\n" in script else []), script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`examples/browser` with the packages that its lock file names."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    path = tmp_path_factory.mktemp("page") / "browser"
    shutil.copytree(SOURCE, path, ignore=shutil.ignore_patterns("node_modules", "__pycache__"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--prefix", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        pytest.skip("the npm registry is slow: no packages after 90 s")
    if done.returncode and any(word in done.stderr for word in NETWORK):
        pytest.skip(f"the npm registry cannot be reached: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def prepare(folder: Path) -> ModuleType:
    return load("browser/prepare")


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, calibrated for two loops; the loop count is an input."""
    path = tmp_path_factory.mktemp("onnx")
    model = bundled.load_model()
    model.loops = 2
    program = lq.compile(model, ids(), scheme="w4a8", method="symmetric")
    program.export_onnx(path, target="onnxruntime", form="rolled", cache=True, last_token=True)
    save_beside(Loaded(None, bundled.load_tokenizer()), path)
    return path


@pytest.fixture(scope="module")
def site(exported: Path, folder: Path, prepare: ModuleType) -> Path:
    path: Path = prepare.main([str(exported), "--out", str(folder / "site"), "--modules", str(folder / "node_modules")])
    return path


def expected(exported: Path, new: int, loops: int) -> list[int]:
    prompt = torch.tensor([bundled.load_tokenizer().encode(PROMPT).ids])
    return OnnxExecutable(exported).generate(prompt, new, loops=loops)[0, prompt.shape[1] :].tolist()


def tokens_of(done: subprocess.CompletedProcess[str]) -> list[int]:
    return [int(token) for token in done.stderr.rsplit(":", 1)[1].split()]


def test_the_same_greedy_tokens_in_node(site: Path, exported: Path, folder: Path) -> None:
    tokens = expected(exported, 16, loops=3)
    done = node("node.mjs", site, PROMPT, 16, 3, folder=folder)
    assert tokens_of(done) == tokens
    assert done.stdout == PROMPT + bundled.load_tokenizer().decode(tokens) + "\n"


def test_an_unrolled_file_in_standard_operators(folder: Path, prepare: ModuleType, tmp_path: Path) -> None:
    export(quantized().graph_module, tmp_path / "onnx", target="qdq", cache=True)
    letters = [chr(code) for code in range(ord("@"), ord("@") + 64)]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    save_beside(Loaded(None, tokenizer), tmp_path / "onnx")
    site = prepare.prepare(tmp_path / "onnx", tmp_path / "site", folder / "node_modules")
    assert json.loads((site / "model.json").read_text())["rolled"] is False
    prompt = torch.tensor([tokenizer.encode("abcXYZ").ids])
    tokens = OnnxExecutable(tmp_path / "onnx").generate(prompt, 12)[0, 6:].tolist()
    assert tokens_of(node("node.mjs", site, "abcXYZ", 12, folder=folder)) == tokens


def test_the_tokenizer_of_the_page(site: Path, folder: Path) -> None:
    """Gives the same ids as the tokenizers library, and the same text back."""
    text = (SOURCE.parent.parent / "README.md").read_text(encoding="utf-8")
    texts = [
        *text.split("\n\n"),
        'def f(x):\n\t"""Grüße,  日本語 — don\'t."""\r\n\n',
        "  12345 ",
        "<|endoftext|> x",
        "e\u0301𝒳",
    ]
    (folder / "texts.json").write_text(json.dumps(texts))
    script = """
        import { readFileSync } from "node:fs";
        import { Tokenizer } from "@huggingface/tokenizers";
        const json = (file) => JSON.parse(readFileSync(file, "utf8"));
        const tokenizer = new Tokenizer(json("site/tokenizer.json"), {});
        const options = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
        const ids = json("texts.json").map((text) => tokenizer.encode(text).ids);
        console.log(JSON.stringify(ids.map((row) => [row, tokenizer.decode(row, options)])));
    """
    tokenizer = bundled.load_tokenizer()
    encoded = [tokenizer.encode(text).ids for text in texts]
    found = json.loads(node(script, folder=folder).stdout)
    assert found == [[tokens, tokenizer.decode(tokens)] for tokens in encoded]


def test_sampling_follows_the_probabilities() -> None:
    script = """
        import { draw, largest, randomNumbers } from "./generate.mjs";
        const count = (temperature, topP, seed) => {
          const random = randomNumbers(seed), counts = [0, 0, 0];
          for (let i = 0; i < 4000; i++) counts[draw([1, 2, 0], temperature, topP, random())]++;
          return counts.map((n) => n / 4000);
        };
        const counts = [count(1, 1, 0), count(1, 1, 0), count(1, 1, 1), count(2, 1, 0), count(1, 0.7, 0)];
        console.log(JSON.stringify([largest([1, 2, 0]), ...counts]));
    """
    best, plain, again, other, warm, cut = json.loads(node(script).stdout)
    logits = torch.tensor([1.0, 2.0, 0.0])
    assert best == 1 and plain == again != other
    for counts, temperature in ((plain, 1), (other, 1), (warm, 2)):
        assert torch.allclose(torch.tensor(counts), (logits / temperature).softmax(-1), atol=0.03)
    assert cut[2] == 0 and cut[0] == pytest.approx(1 / (1 + torch.e), abs=0.03), "0.665 + 0.245 are enough for 0.7"


@pytest.fixture
def page(site: Path, prepare: ModuleType, tmp_path: Path) -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    server = prepare.server(site, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Browser(tmp_path / "profile", f"http://localhost:{server.server_port}/", timeout=150) as browser:
            yield browser
    finally:
        server.shutdown()
        server.server_close()


def test_the_page_streams_the_same_greedy_tokens(page: Browser, exported: Path) -> None:
    page.wait_for("!document.getElementById('go').disabled")
    assert page.evaluate("crossOriginIsolated") is True
    assert page.evaluate("document.getElementById('loops').value") == "2"
    for loops in (2, 3):
        page.evaluate(
            f"document.getElementById('prompt').value = {PROMPT!r}; document.getElementById('tokens').value = 10;"
            f"document.getElementById('loops').value = {loops}; document.getElementById('go').click()"
        )
        tokens = page.wait_for("document.getElementById('text').dataset.tokens")
        assert [int(token) for token in tokens.split()] == expected(exported, 10, loops)
    shown = page.evaluate("document.getElementById('text').textContent")
    assert shown == PROMPT + bundled.load_tokenizer().decode(expected(exported, 10, 3))
    assert "10 tokens" in page.evaluate("document.getElementById('status').textContent")
    page.evaluate("document.getElementById('tokens').value = 2000; document.getElementById('go').click()")
    page.wait_for("document.getElementById('made').textContent.length > 5")
    page.evaluate("document.getElementById('stop').click()")
    stopped = page.wait_for("document.getElementById('text').dataset.tokens")
    assert 1 < len(stopped.split()) < 2000
    page.evaluate("document.getElementById('prompt').value = ''; document.getElementById('go').click()")
    page.wait_for("document.getElementById('status').textContent.includes('The prompt is empty')")


def test_what_cannot_be_shown_is_refused(site: Path, folder: Path, prepare: ModuleType, tmp_path: Path) -> None:
    modules = folder / "node_modules"
    with pytest.raises(SystemExit, match="npm ci"):
        prepare.prepare(site, tmp_path / "page", tmp_path)
    with pytest.raises(SystemExit, match="no file or folder"):
        prepare.prepare(tmp_path / "nothing", tmp_path / "page", modules)
    shutil.copy(site / "model.onnx", tmp_path)
    with pytest.raises(SystemExit, match="not an export with a cache and a tokenizer"):
        prepare.prepare(tmp_path, tmp_path / "page", modules)
    assert not (tmp_path / "page").exists()
