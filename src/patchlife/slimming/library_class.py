"""Slimmed models of transformers and open_clip: instances of the wrapped model's own class.

Trainers, pipelines and other models ask for the class of a model, the signature of its ``forward`` and the class of its
outputs. So the slimmed model's class is made for the wrapped model: a subclass of `SlimModel` and of the model's class.
The library's own methods run, such as ``forward``; only its blocks are replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Embedded
from .model import SlimModel
from .run.fixed import Taps
from .similarity import take

__all__ = ["LibraryModel", "library_class"]


class LibraryModel(SlimModel):
    """A slimmed model that is called with its library's arguments and gives its library's outputs."""

    def _library_call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = self.backbone.image_size_in(args, kwargs)
        if not self.schedule(size).drops and not self._trains_scorer():
            if not torch.compiler.is_compiling():
                self.follow_budget()
            return (self.wrapped if method == "forward" else getattr(self.wrapped, method))(*args, **kwargs)
        with self._prepared():
            return self.backbone.call(method, self._run_blocks, args, kwargs)

    def _run_blocks(self, embedded: Embedded, all_tokens: bool, taps: Taps) -> Float[Tensor, "batch tokens_out dim"]:
        """All blocks. Tokens, in grid order if ``all_tokens``, else without dropped patches; ``taps`` in grid order."""
        tokens = self.before_start(embedded, taps)
        tokens, plan = self._run_from_start(tokens, embedded, all_tokens, taps)
        if plan is None or not (all_tokens or taps):
            return tokens
        places = plan.grid_index(self.backbone.prefix)
        for index in taps:
            if index >= self.start:
                taps[index] = take(taps[index], places)
        return take(tokens, places) if all_tokens else tokens

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers': saves the backbone alone. `patchlife.save` saves the adapter."""
        if kwargs.get("state_dict") is not None:  # a trainer gives this model's
            own = self.wrapped.state_dict().keys()
            kwargs["state_dict"] = {name: value for name, value in kwargs["state_dict"].items() if name in own}
        return self.wrapped.save_pretrained(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: the class is made again from the wrapped model's class."""
        return _new, (type(self.wrapped), self.backbone.own_methods), self.__dict__


@functools.cache
def library_class(kind: Any, methods: tuple[str, ...]) -> type[SlimModel]:
    """The class of slimmed models of class ``kind``. It has its name, and ``methods`` have the same arguments."""
    own = {name: _library_method(kind, name) for name in methods}
    return type(kind.__name__, (LibraryModel, kind), {**own, "__doc__": LibraryModel.__doc__})


def _library_method(kind: Any, name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(kind, name))
    def method(self: LibraryModel, *args: Any, **kwargs: Any) -> Any:
        return self._library_call(name, args, kwargs)

    return method


def _new(kind: Any, methods: tuple[str, ...]) -> nn.Module:
    slimmed = library_class(kind, methods)
    return slimmed.__new__(slimmed)
