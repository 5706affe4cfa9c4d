"""Backbones as TorchRL modules: the memory travels in the tensordict, as that of TorchRL's own `GRUModule` does.

Needs `pip install "amago-nets[torchrl]"`; nothing else in this package imports it.

Dimensions: `B` lanes, `L` timesteps, `D` input features, `E` output features; `*` stands for any batch axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from tensordict import TensorDictBase
    from tensordict.nn import TensorDictModuleBase
    from torchrl.data import Composite, Unbounded
    from torchrl.envs.transforms import TensorDictPrimer
    from torchrl.modules import recurrent_mode
except ImportError as error:
    raise ImportError('amago_nets.torchrl needs TorchRL: pip install "amago-nets[torchrl]"') from error

from .state import State
from .traj_encoders import TrajEncoder

_TIME = "time_idx"


class TrajEncoderModule(TensorDictModuleBase):
    """A sequence backbone that reads and writes tensordicts.

    Acting, it takes one timestep of every lane, `in_key [*, D]` and `is_init [*, 1]`, and the memory below `state_key`;
    it writes `out_key [*, E]` and the memory after that timestep below `("next", state_key)`, so that `step_mdp`
    carries it on. Memory that is missing starts empty.

    Under `torchrl.modules.set_recurrent_mode(True)`, which TorchRL's losses set themselves and `GAE` does not, the last
    batch axis is time: `in_key [*, L, D]`, `is_init [*, L, 1]`. The window goes on from the memory stored with its
    first timestep, which passes no gradient, and starts afresh wherever `is_init` is True.

    Every stored timestep holds the whole memory of its lane: a vector for a GRU, `max_seq_len` keys and values in every
    layer for a Transformer. `("next", state_key)` may be dropped before training.

    Args:
        backbone: any `TrajEncoder`.
        in_key: features of a timestep.
        out_key: where the output goes.
        state_key: where the memory lies; backbones of one policy need different ones.
        is_init_key: True on the first timestep of an episode; the transform `InitTracker` writes it.
        recurrent: whether the last batch axis is time where `set_recurrent_mode` does not say.

    Raises:
        ValueError: (in use) if `is_init_key` is missing.
    """

    def __init__(
        self,
        backbone: TrajEncoder,
        in_key: str,
        out_key: str,
        *,
        state_key: str = "recurrent_state",
        is_init_key: str = "is_init",
        recurrent: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.in_key, self.out_key, self.state_key, self.is_init_key = in_key, out_key, state_key, is_init_key
        self.recurrent = recurrent
        template = backbone.initial_state(1)
        self._axes = _lane_axes(backbone)
        if _TIME in self._axes:
            raise ValueError(f"the state of {type(backbone).__name__} holds {_TIME!r}; give that tensor another name")
        self._shapes = {name: _lanes_first(tensor, self._axes[name])[0] for name, tensor in template.tensors.items()}
        memory: list[Any] = [(state_key, name) for name in (_TIME, *self._axes)]
        after: list[Any] = [("next", *key) for key in memory]
        self.in_keys = [in_key, is_init_key, *memory]
        self.out_keys = [out_key, *after]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that makes an environment carry the memory from step to step.

        Returns:
            A transform to append after `InitTracker`; `torchrl.modules.utils.get_primers_from_module` finds it too.
        """
        specs = {name: Unbounded(shape=one.shape, dtype=one.dtype) for name, one in self._shapes.items()}
        specs[_TIME] = Unbounded(shape=(), dtype=torch.int64)
        return TensorDictPrimer({self.state_key: Composite(specs)}, expand_specs=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Encodes one timestep of every lane, or windows; see the class.

        Args:
            tensordict: batch axes `[*]`, or `[*, L]` for windows.

        Returns:
            The same tensordict with `out_key` and, for single timesteps, the next memory.
        """
        x = tensordict.get(self.in_key)
        is_init = tensordict.get(self.is_init_key, None)
        if is_init is None:
            raise ValueError(f"{self.is_init_key!r} is missing; append torchrl.envs.InitTracker() to the environment")
        mode = recurrent_mode()
        windows = self.recurrent if mode is None else bool(mode)
        lead = x.shape[:-2] if windows else x.shape[:-1]
        shape = (-1, *x.shape[len(lead) :])
        x, is_init = x.reshape(shape), is_init.reshape(shape[:-1])
        if windows:
            out = self._encode_windows(x, is_init, tensordict, len(lead))
        else:
            out = self._encode_step(x, is_init, tensordict, lead)
        return tensordict.set(self.out_key, out.reshape((*lead, *out.shape[1:])))

    def _encode_windows(self, x: Tensor, is_init: Tensor, tensordict: TensorDictBase, lead: int) -> Tensor:
        first = tensordict.select((self.state_key,), strict=False)[(slice(None),) * lead + (0,)]
        state, begin = self._load(first, x)
        clock = torch.arange(x.shape[1], device=x.device)
        last_reset = torch.where(is_init, clock, -1).cummax(dim=1).values
        time_idx = torch.where(last_reset >= 0, clock - last_reset, clock + begin[:, None])
        return self.backbone(x, time_idx, is_init, state)[0]

    def _encode_step(self, x: Tensor, is_init: Tensor, tensordict: TensorDictBase, lead: torch.Size) -> Tensor:
        state, time_idx = self._load(tensordict, x)
        time_idx = time_idx.masked_fill(is_init, 0)
        self.backbone.reset_state(state, is_init)
        out = self.backbone.step(x, time_idx, state)
        key = ("next", self.state_key)
        tensordict.set((*key, _TIME), (time_idx + 1).reshape(lead))
        for name, tensor in state.tensors.items():
            rows = _lanes_first(tensor, self._axes[name])
            tensordict.set((*key, name), rows.reshape((*lead, *rows.shape[1:])))
        return out

    def _load(self, tensordict: TensorDictBase, x: Tensor) -> tuple[State, Tensor]:
        """A state of its own, so that updates in place never reach what was stored, and the time `[B]`."""
        lanes = x.shape[0]
        state = self.backbone.initial_state(lanes, device=x.device)
        time_idx = tensordict.get((self.state_key, _TIME), None)
        if time_idx is None:
            return state, torch.zeros(lanes, dtype=torch.int64, device=x.device)
        stored = {}
        for name, axis in self._axes.items():
            rows = tensordict.get((self.state_key, name))
            stored[name] = rows.reshape(lanes, *self._shapes[name].shape).movedim(0, axis)
        state.load_state_dict(stored)
        return state, time_idx.reshape(lanes)


def _lanes_first(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).contiguous()


def _lane_axes(backbone: TrajEncoder) -> dict[str, int]:
    """The axis of every tensor of the state that grows with the lanes."""
    one, two = backbone.initial_state(1).tensors, backbone.initial_state(2).tensors
    pairs = {name: zip(one[name].shape, two[name].shape, strict=True) for name in one}
    return {name: next(i for i, (a, b) in enumerate(sizes) if a != b) for name, sizes in pairs.items()}
