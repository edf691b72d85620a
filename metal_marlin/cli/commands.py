"""Declarations of the commands.

Only declarations live here, so that ``--help`` and ``--version`` answer without importing torch; each command
imports what it needs when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from metal_marlin._version import __version__

_EXISTING = {"exists": True, "dir_okay": False, "readable": True}


class _Group(TyperGroup):
    """Shows the library's errors as one line: they are written for users; a traceback is not."""

    def invoke(self, ctx: Any) -> Any:
        from metal_marlin.errors import MetalMarlinError

        try:
            return super().invoke(ctx)
        except (MetalMarlinError, OSError) as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="metal-marlin",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Metal Shading Language kernels for PyTorch on CPUs, NVIDIA GPUs and Apple GPUs.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"metal-marlin {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Constants = Annotated[
    list[str] | None, typer.Option("--constant", help="Function constant, NAME=VALUE. Can be repeated.")
]
Lanes = Annotated[int | None, typer.Option(help="Threads of a simdgroup on the CPU: 32 or 1.")]


@app.command()
def doctor(json: AsJson = False) -> None:
    """Check devices, compiler and versions, with a small kernel run on each device.

    Exits with 1 when no device can run a kernel.
    """
    from metal_marlin.cli import doctor as command

    raise typer.Exit(command.run(as_json=json))


