"""`loopq-compile inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopq_compile.cli.common import (
    AllowPickle,
    Dtype,
    Json,
    Model,
    TrustRemoteCode,
    console,
    load,
    note,
    print_json,
    table,
)
from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from loopq_compile.analysis.feasibility import Feasibility
    from loopq_compile.program import Program


def inspect_command(
    model: Model,
    loop: Annotated[
        int | None, typer.Option("--loop", min=0, help="Loop for --svg, --dot and --code, counted from 0.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw one loop's graph (needs the extra 'plot').")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the whole program as one page to browse and search in."),
    ] = None,
    dot: Annotated[Path | None, typer.Option("--dot", metavar="FILE", help="The same as Graphviz text.")] = None,
    code: Annotated[bool, typer.Option("--code", help="Print the graph as Python instead of the tables.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Show loops, linear layers with bits and ranges of every loop, and what each pass did.

    Takes a compiled program, or a model. A model is captured and its loops are found; the last lines say what would be
    quantized, and whether a key-value cache and the rolled form would work. In the picture, linear layers are blue,
    quantization is orange, weights are grey; point at a node to see more. The page has every node with its code, loop,
    module, type and pass, links to its inputs and users, and filters; it opens in any browser, without network.

    Example: loopq-compile inspect my-program --html my-program.html
    """
    loaded = load(model, None, trust_remote_code, None, allow_pickle, dtype)
    if loaded.kind not in ("model", "program"):
        raise LoopQError(f"{model} is an exported file; inspect the program it came from, or open it in Netron.")
    program = loaded.model if loaded.kind == "program" else _captured(loaded.model)
    outlook = _feasibility(program) if program.scheme is None and (json or not code) else None
    say = note(json)
    if json:
        print_json(_report(program) | ({"feasibility": asdict(outlook)} if outlook else {}))
    elif code:
        typer.echo(_code(program, loop))
    else:
        _print_tables(program)
        _print_feasibility(outlook)
    if html:
        say(f"wrote {program.browse(html)}")
    if svg or dot:
        _draw(program, loop, svg, dot)
        for path in filter(None, (dot, svg)):
            say(f"wrote {path}")


def _captured(model: Any) -> Program:
    from loopq_compile.capture.to_graph import capture
    from loopq_compile.graph.shapes import infer_shapes
    from loopq_compile.passes.loops.tag_loops import TagLoops
    from loopq_compile.pipeline import Pipeline
    from loopq_compile.program import Program

    graph_module = Pipeline([TagLoops()], "inspect").run(capture(model))
    infer_shapes(graph_module)
    return Program(graph_module)


def _feasibility(program: Program) -> Feasibility:
    from loopq_compile.analysis.feasibility import feasibility

    return feasibility(program)


def _print_feasibility(outlook: Feasibility | None) -> None:
    if outlook is not None:
        out = console()
        out.print("\nif it is compiled", style="bold")
        for line in outlook.describe():
            out.print(f"  {line}", markup=False, soft_wrap=True)


def _print_tables(program: Program) -> None:
    out = console()
    out.print(program.summary(), markup=False, soft_wrap=True)
    if program.loops.main:
        rows = [
            [", ".join(loop.blocks) or "(nested)", str(loop.count), str(len(loop.weights)), str(len(loop.children))]
            for loop in program.loops.walk()
        ]
        out.print("\nloops", style="bold")
        out.print(table(("block", "runs", "own weights", "nested loops"), rows))
    if program.loops.boundaries:
        rows = [
            [f"{edge.source} -> {edge.target}", ", ".join(edge.state), ", ".join(edge.consumers)]
            for edge in program.loops.boundaries
        ]
        out.print("\nloop transitions", style="bold")
        out.print(table(("step", "state", "read by"), rows, text_columns=3))
    out.print("\npasses", style="bold")
    for entry in program.log:
        out.print(f"{entry.pass_name}{'' if entry.modified else ' (changed nothing)'}", markup=False)
        for text in entry.notes:
            out.print(f"  {text}", markup=False, soft_wrap=True)


def _code(program: Program, loop: int | None) -> str:
    if loop is None:
        return str(program)
    from loopq_compile.graph.loops import get_tag
    from loopq_compile.graph.printer import print_nodes

    if not 0 <= loop < program.loops.count or not program.loops.main:
        raise LoopQError(f"There is no loop {loop}: the main loop runs {program.loops.count} time(s), counted from 0.")
    nodes = [
        n for n in program.graph_module.graph.nodes if (t := get_tag(n)) and t.loops[0] == 0 and t.index[0] == loop
    ]
    return "\n".join(print_nodes(nodes))


def _draw(program: Program, loop: int | None, svg: Path | None, dot: Path | None) -> None:
    from loopq_compile.analysis.visualize import loop_graph, render_svg, to_dot
    from loopq_compile.storage.atomic import write_text

    title = f"loop {loop or 0} of {program.loops.describe()}" if program.loops.main else "no loop"
    text = to_dot(loop_graph(program.graph_module, loop), title)
    for path, make in ((dot, lambda: text), (svg, lambda: render_svg(text))):
        if path is not None:
            write_text(path, make())


def _report(program: Program) -> dict[str, Any]:
    from loopq_compile.graph.names import shown_name
    from loopq_compile.graph.state import get_state
    from loopq_compile.passes.quantize.other_products import OTHER_PRODUCTS

    state = get_state(program.graph_module)
    return {
        "model": state.model_name,
        "method": state.method,
        "scheme": state.scheme.to_dict() if state.scheme else None,
        "signature": state.signature.describe(),
        "loop_count": program.loops.count,
        **program.loops.to_dict(),
        "sites": [{**asdict(site), "weight": shown_name(site.weight)} for site in state.sites.values()],
        "other_products": state.results.get(OTHER_PRODUCTS, {}),
        "passes": [asdict(entry) for entry in state.log],
        "nodes": len(program.graph_module.graph.nodes),
    }
