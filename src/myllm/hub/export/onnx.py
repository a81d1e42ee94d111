"""Export any checkpoint as an ONNX file: tokens (batch, sequence) to logits (batch, sequence, vocabulary)."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

from myllm.errors import require
from myllm.model.transformer import Transformer
from myllm.paths import user_path

from .source import ExportSource, atomic_dir
from .verify import compare_logits, sample_inputs

OPSET = 20


def export_onnx(source: ExportSource, to: Path) -> float:
    """Write the file, run it with onnxruntime and compare logits, and only then give it its name.

    Weights are in float32. Batch and sequence can have any length, up to the context. Weights of more than 2 GB are in
    a second file, NAME.data.

    Returns:
        the largest difference of a logit.

    Raises:
        UserError: the extra `onnx` is not installed, or onnxruntime gives other logits.
    """
    onnxruntime = require("--to-onnx", "onnx", "onnx", "onnxscript", "onnxruntime")
    to = user_path(to).absolute()
    with atomic_dir(to) as work:
        model = source.model()
        _write(model, work / to.name)
        session = onnxruntime.InferenceSession(work / to.name, providers=["CPUExecutionProvider"])

        def peer_logits(tokens: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0])

        inputs = (*sample_inputs(model, source.tokenizer), torch.tensor([[source.tokenizer.end_of_text]]))
        differences, _ = compare_logits("onnxruntime gives", model, peer_logits, inputs)
        for file in sorted(work.iterdir(), key=lambda file: file.name == to.name):  # the main file last
            file.replace(to.with_name(file.name))
    return max(differences)


def _write(model: Transformer, file: Path) -> None:
    context = model.config.max_seq_len
    shapes = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=context)}}
    example = torch.zeros(2, min(8, context), dtype=torch.long)
    # The exporter prints its progress and warns of its own deprecations.
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
    """True if the weights exceed the limit of a protobuf message."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) > 1_900_000_000
