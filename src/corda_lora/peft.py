"""`preprocess_corda` in place of PEFT's own: change the import, keep everything else.

    from corda_lora.peft import preprocess_corda   # was: from peft.tuners.lora.corda import preprocess_corda

The arguments, covariances, files and errors are PEFT's, and the layers get the attributes that `get_peft_model` reads.
These are the differences:

- **One block at a time.** PEFT's interface is a callback that calls the model, as a rule in a loop that ignores the
  outputs. So the calls only wait. When the callback has returned, all of them go through the first block, whose layers
  are then decomposed, and so on: the covariances of one block exist at a time. If the callback reads an output, it is
  computed at once. Then everything is run as in PEFT, with the covariances of all layers in memory.
- **Several samples a call**, with padding, count as single samples without padding.
- **No inverse and no full SVD:** see `decomposition`. λ is 0.01. PEFT doubles it while its float32 inverse is
  inaccurate; here no inverse is needed.
- **Files** are read as plain tensors and nothing else, and written whole or not at all.
"""

import copy
import inspect
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.corda import CordaEigens, target_modules
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from .algebra.covariance import float32_products
from .algebra.decomposition import orient
from .algebra.solvers import chosen_components, say_fallback, warn_of_fallbacks
from .config import CordaError
from .devices import compute_device, double_device
from .files import whole_file
from .models.lockstep import DifferentPathsError, find_blocks, parking
from .models.targets import check_bare
from .models.weights import weight_of, weight_shape
from .preprocess.collect import Collector, Group
from .preprocess.context import Context
from .preprocess.walk import Place, walk
from .progress import progress_bar, track

