"""LayerwiseOptimizer: an optimizer's own step, taken one layer at a time.

What it promises: parameters and optimizer state after `step()` equal those after the wrapped
optimizer's `step()` bit for bit; closures and hooks run once; a step that was begun is finished for
every layer even where a callback fails. Between two layers it tells a `StepObserver`, which is how
a layer is saved while later ones are yet to be updated. Everything runs on the caller's thread.

How: most torch.optim optimizers treat each parameter on its own, so their step may be called once
for each layer, with the param groups narrowed to that layer. Where that would not give the same
bits the step is taken whole, and a warning says so.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.autograd.profiler import record_function
from torch.optim import optimizer as _torch
from torch.optim.optimizer import Optimizer

__all__ = ["LayerwiseOptimizer", "StepObserver"]

LayerCallback = Callable[[str, int, list[Tensor]], None]

# Exactly these types are stepped by layer: each updates a parameter from that parameter's gradient,
# state and group alone. LBFGS does not, and of a subclass nobody knows.
_BY_LAYER: frozenset[type] = frozenset(
    getattr(torch.optim, name)
    for name in (
        "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "Muon", "NAdam",
        "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam",
    )
)  # fmt: skip

# torch replaces a class's `step` by a closure that runs the hooks. All those closures share one
# code object, and only such a `step` can be unwrapped without losing anything but the hooks.
_HOOK_RUNNER = Optimizer.profile_hook_step(lambda optimizer: None).__code__


class StepObserver(Protocol):
    """What is told, and asked, in the course of a step."""

    def before_step(self) -> bool:
        """First thing in step(), before hooks and closure. True: hand every layer over."""

    def before_update(self, layer: str | None) -> None:
        """The gate: returns when the layer (None: every layer) may change.

        To raise here between two layers leaves the step half done: raise in before_step.
        """

    def after_layer(self, layer: str) -> None:
        """The layer has its final values of this step. Only where before_step() returned True."""

    def after_step(self, applied: bool) -> None:
        """Last thing in step(). False: a gradient scaler voided the step, nothing has changed."""

    def abort_step(self, error: BaseException) -> None:
        """A hook, the closure, the gate or the update raised; `error` is about to be re-raised."""


@dataclass
class _Layer:
    name: str
    listed: list[Tensor]  # what callbacks get: the layer as the caller described it
    slices: dict[int, list[Tensor]] = field(default_factory=dict)  # param group -> what is updated

    def with_gradient(self) -> list[Tensor]:
        return [p for params in self.slices.values() for p in params if p.grad is not None]


@dataclass
class _HandOver:
    """Who is told of updated layers in one step. An error waits: it must not come between two.

    An observer that has raised is told no more. A callback is: what it raised may be an error of
    an older step, and what it does for this one shall not lack the later layers.
    """

    callback: LayerCallback | None
    observer: StepObserver | None
    training_step: int
    pinned: bool
    deferred: list[str] | None = None  # layers kept back until the post hooks have run
    callback_s: float = 0.0
    error: BaseException | None = None

    def layer(self, layer: _Layer) -> None:
        if self.callback is not None:
            start = time.perf_counter()
            try:
                self.callback(layer.name, self.training_step, _copies(layer.listed, self.pinned))
            except BaseException as error:
                self._keep(error)
            self.callback_s += time.perf_counter() - start
        if self.deferred is None:
            self._tell(layer.name)
        else:
            self.deferred.append(layer.name)

    def release(self) -> None:
        for name in self.deferred or ():
            self._tell(name)

    def _tell(self, name: str) -> None:
        try:
            if self.observer is not None:
                self.observer.after_layer(name)
        except BaseException as error:
            self.observer = None
            self._keep(error)

    def _keep(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            return
        shown = [self.error]
        while shown[-1].__context__ is not None:
            shown.append(shown[-1].__context__)
        # The first is raised, and all are shown, but not the same one for every layer.
        known = any(type(one) is type(error) and str(one) == str(error) for one in shown)
        if not known and error.__context__ is None:
            shown[-1].__context__ = error


def _of_base(name: str) -> Any:
    """The base's attribute, looked up each time: load_state_dict, for one, rebinds them."""
    return property(
        lambda self: getattr(self._base, name),
        lambda self, value: setattr(self._base, name, value),
        lambda self: delattr(self._base, name),
    )