@app.command()
def kernels(
    json: AsJson = False,
    audit: Annotated[
        Path | None,
        typer.Option(help="File of names, one a line; exit with 1 if any is not a kernel here.", **_EXISTING),
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="With --audit: print every missing name.")] = False,
    plan: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="M N K", help="Instead: what a product of x [M, K] and quantised W [N, K] runs."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="With --plan: cpu, cuda:sm_80, cuda:sm_90a, metal … or this machine's.")
    ] = "",
    format: Annotated[str, typer.Option(help="With --plan: of W; format:zeros says the zeros.")] = "fp4",
    dtype: Annotated[str, typer.Option(help="With --plan: of x and the scales: half, bf16, f32.")] = "half",
    layout: Annotated[str, typer.Option(help="With --plan: canonical, mma16; both where layers may hold W so.")] = "",
    sparse: Annotated[bool, typer.Option("--sparse", help="With --plan: W is 2:4 sparse.")] = False,
) -> None:
    """List the kernels that ship with the package, and what each belongs to; or say which ones a product runs."""
    from metal_marlin.cli import kernels as command

    if plan is not None:
        status = command.run_plan(
            *plan, device=device, format=format, dtype=dtype, layout=layout, sparse=sparse, as_json=json
        )
        raise typer.Exit(status)
    raise typer.Exit(command.run(as_json=json, audit=audit, every=missing))


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="A transformers model, folder or name, whose config gives sizes.")] = "",
    shape: Annotated[list[str] | None, typer.Option(help="NxK of a weight. Can be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; this machine's best by default.")] = "",
    format: Annotated[list[str] | None, typer.Option(help="Formats of W, format:zeros says the zeros; fp4.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="half, bf16, f32, of x and the scales; half.")] = None,
    group: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    tokens: Annotated[list[int] | None, typer.Option(help="Numbers of tokens; all powers of two to 4096.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Of W: canonical, mma16; those that layers hold.")] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Weights are 2:4 sparse, in layout mma16.")] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="The table; the user's for the device.")] = None,
    json: AsJson = False,
) -> None:
    """Time the kernels that a product with quantised weights may run; use the fastest unless METAL_MARLIN_TUNED=off."""
    from metal_marlin.cli import tune as command

    raise typer.Exit(command.run(model, shape, device, format, dtype, group, tokens, layout, sparse, out, json))


@app.command("compile")
def compile_(
    target: Annotated[list[str], typer.Option(help="cpu, cpu:x86-64-v3+avx512f, cuda:sm_90a … Can be repeated.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Cache directory to fill.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(help=".metal files; without any, those that ship with the package.", **_EXISTING),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="Compile only this kernel. Can be repeated."),
    ] = None,
    constant: Constants = None,
    lanes: Lanes = None,
) -> None:
    """Compile kernels ahead of time, for machines without a compiler.

    There, set METAL_MARLIN_ROWS to the directory.
    """
    from metal_marlin.cli import compile as command

    raise typer.Exit(command.run(target, out, files or [], kernel or [], constant or [], lanes))


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every compiled kernel.")] = False,
    json: AsJson = False,
) -> None:
    """Show where compiled kernels are kept and how large they are."""
    from metal_marlin.cli import cache as command

    command.run(clear=clear, as_json=json)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Folder of a transformers model, or a name on the hub.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    preset: Annotated[str | None, typer.Option(help="default, fp4, int8; default where no --format is given.")] = None,
    format: Annotated[
        str | None, typer.Option(help="One format for every layer but lm_head: fp4, int4, int8 …")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights a scale, with --format.")] = None,
    scale: Annotated[str, typer.Option(help="rtn, or mse: search for smaller errors.")] = "rtn",
    per_layer: Annotated[
        list[str] | None, typer.Option(help="PATTERN=FORMAT[:GROUP], such as 'v_proj=int8:64'. Can be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Show every layer, not the worst alone.")] = False,
) -> None:
    """Quantise a model's linear layers and save it; from_pretrained reloads it after register()."""
    from metal_marlin.cli import quantize as command

    command.run(
        source,
        target,
        preset=preset,
        format=format,
        group_size=group_size,
        scale=scale,
        per_layer=per_layer or [],
        force=force,
        every=every,
    )


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder of an MLX, compressed-tensors or MXFP4 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
) -> None:
    """Rewrite a quantised checkpoint of another library for our kernels, its codes kept."""
    from metal_marlin.cli import quantize as command

    command.run_import(source, target)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The .metal file.", **_EXISTING)],
    kernel: Annotated[str, typer.Option(help="Kernel to check; may be left out if there is one.")] = "",
    threads: Annotated[str, typer.Option(help="Threads in all: 1000 or 64,32,1.")] = "",
    threadgroups: Annotated[str, typer.Option(help="Threadgroups, instead of --threads.")] = "",
    threads_per_threadgroup: Annotated[str, typer.Option(help="Threads in a threadgroup: 256 or 16,16.")] = "",
    arg: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE: n=5, x=randn:4x256:float16, y=zeros:1024, x=data.npy. Repeat."),
    ] = None,
    uninitialised: Annotated[
        list[str] | None, typer.Option(help="Buffer whose content before the launch must not be read. Repeat.")
    ] = None,
    threadgroup_memory: Annotated[
        list[str] | None, typer.Option(help="NAME=BYTES of a threadgroup pointer argument. Repeat.")
    ] = None,
    constant: Constants = None,
    seed: Annotated[int, typer.Option(help="Seed of random arguments.")] = 0,
    schedules: Annotated[int, typer.Option(min=1, help="Orders of threads to try.")] = 3,
    time_limit: Annotated[float, typer.Option(help="Seconds after which the kernel's process is ended.")] = 120,
    memory_limit: Annotated[int, typer.Option(help="MB that the kernel's process may use.")] = 8192,
    json: AsJson = False,
) -> None:
    """Find races, divergent barriers, accesses out of bounds and reads of memory nobody wrote, without a Mac.

    Exits with 1 when something is found, with 2 when the kernel could not be run.
    """
    from metal_marlin.cli import check as command
    from metal_marlin.cli.run import Options

    options = Options(
        file, kernel, threads, threadgroups, threads_per_threadgroup, arg or [], threadgroup_memory or [],
        constant or [], "cpu", 32, seed, [],
    )  # fmt: skip
    status = command.run(
        options,
        seeds=schedules,
        uninitialised=uninitialised or [],
        time_limit=time_limit,
        memory_limit=memory_limit,
        as_json=json,
    )
    raise typer.Exit(status)


