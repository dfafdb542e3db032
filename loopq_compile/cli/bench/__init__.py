"""`loopq-compile bench`: a quick table of quality, growth and speed, and the tables and figures of the LoopQ paper."""

from __future__ import annotations

import typer

from loopq_compile.cli.bench import growth, kernels, quality, speculate, speed, studies

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Measure methods and schemes against each other.")


@app.callback()
def _group() -> None:
    """Measure methods and schemes against each other."""


app.command("quality")(quality.quality_command)
app.command("loops")(growth.loops_command)
app.command("beyond")(growth.beyond_command)
app.command("exit")(growth.exit_command)
app.command("cache")(growth.cache_command)
app.command("calibrate")(growth.calibrate_command)
app.command("memory")(growth.memory_command)
app.command("size")(growth.size_command)
app.command("speed")(speed.speed_command)
app.command("speculate")(speculate.speculate_command)
app.command("compile")(growth.compile_command)
app.command("kernels")(kernels.kernels_command)
for _name, _command in studies.commands():
    app.command(_name)(_command)
