"""The verbs about devices: profile measure, list, show, compare, validate and schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from autocompress.cli import options as o
from autocompress.cli.console import out, print_json, quiet_stdout
from autocompress.cli.tables import StageProgress
from autocompress.errors import UsageError
from autocompress.results import Progress

if TYPE_CHECKING:
    from autocompress.hwprofiles import HardwareProfile

profile_app = typer.Typer(
    help="Measure devices and look at their profiles.", no_args_is_help=True, rich_markup_mode=None
)


@profile_app.command("measure")
def measure(
    name: Annotated[str, typer.Option("--name", help="What budgets call it: latency_ms<=5@NAME.")] = "local",
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A JSON file; default: kept under its name.")
    ] = None,
    target: o.Target = "local",
    python: o.Python = "",
    minutes: Annotated[float, typer.Option("--minutes", help="How long it may take; longer is finer.")] = 10.0,
    threads: o.RunThreads = 1,
    batch: o.RunBatch = 1,
    precision: Annotated[
        str, typer.Option("--precision", help="Of a GPU's floats: float32, tf32, float16 or bfloat16.")
    ] = "float16",
    as_json: o.Json = False,
) -> None:
    """Measure this machine, its GPU, or another machine.

    Without it, '@local' measures only the shapes of the model at hand. Leave the machine alone meanwhile. Cut short, the
    same command goes on where it stopped.

    \b
    Example:
      autocompress profile measure --name laptop --minutes 10
      autocompress profile measure --name pi --target ssh://pi@raspberry --minutes 10
      autocompress profile measure --name gpu --target cuda --precision float16 --minutes 2
    """
    if out_file is not None and out_file.suffix != ".json":
        raise UsageError(f"--out names a .json file, got {str(out_file)!r}.")
    if target != "local" and name == "local":
        raise UsageError(f"'local' is this machine; name the profile of {target} with --name.")
    if not 0 < minutes < float("inf"):
        raise UsageError(f"--minutes is more than 0, got {minutes:g}.")
    with quiet_stdout(), StageProgress() as bar:
        from autocompress.hwprofiles import measure_default, open_target, save_profile

        def tell(done: int, total: int) -> None:
            bar(Progress(stage="profile", done=done, total=total))

        if target.partition(":")[0] == "cuda":
            from autocompress.hwprofiles.cuda import cuda_grid, measure_cuda

            profile = measure_cuda(
                cuda_grid(),
                device=target,
                precision=precision,
                batch=batch,
                seconds=60 * minutes,
                progress=tell,
                name=name,
            )
        else:
            with open_target(target, python) as device:
                profile = measure_default(
                    minutes=minutes, threads=threads, batch=batch, progress=tell, name=name, device=device
                )
        path = save_profile(profile, out_file)
    if as_json:
        print_json({"path": str(path), **summary(profile)})
        return
    _print(profile)
    out.print(f"  {path}", markup=False)
    option = f" --profile {name}={out_file}" if out_file else ""
    out.print(f"Use it with --budget 'latency_ms<=50%@{name}'{option}", markup=False)


@profile_app.command("list")
def list_profiles(as_json: o.Json = False) -> None:
    """List the profiles that a budget can name.

    \b
    Example:
      autocompress profile list
    """
    from autocompress.hwprofiles import known_profiles, load_profile

    profiles = {name: (path, load_profile(name)) for name, path in known_profiles().items()}
    if as_json:
        print_json([{"path": str(path), **summary(profile)} for path, profile in profiles.values()])
        return
    if "local" not in profiles:
        out.print("local: this machine; a budget with @local measures the shapes of its model first.")
    for name, (_, profile) in profiles.items():
        out.print(f"{name}: {profile.device}, {_origin(profile)}", markup=False)


@profile_app.command("show")
def show_profile(
    name: Annotated[str, typer.Argument(help="A profile's name or its file.")], as_json: o.Json = False
) -> None:
    """Show what a profile holds.

    What was measured, how and when.

    \b
    Example:
      autocompress profile show local
    """
    from autocompress.hwprofiles import load_profile

    profile = load_profile(name)
    if as_json:
        print_json({**summary(profile), "profile": profile.to_json()})
    else:
        _print(profile)


@profile_app.command("compare")
def compare_profiles(
    first: Annotated[str, typer.Argument(help="A profile's name or its file.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    as_json: o.Json = False,
) -> None:
    """Predict the same kernels on two devices.

    A ratio above 1 means that the second device is slower.

    \b
    Example:
      autocompress profile compare pixel3 raspi4
    """
    from autocompress.hwprofiles import load_profile
    from autocompress.hwprofiles.references import COMPARED

    profiles = [load_profile(name) for name in (first, second)]
    times = [profile.predict_ns(list(COMPARED.values())) / 1e3 for profile in profiles]
    unseen = [[bool(profile.explains([kernel])) for kernel in COMPARED.values()] for profile in profiles]
    rows = [
        {"kernel": name, "first_us": float(a), "second_us": float(b), "ratio": float(b / a), "guessed": bool(u or v)}
        for name, a, b, u, v in zip(COMPARED, *times, *unseen, strict=True)
    ]
    if as_json:
        print_json({"first": summary(profiles[0]), "second": summary(profiles[1]), "kernels": rows})
        return
    table = Table(box=None, pad_edge=False)
    for title in ("kernel", *(f"{profile.name} µs" for profile in profiles), "ratio", ""):
        table.add_column(title, justify="left" if title == "kernel" else "right")
    for row in rows:
        numbers = (f"{row[key]:.4g}" for key in ("first_us", "second_us", "ratio"))
        table.add_row(str(row["kernel"]), *numbers, "guessed" if row["guessed"] else "")
    out.print(table, markup=False)
    for profile in profiles:
        out.print(f"{profile.name}: {_origin(profile)}", markup=False)


@profile_app.command("validate")
def validate_profile(
    file: Annotated[Path, typer.Argument(help="A profile's JSON file.")], as_json: o.Json = False
) -> None:
    """Check a profile's file.

    What is missing, negative or of the wrong kind is named in one sentence.

    \b
    Example:
      autocompress profile validate pixel3.json
    """
    from autocompress.hwprofiles import HardwareProfile

    profile = HardwareProfile.load(file)
    profile.predict_ns([])
    if as_json:
        print_json({"valid": True, **summary(profile)})
    else:
        out.print(f"{file} is a valid profile: {profile.device}, {_origin(profile)}.", markup=False)


@profile_app.command("schema")
def schema_of_profiles(as_json: o.Json = False) -> None:
    """Print the format of profiles as JSON Schema.

    Draft 2020-12; for programs that write profiles, and for editors that check them. It is JSON with and without --json.

    \b
    Example:
      autocompress profile schema
    """
    from autocompress.hwprofiles.schema import json_schema

    print_json(json_schema())


def _origin(profile: HardwareProfile) -> str:
    """Where its figures come from, in a few words: ``fitted``, or ``measured`` and how much of it."""
    if profile.fitted:
        return f"{profile.provenance}, expected error ±{profile.expected_error:.0%}, batch {profile.batch}"
    kernels = f"{len(profile.entries)} kernels on {profile.threads} thread(s)"
    return f"{profile.provenance}, {kernels}, {profile.measured_at}"


def summary(profile: HardwareProfile) -> dict[str, Any]:
    """A profile in a few numbers."""
    families: dict[str, int] = {}
    for entry in profile.entries:
        family = f"{entry.kernel.kind} {entry.kernel.format}"
        families[family] = families.get(family, 0) + 1
    return {
        "name": profile.name,
        "device": profile.device,
        "runtime": f"{profile.runtime} {profile.runtime_version}",
        "threads": profile.threads,
        "batch": profile.batch,
        "measured_at": profile.measured_at,
        "kernels": len(profile.entries),
        "families": families,
        "overhead_us": profile.overhead_ns / 1e3,
        "noise_floor": profile.noise_floor,
        "int8_format": profile.int8_format,
        "provenance": profile.provenance,
        "operators": ", ".join(profile.limits.get("operators", ())) or None,
        "source": ", ".join(profile.source.values()) or None,
        "expected_error": profile.expected_error or None,
        "fit_error": {space: f"{e['mape']:.1%} / {e['spearman']:.3f}" for space, e in profile.fit_error.items()}
        or None,
        "warning": profile.how.get("warning"),
        "hash": profile.hash,
    }


def _print(profile: HardwareProfile) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in summary(profile).items():
        if value is None or value == {}:
            continue
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(key.replace("_", " "), f"{text:.4g}" if isinstance(text, float) else str(text))
    out.print(table, markup=False)
