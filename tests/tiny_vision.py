"""Tiny random vision-language models of each family, with their processors, and pictures for them."""

import io
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
import transformers as t
from PIL import Image
from torch import nn
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor

TOKENS = {
    "image_token": "<image>",
    "pad_of_image": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "begin_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_tag": "<global-img>",
    "end_of_utterance": "<end_of_utterance>",
    "boi_token": "<start_of_image>",
    "soft_token": "<image_soft_token>",
    "eoi_token": "<end_of_image>",
    **{f"row_{i}_col_{j}": f"<row_{i}_col_{j}>" for i in (1, 2, 3, 4) for j in (1, 2, 3, 4)},
}
TEMPLATE = (
    "{%% for m in messages %%}#{{ m['role'] }}\n{%% for p in m['content'] %%}"
    "{%% if p['type'] == 'image' %%}%s{%% else %%}{{ p['text'] }}{%% endif %%}{%% endfor %%}$\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}#assistant\n{%% endif %%}"
)
TEXT = {key: value for key, value in tiny.SIZE.items() if key != "vocab_size"} | {"max_position_embeddings": 512}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
ROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
GRID = [[24, 48], [48, 24], [48, 48]]


def tokenizer_with(image_token: str) -> t.PreTrainedTokenizerFast:
    """A token for each character, and those of images; `image_token` is what the model's image token is called."""
    tokenizer = tiny.character_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(TOKENS.values())})
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": image_token}
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


class NoVideo(BaseVideoProcessor):
    """In place of a video processor, which needs torchvision."""

    def __init__(self):
        pass

    def to_dict(self):
        return {}


def without_video(kind: type) -> type:
    """A processor's class that takes a `NoVideo`."""
    return type(
        kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, argument: type(argument)}
    )


def _ids(tokenizer, **names: str) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _text(tokenizer) -> dict:
    return TEXT | {"vocab_size": len(tokenizer)}


def _llava():
    tokenizer = tokenizer_with("<image>")
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = t.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE % "<image>",
    )
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=t.LlamaConfig(**_text(tokenizer), tie_word_embeddings=False),
        image_token_index=processor.image_token_id,
    )
    return t.LlavaForConditionalGeneration(config), processor


def _llava_next():
    tokenizer = tokenizer_with("<image>")
    images = t.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=GRID
    )
    processor = t.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE % "<image>",
    )
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=t.LlamaConfig(**_text(tokenizer), tie_word_embeddings=False),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=GRID,
    )
    return t.LlavaNextForConditionalGeneration(config), processor


def _qwen(version: str):
    tokenizer = tokenizer_with("<|image_pad|>")
    images = t.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=64 * 64)
    kind = without_video(t.Qwen2VLProcessor if version == "2" else t.Qwen2_5_VLProcessor)
    template = TEMPLATE % "<|vision_start|><|image_pad|><|vision_end|>"
    processor = kind(images, tokenizer, NoVideo(), chat_template=template)
    ids = _ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )
    text = _text(tokenizer) | {"rope_scaling": ROPE}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if version == "2":
        vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        config = t.Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
        return t.Qwen2VLForConditionalGeneration(config), processor
    vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 32}
    vision |= {"fullatt_block_indexes": [1]}
    config = t.Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
    return t.Qwen2_5_VLForConditionalGeneration(config), processor


def _idefics(smol: bool):
    tokenizer = tokenizer_with("<image>")
    images = (SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil)(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    video = (NoVideo(),) if smol else ()
    kind = without_video(t.SmolVLMProcessor) if smol else t.Idefics3Processor
    processor = kind(images, tokenizer, *video, image_seq_len=4, chat_template=TEMPLATE % "<image>")
    settings = {
        "vision_config": VISION | {"image_size": 32},
        "text_config": t.LlamaConfig(**_text(tokenizer), tie_word_embeddings=False),
        "scale_factor": 2,
        "image_token_id": processor.image_token_id,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if smol:
        return t.SmolVLMForConditionalGeneration(t.SmolVLMConfig(**settings)), processor
    return t.Idefics3ForConditionalGeneration(t.Idefics3Config(**settings)), processor


def _gemma3():
    tokenizer = tokenizer_with("<image_soft_token>")
    images = t.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = t.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=TEMPLATE % "<start_of_image>")
    text = t.Gemma3TextConfig(
        **_text(tokenizer), head_dim=8, sliding_window=8, layer_types=tiny.KINDS, query_pre_attn_scalar=8
    )
    ids = _ids(
        tokenizer,
        image_token_index="<image_soft_token>",
        boi_token_index="<start_of_image>",
        eoi_token_index="<end_of_image>",
    )
    vision = t.SiglipVisionConfig(**VISION | {"image_size": 32}, vision_use_head=False)
    config = t.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4, **ids)
    return t.Gemma3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": lambda: _qwen("2"),
    "qwen2_5_vl": lambda: _qwen("2.5"),
    "idefics3": lambda: _idefics(False),
    "smolvlm": lambda: _idefics(True),
    "gemma3": _gemma3,
}
CONNECTORS = {
    "llava": "multi_modal_projector",
    "llava_next": "multi_modal_projector",
    "qwen2_vl": "visual.merger",
    "qwen2_5_vl": "visual.merger",
    "idefics3": "connector",
    "smolvlm": "connector",
    "gemma3": "multi_modal_projector",
}


def build(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, t.ProcessorMixin]:
    """A model of random weights, and its processor."""
    if family == "smolvlm":  # its processor asks for num2words, which it uses for videos
        processing_smolvlm.num2words = str
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model.to(dtype).eval(), processor


def picture(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def png(seed: int, size: tuple[int, int] = (24, 24)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "png")
    return buffer.getvalue()


def save(folder: Path, family: str = "llava") -> Path:
    """A checkpoint with its processor."""
    model, processor = build(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