PARTS = ("S_WC", "U_WC", "V_WC")  # of PEFT's CordaEigens


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Set `eigens` on every target layer, from which `get_peft_model(model, lora_config)` makes the adapter.

    Args:
        model: the model to adapt.
        lora_config: with `init_lora_weights="corda"` and a `corda_config`. Its option `use_float16_for_covariance`
            gives the covariances in the file and on the layers the dtype of the weights. They are summed and decomposed
            in float32 all the same.
        run_model: calls the model on the context, a few hundred samples. Padding is read from `attention_mask`.
            Not needed where one of the files exists.
        hooked_model: the model that `run_model` calls, if it is another one; its layers have the same names. It is left
            in evaluation mode, as in PEFT.

    Raises:
        CordaError (a ValueError): where PEFT raises one; a layer that was never run; a file that holds something else.
            Raised before the model runs wherever possible. After an error no layer has a new attribute.
    """
    config, targets = _checked(model, lora_config, hooked_model)
    options = config.corda_config
    if _exists(options.cache_file):
        _set_cached(options.cache_file, targets)
        return
    ranks, hooked = _ranks_of(config, targets), model if hooked_model is None else hooked_model
    homes = {name: module.weight.device for name, module in targets.items()}  # blocks are moved to the device and back
    device, from_file = compute_device(hooked), _exists(options.covariance_file)
    attributes: dict[str, dict[str, Any]] = {}  # layer -> the attributes that it gets in the end
    to_write: dict[str, Tensor] = {}  # layer -> its covariance
    fallbacks: list[str] = []  # layers that the solver gave up on

    def decompose(names: Sequence[str], C: Tensor, samples: int | None = None) -> None:
        """Decompose layers that share their inputs, with covariance C (n, n), a mean over `samples`."""
        if not bool(torch.isfinite(C).all()):
            why = (
                "the file is broken" if from_file else "a sample is divided by its largest number, which must not be 0"
            )
            raise CordaError(f"Invalid value found in covariance of {names[0]}: {why}")
        solving, fields = double_device(device), {"corda_method": options.corda_method}
        oriented = partial(orient, C=C.to(solving), orientation="covariance")
        C = C.to(targets[names[0]].weight.dtype) if options.use_float16_for_covariance else C
        for name in names:
            W = weight_of(targets[name]).to(solving)  # (m, n)
            parts = corda_eigens(W, oriented, options.corda_method, ranks[name], partial(fallbacks.append, name))
            attributes[name] = {"eigens": CordaEigens(*(part.to(homes[name]) for part in parts))}
            if not options.prune_temporary_fields:
                attributes[name] |= fields | {"covariance_matrix": C.to(homes[name]), "rank": ranks[name]}
                attributes[name] |= {} if samples is None else {"sample_count": samples}
            if options.covariance_file is not None and not from_file:
                to_write[name] = C.cpu()

    with float32_products("highest"):
        if from_file:
            _covariances_of_file(options, targets, decompose)
        elif run_model is None:
            raise CordaError("run_model must be specified when covariance file and cache file aren't built.")
        else:
            hooked.eval()
            layers = {name: module for name, module in target_modules(hooked, config) if name in targets}
            collect(hooked, layers, run_model, device, decompose, options.verbose)
    warn_of_fallbacks(fallbacks)
    if unseen := [name for name in targets if name not in attributes]:
        raise CordaError(f"{unseen[0]} ({len(unseen)} of {len(targets)} target layers) was not run by run_model")
    if to_write:
        _write(options.covariance_file, to_write)
    if options.cache_file is not None:
        eigens = {name: layer["eigens"] for name, layer in attributes.items()}
        _write(
            options.cache_file, {f"{n}.eigens.{part}": getattr(e, part) for n, e in eigens.items() for part in PARTS}
        )
    for name, layer in attributes.items():
        for attribute, value in layer.items():
            setattr(targets[name], attribute, value)


def _checked(
    model: nn.Module, lora_config: LoraConfig, hooked_model: nn.Module | None
) -> tuple[LoraConfig, dict[str, Any]]:
    """The configuration with all its target modules named, and the layers. Raises CordaError before any work."""
    options = lora_config.corda_config
    if options is None:
        raise CordaError("lora_config has no corda_config: give it one, with a corda_method")
    for given in (model, hooked_model):
        if given is not None:
            check_bare(given)
    for file in (options.cache_file, options.covariance_file):
        if file is not None and not _exists(file):
            _check_folder(Path(file))
    config = _maybe_include_all_linear_layers(copy.copy(lora_config), model)
    targets = dict(target_modules(model, config)) if config.target_modules else {}
    if not targets:
        raise CordaError(f"target_modules {config.target_modules!r} matches no linear layer of {type(model).__name__}")
    return config, targets


def _ranks_of(config: LoraConfig, targets: Mapping[str, nn.Module]) -> dict[str, int]:
    """The rank of each layer. Raises CordaError if there is no method, or a layer has fewer components."""
    method, pattern = config.corda_config.corda_method, config.rank_pattern
    if method is None:
        raise CordaError("corda_method is required when cache_file is not provided.")
    if method not in ("ipm", "kpm"):
        raise CordaError(f"Invalid corda_method found: {method}, it should be 'ipm' or 'kpm'.")
    ranks = {name: pattern.get(get_pattern_key(pattern.keys(), name), config.r) for name in targets}
    for name, module in targets.items():
        R = min(weight_shape(module))
        if ranks[name] > R:
            raise CordaError(f"rank mismatch: {R} vs. {ranks[name]}: {name} has only {R} components")
    return ranks


def _set_cached(file: str | Path, targets: Mapping[str, Any]) -> None:
    """Set the `eigens` that a file holds."""
    cached = _read(file, [f"{name}.eigens.{part}" for name in targets for part in PARTS])
    for name, module in targets.items():
        parts = {part: cached[f"{name}.eigens.{part}"].to(module.weight.device, copy=True) for part in PARTS}
        module.eigens = CordaEigens(**parts)


def _covariances_of_file(
    options: Any, targets: Mapping[str, nn.Module], done: Callable[[Sequence[str], Tensor], None]
) -> None:
    """Call `done` with each layer and its covariance out of the file."""
    covariances = _read(options.covariance_file, list(targets))
    for name in track(list(targets), "Collecting eigens", options.verbose):
        n = weight_shape(targets[name])[1]
        if covariances[name].shape != (n, n):
            raise CordaError(f"{options.covariance_file} is of another model: {name} has {n} inputs")
        done([name], covariances[name].clone())  # not a view of the file


def corda_eigens(
    W: Tensor,
    oriented: Callable[[Tensor], Tensor],
    method: str,
    r: int,
    fell_back: Callable[[], None] = say_fallback,
) -> tuple[Tensor, Tensor, Tensor]:
    """The r components that become the adapter: PEFT's S_WC (r,), U_WC (m, r), V_WC (n, r), float32.

    U S Vᵀ is the part U Uᵀ W of the weight, so V = (S⁻¹ Uᵀ W)ᵀ (PEFT computes C_λ⁻¹ V). Where σ is 0, the component and
    its column of V are 0.

    Args:
        W: (m, n).
        oriented: W → W C_λ, see `solvers`.
    """
    U, sigma = chosen_components(W, oriented, method, r, fell_back=fell_back)  # (m, r), (r,)
    rows = U.T @ W.double()  # (r, n)
    V = torch.where(sigma > 0, rows.T / sigma, 0.0)
    return sigma.float(), U.float(), V.float()


class _Output:
    """Stands for the model's output of a call that waits. The output is computed when it is first read."""

    def __init__(self, compute: Callable[[], Any]):
        self._compute = cache(compute)

    __class__ = property(lambda self: type(self._compute()))  # for `isinstance`

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compute(), name)

    def __getitem__(self, key: Any) -> Any:
        return self._compute()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._compute())

    def __len__(self) -> int:
        return len(self._compute())

    def __contains__(self, key: Any) -> bool:
        return key in self._compute()

    def __repr__(self) -> str:
        return repr(self._compute())


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    run_model: Callable[[], Any],
    device: torch.device,
    done: Callable[[Sequence[str], Tensor, int], None],
    verbose: bool = False,
) -> None:
    """Collect the covariances of the layers' inputs, as PEFT normalizes them, in all calls that `run_model` makes.

    Args:
        device: where blocks are run, if the calls can wait.
        done: called when all calls have gone through a block, with layers that share their inputs, their C (n, n), and
            the number of samples that C is the mean over.
    """
    forward = model.forward
    signature = inspect.signature(forward)
    can_pause = _can_pause(model, layers)
    waiting: dict[int, dict[str, Any]] = {}
    at_once = Collector(model, layers, per_sample=True)
    at_once.add(None)  # layers may also be run without the model

    def run(call: Mapping[str, Any], /, *args: Any, **kwargs: Any) -> Any:
        at_once.add(call if _has_tokens(call) else None)
        try:
            return forward(*args, **kwargs)
        finally:
            at_once.add(None)

    def record(*args: Any, **kwargs: Any) -> Any:
        call = {**signature.bind_partial(*args).arguments, **kwargs}
        if not can_pause or not _can_wait(call):
            return run(call, *args, **kwargs)
        call = {k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()}  # a buffer may be used again
        waiting[id(call)] = call

        def compute() -> Any:
            waiting.pop(id(call), None)
            return run(call, **call)

        return _Output(compute)

    with at_once.listening(), _forward_replaced(model, record):
        run_model()

    def hand_over(collector: Collector, groups: list[Group]) -> None:
        while groups:  # popped: a group that is done frees its covariance
            names, Cs = groups.pop(0)
            for C in Cs:  # a single round; empty for a layer that was not run
                done(names, C, collector.counts[names[0]])
                for _ in names:
                    advance()

    calls = list(waiting.values())
    with progress_bar("Collecting eigens", len(layers), verbose) as advance:
        if calls and not at_once.covariances:
            collector = Collector(model, layers, Context(calls), per_sample=True)
            try:
                visiting = device.type == "cuda" and next(model.parameters()).device != device  # its room is small
                place = Place(device, park=parking("cpu" if visiting else "device"))
                for _, groups in walk(model, layers, Context(calls), place, collector=collector):
                    hand_over(collector, groups or [])
                return
            except DifferentPathsError:  # some calls run other blocks than others (with an image, and without)
                pass
        with at_once.listening():
            for call in calls:
                run(call, **call)
        hand_over(at_once, at_once.take(list(layers)))


