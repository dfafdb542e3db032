"""Puts an exported model and this page into one folder of static files, and serves it on request.

    loopq-compile export my-program --out my-onnx --target onnxruntime --form rolled --cache --last-token
    npm ci --ignore-scripts --prefix examples/browser
    python examples/browser/prepare.py my-onnx --out site --serve 8000

Any web server can serve the folder. The headers that `--serve` sends let the browser use several threads; without them
it uses one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from loopq_compile import LoopQError
from loopq_compile.sources.loading import end_tokens, load_model

HERE = Path(__file__).parent
PAGE = ("index.html", "worker.mjs", "generate.mjs")
PACKAGES = (
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
)


def prepare(model: Path, site: Path, modules: Path = HERE / "node_modules") -> Path:
    """Fills `site` with the page, the runtime from `modules`, and the export in `model`; returns `site`."""
    missing = [name for name in PACKAGES if not (modules / name).is_file()]
    if missing:
        raise SystemExit(f"{modules} lacks {missing[0]}; run: npm ci --ignore-scripts --prefix {HERE}")
    try:
        loaded = load_model(model)
    except LoopQError as error:
        raise SystemExit(str(error)) from error
    if loaded.kind != "onnx" or not loaded.model.program_info.get("cache") or loaded.tokenizer is None:
        raise SystemExit(f"{model} is not an export with a cache and a tokenizer: use loopq-compile export --cache.")
    if list(model.glob("*.data")):
        raise SystemExit(
            f"The weights of {model} are in a separate file, and a page opens only one: export the program with "
            "--external-data-threshold 2000000000."
        )
    site.mkdir(parents=True, exist_ok=True)
    for file in (*(HERE / name for name in PAGE), *(modules / name for name in PACKAGES)):
        shutil.copy(file, site)
    for name in ("model.onnx", "tokenizer.json"):
        shutil.copy(model / name, site)
    info, ends = loaded.model.program_info, end_tokens(loaded)
    scheme = info.get("scheme")
    how = f", {info['method']} w{scheme['weight_bits']}a{scheme['activation_bits']}" if scheme else ""
    size = (site / "model.onnx").stat().st_size
    settings = {
        "title": f"{info['model']}{how}, {info['loops']} loops, {size / 1e6:.1f} MB",
        "bytes": size,
        "loops": info["loops"],
        "rolled": info["form"] == "rolled",
        "end_tokens": [ends] if isinstance(ends, int) else ends or [],
    }
    (site / "model.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return site


class Handler(http.server.SimpleHTTPRequestHandler):
    """Static files, with the headers that allow shared memory."""

    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""


def server(site: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of `site` for only this machine; port 0 takes any free port."""
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=str(site)))


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder written by `loopq-compile export --cache`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the page")
    parser.add_argument("--modules", type=Path, default=HERE / "node_modules", help="where npm put its packages")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the page on this machine")
    options = parser.parse_args(arguments)
    site = prepare(options.model, options.out, options.modules)
    print(f"{site}: {sum(file.stat().st_size for file in site.iterdir()) / 1e6:.1f} MB")
    if options.serve is not None:
        with server(site, options.serve) as running, contextlib.suppress(KeyboardInterrupt):
            print(f"http://localhost:{running.server_port}  (Ctrl-C ends)", flush=True)
            running.serve_forever()
    return site


if __name__ == "__main__":
    main()
