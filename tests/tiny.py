"""Tiny random models of each family, with padded batches for them."""

from collections.abc import Callable, Iterator

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from corda_lora.config import CordaConfig
from corda_lora.data.batches import Encoded
from corda_lora.preprocess.context import Context
from corda_lora.preprocess.layer import (
    LayerRecord,
    LayerStart,
    decompose_layer,
    keep_components,
    seen_from,
    start_layer,
)
from corda_lora.preprocess.walk import Place, Step, walk

VOCABULARY = 96
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {k: v for k, v in SIZE.items() if k != "num_key_value_heads"} | {"num_labels": 3}
KINDS = ["sliding_attention", "full_attention"]
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}

# The families that the README names.
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE, tie_word_embeddings=False)),
    "llama_tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "qwen2_biased": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZE)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZE, head_dim=8)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZE, sliding_window=4)),
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**SIZE, head_dim=8, sliding_window=4, layer_types=KINDS, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=4, layer_types=KINDS, query_pre_attn_scalar=8)
    ),
    "gpt2_conv1d": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, n_inner=48)
    ),
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**ENCODER)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**ENCODER)),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
    "mixtral": lambda: t.MixtralForCausalLM(
        t.MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**SIZE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}

# Families with something unusual: fused experts, layers that PEFT does not take, layers called twice.
MORE_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "deepseek_v2": lambda: t.DeepseekV2ForCausalLM(
        t.DeepseekV2Config(**SIZE | {"num_key_value_heads": 4}, **LATENT, **EXPERTS, n_shared_experts=1)
    ),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(
            **SIZE | {"num_key_value_heads": 4}, **LATENT, **EXPERTS, n_shared_experts=1, n_group=1, topk_group=1
        )
    ),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(
            **SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24
        )
    ),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(
            **SIZE, head_dim=8, sliding_window=4, layer_types=KINDS, num_local_experts=4, num_experts_per_tok=2
        )
    ),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**SIZE)),
    "falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=24,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(**{k: v for k, v in SIZE.items() if k != "num_key_value_heads"})
    ),
    "mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            time_step_rank=6,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "lfm2": lambda: t.Lfm2ForCausalLM(
        t.Lfm2Config(**SIZE, layer_types=["conv", "full_attention"], block_multiple_of=8)
    ),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=3, pad_token_id=0
        )
    ),
    "deberta": lambda: t.DebertaForSequenceClassification(t.DebertaConfig(**ENCODER, **RELATIVE)),
    "deberta_v2": lambda: t.DebertaV2ForSequenceClassification(
        t.DebertaV2Config(**ENCODER, **RELATIVE, share_att_key=True, position_buckets=4)
    ),
    "modernbert": lambda: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**ENCODER, local_attention=8, global_attn_every_n_layers=2)
    ),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    ),
}


def llama_for_nf4(**size: int) -> nn.Module:
    """Its rows are whole numbers of NF4's blocks of 64."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZE | wide | size))


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **size: int) -> nn.Module:
    """A model of random weights and biases; `size` is for llama_for_nf4."""
    torch.manual_seed(seed)
    model = llama_for_nf4(**size) if family == "llama_for_nf4" else (FAMILIES | MORE_FAMILIES)[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model.to(dtype).eval()


def padded(lengths: list[int], longest: int, seed: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Random ids and their attention mask, (b, longest)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return ids.masked_fill(mask == 0, 0), mask


def batches(family: str = "llama", equal: bool = False) -> list[dict[str, Tensor]]:
    """Three batches of different shapes, the first two with padding. `equal`: a decoder sees as many tokens as
    its encoder."""
    made = []
    for seed, (lengths, longest, answers) in enumerate(
        [([9, 4, 12], 12, [3, 7, 5]), ([5, 10], 10, [6, 2]), ([8] * 4, 8, [4] * 4)]
    ):
        ids, mask = padded(lengths, longest, seed)
        batch = {"input_ids": ids, "attention_mask": mask}
        if family in ("t5", "bart"):
            labels, label_mask = padded(answers, longest if equal else max(answers), 10 + seed)
            batch["labels"] = labels.masked_fill(label_mask == 0, -100)
        made.append(batch)
    return made


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits(model: nn.Module, family: str = "llama") -> Tensor:
    """Logits of the first batch."""
    return model(**batches(family)[0]).logits


def start_of(W: Tensor, C: Tensor | None, config: CordaConfig, D: Tensor | None = None) -> LayerStart:
    """One weight (m, n), its covariance (n, n) and D (m, m) of its outputs, all the way to the adapter's start."""
    seen = seen_from(W, D, config)
    U, sigma = decompose_layer(seen.Z if seen else W, C, config)
    return start_layer(keep_components(W, C, U, sigma, config.r, config, LayerRecord(), seen), config.r, config)


def steps(model: nn.Module, targets: dict[str, nn.Module], batches: list[dict], **context) -> Iterator[Step]:
    """`walk` on the CPU; `context`: see `Context`."""
    return walk(model, targets, Context(batches, **context), Place(torch.device("cpu")))


def covariances_of(model: nn.Module, targets: dict[str, nn.Module], batches: list[dict], **context):
    """C of every layer that got any, in one round."""
    walked = steps(model, targets, batches, **context)
    return {n: Cs[0] for _, groups in walked for members, Cs in groups or [] for n in members if Cs}


def answered(count=20, seed=0):
    """Samples of 4 to 11 tokens, of which the last 1 to 4 are the answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length, answers = 4 + i % 8, 1 + i % 4
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Encoded(ids, [False] * (length - answers) + [True] * answers))
    return rows


def character_tokenizer() -> t.PreTrainedTokenizerFast:
    """A token for each character; <s> before every text, as LLaMA's tokenizer does."""
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!#-+*=/'\n$()"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)


def save_encoder(folder) -> None:
    """A BERT with the head of a language model and no pooling layer, and a tokenizer of characters for it, which puts
    marks around a text, and tells two texts apart."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,?"
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    t.PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=names, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    model = t.BertForMaskedLM(t.BertConfig(**{k: v for k, v in ENCODER.items() if k != "num_labels"}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