@app.command()
def lint(
    files: Annotated[
        list[Path] | None, typer.Argument(help=".metal files; without any, those of the package.", **_EXISTING)
    ] = None,
    torch: Annotated[bool, typer.Option("--torch", help="Also what torch.mps.compile_shader cannot do.")] = False,
    all_rows: Annotated[bool, typer.Option("--all-rows", help="Measure threadgroup memory of every row.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure threadgroup memory; needs the compiler.")] = True,
    json: AsJson = False,
) -> None:
    """Find what Apple's compiler would refuse, without a Mac. Exits with 1 when a rule is broken."""
    from metal_marlin.cli import lint as command

    status = command.run(files or [], torch_rules=torch or not files, every_row=all_rows, measure=measure, as_json=json)
    raise typer.Exit(status)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="The .metal file.", **_EXISTING)],
    kernel: Annotated[str, typer.Option(help="Kernel to launch; may be left out if there is one.")] = "",
    threads: Annotated[str, typer.Option(help="Threads in all: 1000 or 64,32,1.")] = "",
    threadgroups: Annotated[str, typer.Option(help="Threadgroups, instead of --threads.")] = "",
    threads_per_threadgroup: Annotated[str, typer.Option(help="Threads in a threadgroup: 256 or 16,16.")] = "",
    arg: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE: n=5, a=0.5, x=randn:4x256:float16, y=zeros:1024, x=data.npy. Repeat."),
    ] = None,
    threadgroup_memory: Annotated[
        list[str] | None,
        typer.Option(help="NAME=BYTES of a threadgroup pointer argument. Repeat."),
    ] = None,
    constant: Constants = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = None,
    lanes: Lanes = None,
    seed: Annotated[int, typer.Option(help="Seed of rand, randn and randint.")] = 0,
    save: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE.npy: store a tensor after the run. Repeat."),
    ] = None,
) -> None:
    """Run one kernel of a .metal file and summarise the tensors it was given."""
    from metal_marlin.cli import run as command

    options = command.Options(
        file, kernel, threads, threadgroups, threads_per_threadgroup, arg or [], threadgroup_memory or [],
        constant or [], device, lanes, seed, save or [],
    )  # fmt: skip
    command.run(options)


Model = Annotated[str, typer.Argument(help="Folder of a model, or its name on the hub.")]
Tokens = Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: the most likely token each time.")]
Seed = Annotated[int, typer.Option(help="Seed where the temperature is not 0.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str, typer.Option(help="Type of activations: auto, float32, bfloat16 or float16.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    tokens: Tokens = 200,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json: AsJson = False,
) -> None:
    """Answer one prompt, with tokens/s and the memory of the weights."""
    from metal_marlin.cli import generate as command

    options = command.Options(model, tokens, temperature, seed, device, dtype)
    command.generate(options, prompt, raw=raw, as_json=json)


@app.command()
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    tokens: Tokens = 500,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model; an empty line ends it."""
    from metal_marlin.cli import generate as command

    command.chat(command.Options(model, tokens, temperature, seed, device, dtype), system)


@app.command("eval")
def eval_(
    model: Model,
    text: Annotated[Path, typer.Option(help="UTF-8 text to predict.", **_EXISTING)],
    against: Annotated[str, typer.Option(help="The original model: adds KL divergence and top-1 agreement.")] = "",
    tokens: Annotated[int, typer.Option(min=0, help="Only the text's first tokens; 0: all.")] = 0,
    window: Annotated[int, typer.Option(help="Tokens that the model sees at once.")] = 512,
    stride: Annotated[int, typer.Option(help="Tokens from one window to the next.")] = 256,
    device: Device = "cpu",
    json: AsJson = False,
) -> None:
    """Perplexity of a model on a text, and its distance from the original."""
    from metal_marlin.cli import evaluate as command

    command.run(model, text, against or None, tokens, window, stride, device, json)


@app.command()
def bench(
    op: Annotated[str, typer.Option(help="Only this op.")] = "",
    device: Device = "cpu",
    seconds: Annotated[float, typer.Option(help="Time for each case.")] = 0.5,
    save: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the rows as CSV.")] = None,
    json: AsJson = False,
) -> None:
    """Time the ops with quantised weights on shapes of models.

    Each result is checked first; weights are read in turn from more memory than caches hold.
    """
    from metal_marlin.cli import bench as command

    command.run(op, device, seconds, json, save)


@app.command()
def selftest(
    device: Device = "cpu",
    op: Annotated[list[str] | None, typer.Option(help="Only this op. Repeat.")] = None,
    report: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the report to a file.")] = None,
    checked: Annotated[bool, typer.Option("--checked", help="On the cpu with every access checked; slow.")] = False,
    json: AsJson = False,
) -> None:
    """Compare the small cases of every op with float64 and print a report for an issue. Exits with 1 on a failure."""
    from metal_marlin.cli import selftest as command

    raise typer.Exit(command.run(device, op or [], report, json, checked))


def main() -> None:
    """Entry point of the ``metal-marlin`` script."""
    app()
