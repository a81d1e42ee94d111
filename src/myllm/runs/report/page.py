"""How pages are made that need no other file: a Jinja template, the styles of report.css, figures inside."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from myllm.files import atomic_write
from myllm.formatting import format_duration, format_percent

DPI = 200  # twice the usual 100: sharp on high-resolution screens


def page_template(package: str, **filters: Callable[..., object]) -> Template:
    """report.html of a package, which extends page.html. All values are escaped."""
    jinja = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader(__package__, ".")]), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    jinja.filters |= {"duration": format_duration, "percent": format_percent, "thousands": "{:,.0f}".format} | filters
    return jinja.get_template("report.html")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file; two processes may draw the same one."""
    with atomic_write(path, durable=False) as file:
        figure.savefig(file, dpi=DPI, format="png")


def embed_png(png: bytes) -> str:
    """An image as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def embed_figure(figure: Figure) -> str:
    """A figure as a data URL."""
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI, format="png")
    return embed_png(png.getvalue())
