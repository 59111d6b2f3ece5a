"""What is looked at in a model: `corda inspect`."""

from dataclasses import dataclass, field, replace
from typing import Literal

from .data import DataConfig, NamedConfig, check_different, check_names
from .values import CordaError, Count, CountOrZero, Positive, check_fields


@dataclass
class InspectConfig:
    """What is looked at in a model. Data is a name on the hub or a file, or a mapping of DataConfig's options.

    Args:
        context: samples that show an ability. Give --context several times to compare several. Options of one follow
            it: --context.prompt TEMPLATE, --context.ability NAME.
        prompt: template of the prompt for all contexts without one of their own.
        response: template of the response, likewise.
        samples: the number of samples of each context, drawn with the seed. Of several numbers, such as [32,256], the
            largest is taken, and truncation is also measured with covariances of fewer.
        max_length: the number of tokens at which a sample is cut, where its data has no other number.
        layers: the layers whose spectra and covariances are shown: names or endings of names. Default: those of the
            middle block.
        levels: how many of the smallest components of every layer are discarded; a number below 1 is a share of them.
            The loss is measured at each, by plain SVD, ASVD and CO-SVD with each context. Default: none.
        text: running text on which that is measured. Default: samples of each context that were not shown.
        held_out: the number of such samples, or of windows of the text.
        rounds: the number of independent draws of each context. With several, components are also discarded by CO-SVD+,
            where each layer takes its most compact covariance, and by CO-SVD++, which also shares them out among the
            layers by compactness, with as many parameters in all.
        two_sided: also discard components in the two-sided metric. For it the contexts run backward, too.
        damping: λ of the regularized covariance C + λ·mean(diag C)·I.
        skip_tokens: the number of first tokens of each sample to leave out of the covariances.
        batch_tokens: the number of tokens in a forward.
        park: where hidden states of samples wait for the next block. `auto` is the first of the others with room.
        device: the device that runs and decomposes the blocks. Default: the accelerator, if there is one.
    """

    context: str | DataConfig | NamedConfig | list[str | NamedConfig] = field(default_factory=list)
    prompt: str = ""
    response: str = ""
    samples: Count | list[Count] = 256
    max_length: Count = 512
    layers: str | list[str] = field(default_factory=list)
    levels: Positive | list[Positive] = field(default_factory=list)
    text: str | DataConfig | None = None
    held_out: Count = 32
    rounds: Count = 1
    two_sided: bool = False
    damping: Positive = 0.01
    skip_tokens: CountOrZero = 0
    batch_tokens: Count = 4096
    park: Literal["auto", "device", "cpu", "disk"] = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.samples = sorted(set(self.samples if isinstance(self.samples, list) else [self.samples]))
        self.layers = self.layers if isinstance(self.layers, list) else [self.layers]
        self.levels = sorted(set(self.levels if isinstance(self.levels, list) else [self.levels]))
        if not self.samples:
            raise CordaError("samples is an empty list: give how many samples of a context are shown")
        if broken := [level for level in self.levels if level > 1 and level != int(level)]:
            raise CordaError(f"a level is {broken[0]:g}, but must be a share below 1, or a whole number of components")
        if self.levels and self.levels[0] < 1 <= self.levels[-1]:
            raise CordaError(
                f"levels are shares below 1 or counts of components, not both: {self.levels[0]:g} is a share, "
                f"{self.levels[-1]:g} a count"
            )
        asked = {"two_sided": self.two_sided, "rounds": self.rounds > 1, "text": self.text is not None}
        asked |= {"a second number of samples": len(self.samples) > 1}
        for name in (name for name, given in asked.items() if given and not self.levels):
            raise CordaError(f"{name} is of the components that levels discard: give levels, or leave it out")

    def contexts(self) -> list[DataConfig]:
        """The contexts, however they were given, with the templates and the number of samples that they do not set.

        Raises CordaError if two abilities have one name, or the same samples.
        """
        given = self.context if isinstance(self.context, list) else [self.context]
        configs = [self._cut(data) for data in given]
        assert isinstance(self.samples, list)
        check_names([c.ability for c in configs if isinstance(c, NamedConfig) and c.ability])
        contexts = [
            replace(
                c,
                prompt=c.prompt or self.prompt,
                response=c.response or self.response,
                samples=c.samples or self.samples[-1],
            )
            for c in configs
        ]
        check_different("context", contexts)
        return contexts

    def running_text(self) -> DataConfig | None:
        """The text, however it was given."""
        return None if self.text is None else self._cut(self.text)

    def _cut(self, given: str | DataConfig) -> DataConfig:
        data = DataConfig(given) if isinstance(given, str) else given
        return replace(data, max_length=self.max_length) if data.max_length == DataConfig.max_length else data
