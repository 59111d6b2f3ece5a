"""Reads YAML recipes. Refuses a key that is given twice, and aliases that expand to more than a recipe ever holds."""

from typing import Any

import yaml
from jsonargparse import get_loader

_load = get_loader("yaml")
MOST_VALUES = 100_000


def load_recipe(text: str) -> Any:
    """The value of a YAML text, read as jsonargparse reads it.

    Raises yaml.YAMLError if the text is no YAML, a mapping has a key twice, or the aliases expand too far.
    """
    try:
        _expanded_size(yaml.compose(text, Loader=yaml.SafeLoader), {}, set())
    except RecursionError as error:
        raise yaml.YAMLError("the values are nested too deep") from error
    return _load(text)


def _expanded_size(node: yaml.Node | None, sizes: dict[int, int], outer: set[int]) -> int:
    """The number of values under a node when every alias is replaced by its values.

    Args:
        sizes: the sizes that are known, by the node's id.
        outer: ids of the nodes around this one.
    """
    if id(node) in outer:
        raise yaml.YAMLError("an alias (*name) stands inside the value that it names")
    if not isinstance(node, yaml.CollectionNode) or id(node) in sizes:
        return sizes.get(id(node), 1)
    children = node.value
    if isinstance(node, yaml.MappingNode):
        keys = [(key.tag, key.value) for key, _ in children if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(
                f"the key {min(repeated)[1]!r} is given twice (line {node.start_mark.line + 1} and on)"
            )
        children = [part for pair in children for part in pair]
    size = 1 + sum(_expanded_size(child, sizes, outer | {id(node)}) for child in children)
    if size > MOST_VALUES:
        raise yaml.YAMLError(f"the aliases (*name) expand to more than {MOST_VALUES:,} values")
    sizes[id(node)] = size
    return size