class LayerwiseOptimizer(Optimizer):
    """`base_optimizer`, stepped layer by layer in `update_order`.

    Param groups, state and defaults are the base's own, so schedulers, gradient scalers and
    clipping may be given either of the two. `layer_params_dict` maps layer names to parameters.
    Layers that `update_order` does not name follow in the dict's order; parameters of the base in
    no layer form a last layer of their own; a parameter in two layers is updated with the first.

    `callback(layer_name, training_step, layer_params)` is called after each layer's update with
    copies of its parameters (of CUDA ones in pinned host memory if `use_pinned_memory`).
    `training_step` counts applied steps, this one included. If it raises, the step is completed
    first, and the layers that are left are told to it all the same. Without a callback, or an
    observer that wants this step, the base steps whole, at its own speed (the fast path).

    `layerwise`: None steps the types of torch.optim by layer, others whole, with a warning. False
    steps whole. True vouches for a type of your own: its step treats each parameter by itself and
    counts nothing per group or per optimizer.

    Raises TypeError and ValueError for arguments that do not fit together.
    """

    _observer: StepObserver | None
    _layers: list[_Layer]  # empty: to be planned
    _planned_ids: list[list[int]]
    _profile_name: str

    param_groups: list[dict[str, Any]] = _of_base("param_groups")
    state: Any = _of_base("state")
    defaults: dict[str, Any] = _of_base("defaults")
    grad_scale: Tensor | None = _of_base("grad_scale")  # left here by a GradScaler, for the base's
    found_inf: Tensor | None = _of_base("found_inf")  # kernels to read

    def __init__(
        self,
        base_optimizer: Optimizer,
        update_order: Sequence[str],
        layer_params_dict: Mapping[str, Iterable[Tensor]],
        callback: LayerCallback | None = None,
        verbose: bool = False,
        use_pinned_memory: bool = True,
        *,
        layerwise: bool | None = None,
    ) -> None:
        _expect("base_optimizer", base_optimizer, Optimizer, "a torch.optim.Optimizer")
        _expect("layerwise", layerwise, (bool, type(None)), "True, False or None")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__qualname__}")
        if layerwise and isinstance(base_optimizer, torch.optim.LBFGS):
            raise ValueError("layerwise=True: LBFGS works on all parameters together")
        self._base = base_optimizer
        self.callback = callback
        self.verbose = verbose
        self.use_pinned_memory = use_pinned_memory
        self.training_step = 0
        self._layerwise = type(base_optimizer) in _BY_LAYER if layerwise is None else layerwise
        self._given: dict[str, list[Tensor]] = {}  # in update order
        self._counts = dict.fromkeys(("layerwise", "fast", "whole", "voided"), 0)
        self._seconds = dict.fromkeys(("step", "gate", "callback"), 0.0)
        # Not Optimizer.__init__, which would make groups of its own: this completes an object that
        # has its groups already, as after unpickling.
        self.__setstate__({})
        self.set_update_order(update_order, layer_params_dict)
        _keep_freed_memory()
        if layerwise is None and not self._layerwise:
            self._announce("only the types of torch.optim, LBFGS excepted, are known to allow it")

    def set_update_order(
        self, update_order: Sequence[str], layer_params_dict: Mapping[str, Iterable[Tensor]]
    ) -> None:
        """Replace the layers and their order, from the next step on; arguments as in __init__."""
        _expect("layer_params_dict", layer_params_dict, Mapping, "a dict of lists of parameters")
        given: dict[str, list[Tensor]] = {}
        for name, params in layer_params_dict.items():
            where = f"layer_params_dict[{name!r}]"
            _expect("a name in layer_params_dict", name, str, "a str")
            if isinstance(params, Tensor):
                raise TypeError(f"{where} must be a list of parameters, got a tensor")
            _expect(where, params, Iterable, "a list of parameters")
            given[name] = list(params)
            for param in given[name]:
                _expect(f"every item of {where}", param, Tensor, "a tensor")
        if isinstance(update_order, str):
            raise TypeError(f"update_order must be a list of layer names, got {update_order!r}")
        _expect("update_order", update_order, Iterable, "a list of layer names")
        order: dict[str, list[Tensor]] = {}
        for name in update_order:
            _expect("every item of update_order", name, str, "a layer name")
            if name not in given:
                raise ValueError(f"update_order: no layer {name!r} in layer_params_dict")
            if name in order:
                raise ValueError(f"update_order: layer {name!r} is listed twice")
            order[name] = given[name]
        self._given = {**order, **{name: given[name] for name in given if name not in order}}
        self._layers = []
        if self.verbose:
            print("LayerwiseOptimizer: update order " + ", ".join(self.layers))

    @property
    def base_optimizer(self) -> Optimizer:
        return self._base

    @property
    def layers(self) -> dict[str, list[Tensor]]:
        """The layers in the order of their updates, with the parameters that a callback gets."""
        return {layer.name: list(layer.listed) for layer in self._plan()}

    @property
    def stepping(self) -> bool:
        """Whether step() is under way: hooks of the base are then called from inside it."""
        return self._stepping

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self._base, "_step_supports_amp_scaling", False))

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Update every layer once: `step(closure=None)`, or whatever else the base's step takes.

        Returns what the base returns. Raises the first error of a callback or of the observer's
        after_layer once every layer is updated, any other error at once.
        """
        start = time.perf_counter()
        observer = self._observer
        wanted = observer is not None and observer.before_step()
        told = _HandOver(
            self.callback,
            observer if wanted else None,
            self.training_step + 1,
            self.use_pinned_memory,
        )
        self._stepping = True
        try:
            with record_function(self._profile_name):
                if self._optimizer_step_pre_hooks:
                    args, kwargs = _pre_hooks(self, self._optimizer_step_pre_hooks, args, kwargs)
                applied, out = self._take_step(told, args, kwargs)
                for hook in self._optimizer_step_post_hooks.values():
                    hook(self, (self, *args), kwargs)
                told.release()
        except BaseException as error:
            if error.__context__ is None:
                error.__context__ = told.error
            if observer is not None:
                observer.abort_step(error)
            raise
        finally:
            self._stepping = False
            self._seconds["callback"] += told.callback_s
            self._seconds["step"] += time.perf_counter() - start
        try:
            if observer is not None:
                observer.after_step(applied)
        finally:
            if told.error is not None:
                raise told.error
        return out

    step.hooked = True  # type: ignore[attr-defined]  # torch shall not wrap it: hooks would run twice

    def _take_step(
        self, told: _HandOver, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        """Hooks of the base and of all optimizers, and the update: (applied, result)."""
        base = cast(Any, self._base)
        out = None
        raw = self._raw_step()
        post_hooks: list[Mapping[int, Any]] = []
        if raw is not None:  # then this plays the part of torch's hook runner
            post_hooks = [base._optimizer_step_post_hooks, _torch._global_optimizer_post_hooks]
            for hooks in (_torch._global_optimizer_pre_hooks, base._optimizer_step_pre_hooks):
                if hooks:
                    args, kwargs = _pre_hooks(base, hooks, args, kwargs)
            closure = _closure(*args, **kwargs) if args or kwargs else None
            if closure is not None:
                with torch.enable_grad():
                    out = closure()
            base._opt_called = True  # asked for by schedulers that were made on the base
        if self._optimizer_step_post_hooks or any(map(_may_change_parameters, post_hooks)):
            told.deferred = []
        wanted = told.callback is not None or told.observer is not None
        found_inf = getattr(base, "found_inf", None)
        voided = found_inf is not None and bool(found_inf != 0)
        told_of = self._plan() if wanted and not voided else []
        by_torch = raw is not None and type(base) in _BY_LAYER
        foreach = self._foreach() if told_of and raw is not None and self._layerwise else None
        if raw is not None and foreach is not None:
            for layer in told_of:
                touched = layer.with_gradient()
                self._pass_gate(layer.name)
                self._update(raw, layer, foreach)
                self._bump_versions(touched, by_torch=by_torch)
                told.layer(layer)
            kind = "layerwise"
        else:
            all_touched = [layer.with_gradient() for layer in told_of]
            if raw is None:
                self._pass_gate(None)
                out = base.step(*args, **kwargs)
            elif not voided:
                # A voided step is left out, as a scaler does where kernels cannot void it: they
                # would change nothing, but SGD's leave a momentum buffer behind that is not filled.
                self._pass_gate(None)
                raw(base)
            for layer, touched in zip(told_of, all_touched, strict=True):
                self._bump_versions(touched, by_torch=by_torch)
                told.layer(layer)
            kind = "voided" if voided else "whole" if told_of else "fast"
        self._counts[kind] += 1
        self.training_step += not voided
        if raw is not None:
            base._optimizer_step_code()
        for hooks in post_hooks:
            for hook in hooks.values():
                hook(base, (base, *args), kwargs)
        return not voided, out

    def _raw_step(self) -> Callable[..., Any] | None:
        """The base's step below the hook runner, or None where only its public step will do."""
        step = cast(Any, type(self._base).step)
        if getattr(step, "__code__", None) is not _HOOK_RUNNER:
            # torch.compile, once used, has wrapped some types' to keep itself out of them.
            step = getattr(step, "_torchdynamo_orig_callable", step)
        if self._layerwise or type(self._base) in _BY_LAYER:
            # Schedulers wrap the instance's step only to mark the call.
            patched = self._base.__dict__.get("step")
            as_made = patched is None or getattr(patched, "__wrapped__", None) is step
            if as_made and getattr(step, "__code__", None) is _HOOK_RUNNER:
                return cast(Callable[..., Any], step.__wrapped__)
            if self._layerwise:
                self._announce("its step method has been replaced")
        return None

    def _update(self, raw: Callable[..., Any], layer: _Layer, foreach: list[bool]) -> None:
        """The base's step, while it owns nothing but this layer."""
        if not layer.slices:
            return
        base = self._base
        groups = base.param_groups
        narrowed = [groups[index] for index in layer.slices]
        saved = [dict(group) for group in narrowed]
        try:
            base.param_groups = narrowed
            for group, (index, params) in zip(narrowed, layer.slices.items(), strict=True):
                group["params"] = params
                # Left to choose, torch takes foreach kernels if all parameters of a call allow it,
                # and a layer may where its group does not. Their results differ in the last bits.
                if "foreach" in group and not foreach[index]:
                    group["foreach"] = False
            raw(base)
        finally:
            base.param_groups = groups
            for group, before in zip(narrowed, saved, strict=True):
                group["params"] = before["params"]
                if "foreach" in before:
                    group["foreach"] = before["foreach"]

    def _foreach(self) -> list[bool] | None:
        """Which groups a whole step would update by foreach kernels; None: it must be whole."""
        foreach = [_uses_foreach(group) for group in self._base.param_groups]
        for group, uses_foreach in zip(self._base.param_groups, foreach, strict=True):
            grads = [param.grad for param in group["params"]] if uses_foreach else []
            if any(grad is not None and grad.is_sparse for grad in grads):
                # One sparse gradient changes how the kernels treat dense ones of the same call.
                self._announce("its foreach kernels have got sparse gradients")
                return None
        return foreach

    def _plan(self) -> list[_Layer]:
        """Which layer updates what; made anew when the base's groups hold other parameters."""
        groups = self._base.param_groups
        ids = [[id(param) for param in group["params"]] for group in groups]
        if self._layers and ids == self._planned_ids:
            return self._layers
        layers = [_Layer(name, listed) for name, listed in self._given.items()]
        owner: dict[int, _Layer] = {}
        for layer in layers:
            for param in layer.listed:
                owner.setdefault(id(param), layer)
        name = "unlisted"
        while name in self._given:
            name += "_"
        unlisted = _Layer(name, [])
        for index, group in enumerate(groups):
            for param in group["params"]:
                layer = owner.get(id(param), unlisted)
                layer.slices.setdefault(index, []).append(param)
                if layer is unlisted:
                    layer.listed.append(param)
        # The layers hold every parameter of the groups: while they do, no id is used again.
        self._layers, self._planned_ids = layers + [unlisted] * bool(unlisted.listed), ids
        return self._layers

    def _bump_versions(self, params: list[Tensor], *, by_torch: bool) -> None:
        """Show the update to those who watch version counters: fused kernels do not."""
        if by_torch and not any(group.get("fused") for group in self.param_groups):
            return
        tensors = list(params)
        for param in params:
            values = self._base.state.get(param)
            if isinstance(values, dict):
                tensors += [value for value in values.values() if isinstance(value, Tensor)]
        increment_version(tensors)

    def _pass_gate(self, layer: str | None) -> None:
        if self._observer is not None:
            start = time.perf_counter()
            self._observer.before_update(layer)
            self._seconds["gate"] += time.perf_counter() - start

    def _announce(self, why: str) -> None:
        if why not in self._announced:
            self._announced.add(why)
            warnings.warn(
                f"{type(self._base).__name__} is stepped whole, not layer by layer: {why}. Layers "
                "are still handed over one by one, after the whole update.",
                stacklevel=3,
            )

    def get_statistics(self) -> dict[str, Any]:
        """Steps taken by this object, by kind (all but the voided ones: applied); total seconds."""
        steps = sum(self._counts.values()) - self._counts["voided"]
        return {
            "steps": steps,
            **{f"{kind}_steps": count for kind, count in self._counts.items()},
            "layers": len(self._plan()),
            "stepped_whole": not self._layerwise,
            **{f"{what}_s": seconds for what, seconds in self._seconds.items()},
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's own; hooks of both run, the base's inside this one's."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._base.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the base; hooks of both run, the base's inside this one's."""
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        self._base.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks (torch drops them too), the observer and what can be made anew."""
        kept = (
            "_base", "callback", "verbose", "use_pinned_memory", "training_step", "_layerwise",
            "_counts", "_seconds", "_given",
        )  # fmt: skip
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._observer = None
        self._stepping = False
        self._announced: set[str] = set()
        self._layers = []
        self._profile_name = f"Optimizer.step#{type(self).__name__}.step"
        super().__setstate__({})

    def __repr__(self) -> str:
        how = "stepped by layer" if self._layerwise else "stepped whole"
        return f"{type(self).__name__} ({len(self._plan())} layers, {how}) of {self._base!r}"


def _keep_freed_memory() -> None:
    """Make glibc's allocator keep what the temporaries of an update leave free.

    It returns free memory to the system beyond twice the largest block that it has seen come and
    go. Where that is one of the temporaries themselves, they are page-faulted in again at every
    use, for each layer anew: that was half the time of an update. 32 MiB is the most it learns
    from; the block is never touched, so it costs no memory. Other allocators do not mind.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device="cpu")


