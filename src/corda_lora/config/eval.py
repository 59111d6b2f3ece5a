"""What is measured: `corda eval`."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from .data import DataConfig, check_different
from .values import CordaError, Count, NonNegative, check_fields, check_pattern, short, split


@dataclass
class JudgeConfig:
    """Who judges the answers of the task mt_bench: a model at an endpoint that speaks OpenAI's protocol. If it asks for
    a key, put it into the environment variable OPENAI_API_KEY.

    Args:
        url: the endpoint, such as https://api.openai.com/v1, to which /chat/completions is added. Without it, answers
            are written, and not judged.
        model: the judge's name at the endpoint.
        price: of a million tokens, shown and said alike: what the judging costs at most is said before it begins.
        folder: the directory of answers and judgments, in FastChat's form. What is there is not done again.
    """

    url: str = ""
    model: str = ""
    price: NonNegative | None = None
    folder: Path = Path("mt_bench")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.url and not re.match(r"https?://[^/\s]", self.url):
            raise CordaError(f"judge.url is {short(self.url)}, but must begin with http:// or https://")
        try:
            _ = urlsplit(self.url).port
        except ValueError as error:
            raise CordaError(f"judge.url is {short(self.url)}, which is no address: {error}") from error
        if bool(self.url) != bool(self.model):
            raise CordaError("a judge is an endpoint and a model there: give both judge.url and judge.model")


@dataclass
class EvalConfig:
    """What is measured. Data is a name on the hub or a file, a mapping of DataConfig's options, or a list of these.

    Args:
        keep: samples of the ability to keep. Measured: drift, and the loss of the responses.
        learn: samples of the task. Measured: the loss, and exact match if `exact_match` is set.
        text: running text. Measured: perplexity, and drift over every token.
        choices: multiple-choice questions: rows with a list `choices` and the right choice as `response`.
        prompt: template of the prompt for all of this data but running text, unless the data has its own: keep.prompt,
            learn.prompt, choices.prompt.
        response: template of the response, likewise.
        exact_match: how a greedy answer is compared with the response. `text` compares the whole texts. A regular
            expression, such as "#### (-?[0-9,.]+)", compares the first group of its last match.
        max_new_tokens: the number of tokens at which a greedy answer is cut.
        batch_tokens: the number of tokens in a forward.
        tasks: names of benchmarks, as a list or with commas between: see docs/benchmarks.md.
        data_dir: a directory with the benchmarks' data, which is else taken from the hub.
        limit: the number of samples of each benchmark, the first ones. Default: all.
        judge: who judges the answers of mt_bench: see JudgeConfig.
    """

    keep: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    learn: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    text: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    choices: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    prompt: str = ""
    response: str = ""
    exact_match: str = ""
    max_new_tokens: Count = 64
    batch_tokens: Count = 8192
    tasks: str | list[str] = field(default_factory=list)
    data_dir: Path | None = None
    limit: Count | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        self.tasks = split(self.tasks)
        if self.limit and not self.tasks:
            raise CordaError("limit is of benchmarks: give tasks, or samples of the data (such as --keep.samples)")
        if self.exact_match != "text":
            check_pattern("exact_match", self.exact_match)

    def data(self, kind: str) -> list[DataConfig]:
        """The data of "keep", "learn", "text" or "choices", however it was given.

        Raises CordaError if two are the same samples."""
        value = getattr(self, kind)
        datas = value if isinstance(value, list) else [] if value is None else [value]
        configs = [DataConfig(data) if isinstance(data, str) else data for data in datas]
        if kind != "text":
            configs = [
                replace(c, prompt=c.prompt or self.prompt, response=c.response or self.response) for c in configs
            ]
        check_different(kind, configs)
        return configs
