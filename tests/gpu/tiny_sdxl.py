"""An SDXL pipeline of random weights and 1.7 MB: every part of the real one, each as small as it gets.

Made from configurations in a second or two, without a download; saved as the real one is, so that the real code loads
it. It draws coloured noise.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 32  # of a text embedding; the UNet sees those of both encoders side by side
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def save_tiny_sdxl(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """The folder. `changes`: parts of the pipeline to put in place of ours."""
    torch.manual_seed(seed)
    words = folder.with_name(f"{folder.name}-words")
    first, size = _tokenizer(words, pad=END)
    second, _ = _tokenizer(words, pad="!")
    parts: dict[str, Any] = {
        "tokenizer": first,
        "tokenizer_2": second,
        "text_encoder": CLIPTextModel(_texts(size, "quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(_texts(size, "gelu")),
        "unet": _unet(),
        "vae": _vae(),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": False,
    }
    StableDiffusionXLPipeline(**(parts | changes)).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path, pad: str) -> tuple[Any, int]:
    """CLIP's way of cutting up text, with the bytes for a vocabulary: one token a letter."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # The bytes that are no letters get letters from above Latin, as in every byte-level vocabulary.
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(0x100 + index) for index in range(len(others))]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), BEGIN, END]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token=pad
    )
    return tokenizer, len(vocabulary)


def _texts(vocabulary: int, activation: str) -> Any:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
    )


def _unet() -> Any:
    return UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,  # six numbers of size, and the pooled text
    )


def _vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),  # four blocks: a cell of the latents is 8x8 pixels
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=0.13025,
        force_upcast=True,
    )