def _uses_foreach(group: dict[str, Any]) -> bool:
    """Whether torch.optim will update this group by foreach kernels."""
    foreach = group.get("foreach", False)
    if foreach is None and group.get("fused") is None:
        params = [param for param in group["params"] if param.grad is not None]
        _, foreach = _torch._default_to_fused_or_foreach(params, group.get("differentiable", False))
    return bool(foreach)


def _pre_hooks(
    optimizer: Optimizer, hooks: Mapping[int, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As torch runs them: the optimizer is the first of a hook's args, and it may return others."""
    for hook in hooks.values():
        result = hook(optimizer, (optimizer, *args), kwargs)
        if result is not None:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise RuntimeError(
                    f"a step pre-hook must return None or (new_args, new_kwargs), got {result!r}"
                )
            args, kwargs = tuple(result[0])[1:], result[1]
    return args, kwargs


def _may_change_parameters(hooks: Mapping[int, Any]) -> bool:
    return any(not getattr(hook, "changes_nothing", False) for hook in hooks.values())


def _closure(closure: Callable[[], Any] | None = None) -> Callable[[], Any] | None:
    return closure


_closure.__qualname__ = "step"  # what Python's own complaint about other arguments shall name


def _copies(tensors: list[Tensor], pinned: bool) -> list[Tensor]:
    """Copies that nothing else refers to, complete on return."""
    copies: list[Tensor] = []
    devices: set[torch.device] = set()
    for tensor in (tensor.detach() for tensor in tensors):
        if pinned and tensor.is_cuda and tensor.layout is torch.strided:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            copies.append(copy.copy_(tensor, non_blocking=True))
            devices.add(tensor.device)
        else:
            copies.append(tensor.clone())
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _expect(what: str, value: object, kind: Any, wanted: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {wanted}, got {type(value).__qualname__}")
