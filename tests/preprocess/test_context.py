"""Which tokens of a batch are real, whatever form the mask has, and what is said where padding would count."""

import copy
import warnings

import pytest
import tiny
import torch
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from corda_lora import CordaConfig, CordaError, get_corda_model
from corda_lora.data.batches import as_batches
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.context import answer_mask, token_masks

LENGTHS, LONGEST = [9, 4, 12, 1], 12


def four_dimensional(mask, form):
    """The mask that transformers makes of a padding mask (b, s), (b, 1, s, s)."""
    kind, _, bidirectional = form.partition(" ")
    model = tiny.build("llama")
    model.config._attn_implementation = "sdpa" if kind == "sdpa" else "eager"
    embeds = torch.zeros(*mask.shape, 32)
    make = create_bidirectional_mask if bidirectional else create_causal_mask
    more = {} if bidirectional else {"past_key_values": None, "position_ids": None}
    made = make(config=model.config, inputs_embeds=embeds, attention_mask=mask, **more)
    if kind == "int":
        return (made > -1).long()
    return made


@pytest.mark.parametrize("form", ["eager", "sdpa", "int", "eager bidirectional", "sdpa bidirectional"])
@pytest.mark.parametrize("left", [False, True])
def test_masks_of_queries_and_keys(left, form):
    for lengths in (LENGTHS, [LONGEST] * 4, [3, 12, 12, 12]):
        ids, mask = tiny.padded(lengths, LONGEST, 0, left)
        made = four_dimensional(mask, form)
        if made is None:  # of some forms, where nothing is padded
            assert lengths == [LONGEST] * 4
            continue
        assert made.ndim == 4
        for given in (made, made[:, 0]):
            real, _ = token_masks({"input_ids": ids, "attention_mask": given})
            assert torch.equal(real, mask.bool())


def test_a_row_that_attends_to_everything_for_want_of_a_token():
    """As transformers writes padded queries for kernels that would give NaN."""
    ids, mask = tiny.padded(LENGTHS, LONGEST, 0, left=True)
    made = four_dimensional(mask, "sdpa") & mask[:, None, None, :].bool()
    made = made | ~made.any(3, keepdim=True)
    assert made.all(3).any()
    assert torch.equal(token_masks({"input_ids": ids, "attention_mask": made})[0], mask.bool())


def test_covariances_are_those_of_the_padding_mask():
    model, batches = tiny.build("llama"), tiny.batches()
    targets = find_targets(model, "all-linear")
    others = [batch | {"attention_mask": four_dimensional(batch["attention_mask"], "eager")} for batch in batches]
    expected, found = (tiny.covariances_of(model, targets, given) for given in (batches, others))
    for name in targets:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1, 12, 12)])
def test_a_mask_of_another_shape(shape):
    ids, _ = tiny.padded(LENGTHS, LONGEST, 0)
    with pytest.raises(CordaError, match="2 or 4 dimensions are read"):
        token_masks({"input_ids": ids, "attention_mask": torch.ones(shape)})


def said_of(batches, model=None):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_corda_model(model or tiny.build("llama"), CordaConfig(r=4), batches, progress=False)
    return [str(w.message) for w in said if "padding tokens" in str(w.message)]


@pytest.mark.parametrize("left", [False, True])
def test_padding_that_no_mask_hides_is_said(left):
    ids, mask = tiny.padded(LENGTHS, LONGEST, 0, left)
    (said,) = said_of([{"input_ids": ids}])
    assert said.startswith("3 of 4 samples of the context begin or end in padding tokens (id 0) that no attention_mask")
    assert said_of([{"input_ids": ids, "attention_mask": torch.ones_like(mask)}])
    assert not said_of([{"input_ids": ids, "attention_mask": mask}])


def test_the_end_of_a_text_is_no_padding_where_both_have_one_token():
    model = tiny.build("llama")
    model.config.pad_token_id = None
    copies = [model, copy.deepcopy(model)]
    ids, _ = tiny.padded([12] * 4, LONGEST, 0)
    ids[0, -1] = ids[1, -1] = 2  # </s>
    assert not said_of([{"input_ids": ids}], copies[0])
    ids[0, -2] = 2
    (said,) = said_of([{"input_ids": ids}], copies[1])
    assert said.startswith("1 of 4 samples of the context begin or end in padding tokens (id 2)")


def test_rows_of_tokens_that_were_padded():
    rows = [{"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}, {"input_ids": [8, 9, 5, 6, 7]}]
    batches, _ = as_batches(rows, lambda: None)
    found = [ids[mask.bool()].tolist() for batch in batches for ids, mask in zip(*batch.values())]
    assert sorted(found) == [[5, 6, 7], [8, 9, 5, 6, 7]]
    (said,) = said_of([{"input_ids": [5, 6, 7, 0, 0]}, *rows])
    assert said.startswith("1 of 3 samples")


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [[5, 6], [7, 8]]},
        {"input_ids": [[5, 6], [7]]},
        {"input_ids": []},
        {"input_ids": ["a"]},
        {"input_ids": [0.5, 1.5]},
        {"input_ids": None},
        {"input_ids": [5, 6], "attention_mask": [1]},
        {"other": [5]},
        "text",
    ],
)
def test_rows_that_are_no_tokens(row):
    rows = [{"input_ids": [5, 6]}, row]
    with pytest.raises(CordaError, match="item 1 of the context needs input_ids"):
        as_batches(rows, lambda: None)


def test_labels_of_another_shape_than_the_tokens_are_a_sentence():
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.ones(2, 4, dtype=torch.long)}
    with pytest.raises(CordaError, match=r"labels of shape \(2, 4\) for tokens of shape \(2, 5\)"):
        answer_mask(batch)
