"""Both sides of every layer, of a model that does not fit: forward and then backward, one block at a time.

The forward is `lockstep`'s, and what each block is given is parked for every batch. The tail, which is what a model
computes after its last block, gives the gradient of log p(y) at that block's output. Then the blocks are run once more,
the last one first: each is recomputed from its parked input, and takes the gradient from its output to its input, where
the block before it goes on. So the weights of one block are needed at a time, and the activations of one batch in it.
The numbers are those of one backward through the whole model.

The blocks must form a chain: each is given what the block before it returned, and the tail reads no block but the last.
A model that is built otherwise is refused.

`run_back` is the one backward through the whole model, where this fits.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.second_order import drawn_log_likelihood, uniform
from ..config import CordaError
from ..devices import synchronize
from ..models.lockstep import find_blocks, lockstep, on_device, tensors_of, visits
from ..models.seeing import image_side
from ..models.targets import require_causal
from ..models.weights import weight_shape
from ..progress import track
from .collect import Collector, Gradients, Group, frozen
from .context import Batch, Context, answer_mask
from .walk import Place, inputs_of, pixels_of, tensors_beside, tensors_that_see

NO_ANSWER = "no sample of the context has a response, so nothing tells what its answers hang on"
LOGITS = 2**25  # so many numbers the output head computes at a time


class StepBack(NamedTuple):
    """Target layers whose weights are on the device until the next step: as `Step`, with the other side.

    Attributes:
        gradients: D (d_out, d_out) of each layer. A caller that pops them frees their memory.
    """

    names: list[str]
    groups: list[Group] | None
    gradients: dict[str, Tensor]


def walk_back(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    context: Context,
    place: Place,
    finished: Collection[str] = (),
    on_block: Callable[[], None] = lambda: None,
    listeners: tuple[Collector, Gradients] | None = None,
) -> Iterator[StepBack]:
    """Run the context forward through the model and back, and yield a step for each block, the last block first, with D
    of its target layers beside their covariances. The last step has the target layers that no batch ran: these have
    groups of one with no covariance.

    D (m, m) of a layer is the mean of g gᵀ over the tokens that its covariance counts, of all rounds. Here g is the
    gradient at the layer's output of Σ log p(y), and y is drawn from the model for each answer (see `answer_mask`).

    Args:
        finished: layers whose statistics are not needed. Gradients go through them, but nothing is summed up.
        on_block: called when all batches have gone forward through a block.
        listeners: in place of the default ones; they must be made for this context.

    Raises CordaError: the model is no causal language model; a target is outside of the blocks; the blocks form no
    chain; the context has no answer; activations or gradients have NaN or Inf.
    """
    inside = targets_inside(model, targets)
    blocks = find_blocks(model, list(targets))
    if listeners is None and not any(bool(answer_mask(batch).any()) for batch in context.batches):
        raise CordaError(NO_ANSWER)
    device, finished = place.device, set(finished)
    if listeners is None:
        collector = Collector(model, {n: m for n, m in targets.items() if n not in finished}, context)
        listeners = collector, Gradients(collector)
    collector, gradients = listeners
    seeing = tensors_that_see(model)
    always = [t for t in tensors_beside(model, blocks.values(), to_end=False) if t not in seeing]
    inputs = inputs_of(model, context.batches, device, pixels=False)
    with frozen(model), on_device(always, device, place.stored):
        run = _forward(model, list(blocks.values()), inputs, seeing, place, on_block)
        head = [t for t in tensors_beside(model, blocks.values(), to_end=True) if t not in seeing]
        with on_device([*head, *seeing], device, place.stored):
            passed = _tail(model, context, run, place)  # gradients at the output of the block that is next
        order = list(run.calls)[::-1]
        with (
            collector.listening(),
            gradients.listening(),
            visits(order, device, place.stored, place.processes) as visit,
        ):
            for block in order:
                with visit(block):
                    for index, call in enumerate(run.calls.pop(block)):
                        collector.start(index)
                        passed[index] = _back(block, call, run.states[index].pop(), passed[index], place)
                    names = inside.pop(block)
                    if names and finished.issuperset(names):
                        yield StepBack(names, None, {})
                        continue
                    groups = collector.take(names)
                    seen = [name for members, _ in groups for name in members]
                    Ds = gradients.take(seen)
                    if place.park is not None:  # one matrix is needed on the device at a time
                        groups = [Group(members, [place.park(C) for C in Cs]) for members, Cs in groups]
                        Ds = {name: place.park(D) for name, D in Ds.items()}
                        synchronize(device)  # the copies must be complete before anyone reads them
                    inside[block] = [name for name in names if name not in seen]
                    yield StepBack(seen, groups, Ds)
    if unseen := [name for names in inside.values() for name in names]:
        with on_device([t for name in unseen for t in tensors_of(targets[name])], device, place.stored):
            yield StepBack(unseen, None if finished.issuperset(unseen) else [Group([n], []) for n in unseen], {})


def targets_inside(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[nn.Module, list[str]]:
    """The target layers of each block.

    Raises CordaError: the model is no causal language model; a target is outside of the blocks."""
    require_causal(model, "a context runs backward (keep, orientation two_sided) through these alone")
    blocks = find_blocks(model, list(targets))
    inside = {block: [n for n in targets if n.startswith(f"{name}.")] for name, block in blocks.items()}
    if outside := set(targets).difference(*inside.values()):
        raise CordaError(
            f"{min(outside)} is outside of the model's blocks, so what its outputs do to the answers is not known: "
            "leave it out of target_modules"
        )
    return inside


def run_back(model: nn.Module, targets: Mapping[str, nn.Module], context: Context, progress: bool = False) -> StepBack:
    """The same of a model that fits, with one backward a batch: one step with the layers that were run.

    Raises CordaError: the model is no causal language model; a target is `unknown_layer`; activations or gradients have
    NaN or Inf.
    """
    require_causal(model)
    if unknown := unknown_layer(model, targets):
        raise CordaError(f"{unknown}: leave it out of target_modules")
    device = next(model.parameters()).device
    collector = Collector(model, targets, context)
    gradients = Gradients(collector)
    inputs = inputs_of(model, context.batches, device)
    with frozen(model), collector.listening(), gradients.listening(), torch.enable_grad():
        for number, batch in enumerate(track(context.batches, "the context", progress)):
            collector.start(number)
            answers = answer_mask(batch).to(device)
            columns = answers.any(0).nonzero().flatten()  # only these go through the output head
            logits = model(**inputs[number], logits_to_keep=columns).logits[answers[:, columns]]  # (a, vocabulary)
            drawn_log_likelihood(logits, uniform(len(logits), number)).backward()
            del logits  # its graph holds the hooks, and these hold the sums
    groups = collector.take(list(targets))
    seen = [name for members, _ in groups for name in members]
    return StepBack(seen, groups, gradients.take(seen))


def unknown_layer(model: nn.Module, targets: Mapping[str, nn.Module]) -> str | None:
    """A sentence on the first target that is not given the tokens of a text one by one, so that it has no statistics:
    an output head, which runs at the answers alone, or a layer that sees images. None if there is none."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    head, sees = getattr(head, "base_layer", head), image_side(model)
    for name, module in targets.items():
        if module is head or sees(name):
            what = "the model's output head" if module is head else "outside of the language model"
            return f"{name} is {what}, whose outputs' effect on the answers is not predicted"
    return None