def _can_pause(model: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether calls of the model can wait and go through it block by block. The model must be one of transformers',
    whose outputs have attributes and items, it must be on one device, and its blocks must not share weights."""
    try:
        return (
            isinstance(model, PreTrainedModel)
            and len({parameter.device for parameter in model.parameters()}) == 1
            and bool(find_blocks(model, list(layers)))
        )
    except CordaError:  # shared weights
        return False


def _has_tokens(call: Mapping[str, Any]) -> bool:
    """Whether the real tokens of a call are known (see `token_masks`). Else it counts as one sample, as in PEFT."""
    return any(isinstance(call.get(key), Tensor) for key in ("input_ids", "inputs_embeds"))


def _can_wait(call: Mapping[str, Any]) -> bool:
    """Whether a call gives the same output when it is run later: it must depend neither on a cache nor on autocast."""
    plain = all(value is None or isinstance(value, (Tensor, int, float, str)) for value in call.values())
    devices = {value.device.type for value in call.values() if isinstance(value, Tensor)}
    return plain and _has_tokens(call) and not any(torch.is_autocast_enabled(kind) for kind in devices)


@contextmanager
def _forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the model's `forward` for a `with` block. Accelerate may have replaced it before."""
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _exists(file: str | Path | None) -> bool:
    return file is not None and os.path.exists(file) and os.path.getsize(file) > 0


def _read(file: str | Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of these names, on the CPU, read when they are used. Raises CordaError if the file has others."""
    try:
        mapped = zipfile.is_zipfile(file)  # the format before torch 1.6 is not
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # other bytes may raise anything
        raise CordaError(f"{file} is not a file of tensors, as preprocess_corda writes it") from error
    for name in names:
        if not isinstance(tensors, dict) or not isinstance(tensors.get(name), Tensor):
            raise CordaError(f"{file} holds no tensor {name}: it was written for another model or other target_modules")
    return tensors


def _check_folder(file: Path) -> None:
    """Raises CordaError if the file cannot be written. To be called before the long work."""
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CordaError(f"{file} cannot be written: {folder} is not a folder that may be written to")


def _write(file: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file whole or not at all."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        torch.save(dict(tensors), partial)
