"""An exponential moving average of the trainable weights, to validate and save beside the weights themselves.

ema = ModelEma(model, decay=0.999)      # after wrap() and after weights are loaded
optimizer.step(); ema.update()
with ema.applied(model):
    evaluate(model, ...)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.distributed import sync_buffers, unwrap
from engine.errors import EngineError


class EmaError(EngineError):
    """Averages that do not belong to this model; the message is one sentence."""


class ModelEma:
    """average = decay * average + (1 - decay) * weights, after every optimizer step.

    Trainable parameters and floating-point buffers (BatchNorm's statistics) are averaged; integer buffers
    (num_batches_tracked) are copied. Frozen weights are neither, so memory is that of the trainable part once more.
    Averages have the device and dtype of what they average: float32 in every precision.

    The decay is the same from the first step on, as in timm.utils.ModelEmaV3 (whose update cannot be skipped by a
    tensor). The averages start as the weights of step 0 and follow them by about 1 / (1 - decay) steps, which should be
    well below the steps of the run.

    Args:
        model: already wrapped (DistributedDataParallel, SyncBatchNorm) and on its device, since both replace buffers.
            It is held, not copied.
        decay: 0..1.

    Raises:
        EmaError: the model has no parameter that requires gradients.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        values = _averaged(model)
        if not any(isinstance(value, nn.Parameter) for value in values.values()):
            raise EmaError("there is nothing to average: no parameter requires gradients")
        self.decay = decay
        self._current = _Tensors(values)
        self._average = copy.deepcopy(self._current).requires_grad_(False)  # without the frozen part

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Add the present weights to the averages, on the device: nothing waits for it.

        Args:
            skipped: (), 1.0 for a step that was skipped and changes nothing, else 0.0.
        """
        pairs = list(zip(self._average.state_dict().values(), self._current.state_dict().values(), strict=True))
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)  # a skipped step has not changed counters
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        steps = torch._foreach_sub(values, averages)
        rate = 1 - self.decay
        torch._foreach_mul_(steps, rate if skipped is None else rate * (1 - skipped.to(steps[0].dtype)))
        torch._foreach_add_(averages, steps)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the names of the model's state_dict: the tensors themselves, not copies."""
        held = self._average.state_dict()
        return {name: held[key] for name, key in self._current.keys_by_name.items()}

    def load_state_dict(self, values: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned. Raises EmaError, with nothing changed, for other names or shapes."""
        own = self.state_dict()
        _check(values, own)
        with torch.no_grad():
            for name, average in own.items():
                average.copy_(values[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside this context the model has the averages, after it exactly its own values.

        Nothing is copied, so train nothing inside: that would change the averages.

        Args:
            model: the averaged one (wrapped or not), or another with the same trainable names and shapes on its device.

        Raises:
            EmaError: another model, which is not changed.
        """
        values, averages = _averaged(model), self.state_dict()
        _check(averages, values)
        before = {name: value.data for name, value in values.items()}
        try:
            for name, value in values.items():
                value.data = averages[name]
            yield
        finally:
            for name, value in values.items():
                value.data = before[name]

    def broadcast(self) -> None:
        """Give every process the averaged buffers of rank 0; those of parameters are equal anyway. All must call it."""
        sync_buffers(self._average)


class _Tensors(nn.Module):
    """Tensors as parameters and buffers of a module, each once, under keys without dots.

    `keys_by_name` maps the tensors' names to these keys; a tensor that two modules share has two names and one key.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        keys: dict[int, str] = {}
        self.keys_by_name = {name: keys.setdefault(id(value), str(len(keys))) for name, value in values.items()}
        for name, key in self.keys_by_name.items():
            value = values[name]
            if isinstance(value, nn.Parameter):
                self.register_parameter(key, value)
            else:
                self.register_buffer(key, value)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters and the buffers themselves, by their names in the state dict."""
    state = unwrap(model).state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if value.requires_grad or not isinstance(value, nn.Parameter)}


def _check(values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    different = next(iter(values.keys() ^ wanted.keys()), None)
    if different is not None:
        raise EmaError(f"the averaged weights do not fit this model: {different} is in only one of them")
    for name, value in values.items():
        if value.shape != wanted[name].shape:
            raise EmaError(
                f"the averaged weights do not fit this model: {name} has shape {tuple(value.shape)} "
                f"instead of {tuple(wanted[name].shape)}"
            )
