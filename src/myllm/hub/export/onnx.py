"""A model as one ONNX file: tokens (batch, sequence) to logits (batch, sequence, vocabulary). Any model of ours."""

import contextlib
import io
import logging
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from myllm.errors import UserError
from myllm.paths import user_path

from .target import atomic_dir
from .transformers import ExportSource
from .verify import TOLERANCE, sample_inputs

OPSET = 20


def export_onnx(source: ExportSource, to: Path) -> float:
    """Write the file, run it with onnxruntime, and only then give it its name.

    In float32; batch and sequence may have any length up to the context. Weights beyond 2 GB go to a file beside it,
    which is part of it: NAME.data.

    Returns:
        the largest difference of a logit.

    Raises:
        UserError: the extra `onnx` is not installed, or onnxruntime gives other logits.
    """
    onnxruntime = _require()
    to = user_path(to).absolute()
    with atomic_dir(to) as work:
        model = source.model()
        _write(model, work / to.name)
        difference, largest = 0.0, 0.0
        session = onnxruntime.InferenceSession(work / to.name, providers=["CPUExecutionProvider"])
        for tokens in (*sample_inputs(model, source.tokenizer), torch.tensor([[source.tokenizer.end_of_text]])):
            with torch.no_grad():
                ours = model(tokens).numpy()
            (theirs,) = session.run(None, {"tokens": tokens.numpy()})
            difference = max(difference, float(np.abs(ours - theirs).max()))
            largest = max(largest, float(np.abs(ours).max()))
        if not difference <= TOLERANCE * largest:
            raise UserError(
                f"onnxruntime gives other logits than this model: they differ by up to {difference:.1e}, allowed "
                f"{TOLERANCE * largest:.1e}. Nothing was exported; please report this with the run's config.json"
            )
        for file in sorted(work.iterdir(), key=lambda file: file.name == to.name):  # what names the other comes last
            file.replace(to.with_name(file.name))
    return difference


def _write(model: torch.nn.Module, file: Path) -> None:
    context = model.config.max_seq_len
    shapes = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=context)}}
    example = torch.zeros(2, min(8, context), dtype=torch.long)
    # The exporter tells of its steps on the standard output and of its own deprecations.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, (example,), file, dynamo=True, dynamic_shapes=shapes, input_names=["tokens"],
                output_names=["logits"], opset_version=OPSET, external_data=_large(model), verbose=False,
            )  # fmt: skip
    finally:
        logging.disable(level)


def _large(model: torch.nn.Module) -> bool:
    """Whether the weights exceed what one protobuf message holds."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) > 1_900_000_000


def _require() -> ModuleType:
    try:
        for name in ("onnx", "onnxscript"):  # what torch's exporter imports
            import_module(name)
        return import_module("onnxruntime")
    except ImportError as error:
        raise UserError(
            f"--to-onnx needs {error.name}, which is not installed: pip install onnx onnxscript onnxruntime (the extra "
            "`onnx` of this package)"
        ) from None
