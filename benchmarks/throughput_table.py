"""What throughput.py found, as Markdown."""

import re
import shlex
import statistics
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

from throughput_turns import Result, Turn, describe

from myllm import paths
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.distributed.precision import compute_dtype, dtype_name
from myllm.planning.flops import flops_per_token, n_parameters
from myllm.planning.gpu_specs import peak_flops
from myllm.runs.logs import environment


def section(result: Result, process: DistContext) -> str:
    """A section for a file of results: what ran where, by which command, and the table."""
    config, about = result.config, environment(process.device, process.world_size)
    changed = " with uncommitted changes" if about["git_dirty"] else ""
    products = dtype_name(compute_dtype(config.train.precision, process.device))
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and process.device.type == "cuda")
    threads = f", {about['cpu_threads']} threads" if process.device.type == "cpu" else ""
    lines = [
        f"## Training throughput: {config.name} on {process.world_size} x {about['device_name']}{threads}",
        f"`{command(process)}` at commit {(about['git_commit'] or 'unknown')[:7]}{changed}, {about['started']}; "
        f"torch {about['versions']['torch']}, transformers {version('transformers')}, Python {about['python']}; "
        f"{products if products == 'float32' else f'{products} autocast'}, "
        f"{'compiled' if compiled else 'not compiled'}; {n_parameters(config.model):,} parameters, "
        f"{flops_per_token(config.model) / 1e9:.3f} GFLOPs a token.",
        f"Same weights and batch, no dropout: {describe(result.agreement)}. Loss of the first step as it trains: "
        f"{', '.join(f'{loss:.4f} ({name})' for name, loss in result.first_losses.items())}.",
        table(result, process),
        notes(result),
    ]
    return "\n\n".join(part if part.startswith(("#", "|")) else wrapped(part) for part in lines) + "\n"


def table(result: Result, process: DistContext) -> str:
    rows = [
        "| way | tokens/s | MFU | step ms, median (least to greatest) | processor ms | peak GiB | waits for data "
        "| myllm to this | by processor time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    peak = peak_flops(device_name(process.device))
    rate_at_peak = peak * process.world_size / flops_per_token(result.config.model) if peak else None
    mine = result.turns["myllm"]
    for name, turns in result.turns.items():
        ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, turns, strict=True)]
        by_host = [b.host_s / a.host_s for a, b in zip(mine, turns, strict=True)]
        rows.append(row(name, turns, rate_at_peak, ratios, by_host))
    return "\n".join(rows)


def row(name: str, turns: list[Turn], rate_at_peak: float | None, ratios: list[float], by_host: list[float]) -> str:
    rate = statistics.median(turn.tokens_per_s for turn in turns)
    steps = [1_000 * step for turn in turns for step in turn.step_s]
    cells = [
        name,
        f"{rate:,.0f}",
        f"{rate / rate_at_peak:.1%}" if rate_at_peak else "",
        spread(steps, 1),
        f"{1_000 * statistics.median(turn.host_s for turn in turns):,.1f}",
        f"{max(turn.peak_bytes for turn in turns) / 2**30:.2f}",
        f"{statistics.median(turn.wait_share for turn in turns):.2%}",
        spread(ratios, 2),
        spread(by_host, 2),
    ]
    return f"| {' | '.join(cells)} |"


def notes(result: Result) -> str:
    turns = next(iter(result.turns.values()))
    names_of: dict[str, list[str]] = {}
    for name, batch in result.ways.items():
        names_of.setdefault(batch, []).append(name)
    everyone = "every way" if len(names_of) == 1 else None
    batches = "; ".join(f"{everyone or ' and '.join(names)}: {batch}" for batch, names in names_of.items())
    absent = f" transformers took no part: {result.absent}." if result.absent else ""
    return (
        f"{len(turns)} turns of {len(turns[0].step_s)} steps, one way after the other; rates, shares and ratios are "
        f"medians of turns. Processor: of a step, over all threads. Peak: the way's own weights and moments, and the "
        f"most that a step took beside them. {batches}.{absent}"
    )


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def spread(values: list[float], digits: int) -> str:
    """Median, least and greatest."""
    middle, least, most = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def command(process: DistContext) -> str:
    """What was typed, but for where --out pointed."""
    given = sys.argv[1:]
    words = [word for before, word in zip(["", *given], given, strict=False) if "--out" not in (before, word)]
    launcher = "python" if process.world_size == 1 else f"torchrun --nproc_per_node={process.world_size}"
    return f"{launcher} benchmarks/throughput.py {shlex.join(words)}".rstrip()


def write(text: str, process: DistContext, out: Path | None) -> Path:
    """Add a section to the file of this day and device, by default where runs are too: nothing is written among the
    code."""
    name = device_name(process.device)
    if out is None:
        device = process.device.type if process.device.type != "cuda" else re.sub(r"\W+", "-", name).strip("-").lower()
        out = paths.temp_data() / "benchmarks" / f"{time.strftime('%Y-%m-%d')}-{device}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    before = out.read_text(encoding="utf-8") + "\n" if out.is_file() else f"# {time.strftime('%Y-%m-%d')}, {name}\n\n"
    out.write_text(before + text, encoding="utf-8")
    return out
