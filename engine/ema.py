"""An exponential moving average of what is trained, to validate and keep beside the weights themselves.

Lives here: the averages, under the model's own names, and their visit in the model.
Does not live here: when to update, evaluate or save (loop.py, state.py).

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

    Averaged are the parameters that require gradients and the floating-point buffers (BatchNorm's statistics); integer
    buffers (num_batches_tracked) are copied. A frozen tower is neither averaged nor copied: memory is that of the tuned
    part once more. Averages have the device and dtype of what they average; float32 in every precision of ours.

    The decay is the same from the first step on, as timm.utils.ModelEmaV3 has it (whose update cannot be left out by a
    tensor): the averages start as the
    weights of step 0 and follow them by about 1 / (1 - decay) steps, which should be well below the steps of the run.

    Args:
        model: where it will stay, so wrapped (DistributedDataParallel, SyncBatchNorm) and on its device: `Module.to`
            gives a model other buffers, which would not be seen. It is held, not copied.
        decay: 0..1.

    Raises:
        EmaError: the model has no parameter that requires gradients.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        values = _tuned(model)
        if not any(isinstance(value, nn.Parameter) for value in values.values()):
            raise EmaError("there is nothing to average: no parameter requires gradients")
        self.decay = decay
        self._live = _Registry(values)
        self._average = copy.deepcopy(self._live).requires_grad_(False)  # the registry, so the tuned part alone

    @torch.no_grad()
    def update(self, left_out: Tensor | None = None) -> None:
        """Take the weights of now into the averages. Stays on the device: nothing waits for it.

        Args:
            left_out: (), 1.0 where this is not to happen, which is then known on the device alone; else 0.0.
        """
        pairs = list(zip(self._average.state_dict().values(), self._live.state_dict().values(), strict=True))
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)  # counters have not moved in a step that was left out
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        steps = torch._foreach_sub(values, averages)
        rate = 1 - self.decay
        torch._foreach_mul_(steps, rate if left_out is None else rate * (1 - left_out.to(steps[0].dtype)))
        torch._foreach_add_(averages, steps)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the names of the model's state_dict: the tensors themselves, not copies."""
        held = self._average.state_dict()
        return {name: held[key] for name, key in self._live.keys_by_name.items()}

    def load_state_dict(self, values: Mapping[str, Tensor]) -> None:
        """Take over averages that `state_dict` gave. Raises EmaError, with nothing taken, for other names or shapes."""
        own = self.state_dict()
        _check(values, own)
        with torch.no_grad():
            for name, average in own.items():
                average.copy_(values[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averages inside this context, and with exactly its own values after it.

        They change places without a copy, so train nothing inside: that would change the averages.

        Args:
            model: the one averaged (wrapped or not), or another with the same tuned names and shapes on its device.

        Raises:
            EmaError: another model, which is left as it is.
        """
        values, averages = _tuned(model), self.state_dict()
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


class _Registry(nn.Module):
    """The given tensors as parameters and buffers of a module, each once, under names without dots.

    `keys_by_name` maps the given names to these; a tensor with two names (shared between modules) has one key.
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


def _tuned(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require gradients and the buffers themselves, by their names in the state dict."""
    state = unwrap(model).state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if value.requires_grad or not isinstance(value, nn.Parameter)}


def _check(values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    odd = next(iter(values.keys() ^ wanted.keys()), None)
    if odd is not None:
        raise EmaError(f"the averaged weights do not fit this model: {odd} is in only one of them")
    for name, value in values.items():
        if value.shape != wanted[name].shape:
            raise EmaError(
                f"the averaged weights do not fit this model: {name} has shape {tuple(value.shape)} "
                f"instead of {tuple(wanted[name].shape)}"
            )
