"""The optimizer of a run: AdamW, or Muon for the hidden matrices and AdamW for the rest. One schedule for both."""

from collections.abc import Iterable, Mapping

import torch.distributed as dist
from torch import Tensor, nn

from myllm.config import OptimConfig

from .adamw import AdamW, ParameterState
from .lr_schedule import learning_rate
from .muon import Muon


class ScheduledOptimizer:
    """Updates parameters at rates that are a function of the step. Its state is saved by parameter name.

    Hidden matrices are those inside the blocks, by name: embedding, head and learned positions are two-dimensional too,
    but Muon harms them without an error. Weight decay applies to hidden matrices and, if `optim.decay_embeddings`, to
    these others; never to vectors (biases, norms).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        hidden_matrices: Mapping[str, tuple[int, ...]],
        config: OptimConfig,
        max_steps: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            hidden_matrices: by parameter name, the numbers of rows of the matrices that a parameter consists of.
            group: ranks with the same parameters and gradients, among which Muon shares its work. None: no sharing.
        """
        self._config, self._max_steps = config, max_steps
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        hidden = {name: rows for name, rows in hidden_matrices.items() if name in self.parameters}
        assert hidden or config.optimizer == "adamw", "Muon needs the names of the hidden matrices"
        for_muon = hidden if config.optimizer == "muon" else {}
        for_adamw = {name: p for name, p in self.parameters.items() if name not in for_muon}
        decayed = {
            name: p for name, p in for_adamw.items() if name in hidden or (p.ndim >= 2 and config.decay_embeddings)
        }
        not_decayed = {name: p for name, p in for_adamw.items() if name not in decayed}
        self._parts: list[AdamW | Muon] = []
        if for_adamw:
            self._parts.append(AdamW(decayed, not_decayed, config, max_steps))
        if for_muon:
            matrices = {name: self.parameters[name] for name in for_muon}
            self._parts.append(Muon(matrices, for_muon, config, max_steps, group))

    def rate(self, step: int) -> float:
        """AdamW's; Muon's is in the same proportion to optim.muon_lr."""
        return learning_rate(step, self._config, self._max_steps)

    def step(self, step: int, skip: Tensor | None = None, grad_scale: Tensor | None = None) -> float:
        """Apply update number `step`, counted from 0, and return its learning rate.

        Args:
            skip: float32 scalar on the device; if it is not 0, nothing changes.
            grad_scale: factor by which the gradients are too large, a float32 scalar on the device.
        """
        for part in self._parts:
            part.step(step, skip, grad_scale)
        return self.rate(step)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, ParameterState]:
        """The state of each parameter, by name. Empty before the first step."""
        return {name: state for part in self._parts for name, state in part.state_dict().items()}

    def zero_state(self) -> dict[str, ParameterState]:
        """`state_dict` of the first step, filled with zeros: the tensors that a checkpoint is read into."""
        return {name: state for part in self._parts for name, state in part.zero_state().items()}

    def load_state_dict(self, state: dict[str, ParameterState], copy: bool = True) -> None:
        """
        Args:
            copy: false: keep tensors that are on the device, instead of a copy that needs as much memory again.

        Raises:
            ValueError: the names are not those of the parameters.
        """
        if not state:
            return
        if state.keys() != self.parameters.keys():
            wrong = sorted(state.keys() ^ self.parameters.keys())[:5]
            raise ValueError(f"the optimizer state does not fit this model: {', '.join(wrong)}, ... are not in both")
        for part in self._parts:
            for name, parameter in part.parameters.items():
                moved = {key: value.to(parameter.device, copy=copy) for key, value in state[name].items()}
                part.load_parameter_state(name, moved)
