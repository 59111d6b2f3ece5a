"""Fine-tune language models without making them forget: CorDA for Hugging Face models.

`get_corda_model(model, CordaConfig(mode="kpm", r=128), batches)` is a `PeftModel`, to train as ever.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .config import CordaConfig, CordaError
from .version import __version__

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

__all__ = [
    "CordaConfig",
    "CordaError",
    "HoldCallback",
    "KeepCallback",
    "__version__",
    "get_corda_model",
    "hold",
    "load_adapter",
]


def get_corda_model(
    model: "nn.Module",
    config: CordaConfig,
    batches: "Iterable[Any] | Mapping[str, Any]" = (),
    progress: bool = True,
    tokenizer: Any = None,
) -> "PeftModel":
    """Adapt a model to a context: a `PeftModel` to train as ever. (CorDA, arXiv 2406.05223 and 2506.13187.)

    The model's own weights are not changed, and the adapted model's first output is the model's to the last bit. With
    `config.quantization` the model becomes one in 4 bits, in place, and the adapter fits that one only.
    `save_pretrained` writes an ordinary LoRA that plain PEFT loads on the original model (rank 2r, or r with the
    splits `anchored` and `seeded`); `load_adapter(..., trainable=True)` goes on training it.

    Args:
        model: a transformers model, on any device.
        config: see `CordaConfig`.
        batches: the context: any iterable of dicts of what the model's forward takes, such as a DataLoader. Padding is
            excluded through `attention_mask`. A few hundred samples of the ability to keep (kpm) or to learn (ipm), in
            each of the rounds if there are several (preset corda++): batches that follow one another make a round.
            Texts, chats (lists of messages) and the rows of a `datasets.Dataset` do, too, also with images: see
            docs/data.md and docs/vision.md. Of several abilities, a mapping of their names to such contexts, or to
            pairs of a context and its weight (else 1).
        progress: show a progress bar.
        tokenizer: for a context of texts, chats or rows; or the processor of a vision-language model. Default: that of
            the model's name.

    Returns:
        the adapted model. If `config.keep` is above 0, it has that as an attribute, and in `statistics` what predicts
        the drift that an adapter causes on the context: see `KeepCallback`.

    Raises:
        CordaError: see `preprocess`.
    """
    from .adapters.lora import install
    from .adapters.quantize import quantize_in_place
    from .models.targets import check_bare
    from .preprocess.pipeline import preprocess

    check_bare(model)
    start = preprocess(model, config, _context(model, config, batches, tokenizer), progress)
    if config.quantization:
        quantize_in_place(model, start)
    adapted: Any = install(model, start)
    if start.statistics is not None:
        adapted.statistics, adapted.keep = start.statistics, config.keep
    return adapted


def _context(model: "nn.Module", config: CordaConfig, batches: Any, tokenizer: Any) -> Any:
    """A context, or batches, as `preprocess` takes them.

    Raises CordaError if weights are negative, not finite, or sum to zero."""
    from .config.data import weights_of
    from .data.batches import as_batches
    from .data.overview import check_fit
    from .data.samples import UNCUT
    from .models.loading import tokenizer_of, with_processor
    from .models.seeing import reads_images
    from .preprocess.context import Ability, Context, has_decoder, together

    if isinstance(batches, Mapping) and "input_ids" not in batches:
        pairs = {name: given if isinstance(given, tuple) else (given, 1.0) for name, given in batches.items()}
        weights = weights_of({name: weight for name, (_, weight) in pairs.items()})
        contexts = [_context(model, config, list(given), tokenizer) for given, _ in pairs.values()]
        contexts = [each if isinstance(each, Context) else Context(each) for each in contexts]
        return together(contexts, [Ability(name, weight) for name, weight in weights.items()])
    assert config.rounds is not None
    if hasattr(tokenizer, "image_processor"):
        tokenizer = with_processor(tokenizer)
    length = {"max_length": UNCUT} if reads_images(getattr(model, "config", None)) else {}  # images are never cut
    context: Any
    context, rounds = as_batches(
        batches, lambda: tokenizer or tokenizer_of(model), config.rounds, has_decoder=has_decoder(model), **length
    )
    if rounds:  # it was no batches
        check_fit(model, (ids for batch in context for ids in batch["input_ids"].tolist()))
        context = Context(context, rounds)
    return context


def __getattr__(name: str) -> Any:  # torch and PEFT are imported when first needed: `corda --help` does without
    if name == "load_adapter":
        from .adapters.lora import load_adapter

        return load_adapter
    if name in ("hold", "HoldCallback"):
        from .adapters import held

        return getattr(held, name)
    if name == "KeepCallback":
        from .training.keeping import KeepCallback

        return KeepCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