class _Call(NamedTuple):
    """How a block was called. What is at `key` of its arguments, an index or a name, comes from the block before."""

    key: int | str
    args: list[Any]
    kwargs: dict[str, Any]


@dataclass
class _Run:
    """What a forward leaves behind.

    Attributes:
        inputs: the batches on the device.
        calls: for each block, in the order in which they were run, how each batch called it.
        states: for each batch the input of each block and the output of the last, parked.
        forms: for each block the number of things that it returns, or 0 where it returns a tensor.
    """

    inputs: list[Batch]
    calls: dict[nn.Module, list[_Call]] = field(default_factory=dict)
    states: list[list[Tensor]] = field(default_factory=list)
    forms: dict[nn.Module, int] = field(default_factory=dict)


def _forward(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    inputs: list[Batch],
    seeing: Collection[Tensor],
    place: Place,
    on_block: Callable[[], None],
) -> _Run:
    """Args: seeing: tensors that are on the device only until all batches are at the first block (see `walk`)."""
    run = _Run(inputs, states=[[] for _ in inputs])
    returned: dict[int, weakref.ref[Tensor]] = {}  # batch -> what its last block returned
    batch = 0

    def start(index: int) -> None:
        nonlocal batch
        batch = index

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: dict[Any, Any] = dict(enumerate(args)) | kwargs
        key = next(k for k, x in given.items() if isinstance(x, Tensor) and x.is_floating_point())
        if batch not in returned:
            run.states[batch].append(_kept(given[key], place))
        elif returned[batch]() is not given[key]:
            raise CordaError(
                f"the blocks of {type(model).__name__} do not form a chain, so gradients cannot be taken block by block"
            )
        given[key] = None
        call = _Call(key, [given[i] for i in range(len(args))], {name: given[name] for name in kwargs})
        run.calls.setdefault(block, []).append(call)

    def leave(block: nn.Module, args: Any, output: Any) -> None:
        run.forms[block] = 0 if isinstance(output, Tensor) else len(output)
        x = _first(output)
        returned[batch] = weakref.ref(x)
        run.states[batch].append(_kept(x, place))

    # These hooks come before those of `lockstep`, which pauses in its own.
    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with visits(blocks, place.device, place.stored, place.processes) as visit, ExitStack() as at_first:
            at_first.enter_context(on_device([*seeing, *pixels_of(inputs)], place.device, place.stored))
            for block, advance in lockstep(model, blocks, inputs, start, park=place.park):
                at_first.close()
                with visit(block):
                    advance()
                on_block()
    finally:
        for hook in hooks:
            hook.remove()
    return run


def _tail(model: nn.Module, context: Context, run: _Run, place: Place) -> list[Tensor]:
    """The gradient of Σ log p(y) at the last block's output, parked, for each batch.

    The model's own forward is run with blocks that do nothing: the last one returns its output of before, the others
    NaN, which shows where anything but the last block is read. Only what is at an answer goes through the output head,
    a part of it at a time.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    gradients = []
    for index, (batch, inputs) in enumerate(zip(context.batches, run.inputs)):
        number, x = context.begin + index, run.states[index].pop().to(place.device).requires_grad_()  # (b, s, d)
        x.grad = torch.zeros_like(x)
        answers = answer_mask(batch).nonzero().to(place.device)  # (a, 2)
        drawn = uniform(len(answers), number).to(place.device)
        part = max(1, LOGITS // weight_shape(head)[0])
        for where, u in zip(answers.split(part), drawn.split(part)):
            rows, columns = where.T
            hook = head.register_forward_pre_hook(lambda head, args: (args[0][rows, columns][None],))  # noqa: B023
            try:
                pixels = on_device(pixels_of([inputs]), place.device)
                with _skipped(run.forms, x), pixels, torch.enable_grad():
                    logits = model(**inputs).logits[0]  # (a', vocabulary)
                    log_likelihood = drawn_log_likelihood(logits, u)
            finally:
                hook.remove()
            if not bool(log_likelihood.isfinite()):
                name = type(model).__name__
                raise CordaError(
                    f"the head of {name} reads more than its last block, so gradients cannot be taken block by block"
                    if bool(x.isfinite().all())
                    else f"Invalid value found in the output of {name}'s last block, batch {number}: NaN or Inf"
                )
            log_likelihood.backward()
        gradients.append(_kept(x.grad, place))
    return gradients


@contextmanager
def _skipped(forms: dict[nn.Module, int], x: Tensor) -> Iterator[None]:
    """For a `with` block the last of some blocks returns x, and the others NaN, without doing anything."""
    before = {block: vars(block).get("forward") for block in forms}
    last = next(reversed(forms))
    nothing = torch.full_like(x, torch.nan, requires_grad=False)
    for block, form in forms.items():
        output = x if block is last else nothing
        value = (output, *[None] * (form - 1)) if form else output
        block.forward = lambda *args, value=value, **kwargs: value
    try:
        yield
    finally:
        for block, forward in before.items():
            del block.forward
            if forward is not None:  # accelerate's
                block.forward = forward


def _back(block: nn.Module, call: _Call, x: Tensor, gradient: Tensor, place: Place) -> Tensor:
    """The gradient at a block's input, parked, from its input x and the gradient at its output, both parked."""
    x = x.to(place.device).requires_grad_()

    def there(key: int | str, value: Any) -> Any:
        return x if key == call.key else value.to(place.device) if isinstance(value, Tensor) else value

    args = [there(key, value) for key, value in enumerate(call.args)]
    kwargs = {key: there(key, value) for key, value in call.kwargs.items()}
    with torch.enable_grad():
        y = _first(block(*args, **kwargs))
    y.backward(gradient.to(place.device))
    assert x.grad is not None
    return _kept(x.grad, place)


def _first(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first of several."""
    x = output if isinstance(output, Tensor) else output[0]
    assert isinstance(x, Tensor)
    return x


def _kept(x: Tensor, place: Place) -> Tensor:
    """A copy, parked: a block may change its input in place."""
    return x.clone() if place.park is None else place.park(x)
